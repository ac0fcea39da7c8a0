"""How much of a merge arrives: sampled, before anything is written.

A merge that adds a tenth of a small difference changes few of the values that bfloat16 can hold. Of each tensor four
stretches of 2048 elements, laid end to end, are merged as they will be; tensors of up to that many in all are measured
whole. Sums are float64. Methods that look at a whole tensor (slerp's angle, TIES' threshold) see the sample instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np

from surgery.arch.merging.numbers.arithmetic import SIZES, Bits, Sink, Source
from surgery.arch.merging.numbers.formulas import Formula, elements, merger
from surgery.store.reader import MemoryReader, Reader

WINDOW = 1 << 11
WINDOWS = 4
LITTLE = 0.8  # effective transfer below which a merge is warned of


class Sample:
    """Stretches of another reader's tensor, end to end, as a flat tensor of their own."""

    def __init__(self, reader: Reader, stretches: Sequence[tuple[int, int]], size: int) -> None:
        self.name, self.dtype, self.shape = reader.name, reader.dtype, (sum(count for _, count in stretches),)
        self._reader = reader
        self._stretches = [(start * size, count * size) for start, count in stretches]

    def into(self, view: memoryview, start: int) -> None:
        for first, count in self._stretches:
            if start < count and len(view):
                part = view[: count - start]
                self._reader.into(part, first + start)
                view, start = view[len(part) :], start + len(part)
            start -= count


@dataclass
class Sums:
    """Running sums over elements of host h, donor d, merged value and stored value."""

    elements: int = 0
    changed: int = 0
    hh: float = 0.0
    dd: float = 0.0
    hd: float = 0.0
    apart: float = 0.0  # |h - d|^2
    intended: float = 0.0  # |merged - h|^2 before rounding
    arrived: float = 0.0  # <stored - h, merged - h>
    tensors: int = 0

    def add(self, h: Any, d: Any, merged: Any, stored: Any) -> None:
        """One stretch of all four, flat and in float64."""
        wish, change = merged - h, stored - h
        self.elements += len(h)
        self.changed += int(np.count_nonzero(change))
        self.hh, self.dd, self.hd = self.hh + float(h @ h), self.dd + float(d @ d), self.hd + float(h @ d)
        self.apart += float((h - d) @ (h - d))
        self.intended += float(wish @ wish)
        self.arrived += float(change @ wish)

    def row(self, label: int | str) -> dict[str, Any]:
        """As JSON values, rounded to six digits; None where there is nothing to divide by, or a value is not finite."""
        return {
            "layer": label,
            "tensors": self.tensors,
            "relative": ratio(sqrt(self.apart), sqrt(self.hh)),
            "cosine": ratio(self.hd, sqrt(self.hh) * sqrt(self.dd)),
            "changed": ratio(self.changed, self.elements),
            "transfer": ratio(self.arrived, self.intended),
        }


def windows(total: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the stretches that are looked at."""
    if total <= WINDOW * WINDOWS:
        if total:
            yield 0, total
        return
    for index in range(WINDOWS):
        # Starts are multiples of 16, the elements of one step of the random counter.
        yield (total - WINDOW) * index // (WINDOWS - 1) // 16 * 16, WINDOW


Merge = Callable[[Sequence[Reader], int], Any]  # (inputs, elements) -> merged values before rounding


def measure_tensor(
    sums: Sums,
    merge: Merge,
    readers: Sequence[Reader],
    dtype: str,
    name: str,
    *,
    pair: tuple[int, int] = (0, 1),
    dither: Bits | None = None,
) -> None:
    """Add one tensor; `pair` says which readers are host and donor, `dither` are the bits of stochastic rounding."""
    sums.tensors += 1
    stretches = list(windows(elements(readers[0].shape)))
    count = sum(c for _, c in stretches)
    if not count:
        return
    views = [Sample(r, stretches, SIZES[r.dtype]) for r in readers]
    h, d = (Source(views[i], np.float64, count).read(0, count).copy() for i in pair)
    merged = np.asarray(merge(views, count), np.float64).copy()
    sums.add(h, d, merged, _stored(merged, dtype, name, dither))


def by_formula(formula: Formula, seed: int) -> Merge:
    """A formula as it is measured."""
    return lambda readers, count: merger(formula, readers, seed)(0, count)


def _stored(values: Any, dtype: str, name: str, dither: Bits | None) -> Any:
    """What `values` are after being stored as `dtype`."""
    count = len(values)
    work = np.float64 if dtype == "F64" else np.float32
    data = bytes(Sink(dtype, name, count, dither=dither).encode(values.astype(work), 0))
    reader = MemoryReader(name, dtype, (count,), memoryview(data))
    return Source(reader, np.float64, count).read(0, count)


def ratio(over: float, under: float) -> float | None:
    """`over` / `under` to six digits; None where that is no finite number."""
    return float(f"{over / under:.6g}") if under and isfinite(over / under) else None
