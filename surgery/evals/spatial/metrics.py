"""Measures of answers to spatial questions, as pure functions of what was answered.

Section 5 of the evaluation of AdaptVis (arXiv 2503.01773), with the reference's oddities named and not repeated: pair
and set accuracy count complete groups only, and the harmonic mean of sensitivity and specificity is not called F1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import UsageError
from surgery.evals.intervals import wilson

OPPOSITE = {
    "left": "right", "above": "below", "top": "bottom", "on": "under", "front": "behind", "in-front": "behind",
    "over": "under",
}  # fmt: skip
"""Relations of which both are asked about the same pair of things; each once, in one direction."""


@dataclass(frozen=True)
class Answered:
    """One answer: which question of which group, what it should be, what it was read as (None: nothing clear), whether
    that counts as right, and how sure the model was."""

    id: str
    gold: str
    said: str | None
    right: bool
    confidence: float = float("nan")
    group: str = ""
    options: tuple[str, ...] = ()


def summary(rows: Sequence[Answered]) -> dict[str, Any]:
    """Everything about one method's answers, as JSON values.

    accuracy with Wilson's interval, recall of each relation and their mean (`balanced`), pairs and sets over complete
    groups, the share of unclear answers, the rate of the commonest gold answer, mean confidence, how well confidence
    tells right from wrong (`auroc`, None if it has one class), calibration error, and the confusion matrix.
    """
    if not rows:
        raise UsageError("no-answers", "there are no answers to measure", hint="name a file with items")
    right = sum(r.right for r in rows)
    recalls = recall(rows)
    sure = [r.confidence for r in rows if r.confidence == r.confidence]
    known = len(sure) == len(rows)
    return {
        "n": len(rows),
        "right": right,
        "accuracy": right / len(rows),
        "interval": list(wilson(right, len(rows))),
        "balanced": sum(recalls.values()) / len(recalls),
        "recall": recalls,
        **groups(rows),
        "unparsable": sum(r.said is None for r in rows) / len(rows),
        "majority": max(_counts([r.gold for r in rows]).values()) / len(rows),
        "confidence": sum(sure) / len(sure) if sure else None,
        "auroc": auroc([r.confidence for r in rows], [r.right for r in rows]) if known else None,
        "ece": calibration_error([r.confidence for r in rows], [r.right for r in rows]) if known else None,
        "confusion": confusion(rows),
        **(yes_no(rows) if {r.gold for r in rows} <= {"yes", "no"} else {}),
    }


def recall(rows: Sequence[Answered]) -> dict[str, float]:
    """Of the questions with each gold answer, the share that was answered right."""
    golds = list(dict.fromkeys(r.gold for r in rows))
    return {g: _mean([r.right for r in rows if r.gold == g]) for g in golds}


def groups(rows: Sequence[Answered]) -> dict[str, Any]:
    """Pair and set accuracy: both of two opposite relations right, and all relations that are asked right.

    Only groups that are complete count: a pair needs each of the two once, a set each option once and nothing else.
    `pairs` and `sets` say how many those are; a rate over none is None.
    """
    by_group: dict[str, list[Answered]] = {}
    for row in rows:
        if row.group:
            by_group.setdefault(row.group, []).append(row)
    pairs: list[bool] = []
    sets: list[bool] = []
    for members in by_group.values():
        counts = _counts([m.gold for m in members])
        of = {m.gold: m.right for m in members}
        for one, other in OPPOSITE.items():
            if counts.get(one) == 1 and counts.get(other) == 1:
                pairs.append(of[one] and of[other])
        asked = {o.lower() for m in members for o in m.options}
        if len(asked) > 2 and set(counts) == asked and set(counts.values()) == {1}:
            sets.append(all(of.values()))
    return {
        "pairs": len(pairs),
        "pair_accuracy": _mean(pairs) if pairs else None,
        "sets": len(sets),
        "set_accuracy": _mean(sets) if sets else None,
    }


def confusion(rows: Sequence[Answered]) -> dict[str, dict[str, int]]:
    """Gold answer -> what was said ("unclear" for None) -> how often; answers in a fixed order, zeros included."""
    said = list(dict.fromkeys([*(r.gold for r in rows), *(r.said for r in rows if r.said is not None)]))
    columns = [*sorted(said), "unclear"]
    table = {gold: dict.fromkeys(columns, 0) for gold in sorted({r.gold for r in rows})}
    for row in rows:
        table[row.gold]["unclear" if row.said is None else row.said] += 1
    return table


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """The chance that a positive has the larger score than a negative, ties counting half (Mann-Whitney U / n1 n0);
    None when one of the classes is empty."""
    import numpy as np

    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    n1, n0 = int(labels.sum()), int((~labels).sum())
    if not n1 or not n0:
        return None
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of each distinct value
    return float((ranks[where][labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def calibration_error(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence| of each of `bins` equal ranges, weighted by its size."""
    table = confidence_bins(confidences, right, bins=bins)
    return sum(b["n"] / len(right) * abs(b["accuracy"] - b["confidence"]) for b in table if b["n"])


def confidence_bins(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> list[dict[str, Any]]:
    """Answers by ranges of confidence, the upper end inside the last one: count, accuracy, mean confidence."""
    rows: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for c, r in zip(confidences, right, strict=True):
        rows[min(bins - 1, max(0, int(c * bins)))].append((c, bool(r)))
    return [
        {
            "from": i / bins,
            "to": (i + 1) / bins,
            "n": len(row),
            "accuracy": _mean([r for _, r in row]) if row else None,
            "confidence": sum(c for c, _ in row) / len(row) if row else None,
        }
        for i, row in enumerate(rows)
    ]


def yes_no(rows: Sequence[Answered]) -> dict[str, Any]:
    """Precision, recall and F1 of "yes", and `hmean_tpr_tnr`: the harmonic mean of the recalls of both answers, which
    the paper prints as F1. What is neither counts as wrong on its side."""
    tp = sum(r.gold == "yes" and r.said == "yes" for r in rows)
    fp = sum(r.gold == "no" and r.said == "yes" for r in rows)
    tn = sum(r.gold == "no" and r.said == "no" for r in rows)
    yes = sum(r.gold == "yes" for r in rows)
    tpr, tnr = _ratio(tp, yes), _ratio(tn, len(rows) - yes)
    precision = _ratio(tp, tp + fp)
    return {
        "precision": precision,
        "recall_yes": tpr,
        "f1": _ratio(2 * precision * tpr, precision + tpr),
        "hmean_tpr_tnr": _ratio(2 * tpr * tnr, tpr + tnr),
    }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {v: values.count(v) for v in dict.fromkeys(values)}
