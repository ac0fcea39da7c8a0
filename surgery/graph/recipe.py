"""A recipe: YAML that names inputs, steps and outputs, checked before anything runs.

    surgery: 1
    seed: 0
    inputs: {base: dit-digits}
    steps:
      out: {op: graft, from: base, with: {replace: [attn=hyena], data: digits}}
    outputs: {out: out/hyena}

Every fault names the file, the line and the nearest known word. yaml is imported when a file is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from surgery.errors import UsageError, closest, printable
from surgery.graph.documents import Lines, fault, load_documents, read_text
from surgery.graph.op import Op, Plan, PlanContext, build_op, check_parents, op_params
from surgery.graph.run import Report, RunOptions, RunResult, plan_key, run_op, silent
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.digests import cache_folder

_TOP = ("surgery", "seed", "inputs", "steps", "outputs")
_STEP = ("op", "from", "with", "seed")


@dataclass(frozen=True)
class Step:
    """One operation applied to named inputs or steps. `lines` say where each of `params` stands in the file."""

    name: str
    op: str
    sources: tuple[str, ...]
    params: Mapping[str, Any]
    seed: int
    line: int
    lines: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `steps` are in an order in which they can run."""

    path: Path
    inputs: Mapping[str, str]
    steps: tuple[Step, ...]
    outputs: Mapping[str, str]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file. Raises `UsageError` with the line of the fault, `CheckpointError` if unreadable."""
    text = read_text(path)
    if "merge_method" in text:
        from surgery.graph.mergekit_file import is_mergekit, parse_mergekit

        if any(is_mergekit(document) for document, _ in load_documents(text, path, several=True)):
            return parse_mergekit(text, path)
    ((document, lines),) = load_documents(text, path, several=False)
    if not isinstance(document, dict):
        raise fault(path, 1, "a recipe is a mapping with steps", hint="start with: surgery: 1")
    _known_keys(document, _TOP, (), lines, path)
    if document.get("surgery") != 1:
        raise fault(
            path, lines.get(("surgery",), 1), "the first key must be 'surgery: 1'", hint="this is the format's number"
        )
    seed = _seed(document, 0, path, lines.get(("seed",), 1))
    inputs, steps, outputs = (_mapping(document, k, lines, path) for k in ("inputs", "steps", "outputs"))
    for key, names in (("inputs", inputs), ("outputs", outputs)):
        for name, value in names.items():
            if not isinstance(value, str) or not value:
                line = lines.get((key, name), 1)
                raise fault(path, line, f"{key}: {name} must be a name or a path", hint="put quotes around it")
    if not steps:
        raise fault(path, 1, "no steps", hint="add at least one step")
    found = {name: _step(name, body, seed, lines, path) for name, body in steps.items()}
    for name in set(inputs) & set(found):
        raise fault(
            path, lines.get(("steps", name), 1), f"'{name}' is an input and a step", hint="give the step another name"
        )
    for step in found.values():
        for source in step.sources:
            if source not in inputs and source not in found:
                raise fault(
                    path,
                    step.line,
                    f"step '{step.name}' reads '{source}', which is no input or step",
                    hint=closest(source, [*inputs, *found]),
                )
    for name in outputs:
        if name not in found:
            raise fault(
                path, lines.get(("outputs", name), 1), f"output '{name}' is no step", hint=closest(name, list(found))
            )
        if list(outputs.values()).count(outputs[name]) > 1:
            line = lines.get(("outputs", name), 1)
            raise fault(path, line, f"two outputs are called {outputs[name]}", hint="give each its own folder")
    return Recipe(path, inputs, in_order(found, path), outputs)


def build_steps(recipe: Recipe, load_op: Callable[[str], Any]) -> dict[str, Op]:
    """The operation of every step, by step name. Raises `UsageError` with the line of a fault: an unknown operation or
    parameter, a value of another type, a wrong number of sources."""
    ops: dict[str, Op] = {}
    for step in recipe.steps:
        try:
            kind = load_op(step.op)
            known = op_params(kind)
            values = {}
            for name, value in step.params.items():
                field_name = name if name in known else f"{name}_"
                hint = known[field_name][0] if field_name in known else object
                fits, values[name] = _typed(value, hint)
                if not fits:
                    line = step.lines.get(name, step.line)
                    given = printable(repr(value), limit=60)
                    what = f"step '{step.name}': {name} must be {_type_words(hint)}, not {given}"
                    raise fault(recipe.path, line, what, hint=f"see surgery {step.op.replace('-', ' ')} --help")
            ops[step.name] = build_op(kind, values)
        except UsageError as err:
            if err.code == "usage.recipe":
                raise
            # The first key that the operation does not know is what it complained of.
            line = next((at for n, at in step.lines.items() if f"'{n}'" in err.message), step.line)
            raise fault(recipe.path, line, f"step '{step.name}': {err.message}", hint=err.hint) from None
        try:
            check_parents(kind, len(step.sources))
        except UsageError as err:
            what = f"step '{step.name}': {err.message}"
            raise fault(recipe.path, step.line, what, hint="name them under 'from'") from None
    return ops


def plan_recipe(
    recipe: Recipe, load_op: Callable[[str], Any], open_input: Callable[[str], Checkpoint], *, options: RunOptions
) -> list[tuple[Step, Op, Plan | None]]:
    """Every step with its plan; None where a plan needs the result of an earlier step. Nothing is written."""
    ops = build_steps(recipe, load_op)
    opened: dict[str, Checkpoint] = {}
    planned: list[tuple[Step, Op, Plan | None]] = []
    for step in recipe.steps:
        plan = None
        if all(source in recipe.inputs for source in step.sources):
            for source in step.sources:
                opened[source] = opened.get(source) or open_input(recipe.inputs[source])
            parents = [opened[source] for source in step.sources]
            plan = ops[step.name].plan(PlanContext(step.seed, options.offline), *parents)
        planned.append((step, ops[step.name], plan))
    return planned


def run_recipe(
    recipe: Recipe,
    load_op: Callable[[str], Any],
    open_input: Callable[[str], Checkpoint],
    out: Path | None,
    *,
    options: RunOptions,
    report: Report = silent,
    notice: Callable[[Step, Plan], None] = lambda step, plan: None,
) -> dict[str, RunResult]:
    """Run every step; returns the results of the outputs by step name.

    Outputs go to the recipe's paths, or to `out` (below it when there are several); a step that is no output is kept in
    the cache under its key and found there again. `notice` sees the plan of each step that has work to do.
    """
    ops = build_steps(recipe, load_op)
    outputs = dict(recipe.outputs) or {recipe.steps[-1].name: ""}
    made: dict[str, Checkpoint] = {}
    results: dict[str, RunResult] = {}
    for step in recipe.steps:
        op = ops[step.name]
        parents = []
        for source in step.sources:
            if source not in made:
                made[source] = open_input(recipe.inputs[source])
            parents.append(made[source])
        own = replace(options, seed=step.seed)
        if step.name in outputs:
            target = _target(outputs, step.name, out)
        else:
            key = plan_key(op, op.plan(PlanContext(own.seed, own.offline), *parents), parents, own)
            target, own = cache_folder() / "nodes" / key[:2] / key, replace(own, overwrite=False)
        result = run_op(op, parents, target, options=own, report=report, notice=partial(notice, step), reuse=True)
        made[step.name] = open_checkpoint(result.path, name=step.name)
        if step.name in outputs:
            results[step.name] = result
    return results


def _target(outputs: Mapping[str, str], name: str, out: Path | None) -> Path | None:
    if out is not None:
        return out if len(outputs) == 1 else out / name
    return Path(outputs[name]) if outputs[name] else None


def _step(name: str, body: Any, seed: int, lines: Lines, path: Path) -> Step:
    line = lines.get(("steps", name), 1)
    if not isinstance(body, dict) or "op" not in body:
        raise fault(path, line, f"step '{name}' has no op", hint="write op: graft, or another operation")
    _known_keys(body, _STEP, ("steps", name), lines, path)
    sources = body.get("from", [])
    sources = [sources] if isinstance(sources, str) else sources
    params = body.get("with") or {}
    if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources) or not isinstance(params, dict):
        raise fault(
            path, line, f"step '{name}': from is a name or a list of names, with is a mapping", hint="see recipes/"
        )
    if not isinstance(body["op"], str):
        raise fault(path, lines.get(("steps", name, "op"), line), f"step '{name}': op is no name", hint="op: graft")
    if not all(isinstance(key, str) for key in params):
        raise fault(path, line, f"step '{name}': with has a key that is no name", hint="put quotes around it")
    at = {key: lines.get(("steps", name, "with", key), line) for key in params}
    own = _seed(body, seed, path, lines.get(("steps", name, "seed"), line))
    return Step(name, body["op"], tuple(sources), params, own, line, at)


def _seed(body: Mapping[str, Any], default: int, path: Path, line: int) -> int:
    seed = body.get("seed", default)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise fault(path, line, f"seed must be a whole number, not {printable(repr(seed), limit=60)}", hint="seed: 0")
    return seed


def _typed(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a YAML value can be the parameter of type `hint`, and the value as such.

    YAML reads 1e-4 as a word and 3 as a number whatever they are for; a single word may stand for a list of one.
    """
    if hint is object:
        return True, value  # not a parameter: the operation says so itself
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        typed = [_typed(item, get_args(hint)[0]) for item in items]
        return all(fits for fits, _ in typed), tuple(item for _, item in typed)
    if NoneType in get_args(hint):
        (hint,) = (a for a in get_args(hint) if a is not NoneType)
        if value is None:
            return True, None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool, value
    if hint is str:
        return isinstance(value, str | int), str(value)
    if hint is float:
        try:
            return isinstance(value, int | float | str), float(value)
        except (TypeError, ValueError):
            return False, value
    return isinstance(value, hint), value


