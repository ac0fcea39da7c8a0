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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest
from surgery.graph.op import Op, PlanContext, build_op
from surgery.graph.run import Report, RunOptions, RunResult, plan_key, run_op, silent
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.digests import cache_folder

_TOP = ("surgery", "seed", "inputs", "steps", "outputs")
_STEP = ("op", "from", "with", "seed")


@dataclass(frozen=True)
class Step:
    """One operation applied to named inputs or steps."""

    name: str
    op: str
    sources: tuple[str, ...]
    params: Mapping[str, Any]
    seed: int
    line: int


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `steps` are in an order in which they can run."""

    path: Path
    inputs: Mapping[str, str]
    steps: tuple[Step, ...]
    outputs: Mapping[str, str]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file. Raises `UsageError` with the line of the fault, `CheckpointError` if unreadable."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(
            "unreadable", f"{path}: {getattr(err, 'strerror', None) or 'not UTF-8'}", hint="check the path"
        ) from None
    document, lines = _load(text, path)
    if not isinstance(document, dict):
        raise _fault(path, 1, "a recipe is a mapping with steps", hint="start with: surgery: 1")
    _known_keys(document, _TOP, (), lines, path)
    if document.get("surgery") != 1:
        raise _fault(
            path, lines.get(("surgery",), 1), "the first key must be 'surgery: 1'", hint="this is the format's number"
        )
    seed = document.get("seed", 0)
    inputs, steps, outputs = (_mapping(document, k, lines, path) for k in ("inputs", "steps", "outputs"))
    if not steps:
        raise _fault(path, 1, "no steps", hint="add at least one step")
    found = {name: _step(name, body, seed, lines, path) for name, body in steps.items()}
    for name in set(inputs) & set(found):
        raise _fault(
            path, lines[("steps", name)], f"'{name}' is an input and a step", hint="give the step another name"
        )
    for step in found.values():
        for source in step.sources:
            if source not in inputs and source not in found:
                raise _fault(
                    path,
                    step.line,
                    f"step '{step.name}' reads '{source}', which is no input or step",
                    hint=closest(source, [*inputs, *found]),
                )
    for name in outputs:
        if name not in found:
            raise _fault(path, lines[("outputs", name)], f"output '{name}' is no step", hint=closest(name, list(found)))
    return Recipe(path, inputs, _in_order(found, path), outputs)


def run_recipe(
    recipe: Recipe,
    load_op: Callable[[str], Any],
    open_input: Callable[[str], Checkpoint],
    out: Path | None,
    *,
    options: RunOptions,
    report: Report = silent,
) -> dict[str, RunResult]:
    """Run every step; returns the results of the outputs by step name.

    Outputs go to the recipe's paths, or to `out` (below it when there are several); a step that is no output is kept in
    the cache under its key and found there again.
    """
    outputs = dict(recipe.outputs) or {recipe.steps[-1].name: ""}
    made: dict[str, Checkpoint] = {}
    results: dict[str, RunResult] = {}
    for step in recipe.steps:
        op: Op = build_op(load_op(step.op), step.params)
        parents = []
        for source in step.sources:
            if source not in made:
                made[source] = open_input(recipe.inputs[source])
            parents.append(made[source])
        if len(parents) != op.parents:
            raise _fault(
                recipe.path,
                step.line,
                f"step '{step.name}': {step.op} takes {op.parents} checkpoints, not {len(parents)}",
                hint="see its 'from'",
            )
        own = replace(options, seed=step.seed)
        if step.name in outputs:
            target = _target(outputs, step.name, out)
        else:
            key = plan_key(op, op.plan(PlanContext(own.seed, own.offline), *parents), parents, own)
            target, own = cache_folder() / "nodes" / key[:2] / key, replace(own, overwrite=False)
        result = run_op(op, parents, target, options=own, report=report, reuse=True)
        made[step.name] = open_checkpoint(result.path, name=step.name)
        if step.name in outputs:
            results[step.name] = result
    return results


def _target(outputs: Mapping[str, str], name: str, out: Path | None) -> Path | None:
    if out is not None:
        return out if len(outputs) == 1 else out / name
    return Path(outputs[name]) if outputs[name] else None


def _step(name: str, body: Any, seed: int, lines: Mapping[tuple[Any, ...], int], path: Path) -> Step:
    line = lines.get(("steps", name), 1)
    if not isinstance(body, dict) or "op" not in body:
        raise _fault(path, line, f"step '{name}' has no op", hint="write op: graft, or another operation")
    _known_keys(body, _STEP, ("steps", name), lines, path)
    sources = body.get("from", [])
    sources = [sources] if isinstance(sources, str) else sources
    params = body.get("with") or {}
    if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources) or not isinstance(params, dict):
        raise _fault(
            path, line, f"step '{name}': from is a name or a list of names, with is a mapping", hint="see recipes/"
        )
    return Step(name, str(body["op"]), tuple(sources), params, int(body.get("seed", seed)), line)


def _in_order(steps: Mapping[str, Step], path: Path) -> tuple[Step, ...]:
    from graphlib import CycleError, TopologicalSorter

    try:
        order = list(
            TopologicalSorter({n: [s for s in step.sources if s in steps] for n, step in steps.items()}).static_order()
        )
    except CycleError as err:
        raise _fault(
            path,
            steps[err.args[1][0]].line,
            f"steps in a circle: {' -> '.join(err.args[1])}",
            hint="a step cannot need itself",
        ) from None
    return tuple(steps[n] for n in order)


def _mapping(document: Mapping[str, Any], key: str, lines: Mapping[tuple[Any, ...], int], path: Path) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise _fault(path, lines.get((key,), 1), f"{key} must map names to values", hint="see recipes/")
    return value


def _known_keys(
    body: Mapping[str, Any],
    known: tuple[str, ...],
    at: tuple[Any, ...],
    lines: Mapping[tuple[Any, ...], int],
    path: Path,
) -> None:
    for key in body:
        if key not in known:
            raise _fault(path, lines.get((*at, key), 1), f"unknown key '{key}'", hint=closest(str(key), list(known)))


def _fault(path: Path, line: int, what: str, *, hint: str) -> UsageError:
    return UsageError("recipe", f"{path}:{line}: {what}", hint=hint)


def _load(text: str, path: Path) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The document, and the line of every key; a key that stands twice is a fault."""
    import yaml

    lines: dict[tuple[Any, ...], int] = {}

    def walk(node: Any, at: tuple[Any, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in seen and key.value != "<<":
                    raise _fault(path, line, f"'{key.value}' stands twice", hint="keep one")
                seen.add(key.value)
                lines[(*at, key.value)] = line
                walk(value, (*at, key.value))

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        walk(node, ())
        return yaml.safe_load(text), lines
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise _fault(
            path,
            line,
            f"not YAML: {getattr(err, 'problem', None) or 'unreadable'}",
            hint="check indentation and quotes",
        ) from None
