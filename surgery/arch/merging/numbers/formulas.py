"""The merge methods that are made in pieces: linear, slerp, task arithmetic, TIES, DARE.

W are inputs, B the base, tau = W - B. Everything is elementwise but a few numbers per tensor (norms and a dot product
for slerp, the k-th largest |tau| for TIES), which take a pass of their own. Sources: Model Soups (2203.05482), Task
Arithmetic (2212.04089), TIES (2306.01708), DARE (2311.03099), and for `compat="paper"` the reference code of "Bring
Reason to Vision" (2505.05464), whose TIES elects unweighted and divides by a count, and whose DARE does not rescale.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import Any

import numpy as np

from surgery.arch.merging.numbers.arithmetic import PIECE, Array, Bits, Sink, Source, working_dtype
from surgery.arch.merging.numbers.lerp import lerped, lerps
from surgery.arch.merging.numbers.sums import weighted_sums
from surgery.store.reader import Reader

WITH_BASE = ("task-arithmetic", "ties", "dare-linear", "dare-ties")
STREAMED = ("linear", "slerp", *WITH_BASE)
_WHOLE = 1 << 24  # elements whose |tau| are sorted at once; beyond, a histogram finds the same number in fixed memory
ROUNDING = 1 << 32  # the stream of random bits that rounding uses; masks use 0, 1, ...


@dataclass(frozen=True)
class Formula:
    """One tensor's merge. `weights` are per input without the base, which comes last among the readers of methods that
    have one. `normalize` divides by the weights that count; `scale` multiplies the summed task vector. `numerics`
    "fast" leaves linear merges to `torch.lerp` where it can."""

    method: str
    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    normalize: bool = True
    scale: float = 1.0
    compat: str = "none"
    rounding: str = "nearest"
    numerics: str = "exact"


Merger = Callable[[int, int], Array]


def stream(formula: Formula, readers: Sequence[Reader], dtype: str, name: str, seed: int) -> Iterator[memoryview]:
    """The merged tensor's bytes as `dtype`, in pieces that are valid until the next one."""
    total = elements(readers[0].shape)
    if formula.numerics == "fast" and lerps(formula.weights, readers, dtype):
        yield from lerped(formula.weights[1], readers, dtype, total, PIECE)
        return
    dither = Bits(seed, ROUNDING) if formula.rounding == "stochastic" else None
    sink = Sink(dtype, name, min(PIECE, max(total, 1)), dither=dither)
    make = merger(formula, readers, seed)
    if formula.method == "linear" and dither is None and {dtype, *(r.dtype for r in readers)} == {"BF16"}:
        for start, count, done in weighted_sums(_shares(formula, np.float32), readers, total):
            for at in range(0, count, PIECE):
                part, first = min(PIECE, count - at), start + at
                yield sink.encode(make(first, part), first) if done is None else done[2 * at : 2 * (at + part)]
        return
    for start in range(0, total, PIECE):
        count = min(PIECE, total - start)
        yield sink.encode(make(start, count), start)


def merger(formula: Formula, readers: Sequence[Reader], seed: int) -> Merger:
    """A function of (first element, count) that returns the merged values before rounding, in an array that the next
    call overwrites. What a method must know of the whole tensor is found here, by passes over the readers."""
    total = elements(readers[0].shape)
    work = working_dtype([r.dtype for r in readers])
    sources = [Source(r, work, min(PIECE, max(total, 1))) for r in readers]
    if formula.method == "linear":
        return _linear(formula, sources, work)
    if formula.method == "slerp":
        return _slerp(formula, sources, total)
    return _task_vectors(formula, sources, total, work, seed)


def elements(shape: Sequence[int]) -> int:
    """How many numbers a tensor of that shape holds."""
    count = 1
    for n in shape:
        count *= n
    return count


