"""Questions about images, from JSON lines or from the tables that benchmarks come as.

JSON lines: `question`, `answer`, optionally `id`, `image` (a path beside the file, base64, or a list of them),
`choices` (a list), `answer_type` (choice, integer, float, string, list), `precision` (decimals that count); every
other short field is one that results can be grouped by, a list of texts (`skills`) puts an item into several groups. A
.json file holds the same objects in one list. Tables (.tsv): `index`, `image` (base64, a list of them, or the
index of the row that has it) or `image_path`, `question`, `answer`, and for choices the columns A, B, C, … or
`choices`. Standard library only; pictures are opened when they are needed, with Pillow.
"""

import base64
import binascii
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, ResourceError, UsageError, printable
from surgery.evals.vqa.numbers import last_number

TYPES = ("choice", "integer", "float", "string", "list")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OWN = {
    "id", "index", "image", "image_path", "question", "answer", "choices", "answer_option", "precision", "split",
    "hint",
}  # fmt: skip
Groups = Mapping[str, str | tuple[str, ...]]
_LONGEST_GROUP = 80
_MAX_BYTES = 20_000_000_000


@dataclass(frozen=True)
class Item:
    """One question. `answer` is a letter where there are `choices`; `groups` holds the fields to group by."""

    id: str
    question: str
    answer: str
    images: tuple["Picture", ...] = ()
    choices: tuple[str, ...] = ()
    answer_type: str = "string"
    precision: int | None = None
    groups: Groups = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An image that is not opened yet: a file, or base64 text; `where` names its row in errors."""

    where: str
    path: Path | None = None
    text: str | None = None

    def content(self) -> bytes:
        """The bytes of the image's file. Raises CheckpointError."""
        try:
            if self.path is not None:
                return self.path.read_bytes()
            return base64.b64decode("".join((self.text or "").split()), validate=True)
        except OSError as err:
            raise CheckpointError(
                "no-image", f"{self.where}: {self.path}: {err.strerror}", hint="image paths start beside the data file"
            ) from None
        except (binascii.Error, ValueError):
            raise CheckpointError("no-image", f"{self.where}: the image is not base64", hint="check the data") from None

    def open(self) -> Any:
        """The picture as Pillow opens it, in RGB. Raises CheckpointError for what is none, ResourceError."""
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise ResourceError(
                "missing-package", "images need Pillow", hint="install surgery with its extra 'images'"
            ) from None
        try:
            with Image.open(io.BytesIO(self.content())) as picture:
                return picture.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError, SyntaxError) as err:
            what = "" if isinstance(err, UnidentifiedImageError) else f" ({printable(str(err), limit=80)})"
            shown = f" {self.path}:" if self.path is not None else ""
            raise CheckpointError(
                "no-image", f"{self.where}:{shown} not an image that Pillow reads{what}", hint="check the data"
            ) from None

    def check(self) -> None:
        """Raise CheckpointError where the file is not there, before any work."""
        if self.path is not None and not self.path.is_file():
            raise CheckpointError(
                "no-image", f"{self.where}: no file {self.path}", hint="image paths start beside the data file"
            )


