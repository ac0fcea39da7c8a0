"""Whether rows of a comparison stand in the order that a paper found: means, intervals, and what overlaps.

Pure functions on numbers; a claim holds, fails, or is left open where the intervals overlap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# 97.5 % points of Student's t for 1 to 10 degrees of freedom; the last serves more, on the safe side.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; `values` by seed."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals share a value."""
        return self.low <= other.high and other.low <= self.high


def estimate(values: Sequence[float], *, interval: tuple[float, float] | None = None) -> Estimate:
    """Mean and Student's 95 % interval of values from independent seeds; one value takes the given `interval`."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        low, high = interval or (mean, mean)
        return Estimate(mean, low, high, tuple(values))
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = _T[min(len(values) - 2, len(_T) - 1)] * spread / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))


def check_order(rows: Mapping[str, Estimate], better: str, worse: str) -> dict[str, Any]:
    """The claim that `better` is at most `worse` (smaller is better): in the means, in how many seeds, and whether the
    intervals overlap, in which case the order of the means is no finding by itself. With several seeds the text also
    gives the difference seed by seed, whose interval leaves out what a seed does to all rows alike."""
    one, two = rows[better], rows[worse]
    seeds = sum(a <= b for a, b in zip(one.values, two.values, strict=True))
    overlap = one.overlaps(two)
    holds = one.mean <= two.mean
    word = "holds" if holds else "FAILS"
    text = f"{better} ≤ {worse}: {word} in the mean, {seeds} of {len(one.values)} seeds"
    if overlap:
        text += "; the intervals overlap, so this order is open"
    claim = {"better": better, "worse": worse, "holds": holds, "seeds": seeds, "overlap": overlap}
    if len(one.values) > 1:
        paired = estimate([b - a for a, b in zip(one.values, two.values, strict=True)])
        text += f"; difference by seed {paired.mean:.2g} [{paired.low:.2g}, {paired.high:.2g}]"
        claim["difference"] = [paired.mean, paired.low, paired.high]
    return {**claim, "text": text}
