"""The exact tuner against brute force, and the properties that a tuner of thresholds must have."""

import random
from collections.abc import Sequence

import pytest

from surgery.errors import UsageError
from surgery.evals.spatial.tuning import Choice, Trial, answers_right, cross_fit, fixed, report, score, search

ALPHAS = (0.5, 1.0, 1.5, 2.0)


def trials(n: int, seed: int, *, digits: int = 2, alphas: Sequence[float] = ALPHAS) -> list[Trial]:
    """Random items; rounded confidences repeat."""
    draw = random.Random(seed)
    golds = ["left", "right", "on", "under"]
    return [
        Trial(
            str(i),
            round(draw.random(), digits),
            tuple(draw.random() < 0.5 for _ in alphas),
            golds[draw.randrange(4) if draw.random() < 0.5 else 0],
            f"set{i // 4}" if draw.random() < 0.9 else "",
        )
        for i in range(n)
    ]


def brute(rows: Sequence[Trial], alphas: Sequence[float], objective: str) -> float:
    """Every pair of alphas at every threshold, counted out."""
    thresholds = [0.0, *sorted({t.confidence for t in rows}), 1.01]
    return max(
        score(rows, answers_right(rows, alphas, Choice(a, b, beta, 0.0)), objective)
        for a in alphas
        for b in alphas
        for beta in thresholds
    )


@pytest.mark.parametrize("objective", ["accuracy", "balanced", "groups"])
def test_the_search_finds_what_brute_force_finds(objective: str) -> None:
    for seed in range(25):
        rows = trials(3 + seed, seed)
        found = search(rows, ALPHAS, objective)
        assert found.score == pytest.approx(brute(rows, ALPHAS, objective), abs=1e-9)
        # The numbers that it gives reach the value that it claims.
        assert score(rows, answers_right(rows, ALPHAS, found), objective) == pytest.approx(found.score, abs=1e-9)
        assert 0 <= found.beta <= 1.01


def test_balanced_is_the_mean_of_recalls() -> None:
    rows = [Trial("a", 0.1, (True,), "left"), Trial("b", 0.2, (True,), "left"), Trial("c", 0.3, (False,), "right")]
    assert score(rows, [True, True, False], "balanced") == pytest.approx(0.5)
    assert score(rows, [True, False, True], "balanced") == pytest.approx(0.75)
    assert score(rows, [True, True, False]) == pytest.approx(2 / 3)
    grouped = [Trial("a", 0.1, (True,), "left", "g"), Trial("b", 0.2, (True,), "left", "g"), Trial("c", 0.3, (True,))]
    assert score(grouped, [True, False, True], "groups") == pytest.approx(0.5)


def test_shifting_confidences_moves_the_threshold_and_not_the_partition() -> None:
    for seed in range(10):
        rows = [t for t in trials(40, seed, digits=6) if 0.2 < t.confidence < 0.6]
        moved = [Trial(t.id, t.confidence + 0.25, t.right, t.gold, t.group) for t in rows]
        a, b = search(rows, ALPHAS), search(moved, ALPHAS)
        assert (a.alpha1, a.alpha2, a.score) == (b.alpha1, b.alpha2, b.score)
        inside = min(t.confidence for t in rows) < a.beta < max(t.confidence for t in rows)
        if inside and min(t.confidence for t in moved) < b.beta < max(t.confidence for t in moved):
            assert answers_right(rows, ALPHAS, a) == answers_right(moved, ALPHAS, b)


def test_where_one_alpha_is_right_for_the_unsure_half_the_threshold_separates_the_halves() -> None:
    unsure = [Trial(f"u{i}", 0.1 + i / 100, (True, False, False, False)) for i in range(10)]
    sure = [Trial(f"s{i}", 0.7 + i / 100, (False, False, True, False)) for i in range(10)]
    found = search([*sure, *unsure], ALPHAS)
    assert (found.alpha1, found.alpha2, found.score) == (0.5, 1.5, 1.0)
    assert found.beta == pytest.approx((0.19 + 0.7) / 2)  # the middle of the gap, not a sample