def _type_words(hint: Any) -> str:
    kinds = [hint, *get_args(hint)]
    many = get_origin(hint) is tuple
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    found = next((words[k] for k in kinds if k in words), "of another type")
    return f"a list, each {found}" if many else found


def in_order(steps: Mapping[str, Step], path: Path) -> tuple[Step, ...]:
    from graphlib import CycleError, TopologicalSorter

    try:
        order = list(
            TopologicalSorter({n: [s for s in step.sources if s in steps] for n, step in steps.items()}).static_order()
        )
    except CycleError as err:
        raise fault(
            path,
            steps[err.args[1][0]].line,
            f"steps in a circle: {' -> '.join(err.args[1])}",
            hint="a step cannot need itself",
        ) from None
    return tuple(steps[n] for n in order)


def _mapping(document: Mapping[str, Any], key: str, lines: Lines, path: Path) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise fault(path, lines.get((key,), 1), f"{key} must map names to values", hint="see recipes/")
    return value


def _known_keys(
    body: Mapping[str, Any],
    known: tuple[str, ...],
    at: tuple[Any, ...],
    lines: Lines,
    path: Path,
) -> None:
    for key in body:
        if key not in known:
            raise fault(path, lines.get((*at, key), 1), f"unknown key '{key}'", hint=closest(str(key), list(known)))