def _linear(formula: Formula, sources: Sequence[Source], work: Any) -> Merger:
    """sum_i w_i W_i, each product and sum rounded once."""
    weights = _shares(formula, work)

    def make(start: int, count: int) -> Array:
        out = sources[0].read(start, count)
        np.multiply(out, weights[0], out=out)
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            other = source.read(start, count)
            np.multiply(other, weight, out=other)
            np.add(out, other, out=out)
        return out

    return make


def _shares(formula: Formula, work: Any) -> list[Any]:
    """The weights as numbers of the working dtype; with `normalize`, w_i / sum w."""
    total = sum(formula.weights) if formula.normalize else 1.0
    return [work(w / total) if total != 1.0 else work(w) for w in formula.weights]


def _slerp(formula: Formula, sources: Sequence[Source], total: int) -> Merger:
    """On the arc between a and b, as flat vectors: t = the second weight's share; nearly parallel ones on the line."""
    t = formula.weights[1] / sum(formula.weights)
    a2 = b2 = ab = 0.0
    for start in range(0, total, PIECE):
        a, b = (s.read(start, min(PIECE, total - start)).astype(np.float64) for s in sources)
        a2, b2, ab = a2 + float(a @ a), b2 + float(b @ b), ab + float(a @ b)
    norm_a, norm_b = (sqrt(x) if sqrt(x) > 1e-8 else 1.0 for x in (a2, b2))
    dot = max(-1.0, min(1.0, ab / norm_a / norm_b))
    if abs(dot) > 0.9995:
        share_a, share_b = 1 - t, t
    else:
        angle = acos(dot)
        share_a, share_b = sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)
    return _linear(Formula("linear", (share_a, share_b), normalize=False), sources, sources[0].read(0, 0).dtype.type)


def _task_vectors(formula: Formula, sources: Sequence[Source], total: int, work: Any, seed: int) -> Merger:
    *inputs, base = sources
    paper = formula.compat == "paper"
    ties = formula.method in ("ties", "dare-ties")
    weights = [work(w) for w in formula.weights]
    densities = formula.densities or (1.0,) * len(inputs)
    trims = [
        _Trim(source, base, total, density, least=0 if paper else 1)
        if formula.method == "ties" and density < 1
        else None
        for source, density in zip(inputs, densities, strict=True)
    ]
    masks = [Bits(seed, index) if formula.method.startswith("dare") and d < 1 else None
             for index, d in enumerate(densities)]  # fmt: skip
    sums = work(sum(formula.weights))

    def make(start: int, count: int) -> Array:
        origin = base.read(start, count)
        taus = []
        for index, source in enumerate(inputs):
            tau = source.read(start, count)
            np.subtract(tau, origin, out=tau)
            trim, mask = trims[index], masks[index]
            if trim is not None:
                tau[~trim.kept(np.abs(tau), start)] = 0
            if mask is not None:
                tau[~mask.below(densities[index], start, count)] = 0
                if not paper:
                    np.divide(tau, work(densities[index]), out=tau)
            taus.append(tau)
        if not ties:
            mixed = _weighted_sum(taus, weights)
            if formula.normalize and abs(sums) >= 1e-8:
                np.divide(mixed, sums, out=mixed)
        else:
            mixed = _elected(taus, weights, paper=paper, normalize=formula.normalize)
        if formula.scale != 1.0:
            np.multiply(mixed, work(formula.scale), out=mixed)
        return np.add(origin, mixed, out=mixed)

    return make


def _weighted_sum(taus: Sequence[Array], weights: Sequence[Any]) -> Array:
    """In place, into the first."""
    for tau, weight in zip(taus, weights, strict=True):
        np.multiply(tau, weight, out=tau)
    for tau in taus[1:]:
        np.add(taus[0], tau, out=taus[0])
    return taus[0]


