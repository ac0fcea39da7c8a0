"""From records of answers to a report: every method's measures, and what each gains over plain decoding."""

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.evals.intervals import mcnemar, paired_score
from surgery.evals.spatial.metrics import Answered, summary

RULES = {"strict": "right", "reference": "reference"}


def answered(records: Sequence[Mapping[str, Any]], method: str, rule: str = "strict") -> list[Answered]:
    """The answers of one method, judged by one of RULES."""
    return [
        Answered(
            r["id"],
            r["gold"],
            r["answers"][method]["said"],
            bool(r["answers"][method][RULES[rule]]),
            float(r["confidence"]) if r.get("confidence") is not None else float("nan"),
            r.get("group", ""),
            tuple(r.get("options", ())),
        )
        for r in records
    ]


def report(records: Sequence[Mapping[str, Any]], *, rule: str = "strict", beta: float | None = None) -> dict[str, Any]:
    """{method: measures of `summary`, by `rule`} for every method that the records hold, in their order.

    Each but `base` has `gain`: the paired difference to base with its 95 % interval (Tango), the items lost and gained,
    and McNemar's exact p; `agree` is the share of items on which both reading rules judge alike. `low` is the share of
    samples whose confidence is below `beta`.
    """
    methods = list(records[0]["answers"])
    out: dict[str, Any] = {}
    for method in methods:
        rows = answered(records, method, rule)
        numbers = summary(rows)
        both = [r["answers"][method] for r in records]
        numbers["agree"] = sum(a["right"] == a["reference"] for a in both) / len(both)
        numbers["reference_accuracy"] = sum(a["reference"] for a in both) / len(both)
        if beta is not None and numbers["confidence"] is not None:
            numbers["low"] = sum(r.confidence < beta for r in rows) / len(rows)
        if method != "base" and "base" in methods:
            numbers["gain"] = gain(answered(records, "base", rule), rows)
        out[method] = numbers
    seconds = [r["seconds"] for r in records if r.get("seconds") is not None]
    return {"n": len(records), "seconds": sum(seconds) / len(seconds) if seconds else None, "methods": out}


def gain(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Any]:
    """The paired difference of two methods on the same items; `reliable` when its 95 % interval leaves 0 out."""
    lost = sum(b.right and not a.right for b, a in zip(before, after, strict=True))
    gained = sum(a.right and not b.right for b, a in zip(before, after, strict=True))
    low, high = paired_score(lost, gained, len(before))
    return {
        "difference": (gained - lost) / len(before),
        "interval": [low, high],
        "lost": lost,
        "gained": gained,
        "p": mcnemar(lost, gained),
        "reliable": low > 0 or high < 0,
    }
