"""Where the values of a new tensor come from: drawn, constant, or taken from tensors that exist already.

A source is a small frozen value with three things: `sources`, the names of the tensors that it reads; `random`, whether
it draws numbers; and `evaluate(tensors, generator)`, which computes it. A planner asks `byte_ranges` first: a source
that is nothing but contiguous rows of its inputs can be copied as bytes and never decoded. Nothing here knows any
model; torch is imported only where a value is computed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Source(Protocol):
    """What every source offers; `evaluate` reads only the tensors named in `sources`."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that it reads."""
        ...

    @property
    def random(self) -> bool:
        """Whether it draws."""
        ...

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        """The tensor; from `tensors` by name, and what is random from `generator`."""
        ...


@dataclass(frozen=True)
class Fresh:
    """What the sources that read nothing share; they give float32. `note` says why nothing old was taken."""

    shape: Shape
    note: str = field(default="", kw_only=True)
    sources: ClassVar[tuple[str, ...]] = ()
    random: ClassVar[bool] = False

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        """Every kind of fresh value says how it is made."""
        raise TypeError(f"{type(self).__name__} has no values of its own")


@dataclass(frozen=True)
class Constant(Fresh):
    """`value` everywhere."""

    value: float

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        return torch.full(self.shape, self.value, dtype=torch.float32)


@dataclass(frozen=True)
class Tap(Fresh):
    """A convolution filter that returns its input: 0 except 1 at `position` of the last axis."""

    position: int

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        value = torch.zeros(self.shape, dtype=torch.float32)
        value[..., self.position] = 1.0
        return value


@dataclass(frozen=True)
class Uniform(Fresh):
    """U(-bound, bound). torch draws linear and convolution layers with bound 1/sqrt(fan-in), biases included."""

    bound: float
    random: ClassVar[bool] = True

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        return torch.empty(self.shape, dtype=torch.float32).uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Normal(Fresh):
    """N(0, std²)."""

    std: float
    random: ClassVar[bool] = True

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        return torch.empty(self.shape, dtype=torch.float32).normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class LogRange(Fresh):
    """log(1), log(2), … log(n): the decay rates A of Mamba-2's heads as transformers starts them."""

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        return torch.log(torch.arange(1, self.shape[0] + 1, dtype=torch.float32))


@dataclass(frozen=True)
class TimeStepBias(Fresh):
    """softplus⁻¹ of step sizes drawn log-uniformly from [low, high], at least `floor` (Mamba-2's `dt_bias`)."""

    low: float = 1e-3
    high: float = 0.1
    floor: float = 1e-4
    random: ClassVar[bool] = True

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        exponent = torch.empty(self.shape, dtype=torch.float32).uniform_(
            math.log(self.low), math.log(self.high), generator=generator
        )
        step = exponent.exp().clamp(min=self.floor)
        # softplus⁻¹(s) = log(exp(s) - 1) = s + log(1 - exp(-s)); the second form does not lose digits for small s.
        return step + torch.log(-torch.expm1(-step))


@dataclass(frozen=True)
class Same:
    """The tensor `source`, byte for byte, under the new name."""

    source: str
    random: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        return tensors[self.source]


@dataclass(frozen=True)
class Rows:
    """Rows start..stop-1 of `source`: contiguous bytes."""

    source: str
    start: int
    stop: int
    random: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        return tensors[self.source][self.start : self.stop]


@dataclass(frozen=True)
class Take:
    """The entries `indices` of `source` along `axis`, in the order given."""

    source: str
    axis: int
    indices: tuple[int, ...]
    random: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        return tensors[self.source].index_select(self.axis, torch.tensor(self.indices, dtype=torch.long))


@dataclass(frozen=True)
class Concat:
    """`parts` one after another along `axis`; drawn parts take the dtype of the first part that is copied."""

    parts: tuple[Source, ...]
    axis: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.sources))

    @property
    def random(self) -> bool:
        return any(part.random for part in self.parts)

    def evaluate(self, tensors: "Mapping[str, torch.Tensor]", generator: "torch.Generator") -> "torch.Tensor":
        import torch

        values = [part.evaluate(tensors, generator) for part in self.parts]
        copied = [value.dtype for value, part in zip(values, self.parts, strict=True) if part.sources]
        dtype = copied[0] if copied else torch.float32
        return torch.cat([value.to(dtype) for value in values], dim=self.axis)


def byte_ranges(source: Source) -> tuple[tuple[str, int, int | None], ...] | None:
    """The row ranges (name, start, stop) whose bytes in a row are the tensor; None where it must be computed.

    A stop of None means to the end. Rows are entries of axis 0.
    """
    if isinstance(source, Same):
        return ((source.source, 0, None),)
    if isinstance(source, Rows):
        return ((source.source, source.start, source.stop),)
    if isinstance(source, Concat) and source.axis == 0:
        parts = [byte_ranges(part) for part in source.parts]
        if all(part is not None for part in parts):
            return tuple(piece for part in parts if part is not None for piece in part)
    return None
