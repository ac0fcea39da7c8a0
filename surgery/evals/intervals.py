"""How sure a measured share or difference is: Wilson's interval, McNemar's exact test, paired intervals.

Pure functions. Two models that answered the same questions are compared question by question: what they share cancels,
so far smaller differences show than by comparing two scores.
"""

import math
from collections.abc import Callable, Sequence

from surgery.errors import UsageError

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `n` (Wilson 1927): inside [0, 1], and honest for few items.

    Without items nothing is known: (0, 1). Raises UsageError unless 0 <= right <= n.
    """
    if not 0 <= right <= n:
        raise UsageError("interval", f"{right} of {n} is no share", hint="count each item once")
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    return low, 1.0 if right == n else min(1.0, middle + half)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: how likely are flips as uneven as `lost` against `gained` if each flip were
    a fair coin. 1 without flips; computed in whole numbers, so no count is too large."""
    if lost < 0 or gained < 0:
        raise UsageError("interval", f"{lost} and {gained} are no counts", hint="count flips in both directions")
    n = lost + gained
    term = tail = 1
    for k in range(min(lost, gained)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def paired_score(lost: int, gained: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a difference of two shares of the same `n` items, (gained - lost) / n (Tango 1998).

    It inverts the score test, so it has a width even when nothing flipped, where a bootstrap has none. Without items
    (-1, 1). Raises UsageError for counts that do not fit.
    """
    if lost < 0 or gained < 0 or lost + gained > n:
        raise UsageError("interval", f"{lost} and {gained} flips of {n} do not fit", hint="count each item once")
    if n == 0:
        return -1.0, 1.0

    def score(delta: float) -> float:
        """The test's statistic of the difference `delta`; it falls as delta grows."""
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)  # the restricted estimate of the share lost
        variance = n * (2 * q + delta * (1 - delta))
        gap = gained - lost - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    estimate = (gained - lost) / n
    low = -1.0 if score(-1.0) <= _Z else _root(lambda d: score(d) - _Z, -1.0, estimate)
    high = 1.0 if score(1.0) >= -_Z else _root(lambda d: score(d) + _Z, estimate, 1.0)
    return low, high


def paired_bootstrap(
    differences: Sequence[float], *, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of the mean of paired differences, items drawn with replacement.

    Bit-equal for the same seed and numpy. Raises UsageError without items or with values that are not finite.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise UsageError("interval", "a bootstrap needs a list of finite differences", hint="see which items failed")
    # A mean depends only on how often each value is drawn: for few distinct values, such as -1, 0, 1, one multinomial
    # draw a sample is the same distribution at a small part of the cost.
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    if len(distinct) <= 64:
        means = rng.multinomial(len(values), counts / len(values), size=samples) @ distinct / len(values)
    else:
        means = np.empty(samples)
        step = max(1, 4_000_000 // len(values))
        for start in range(0, samples, step):
            stop = min(samples, start + step)
            means[start:stop] = values[rng.integers(len(values), size=(stop - start, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _root(function: Callable[[float], float], left: float, right: float) -> float:
    """Where a falling function crosses zero between two ends, by halving."""
    for _ in range(60):
        middle = (left + right) / 2
        if function(middle) > 0:
            left = middle
        else:
            right = middle
    return (left + right) / 2