def _elected(taus: Sequence[Array], weights: Sequence[Any], *, paper: bool, normalize: bool) -> Array:
    """Of every element the inputs that agree with the elected sign; a sum of zero elects plus.

    mergekit elects on weighted task vectors and divides by the agreeing weights; the paper's code elects on unweighted
    ones and divides by how many agree.
    """
    if not paper:
        for tau, weight in zip(taus, weights, strict=True):
            np.multiply(tau, weight, out=tau)
    ballot = taus[0].copy()
    for tau in taus[1:]:
        np.add(ballot, tau, out=ballot)
    plus = ballot >= 0
    mixed, divisor = np.zeros_like(ballot), np.zeros_like(ballot)
    for tau, weight in zip(taus, weights, strict=True):
        agree = (tau != 0) & ((tau > 0) == plus)
        np.add(mixed, tau * weight if paper else tau, out=mixed, where=agree)
        np.add(divisor, 1 if paper else weight, out=divisor, where=agree)
    if paper or normalize:
        divisor[divisor == 0] = 1
        np.divide(mixed, divisor, out=mixed)
    return mixed


class _Trim:
    """Which elements of a task vector are among the k largest in size; of equal ones the first in the tensor count."""

    def __init__(self, source: Source, base: Source, total: int, density: float, *, least: int) -> None:
        k = max(least, int(density * total))

        def sizes() -> Iterator[Array]:
            for start in range(0, total, PIECE):
                count = min(PIECE, total - start)
                tau = source.read(start, count)
                np.subtract(tau, base.read(start, count), out=tau)
                yield np.abs(tau, out=tau)

        self._none = k == 0 or total == 0
        if self._none:
            return
        find = _sorted_out if total <= _WHOLE or sizes_are_wide(source) else _by_histogram
        self._limit, larger = find(sizes, total, k)
        self._room = k - larger  # how many elements of exactly the limit are kept
        self._taken: dict[int, int] = {}  # first element of a piece -> how many equal ones stand before it
        self._next = (0, 0)

    def kept(self, sizes: Array, start: int) -> Array:
        """The mask of one piece. Pieces come in order, or are sampled one by one."""
        if self._none:
            return np.zeros(len(sizes), bool)
        keep = sizes > self._limit
        equal = sizes == self._limit
        at, before = self._next
        found = int(equal.sum())
        if start != at:
            before = self._taken.get(start, before if start > at else 0)
        room = max(0, self._room - before)
        if found <= room:
            keep |= equal
        elif room:
            keep[np.flatnonzero(equal)[:room]] = True
        self._next = (start + len(sizes), before + found)
        self._taken[start + len(sizes)] = before + found
        return keep


def sizes_are_wide(source: Source) -> bool:
    """Whether |tau| is float64, whose bits the histogram does not cut."""
    return source.read(0, 0).dtype == np.float64


def _sorted_out(sizes: Callable[[], Iterator[Array]], total: int, k: int) -> tuple[Any, int]:
    """(the k-th largest, how many are larger), by partition of all of them."""
    first = next(sizes())
    every = np.empty(total, first.dtype)
    at = 0
    for piece in sizes():
        every[at : at + len(piece)] = piece
        at += len(piece)
    every.partition(total - k)
    limit = every[total - k]
    return limit, int((every[total - k :] > limit).sum())


def _by_histogram(sizes: Callable[[], Iterator[Array]], total: int, k: int) -> tuple[Any, int]:
    """The same in fixed memory: bits of positive floats are in their order, so two histograms of 16 bits find it."""
    high = np.zeros(1 << 16, np.int64)
    for piece in sizes():
        high += np.bincount(piece.view(np.uint32) >> 16, minlength=1 << 16)
    top, above = _bin(high, k)
    low = np.zeros(1 << 16, np.int64)
    for piece in sizes():
        bits = piece.view(np.uint32)
        low += np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
    bottom, within = _bin(low, k - above)
    return np.array([top << 16 | bottom], np.uint32).view(np.float32)[0], above + within


def _bin(counts: Array, k: int) -> tuple[int, int]:
    """The highest bin at which at least k are counted from the top, and how many lie above it."""
    upwards = np.cumsum(counts[::-1])
    index = int(np.searchsorted(upwards, k))
    return len(counts) - 1 - index, int(upwards[index - 1]) if index else 0
