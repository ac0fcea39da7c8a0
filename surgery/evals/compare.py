"""Two files of records of the same items, compared item by item."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import UsageError, printable
from surgery.evals.intervals import mcnemar, paired_bootstrap, paired_score
from surgery.evals.records import read_records
from surgery.evals.vqa.evaluate import split

_MAY_DIFFER = ("model", "config")


def compare_files(a: Path, b: Path, *, group_by: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """How the results of `b` differ from those of `a`, on the items that both hold.

    Notes say what else than the model was different, and how many items only one of them has. Raises UsageError when
    they hold other kinds of results or no item in common, or when an item was another question.
    """
    one, two = read_records(a), read_records(b)
    if one.kind != two.kind:
        raise UsageError("compare", f"{a} holds {one.kind}, {b} {two.kind}", hint="compare results of one kind")
    for file in (one, two):
        for name, row in file.rows.items():
            if not {"correct", "extracted", "answer"} <= row.keys():
                raise UsageError(
                    "compare",
                    f"{file.path}: item '{printable(name)}' says nothing of right or wrong; it holds {file.kind}",
                    hint="compare what surgery eval vqa wrote",
                )
    shared = [name for name in one.rows if name in two.rows]
    if not shared:
        raise UsageError("compare", f"{a} and {b} have no item in common", hint="evaluate both on the same data")
    other = next((n for n in shared if one.rows[n].get("asked") != two.rows[n].get("asked")), None)
    if other is not None:
        raise UsageError(
            "compare", f"item '{other}' is another question in {b} than in {a}", hint="evaluate both on the same data"
        )
    keys = [*one.settings, *(k for k in two.settings if k not in one.settings)]
    notes = [
        f"{key}: {one.settings.get(key)} against {two.settings.get(key)}"
        for key in keys
        if key not in _MAY_DIFFER and one.settings.get(key) != two.settings.get(key)
    ]
    notes += [
        f"{len(f.rows) - len(shared)} items of {f.path} are not in the other file and were left out"
        for f in (one, two)
        if len(f.rows) > len(shared)
    ]
    mine, theirs = [one.rows[n] for n in shared], [two.rows[n] for n in shared]
    out = paired(mine, theirs, seed=seed)
    if group_by:
        out["groups"] = {}
        for field in group_by:
            by_value = {value: {r["id"] for r in rows} for value, rows in split(mine, field).items()}
            out["groups"][field] = {
                value: paired(
                    [one.rows[n] for n in shared if n in ids], [two.rows[n] for n in shared if n in ids], seed=seed
                )
                for value, ids in by_value.items()
            }
    flips = [
        {
            "id": m["id"],
            "now": "right" if t["correct"] else "wrong",
            "a": m["extracted"],
            "b": t["extracted"],
            "answer": m["answer"],
        }
        for m, t in zip(mine, theirs, strict=True)
        if m["correct"] != t["correct"]
    ]
    return out | {"flips": flips, "notes": notes}


def paired(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Accuracies of the same items before and after, the difference with its bootstrap and score intervals (95 %), and
    McNemar's exact p. The score interval has a width even when nothing flipped."""
    before, after = ([int(bool(r["correct"])) for r in rows] for rows in (a, b))
    n = len(before)
    lost = sum(x > y for x, y in zip(before, after, strict=True))
    gained = sum(x < y for x, y in zip(before, after, strict=True))
    differences = [y - x for x, y in zip(before, after, strict=True)]
    return {
        "n": n,
        "a": sum(before) / n,
        "b": sum(after) / n,
        "difference": (gained - lost) / n,
        "interval": list(paired_bootstrap(differences, seed=seed)),
        "score_interval": list(paired_score(lost, gained, n)),
        "lost": lost,
        "gained": gained,
        "p": mcnemar(lost, gained),
    }
