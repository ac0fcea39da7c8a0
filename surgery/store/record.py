"""Read `surgery.json` and check its shape, so that everything after may rely on its fields.

A record comes from a folder that somebody may have damaged or made up. What it means belongs to `graph.lineage`, and
whether it is true is what `surgery verify` finds out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, printable
from surgery.store import digests
from surgery.store.layout import read_json, safe_relative

_PASSING = ("created", "environment", "measured")  # of a time and a machine, not of the work
_FIELDS: Mapping[str, type] = {
    "record": str,
    "digest": str,
    "created": str,
    "output": dict,
    "steps": list,
    "parents": dict,
    "changes": list,
    "tensors": dict,
    "environment": dict,
}
_STEP: Mapping[str, type] = {"op": str, "version": int, "params": dict, "seed": int, "key": str}
_TENSOR: Mapping[str, type] = {"dtype": str, "shape": list}
_FILE: Mapping[str, type] = {"path": str, "size": int}
_CHANGE: Mapping[str, type] = {"tensors": str, "count": int, "how": str}


def read_record(path: Path) -> dict[str, Any]:
    """The record at `path`. Raises `CheckpointError` when it is no lineage record of format 1."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("surgery") != 1:
        raise CheckpointError(
            "bad-lineage", f"{path}: not a lineage record of format 1", hint="made by a newer version, or damaged"
        )
    ancestors = document.get("ancestors")
    fault = _fault(document)
    if fault is None and not isinstance(ancestors, dict):
        fault = "ancestors"
    if fault is None and isinstance(ancestors, dict):
        fault = next((f"ancestors: {f}" for a in ancestors.values() if (f := _fault(a))), None)
    if fault is not None:
        raise CheckpointError(
            "bad-lineage",
            f"{path}: damaged: {printable(fault)}",
            hint="restore the file, or build the checkpoint again",
        )
    return document


def record_digest(record: Mapping[str, Any]) -> str:
    """Digest of a record without itself, and without time, environment, measured numbers and what parents were called
    on that machine: neither its own nor those of its ancestors, so that the same work has the same one anywhere."""
    ancestors = record.get("ancestors")
    told = {n: _lasting(own) for n, own in ancestors.items()} if isinstance(ancestors, Mapping) else ancestors
    return _digest(record, told)


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a record is as it was written: by the rule of `record_digest`, or by the first one, which took records of
    ancestors whole, time and all. Records without ancestors are the same by both."""
    return record["record"] in (record_digest(record), _digest(record, record.get("ancestors")))


def _digest(record: Mapping[str, Any], ancestors: Any) -> str:
    hashed = {k: v for k, v in _lasting(record).items() if k != "record"}
    return "sha256:" + digests.canonical_digest(hashed | ({"ancestors": ancestors} if "ancestors" in record else {}))


def _lasting(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record is true of the work wherever and whenever it is done."""
    kept = {k: v for k, v in record.items() if k not in _PASSING}
    if isinstance(parents := kept.get("parents"), Mapping):
        kept["parents"] = {n: {k: v for k, v in row.items() if k != "source"} for n, row in parents.items()}
    return kept


def undigested(record: Mapping[str, Any]) -> list[str]:
    """The tensors that a record has no digest of: those that a run with --hash header made, or took from parents that
    were not digested either."""
    return [name for name, row in record["tensors"].items() if "sha256" not in row]


def params_text(step: Mapping[str, Any]) -> str:
    """The parameters of a recorded step that are set, in one line."""
    set_ = {k: v for k, v in step["params"].items() if v not in (None, "", [], False)}
    return ", ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in set_.items())


def is_unhashed(digest: str) -> bool:
    """Whether what stands for a digest in a record is the name of work, or of files, whose content nobody hashed."""
    return digest.startswith("unhashed:")


def _fault(record: Any) -> str | None:
    """The first field of a record that is missing or of another type than it should be."""
    if fault := _lacks(record, _FIELDS):
        return fault
    if not record["steps"] or any(_lacks(step, _STEP) for step in record["steps"]):
        return "steps"
    fields = _TENSOR if is_unhashed(record["digest"]) else {"sha256": str, **_TENSOR}
    if any(_lacks(row, fields) or not isinstance(row.get("sha256", ""), str) for row in record["tensors"].values()):
        return "tensors"
    files = record["output"].get("files")
    if not isinstance(files, list) or any(_lacks(row, _FILE) or not safe_relative(row["path"]) for row in files):
        return "output.files"
    if any(_lacks(row, _CHANGE) for row in record["changes"]):
        return "changes"
    for parent in record["parents"].values():
        if _lacks(parent, {"digest": str}) or not isinstance(parent.get("lineage", 0), str | None):
            return "parents"
    return None


def _lacks(value: Any, fields: Mapping[str, type]) -> str | None:
    if not isinstance(value, dict):
        return "not an object"
    return next((name for name, kind in fields.items() if not isinstance(value.get(name), kind)), None)