def test_plain_and_single_alphas_can_be_reached() -> None:
    plain = [Trial(str(i), i / 10, (False, True, False, False)) for i in range(5)]
    assert search(plain, ALPHAS) == Choice(1.0, 1.0, 0.0, 1.0)
    single = [Trial(str(i), i / 10, (False, False, False, True)) for i in range(5)]
    assert fixed(single, ALPHAS) == Choice(2.0, 2.0, 0.0, 1.0)
    found = search(single, ALPHAS)
    assert all(found.alpha(t.confidence) == 2.0 for t in single) and found.score == 1.0
    for seed in range(10):
        rows = trials(30, seed)
        assert search(rows, ALPHAS).score >= fixed(rows, ALPHAS).score >= score(rows, [t.right[1] for t in rows])


def test_among_equals_alphas_near_1_win() -> None:
    rows = [Trial(str(i), i / 10, (True, True, True, True)) for i in range(4)]
    assert search(rows, ALPHAS) == Choice(1.0, 1.0, 0.0, 1.0)
    assert fixed(rows, (0.5, 1.0, 1.2)).alpha1 == 1.0


def test_the_widest_run_of_equal_thresholds_is_taken() -> None:
    """Right under alpha1 below .2 and again anywhere between .3 and .8: the wide gap's middle."""
    rows = [
        Trial("a", 0.2, (True, False)),
        Trial("b", 0.3, (True, True)),
        Trial("c", 0.8, (False, True)),
    ]
    found = search(rows, (0.5, 1.0))
    assert found.beta == pytest.approx((0.2 + 0.8) / 2) and found.score == 1.0


def test_folds_keep_groups_together_and_use_no_item_of_their_own() -> None:
    rows = trials(60, 3)
    outcome = cross_fit(rows, ALPHAS, folds=5, seed=1)
    assert len(outcome["adapt"]) == 60
    # An answer that only an item's own record could have chosen: flipping it must not change its own outcome's alpha.
    flipped = [*rows]
    flipped[0] = Trial(rows[0].id, rows[0].confidence, tuple(not r for r in rows[0].right), rows[0].gold, rows[0].group)
    again = cross_fit(flipped, ALPHAS, folds=5, seed=1)
    assert again["adapt"][0] == (not outcome["adapt"][0]) and again["scaling"][0] == (not outcome["scaling"][0])
    with pytest.raises(UsageError, match="folds"):
        cross_fit(rows, ALPHAS, folds=500, seed=1)


def test_noise_is_no_reliable_gain_and_a_real_gain_is_one() -> None:
    verdicts = []
    for seed in range(20):
        noise = report(trials(80, seed), trials(200, 100 + seed), ALPHAS)
        assert noise["validation"]["adapt"]["accuracy"] > 0.5  # what tuning alone gives
        low, high = noise["test"]["adapt_gain"]["interval"]
        assert low <= noise["test"]["adapt_gain"]["mean"] <= high
        verdicts.append(noise["verdict"])
    assert verdicts.count("no reliable gain") >= 17  # 5 % of intervals miss
    real = [Trial(str(i), (i % 10) / 10, (i % 10 < 5, i % 4 == 0, i % 10 >= 5, False), "x") for i in range(200)]
    found = report(real[:60], real[60:], ALPHAS)
    assert found["verdict"] == "gain" and (found["alpha1"], found["alpha2"]) == (0.5, 1.5)
    assert found["test"]["adapt"]["accuracy"] == 1.0 and found["cross_fit"]["adapt"] == 1.0
    assert found["test"]["right"] == {"0.5": 70, "1": 35, "1.5": 70, "2": 0}
    assert report(real, [], ALPHAS)["verdict"].startswith("not tested")


@pytest.mark.parametrize(
    ("alphas", "objective", "rows", "words"),
    [
        ((0.5, 1.5), "accuracy", 4, "1 (the plain model) among them"),
        ((1.0, 1.0), "accuracy", 4, "distinct"),
        ((1.0, -1.0), "accuracy", 4, "from 0 up"),
        ((1.0, float("nan")), "accuracy", 4, "from 0 up"),
        ((0.5, 1.0), "recall", 4, "no objective"),
        ((0.5, 1.0), "accuracy", 0, "no items"),
    ],
)
def test_bad_requests_are_named(alphas: tuple[float, ...], objective: str, rows: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        search(trials(rows, 0, alphas=alphas), alphas, objective)
    assert words in str(caught.value)
