"""The model card of a merge: what it was made of, for the hub and for people. Written from the plan, offline."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.store.checkpoint import Checkpoint

_FRONT = 1 << 16  # characters of a card in which its front matter must end


def short_name(checkpoint: Checkpoint) -> str:
    """The hub id where there is one, else the last piece of the path: no card says where files lay."""
    return checkpoint.origin.get("name") or checkpoint.name.rstrip("/").rsplit("/", 1)[-1] or "checkpoint"


def card(report: Mapping[str, Any], parents: Sequence[Checkpoint]) -> str:
    """README.md of the output."""
    names = [short_name(p) for p in parents]
    front = ["---", "library_name: transformers", "base_model:", *(f"- {n}" for n in names),
             "base_model_relation: merge", "tags:", "- surgery", "- merge", "---", ""]  # fmt: skip
    lines = [*front, f"# A merge of {', '.join(names)}", ""]
    roles = ["host", "donor", "base"] if "weights" in report else [f"model {i}" for i in range(len(names))]
    lines += ["| role | model | content |", "|---|---|---|"]
    lines += [f"| {r} | {n} | `{_class(p)}` |" for r, n, p in zip(roles, names, parents, strict=False)]
    lines += ["", f"Method: {report['method']}."]
    for row in report.get("weights", []):
        lines.append(f"{weighed(row).capitalize()}: host {row['host']:g}, donor {row['donor']:g}.")
    merged = report["merged"]
    lines += [
        "",
        f"{merged['tensors']:,} tensors were merged, the others are the first model's, byte for byte. "
        "`surgery.json` holds the whole record; `surgery replay` builds it again.",
        "",
    ]
    return "\n".join(lines)


def card_base(checkpoint: Checkpoint) -> str | None:
    """The first `base_model` that the card beside the weights names; None where it names none."""
    path = checkpoint.root / "README.md"
    if not checkpoint.path.is_dir() or not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        front = file.read(_FRONT).split("\n---", 1)[0]
    found = re.search(r"^base_model:[ \t]*(?:\n[ \t]*-)?[ \t]*[\"']?([^\s\"'\[\],#]+)", front, re.M)
    return found[1] if front.startswith("---") and found else None


def weighed(row: Mapping[str, Any]) -> str:
    """What the weights of a row of the report are for."""
    return f"layers {spans(row['layers'])}" if row["layers"] else "outside layers"


def spans(numbers: Sequence[int]) -> str:
    """0-3, 7 for [0, 1, 2, 3, 7]."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _class(checkpoint: Checkpoint) -> str:
    config = next(iter(checkpoint.parts.values())).config or {}
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else "weights without a config"
