"""Means, intervals and the verdict on an order of rows."""

import pytest

from surgery.evals.ordering import check_order, estimate


def test_the_interval_of_several_values_is_students() -> None:
    got = estimate([1.0, 2.0, 3.0])
    # s = 1, t(0.975; 2) = 4.303, half = 4.303 / sqrt(3).
    assert got.mean == 2.0
    assert got.high - got.mean == pytest.approx(4.303 / 3**0.5)
    assert got.mean - got.low == pytest.approx(got.high - got.mean)
    assert got.values == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("n", [2, 5, 11])
def test_the_factors_are_those_of_scipy(n: int) -> None:
    from scipy import stats

    values = [float(i) for i in range(n)]
    spread = stats.tstd(values) / n**0.5
    assert (estimate(values).high - estimate(values).mean) / spread == pytest.approx(
        stats.t.ppf(0.975, n - 1), abs=6e-4
    )


def test_beyond_ten_degrees_of_freedom_the_interval_errs_on_the_wide_side() -> None:
    from scipy import stats

    values = [float(i % 7) for i in range(30)]
    half = estimate(values).high - estimate(values).mean
    assert half > stats.t.ppf(0.975, 29) * stats.tstd(values) / 30**0.5


def test_one_value_takes_the_interval_it_comes_with_or_none_at_all() -> None:
    assert (estimate([4.0]).low, estimate([4.0]).high) == (4.0, 4.0)
    alone = estimate([4.0], interval=(3.0, 6.0))
    assert (alone.mean, alone.low, alone.high) == (4.0, 3.0, 6.0)


def test_equal_values_have_an_empty_interval() -> None:
    same = estimate([2.0, 2.0, 2.0])
    assert same.low == same.high == 2.0


def test_intervals_that_touch_overlap() -> None:
    left, right = estimate([1.0], interval=(0.0, 2.0)), estimate([3.0], interval=(2.0, 4.0))
    assert left.overlaps(right) and right.overlaps(left)
    inner = estimate([3.0], interval=(2.5, 3.5))
    assert right.overlaps(inner) and inner.overlaps(right)
    assert not left.overlaps(inner)


def test_a_clear_order_holds_and_says_in_how_many_seeds() -> None:
    rows = {"a": estimate([1.0, 1.1, 1.2]), "b": estimate([5.0, 5.1, 5.2])}
    claim = check_order(rows, "a", "b")
    assert (claim["holds"], claim["overlap"], claim["seeds"]) == (True, False, 3)
    assert claim["text"] == "a ≤ b: holds in the mean, 3 of 3 seeds; difference by seed 4 [4, 4]"


def test_an_order_that_fails_is_not_softened() -> None:
    rows = {"a": estimate([5.0, 5.1, 5.2]), "b": estimate([1.0, 1.1, 1.2])}
    claim = check_order(rows, "a", "b")
    assert (claim["holds"], claim["overlap"], claim["seeds"]) == (False, False, 0)
    assert "FAILS" in claim["text"]


def test_overlapping_intervals_leave_the_order_open_whichever_way_the_means_stand() -> None:
    rows = {"a": estimate([1.0, 3.0]), "b": estimate([1.5, 2.0])}
    for pair in (("a", "b"), ("b", "a")):
        claim = check_order(rows, *pair)
        assert claim["overlap"] and "so this order is open; difference by seed" in claim["text"]


def test_equal_means_count_as_in_order() -> None:
    rows = {"a": estimate([1.0]), "b": estimate([1.0])}
    claim = check_order(rows, "a", "b")
    assert claim["holds"] and claim["overlap"] and claim["seeds"] == 1