def read_items(path: Path, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The questions of a .jsonl or .tsv file, in its order.

    With `limit`, so many of them drawn by `seed`; a larger limit keeps those of a smaller one. Raises CheckpointError
    naming the row and field that is wrong, UsageError for another kind of file.
    """
    if path.suffix not in (".jsonl", ".json", ".tsv"):
        raise UsageError("data", f"{path}: questions come as .jsonl, .json or .tsv", hint="one JSON object a line")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError("data", f"{path}: larger than {_MAX_BYTES:,} bytes", hint="split the file")
        text = path.read_text("utf-8-sig")
    except OSError as err:
        raise CheckpointError("unreadable", f"{path}: {err.strerror}", hint="check the path and its rights") from None
    except UnicodeDecodeError:
        raise CheckpointError("malformed", f"{path}: not UTF-8 text", hint="save it as UTF-8") from None
    items = list(_from_table(path, text) if path.suffix == ".tsv" else _from_lines(path, text))
    if not items:
        raise CheckpointError("no-items", f"{path}: holds no questions", hint="one JSON object a line")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise CheckpointError("bad-item", f"{path}: id '{printable(item.id)}' twice", hint="ids must be unique")
        seen.add(item.id)
    if limit is not None and limit < len(items):
        import random

        order = list(range(len(items)))
        random.Random(seed).shuffle(order)
        items = [items[i] for i in sorted(order[:limit])]
    for item in items:
        for picture in item.images:
            picture.check()
    return items


def _objects(path: Path, text: str) -> Iterator[tuple[str, int, Any]]:
    """(where it stands, its number, value) of every line of .jsonl, or of every item of a .json file's list."""
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            raise CheckpointError("malformed", f"{path}: not a JSON list", hint="check it, or use .jsonl") from None
        yield from ((f"{path}, item {n}", n, row) for n, row in enumerate(listed, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", number, json.loads(line)
            except (ValueError, RecursionError):
                yield f"{path}, line {number}", number, None


def _from_lines(path: Path, text: str) -> Iterator[Item]:
    for where, number, row in _objects(path, text):
        if not isinstance(row, dict):
            raise CheckpointError("bad-item", f"{where}: not a JSON object", hint="one JSON object a line")
        listed = row.get("choices")
        if listed is not None and not (
            isinstance(listed, list) and all(isinstance(c, str | int | float) for c in listed)
        ):
            raise CheckpointError("bad-item", f"{where}: choices is not a list of texts", hint='["a cat", "a dog"]')
        images = row.get("image", row.get("image_path"))
        named = [] if images is None else images if isinstance(images, list) else [images]
        yield _item(where, row, str(number), [str(c) for c in listed or ()], _pictures(where, path, named), "text")


def _from_table(path: Path, text: str) -> Iterator[Item]:
    before = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    except csv.Error as err:
        raise CheckpointError("malformed", f"{path}: {err}", hint="columns are separated by tabs") from None
    finally:
        csv.field_size_limit(before)
    by_index = {str(row.get("index")): row for row in rows}
    for number, row in enumerate(rows, 2):
        where = f"{path}, row {number}"
        if None in row or None in row.values():
            raise CheckpointError(
                "bad-item", f"{where}: has another number of columns than the header", hint="check it"
            )
        image = row.get("image") or ""
        if image in by_index and len(image) < 64:
            image = by_index[image].get("image") or ""  # tables store a shared image once
        named = _listed(image) or _listed(row.get("image_path") or "")
        columns = [row[letter] for letter in LETTERS if (row.get(letter) or "").strip()]
        first = "letter" if columns else "text"
        yield _item(
            where, row, str(number), columns or _listed(row.get("choices") or ""), _pictures(where, path, named), first
        )


def _listed(cell: str) -> list[str]:
    """The texts in a cell: one, or several written as a list in JSON or Python."""
    cell = cell.strip()
    if not cell or cell in ("[]", "nan", "None"):
        return []
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        found = json.loads(cell)
    except ValueError:
        found = [a or b for a, b in re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", cell)]
    return [str(value) for value in found]


def _pictures(where: str, file: Path, named: Iterable[Any]) -> tuple[Picture, ...]:
    out = []
    for value in named:
        if not isinstance(value, str) or not value:
            raise CheckpointError("bad-item", f"{where}: image is no path and no base64 text", hint="check the data")
        inline = re.match(r"data:image/[\w.+-]+;base64,", value)
        path = None
        if inline is None and len(value) < 1024:
            path = file.parent / value
            if not path.is_file() and re.fullmatch(r"[A-Za-z0-9+/=\s]{40,}", value):
                path = None
        out.append(
            Picture(where, path)
            if path is not None
            else Picture(where, None, value[inline.end() :] if inline else value)
        )
    return tuple(out)


def _item(
    where: str, row: Mapping[str, Any], number: str, choices: list[str], images: tuple[Picture, ...], first: str
) -> Item:
    question, answer = row.get("question"), row.get("answer")
    name = next((n for n in (row.get("id"), row.get("index"), number) if n not in (None, "")), number)
    if isinstance(name, list | dict | bool):
        raise CheckpointError("bad-item", f"{where}: the id is no text and no number", hint="leave it out, or name it")
    if not isinstance(question, str) or not question.strip():
        raise CheckpointError("bad-item", f"{where}: no question", hint="every row has a text field 'question'")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise CheckpointError("bad-item", f"{where}: the answer is {answer}", hint="a finite number, or a text")
    if answer is None or isinstance(answer, bool | dict) or (isinstance(answer, str) and not answer.strip()):
        raise CheckpointError("bad-item", f"{where}: no answer", hint="every row has a field 'answer'")
    shown = json.dumps(answer) if isinstance(answer, list) else str(answer).strip()
    kind = row.get("answer_type") or ("choice" if choices else _type_of(answer, shown))
    if row.get("question_type") in ("multi_choice", "multi-choice") or (choices and kind in ("text", "string")):
        kind = "choice"  # benchmark tables give the type of the choices' text
    kind = {"text": "string", "multi_choice": "choice", "int": "integer"}.get(kind, kind)
    if kind not in TYPES:
        raise CheckpointError(
            "bad-item", f"{where}: answer_type '{printable(str(kind))}'", hint=f"one of {', '.join(TYPES)}"
        )
    if kind == "choice":
        shown = _letter(where, shown, str(row.get("answer_option") or "").strip(), choices, first)
    elif choices:
        kind, shown = "choice", _letter(where, shown, str(row.get("answer_option") or "").strip(), choices, first)
    if kind in ("integer", "float") and last_number(shown) is None:
        raise CheckpointError(
            "bad-item",
            f"{where}: answer_type is {kind}, and the answer '{printable(shown, limit=40)}' holds no number",
            hint="answer_type: string",
        )
    groups = {
        key: found
        for key, value in row.items()
        if key not in _OWN and not (key in LETTERS and choices) and (found := _group(value))
    }
    return Item(str(name), question, shown, images, tuple(choices), kind, _precision(where, row, kind, shown), groups)


def _group(value: Any) -> str | tuple[str, ...] | None:
    """A field's value to group by; several for a list of short texts, also one written in a table's cell."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        value = _listed(value)
    if isinstance(value, list):
        found = tuple(str(v) for v in value if isinstance(v, str | int | float) and 0 < len(str(v)) <= _LONGEST_GROUP)
        return found or None
    return str(value) if isinstance(value, str | int | float) and 0 < len(str(value)) <= _LONGEST_GROUP else None


def values_of(groups: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The groups of one field that an item or a record is in; "-" without the field."""
    value = groups.get(field, "-")
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def _type_of(answer: Any, shown: str) -> str:
    if isinstance(answer, list) or re.fullmatch(r"\[.*\]", shown):
        return "list"
    if re.fullmatch(r"[-+]?\d+", shown):
        return "integer"
    return "float" if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d{1,3})?", shown) else "string"


def _letter(where: str, answer: str, option: str, choices: list[str], first: str) -> str:
    """The letter of the right choice, however the data names it."""
    if not choices or len(choices) > len(LETTERS):
        raise CheckpointError("bad-item", f"{where}: {len(choices)} choices", hint=f"from 1 to {len(LETTERS)}")
    letters = LETTERS[: len(choices)]
    by_letter = answer.upper() if len(answer) == 1 and answer.upper() in letters else None
    by_text = letters[choices.index(answer)] if answer in choices else None
    if len(option) == 1 and option in letters:
        return option
    found = (by_letter or by_text) if first == "letter" else (by_text or by_letter)
    if found is None:
        raise CheckpointError(
            "bad-item",
            f"{where}: the answer '{printable(answer, limit=40)}' is none of the {len(choices)} choices",
            hint="give its letter or its text",
        )
    return found


def _precision(where: str, row: Mapping[str, Any], kind: str, shown: str) -> int | None:
    """Decimals that count for a float: as the data says, else as many as the answer has."""
    given = row.get("precision")
    if given not in (None, "", "nan"):
        try:
            number = float(given)
        except (TypeError, ValueError):
            number = -1.0
        if not (0 <= number <= 30 and number == int(number)):
            raise CheckpointError(
                "bad-item", f"{where}: precision {printable(str(given))}", hint="a number of decimals"
            )
        return int(number)
    match = re.search(r"\.(\d*)", shown)
    return (len(match[1]) if match else 0) if kind == "float" else None
