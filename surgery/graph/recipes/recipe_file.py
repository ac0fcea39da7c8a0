"""A recipe: YAML that names inputs, steps and outputs, checked before anything runs.

    surgery: 1
    seed: 0
    inputs: {base: dit-digits}
    steps:
      out: {op: graft, from: base, with: {replace: [attn=hyena], data: digits}}
    outputs: {out: out/hyena}

Every fault names the file, the line and the nearest known word. yaml is imported when a file is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.errors import UsageError, closest, printable
from surgery.graph.recipes.documents import Lines, fault, load_documents, read_text
from surgery.graph.recipes.mergekit_file import is_mergekit, parse_mergekit
from surgery.graph.recipes.recipe import Recipe, Step, in_order
from surgery.graph.recipes.words import Words, change, change_step

_TOP = ("surgery", "include", "seed", "inputs", "steps", "outputs")
_STEP = ("op", "from", "with", "seed", "cache")


def read_recipe(path: Path, *, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file with what it includes. `changes` are "key=value" as of --set. Raises `UsageError`
    with the line of the fault, `CheckpointError` if unreadable."""
    text = read_text(path)
    if "merge_method" in text and any(map(is_mergekit, (d for d, _ in load_documents(text, path, several=True)))):
        if changes:
            raise UsageError("set", f"--set {changes[0]}: {path} is mergekit's", hint="edit the file")
        return parse_mergekit(text, path)
    found = _gather(path, text, changes, None, ())
    if not found.steps:
        raise fault(path, 1, "no steps", hint="add at least one step")
    for name in set(found.inputs) & set(found.steps):
        raise fault(*found.where["steps", name], f"'{name}' is an input and a step", hint="give the step another name")
    for step in found.steps.values():
        for source in step.sources:
            if source not in found.inputs and source not in found.steps:
                raise fault(
                    step.path or path,
                    step.line,
                    f"step '{step.name}' reads '{source}', which is no input or step",
                    hint=closest(source, [*found.inputs, *found.steps]),
                )
    for name, place in found.outputs.items():
        if name not in found.steps:
            what = f"output '{name}' is no step"
            raise fault(*found.where["outputs", name], what, hint=closest(name, list(found.steps)))
        if list(found.outputs.values()).count(place) > 1:
            what = f"two outputs are called {place}"
            raise fault(*found.where["outputs", name], what, hint="give each its own folder")
    return Recipe(path, found.inputs, in_order(found.steps, path), found.outputs)


@dataclass
class _Gathered:
    """What a file and those that it includes say; `where` is the file and line of each name."""

    inputs: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    where: dict[tuple[str, str], tuple[Path, int]] = field(default_factory=dict)


def _gather(
    path: Path, text: str, changes: Sequence[str], outer_seed: int | None, opened: tuple[Path, ...]
) -> _Gathered:
    """One file on top of those that it includes; a step, input or output that stands in both is this file's. The seed
    of the outermost file that has one holds for all."""
    ((document, lines),) = load_documents(text, path, several=False)
    if not isinstance(document, dict):
        raise fault(path, 1, "a recipe is a mapping with steps", hint="start with: surgery: 1")
    _known_keys(document, _TOP, (), lines, path)
    if document.get("surgery") != 1:
        raise fault(
            path, lines.get(("surgery",), 1), "the first key must be 'surgery: 1'", hint="this is the format's number"
        )
    found = _Gathered()
    own_seed = document.get("seed") if outer_seed is None else outer_seed
    for include in _includes(document, lines, path):
        inner = path.parent / include
        line = lines.get(("include",), 1)
        if inner.resolve() in (path.resolve(), *(p.resolve() for p in opened)):
            raise fault(path, line, f"{include} includes itself", hint="a file cannot stand inside itself")
        seed = own_seed if isinstance(own_seed, int) and not isinstance(own_seed, bool) else None
        part = _gather(inner, read_text(inner), (), seed, (*opened, path))
        for mine, theirs in (
            (found.inputs, part.inputs),
            (found.steps, part.steps),
            (found.outputs, part.outputs),
            (found.where, part.where),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
    for text_of_change in changes:
        change(document, text_of_change, list(found.steps))
    seed = _seed(document, 0, path, lines.get(("seed",), 1)) if outer_seed is None else outer_seed
    inputs, steps, outputs = (_mapping(document, k, lines, path) for k in ("inputs", "steps", "outputs"))
    if changes:
        found.steps = {n: _changed(step, changes) for n, step in found.steps.items()}
    for key, names in (("inputs", inputs), ("outputs", outputs)):
        for name, value in names.items():
            line = lines.get((key, name), 1)
            if not isinstance(value, str) or not value:
                raise fault(path, line, f"{key}: {name} must be a name or a path", hint="put quotes around it")
            found.where[key, name] = (path, line)
    found.inputs |= inputs
    words = Words(path, lines, found.inputs)
    found.inputs |= {n: words.filled(v, ("inputs", n), own=n) for n, v in inputs.items()}
    found.outputs |= {n: words.filled(v, ("outputs", n)) for n, v in outputs.items()}
    for name, body in steps.items():
        found.steps[name] = _step(name, body, seed, lines, path, words)
        found.where["steps", name] = (path, found.steps[name].line)
    return found


def _includes(document: Mapping[str, Any], lines: Lines, path: Path) -> list[str]:
    value = document.get("include", [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise fault(
            path, lines.get(("include",), 1), "include must be a file or a list of files", hint="include: a.yaml"
        )
    return value


def _changed(step: Step, changes: Sequence[str]) -> Step:
    """A step of an included file with what --set says of it."""
    body: dict[str, Any] = {"with": dict(step.params), "seed": step.seed}
    for text in changes:
        change_step(body, step.name, text)
    return replace(step, params=body["with"], seed=body["seed"])


def _step(name: str, body: Any, seed: int, lines: Lines, path: Path, words: Words) -> Step:
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
    params = {key: words.filled(value, ("steps", name, "with", key)) for key, value in params.items()}
    at = {key: lines.get(("steps", name, "with", key), line) for key in params}
    own = _seed(body, seed, path, lines.get(("steps", name, "seed"), line))
    kept = body.get("cache", False)
    if not isinstance(kept, bool):
        raise fault(path, lines.get(("steps", name, "cache"), line), "cache must be true or false", hint="cache: true")
    return Step(name, body["op"], tuple(sources), params, own, line, at, kept, path)


def _seed(body: Mapping[str, Any], default: int, path: Path, line: int) -> int:
    seed = body.get("seed", default)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise fault(path, line, f"seed must be a whole number, not {printable(repr(seed), limit=60)}", hint="seed: 0")
    return seed


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
