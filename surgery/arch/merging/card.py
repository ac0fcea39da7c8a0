"""The model card of a merge: what it was made of, for the hub and for people. Written from the plan, offline."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.store.checkpoint import Checkpoint
from surgery.store.digests import canonical_digest

_FRONT = 1 << 16  # characters of a card in which its front matter must end


def short_name(checkpoint: Checkpoint) -> str:
    """The hub id where there is one, else the last piece of the path: no card says where files lay."""
    return checkpoint.origin.get("name") or checkpoint.name.rstrip("/").rsplit("/", 1)[-1] or "checkpoint"


def card(report: Mapping[str, Any], parents: Sequence[Checkpoint], roles: Sequence[str] | None = None) -> str:
    """README.md of the output; `roles` say what each parent is in it, where they are not models side by side."""
    names = [short_name(p) for p in parents]
    licence, said = _licences(names, parents)
    front = ["---", "library_name: transformers", *licence, "base_model:", *(f"- {n}" for n in names),
             "base_model_relation: merge", "tags:", "- surgery", "- merge", "---", ""]  # fmt: skip
    lines = [*front, f"# A merge of {', '.join(names)}", ""]
    roles = roles or [f"model {i}" for i in range(len(names))]
    lines += ["| role | model | content |", "|---|---|---|"]
    lines += [f"| {r} | {n} | `{_class(p)}` |" for r, n, p in zip(roles, names, parents, strict=True)]
    lines += ["", f"Method: {report['method']}."]
    for row in report.get("weights", []):
        lines.append(f"{weighed(row).capitalize()}: host {row['host']:g}, donor {row['donor']:g}.")
    merged = report["merged"]
    lines += [
        "",
        f"{merged['tensors']:,} tensors were merged, the others are the first model's, byte for byte. "
        "`surgery.json` holds the whole record; `surgery replay` builds it again.",
        "",
        *((said, "") if said else ()),
    ]
    return "\n".join(lines)


def card_digest(parents: Sequence[Checkpoint]) -> str:
    """What a card takes from those of the models. All else in it follows from the work, but for what they are called,
    which changes no result."""
    return canonical_digest([[_stated(p, key) for key in ("license", "license_name")] for p in parents])


def card_base(checkpoint: Checkpoint) -> str | None:
    """The first `base_model` that the card beside the weights names; None where it names none."""
    return _stated(checkpoint, "base_model")


def _stated(checkpoint: Checkpoint, key: str) -> str | None:
    """The first value of `key` in the front matter of the card beside the weights."""
    path = checkpoint.root / "README.md"
    if not checkpoint.path.is_dir() or not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        front = file.read(_FRONT).split("\n---", 1)[0]
    found = re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-)?[ \t]*[\"']?([^\s\"'\[\],#]+)", front, re.M)
    return found[1] if front.startswith("---") and found else None


def _licences(names: Sequence[str], parents: Sequence[Checkpoint]) -> tuple[list[str], str]:
    """(lines of the front matter, what people should know): the licence that the parents' cards agree on, `other` where
    they differ, nothing where no card states one."""
    stated = [(n, _stated(p, "license"), _stated(p, "license_name")) for n, p in zip(names, parents, strict=True)]
    known = [(n, kind, called) for n, kind, called in stated if kind]
    if not known:
        return [], ""
    each = ", ".join(f"{n} {kind}{f' ({called})' if called else ''}" for n, kind, called in known)
    said = [f"Licences that the models' cards state: {each}."]
    (kind, called), *others = dict.fromkeys((kind, called) for _, kind, called in known)
    if others:
        said.append("They differ, and the conditions of each hold for a merge.")
    if closed := [n for n, kind, called in known if "-nc" in f"{kind} {called}".lower()]:
        said.append(f"That of {', '.join(closed)} rules out commercial use.")
    if silent := [n for n, kind, _ in stated if not kind]:
        said.append(f"No licence is stated beside {', '.join(silent)}.")
    lines = [f"license: {'other' if others else kind}"]
    return lines + ([f"license_name: {called}"] if called and not others else []), " ".join(said)


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
