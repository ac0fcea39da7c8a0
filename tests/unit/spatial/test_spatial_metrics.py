"""Measures of answers against naive definitions and hand-made groups."""

import numpy as np
import pytest

from surgery.errors import UsageError
from surgery.evals.spatial.metrics import (
    Answered,
    auroc,
    calibration_error,
    confidence_bins,
    confusion,
    groups,
    recall,
    summary,
    yes_no,
)

OPTIONS = ("left", "right", "on", "under")


def answered(group: str, **right: bool) -> list[Answered]:
    return [Answered(f"{group}{g}", g, g if r else None, r, 0.5, group, OPTIONS) for g, r in right.items()]


def test_pairs_and_sets_count_complete_groups_only() -> None:
    rows = answered("a", left=True, right=True, on=True, under=True)
    rows += answered("b", left=True, right=False, on=True, under=True)
    rows += answered("c", left=True, right=True)  # a pair, no set
    rows += answered("d", left=True, on=True)  # neither
    assert groups(rows) == {"pairs": 5, "pair_accuracy": 4 / 5, "sets": 2, "set_accuracy": 1 / 2}


def test_a_relation_that_is_asked_twice_makes_no_pair() -> None:
    rows = [*answered("a", left=True, right=True), *answered("a", left=False)]
    assert groups(rows) == {"pairs": 0, "pair_accuracy": None, "sets": 0, "set_accuracy": None}


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_the_definition_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 40) / 6, rng.random(40) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores.tolist(), labels.tolist()) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auroc_of_one_class_is_undefined() -> None:
    assert auroc([0.1, 0.9], [True, True]) is None


def test_calibration_is_the_weighted_gap_of_ten_ranges() -> None:
    confidences, right = [0.05, 0.95, 0.91, 1.0], [True, True, False, True]
    assert calibration_error(confidences, right) == pytest.approx(0.25 * 0.95 + 0.75 * abs(2 / 3 - 2.86 / 3))
    bins = confidence_bins(confidences, right)
    assert [b["n"] for b in bins] == [1, *[0] * 8, 3] and bins[4]["accuracy"] is None


def test_a_summary_holds_every_measure() -> None:
    rows = [
        Answered("1", "left", "left", True, 0.9, "g", OPTIONS),
        Answered("2", "left", "right", False, 0.4, "g", OPTIONS),
        Answered("3", "right", None, False, 0.2, "h", OPTIONS),
        Answered("4", "left", "left", True, 0.7, "i", OPTIONS),
    ]
    out = summary(rows)
    assert out["accuracy"] == 0.5 and out["interval"][0] < 0.5 < out["interval"][1]
    assert out["recall"] == recall(rows) == {"left": 2 / 3, "right": 0.0} and out["balanced"] == pytest.approx(1 / 3)
    assert (out["unparsable"], out["majority"], out["auroc"]) == (0.25, 0.75, 1.0)
    assert out["confusion"] == confusion(rows)
    assert out["confusion"]["left"] == {"left": 2, "right": 1, "unclear": 0}
    with pytest.raises(UsageError):
        summary([])


def test_yes_and_no_keep_f1_apart_from_the_papers() -> None:
    said = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "yes")] * 2 + [("no", "no")] * 3 + [("no", None)]
    rows = [Answered(str(i), g, s, g == s) for i, (g, s) in enumerate(said)]
    out = yes_no(rows)
    assert out["precision"] == pytest.approx(3 / 5) and out["recall_yes"] == pytest.approx(3 / 4)
    assert out["f1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert out["hmean_tpr_tnr"] == pytest.approx(2 * 0.75 * 0.5 / 1.25)
