"""What a mergekit document says about one tensor: gradients, filters and precedence, with mergekit's rules.

A scalar is itself; numbers in a list are a gradient over t in [0, 1]; words in a list are chosen by t; conditions are
tried in order, the first whose filter is absent, `*`, or a substring of the tensor's name counts. Settings are looked
up at the source, the slice, the module and the top; one that resolves to nothing falls through. Standard library only.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.arch.merging.selection import interpolate

Settings = Mapping[str, Any] | None
Validate = Callable[[Any], Any]


@dataclass(frozen=True)
class Source:
    """One input of a slice: `model` is its index, with the index of an adapter where there is one."""

    model: int
    adapter: int | None
    first: int
    last: int  # one past its last layer
    parameters: Settings = None

    @property
    def key(self) -> tuple[int, int | None]:
        """What tells inputs apart."""
        return self.model, self.adapter


@dataclass(frozen=True)
class Slice:
    """Some layers of the output. `base` is the key of the base in this slice."""

    sources: tuple[Source, ...]
    base: tuple[int, int | None] | None
    parameters: Settings = None

    @property
    def count(self) -> int:
        """How many layers it makes."""
        return self.sources[0].last - self.sources[0].first


@dataclass(frozen=True)
class Document:
    """A checked document: every form of models, slices and modules as slices of one module."""

    method: str
    slices: tuple[Slice, ...]
    base: tuple[int, int | None] | None
    module: Settings = None
    top: Settings = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    chat_template: str | None = None
    sliced: bool = False
    ours: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[tuple[int, int | None], ...]:
        """Every input, base included, in the order of the first slice that names it."""
        found = dict.fromkeys(s.key for part in self.slices for s in part.sources)
        for part in self.slices:
            if part.base is not None:
                found.setdefault(part.base)
        return tuple(found)

    def scopes(self, part: Slice, key: tuple[int, int | None] | None) -> Iterable[Settings]:
        """Where a setting is looked up for a tensor of `part`, of the input `key` or of all inputs, nearest first."""
        if key is not None:
            yield from (s.parameters for s in part.sources if s.key == key)
        yield part.parameters
        yield self.module
        yield self.top


def find(name: str, scopes: Iterable[Settings], tensor: str, t: float, validate: Validate) -> Any:
    """The value of a parameter for one tensor; None where nobody gives one."""
    for scope in scopes:
        if scope is not None and name in scope:
            value = evaluate(scope[name], tensor, t, validate)
            if value is not None:
                return value
    return None


def evaluate(setting: Any, tensor: str, t: float, validate: Validate) -> Any:
    """One setting at t for a tensor's name. Raises what `validate` raises."""
    if not isinstance(setting, list):
        return validate(setting)
    if not setting:
        return None
    if all(isinstance(value, bool | int | float | str) for value in setting):
        values = [validate(value) for value in setting]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return validate(interpolate(values, t))
        return values[int(t * (len(values) - 1))]
    for condition in setting:
        wanted = condition.get("filter")
        if wanted is None or wanted == "*" or wanted in tensor:
            return evaluate(condition["value"], tensor, t, validate)
    return None
