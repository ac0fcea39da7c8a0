"""What a recipe says, wherever it was read from: inputs, steps and outputs, and the operations that its steps name.

`recipe_file` and `mergekit_file` read recipes from YAML.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from surgery.errors import UsageError, printable
from surgery.graph.op import Op, build_op, check_parents, op_params
from surgery.graph.recipes.documents import fault


@dataclass(frozen=True)
class Step:
    """One operation applied to named inputs or steps. `lines` say where each of `params` stands in the file. `cache`
    asks for its result to be written and kept, where it could be made on the way; `path` is the file it stands in."""

    name: str
    op: str
    sources: tuple[str, ...]
    params: Mapping[str, Any]
    seed: int
    line: int
    lines: Mapping[str, int] = field(default_factory=dict)
    cache: bool = False
    path: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `steps` are in an order in which they can run."""

    path: Path
    inputs: Mapping[str, str]
    steps: tuple[Step, ...]
    outputs: Mapping[str, str]


def in_order(steps: Mapping[str, Step], path: Path) -> tuple[Step, ...]:
    """The steps, each after those that it reads. Raises `UsageError` where they go in a circle."""
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
                    raise fault(
                        step.path or recipe.path, line, what, hint=f"see surgery {step.op.replace('-', ' ')} --help"
                    )
            ops[step.name] = build_op(kind, values)
        except UsageError as err:
            if err.code == "usage.recipe":
                raise
            # The first key that the operation does not know is what it complained of.
            line = next((at for n, at in step.lines.items() if f"'{n}'" in err.message), step.line)
            raise fault(step.path or recipe.path, line, f"step '{step.name}': {err.message}", hint=err.hint) from None
        try:
            check_parents(kind, len(step.sources))
        except UsageError as err:
            what = f"step '{step.name}': {err.message}"
            raise fault(step.path or recipe.path, step.line, what, hint="name them under 'from'") from None
    return ops


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
        return isinstance(value, str | int | float), str(value)
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
