"""Intervals and tests against naive definitions, and the noise floors that the literature quotes."""

import math
from fractions import Fraction

import numpy as np
import pytest

from surgery.errors import UsageError
from surgery.evals.intervals import mcnemar, paired_bootstrap, paired_score, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 1000), (511, 540), (1, 1)])
def test_wilson_ends_are_where_the_score_test_just_rejects(right: int, n: int) -> None:
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(Z, rel=1e-9)


def test_wilson_knows_the_published_example() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0.0, 1.0)


def exact(lost: int, gained: int) -> Fraction:
    """Two-sided p by adding up every outcome that is at most as likely."""
    n = lost + gained
    mine = math.comb(n, lost)
    return Fraction(sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= mine), 2**n)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 3), (1, 9), (10, 25), (25, 10), (400, 520)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    assert mcnemar(lost, gained) == pytest.approx(float(exact(lost, gained)), rel=1e-12)


def test_mcnemar_counts_without_overflow() -> None:
    assert 0 < mcnemar(4_000, 4_400) < 1e-4
    assert mcnemar(0, 5_000) == 0.0


def restricted_variance(lost: int, gained: int, n: int, delta: float) -> float:
    """n times the variance of (gained - lost)/n at difference delta, by trying every share lost that is allowed."""
    grid = np.linspace(max(0.0, -delta), (1 - delta) / 2, 200_001)[1:-1]
    rest = n - lost - gained
    likelihood = lost * np.log(grid) + gained * np.log(grid + delta) + rest * np.log(1 - 2 * grid - delta)
    q = grid[np.argmax(np.where(np.isfinite(likelihood), likelihood, -np.inf))]
    return n * (2 * q + delta * (1 - delta))


@pytest.mark.parametrize(("lost", "gained", "n"), [(3, 9, 40), (12, 2, 50), (1, 1, 30), (20, 31, 400)])
def test_tango_ends_are_where_the_restricted_score_test_just_rejects(lost: int, gained: int, n: int) -> None:
    low, high = paired_score(lost, gained, n)
    assert low < (gained - lost) / n < high
    for end in (low, high):
        statistic = abs(gained - lost - n * end) / math.sqrt(restricted_variance(lost, gained, n, end))
        assert statistic == pytest.approx(Z, rel=1e-3)


def test_tango_has_a_width_without_flips_and_mirrors() -> None:
    low, high = paired_score(0, 0, 44)
    assert (-low, high) == pytest.approx((Z * Z / (44 + Z * Z),) * 2, rel=1e-6)  # closed form of that case
    assert paired_score(9, 3, 40) == pytest.approx(tuple(-x for x in reversed(paired_score(3, 9, 40))))
    assert paired_score(0, 0, 0) == (-1.0, 1.0)
    assert paired_score(0, 5, 5)[1] == 1.0 and paired_score(5, 0, 5)[0] == -1.0


def test_tango_covers_the_truth_19_times_of_20() -> None:
    rng = np.random.default_rng(0)
    inside, trials = 0, 600
    for _ in range(trials):
        lost, gained, _ = rng.multinomial(60, [0.05, 0.15, 0.8])
        low, high = paired_score(int(lost), int(gained), 60)
        inside += low <= 0.10 <= high
    assert 0.92 < inside / trials < 0.98


@pytest.mark.parametrize("many", [False, True])
def test_the_bootstrap_is_that_of_drawing_items(many: bool) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=150) if many else rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=150)
    naive = [values[rng.integers(150, size=150)].mean() for _ in range(4000)]
    wanted = np.quantile(naive, [0.025, 0.975])
    assert paired_bootstrap(values.tolist()) == pytest.approx(tuple(wanted), abs=0.02)
    assert paired_bootstrap(values.tolist()) == paired_bootstrap(values.tolist())
    assert paired_bootstrap(values.tolist(), seed=1) != paired_bootstrap(values.tolist())


def test_wrong_counts_are_refused() -> None:
    for call in (
        lambda: wilson(3, 2),
        lambda: mcnemar(-1, 2),
        lambda: paired_score(3, 3, 5),
        lambda: paired_bootstrap([]),
    ):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (37, 1000), (511, 540), (2500, 5010)])
def test_wilson_and_mcnemar_are_those_of_scipy(right: int, n: int) -> None:
    from scipy.stats import binomtest

    found = binomtest(right, n)
    interval = found.proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert mcnemar(right, n - right) == pytest.approx(found.pvalue, rel=1e-9, abs=1e-300)


def test_the_bootstrap_is_that_of_scipy_within_its_noise() -> None:
    from scipy.stats import bootstrap

    differences = [1.0] * 20 + [-1.0] * 5 + [0.0] * 75
    theirs = bootstrap((differences,), np.mean, method="percentile", n_resamples=10_000, random_state=1)
    mine = paired_bootstrap(differences)
    assert mine == pytest.approx(tuple(theirs.confidence_interval), abs=0.011)  # one item in a hundred
