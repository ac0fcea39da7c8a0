"""Questions about where things are in pictures: one item a line of a JSONL file, beside its pictures.

`id`, `image` (a path relative to the file, or a list), `question` (no template), `options`, `answer` (one of them),
`relation`, `subject`, `object`, `group` (a set of items that are judged together), `boxes` (label and xyxy in pixels of
the picture), `split`. What is not known is left out. Reading checks every line; writing is whole or not at all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.store import digests
from surgery.store.writer import atomic_write

_KEYS = ("id", "image", "question", "options", "answer", "relation", "subject", "object", "group", "boxes", "split")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Item:
    """One question. `boxes` are (label, (left, top, right, bottom)) in pixels of the picture; `images` are paths that
    open, as far as the reader could tell."""

    id: str
    images: tuple[Path, ...]
    question: str
    options: tuple[str, ...]
    answer: str
    relation: str = ""
    subject: str = ""
    object: str = ""
    group: str = ""
    boxes: tuple[tuple[str, Box], ...] = ()
    split: str = ""

    def to_mapping(self, folder: Path) -> dict[str, Any]:
        """The line of this item in a file of `folder`."""
        paths = [p.relative_to(folder).as_posix() if p.is_relative_to(folder) else str(p) for p in self.images]
        row: dict[str, Any] = {"id": self.id, "image": paths[0] if len(paths) == 1 else paths}
        row |= {"question": self.question, "options": list(self.options), "answer": self.answer}
        row |= {k: getattr(self, k) for k in ("relation", "subject", "object", "group") if getattr(self, k)}
        if self.boxes:
            row["boxes"] = [{"label": label, "xyxy": [round(v, 2) for v in box]} for label, box in self.boxes]
        return row | ({"split": self.split} if self.split else {})


def read_items(path: Path, *, limit: int | None = None) -> list[Item]:
    """The items of a file, the first `limit` of them.

    Raises UsageError when the file is not there, CheckpointError naming the line for anything that is wrong in it: not
    JSON, an unknown or missing key, an answer that is not among the options, an id twice, a picture that is not there.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for number, row in read_rows(path):
        if limit is not None and len(items) >= limit:
            break
        where = f"{path}: line {number}"
        item = _item(row, where, path.parent)
        if item.id in seen:
            raise _bad("repeated-id", f"{where}: id '{printable(item.id)}' is there twice", "ids must differ")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise _bad("empty-data", f"{path}: holds no items", "make some: surgery adaptvis data make -o scenes")
    return items


def read_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of every line that is not blank. Raises as `read_items` does."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UsageError(
            "no-data", f"{path} does not exist", hint="make some: surgery adaptvis data make -o scenes"
        ) from None
    except IsADirectoryError:
        inside = sorted(p.name for p in path.glob("*.jsonl"))
        found = f"{path}/{inside[0]}" if inside else "a .jsonl file in it"
        raise UsageError("no-data", f"{path} is a folder, not a file of questions", hint=f"name {found}") from None
    except (OSError, UnicodeDecodeError) as err:
        raise _bad("unreadable", f"{path}: {getattr(err, 'strerror', 'is not UTF-8 text')}", "check the file") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _bad("bad-data", f"{path}: line {number} is not a JSON object", "write one object a line")
        yield number, row


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write a file of items, whole or not at all; paths of pictures become relative to it."""
    lines = (json.dumps(item.to_mapping(path.parent), ensure_ascii=False) for item in items)
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def items_digest(items: Iterable[Item]) -> str:
    """What identifies a set of questions: digest of their text, options, answers and the bytes of their pictures."""
    rows = []
    for item in items:
        pictures = [digests.file_digest(p) for p in item.images]
        rows.append([item.id, item.question, list(item.options), item.answer, item.group, pictures])
    return digests.canonical_digest(rows)


def split_groups(items: Sequence[Item], *, val: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(validation, test): whole groups, a share `val` of them drawn from `seed`; items without a group are their own.
    Their `split` says so from then on.

    Splitting by group keeps what was tuned on one picture of a set out of the test of its siblings, and leaves sets
    whole, which pair and set accuracy need.
    """
    import numpy as np

    if not 0 <= val <= 1:
        raise UsageError("fraction", f"a share of {val:g}", hint="0 to 1, for example 0.2")
    names = list(dict.fromkeys(item.group or item.id for item in items))
    chosen = set(np.random.default_rng(seed).permutation(len(names))[: round(val * len(names))].tolist())
    held = {name for i, name in enumerate(names) if i in chosen}
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        tested = (item.group or item.id) not in held
        parts[tested].append(replace(item, split="test" if tested else "val"))
    return parts


def _item(row: Mapping[str, Any], where: str, folder: Path) -> Item:
    unknown = [k for k in row if k not in _KEYS]
    if unknown:
        raise _bad("bad-data", f"{where}: unknown key '{printable(unknown[0])}'", closest(unknown[0], list(_KEYS)))
    row = {**row, "id": str(row["id"])} if isinstance(row.get("id"), int) else row
    for key in ("id", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _bad("bad-data", f"{where}: '{key}' must be text that is not empty", "see the format: README")
    for key in ("relation", "subject", "object", "group", "split"):
        if not isinstance(row.get(key, ""), str):
            raise _bad("bad-data", f"{where}: '{key}' must be text", "see the format: README")
    options = row.get("options")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        raise _bad("bad-data", f"{where}: 'options' must list two or more answers", 'for example ["left", "right"]')
    answer = next((o for o in options if o.lower() == row["answer"].lower()), None)
    if answer is None:
        listed = ", ".join(options)
        raise _bad("answer", f"{where}: answer '{printable(row['answer'])}' is not among {printable(listed)}", "add it")
    names = row.get("image")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise _bad("bad-data", f"{where}: 'image' must be a path or a list of paths", "relative to the file")
    images = tuple(folder / n for n in names)
    for image in images:
        if not image.is_file():
            raise _bad("no-image", f"{where}: {image} does not exist", "paths are relative to the file of questions")
    return Item(
        row["id"],
        images,
        row["question"].strip(),
        tuple(options),
        answer,
        *(row.get(k, "") for k in ("relation", "subject", "object", "group")),
        boxes=_boxes(row.get("boxes", []), where),
        split=row.get("split", ""),
    )


def _boxes(rows: Any, where: str) -> tuple[tuple[str, Box], ...]:
    found = []
    for row in rows if isinstance(rows, list) else [None]:
        xyxy = row.get("xyxy") if isinstance(row, dict) else None
        good = isinstance(xyxy, list) and len(xyxy) == 4 and all(isinstance(v, int | float) for v in xyxy)
        if not good or not xyxy[0] < xyxy[2] or not xyxy[1] < xyxy[3]:
            hint = '{"label": "cup", "xyxy": [left, top, right, bottom]}'
            raise _bad("bad-data", f"{where}: 'boxes' must list a label and corners in pixels", hint)
        found.append((str(row.get("label", "")), (float(xyxy[0]), float(xyxy[1]), float(xyxy[2]), float(xyxy[3]))))
    return tuple(found)


def _bad(code: str, message: str, hint: str) -> CheckpointError:
    return CheckpointError(code, message, hint=hint)
