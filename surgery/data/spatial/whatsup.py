"""Import the spatial questions of What's Up (arXiv 2310.19785) as AdaptVis (arXiv 2503.01773) asks them, and those of
VSR (arXiv 2205.00363).

Question files hold a prompt per line and no picture; the annotations of the picture release name the pictures. The two
are joined by order, as their authors do, and the join is checked where the file name says what the answer is.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.data.spatial.items import Item, read_rows
from surgery.errors import CheckpointError, UsageError, printable

_PROMPT = re.compile(r"(?:<image>)?\s*(?:USER:)?\s*(?P<question>.*?)\s*(?:ASSISTANT:)?\s*", re.S)
_OPTIONS = re.compile(r"\s*Answer with (?P<options>[^.\n]*)[.\s]*.*$", re.S)
_PAIR = re.compile(r"Where (?:is|are) (?:the )?(?P<a>.+?) in relation to (?:the )?(?P<b>.+?)\s*\?", re.S)
_SINGLE = re.compile(r"Where (?:is|are) (?:the )?(?P<a>.+?) in the (?:photo|picture|image)\s*\?", re.S)
_FILE = re.compile(r"(?P<a>[^_]+)_(?P<relation>left|right|on|under|in-front|behind)(?:_of)?_(?P<b>.+)\.[A-Za-z]+$")
_SAME = {"front": "in-front"}  # how the file names write an answer


def read_whatsup(questions: Path, annotations: Path, images: Path) -> list[Item]:
    """The items of one question file, with the pictures that `annotations` names in the folder `images`.

    Raises UsageError for a file that is not there, CheckpointError when the two files do not fit each other, a line
    cannot be read, or a picture is missing.
    """
    rows = list(read_rows(questions))
    named = _annotations(annotations)
    if len(rows) != len(named):
        raise CheckpointError(
            "other-length",
            f"{questions} holds {len(rows)} questions, {annotations} {len(named)} pictures",
            hint="name the annotations of the same set",
        )
    items = []
    for (number, row), picture in zip(rows, named, strict=True):
        where = f"{questions}: line {number}"
        items.append(_item(row, picture, where, images))
    return items


def parse_prompt(prompt: str) -> tuple[str, tuple[str, ...], str, str]:
    """(question, options, subject, object) of a prompt of the question files; what is not there is empty.

    The question keeps its list of options, as the model was asked with it; the template around it goes.
    """
    text = " ".join(_PROMPT.fullmatch(prompt)["question"].split())  # type: ignore[index]
    offered = _OPTIONS.search(text)
    options: tuple[str, ...] = ()
    if offered:
        pieces = re.split(r",\s*(?:or\s+)?|\s+or\s+", offered["options"].strip())
        options = tuple(dict.fromkeys(p.strip().lower() for p in pieces if p.strip()))
    about = _PAIR.search(text) or _SINGLE.search(text)
    subject = about["a"] if about else ""
    return text, options, subject, (about.groupdict().get("b") or "") if about else ""


def _item(row: dict[str, Any], picture: str, where: str, images: Path) -> Item:
    answer = row.get("answer")
    answer = answer[0] if isinstance(answer, list) and answer else answer
    if not isinstance(row.get("question"), str) or not isinstance(answer, str) or "id" not in row:
        raise CheckpointError("bad-data", f"{where}: needs id, question and answer", hint="name a question file")
    question, options, subject, other = parse_prompt(row["question"])
    answer = answer.strip().lower()
    if not options:
        raise CheckpointError("bad-data", f"{where}: the question offers no options", hint="name a question file")
    if answer not in options:
        options = (*options, answer)  # one line of VG asks with "top" and has "above" as its answer
    controlled = _FILE.fullmatch(picture.rsplit("/", 1)[-1])
    if controlled and controlled["relation"] != _SAME.get(answer, answer):
        raise CheckpointError(
            "other-order",
            f"{where}: the answer is '{printable(answer)}', its picture {printable(picture)}",
            hint="the annotations must be in the order of the questions",
        )
    group = f"{controlled['a']}|{controlled['b']}" if controlled else picture.rsplit("/", 1)[-1]
    path = _find(picture, images, where)
    return Item(str(row["id"]), (path,), question, options, answer, answer, subject, other, group)


def _annotations(path: Path) -> list[str]:
    """The picture of each entry, as a path relative to some folder: both forms of the release."""
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError("no-data", f"{path} does not exist", hint="check the path of --annotations") from None
    except (OSError, ValueError) as err:
        raise CheckpointError("unreadable", f"{path}: {err}", hint="name the JSON file of the release") from None
    found: list[str] = []
    for i, row in enumerate(rows if isinstance(rows, list) else [None]):
        if isinstance(row, dict) and isinstance(row.get("image_path"), str):
            found.append(row["image_path"])
        elif isinstance(row, list) and row and isinstance(row[0], int | str):
            found.append(str(row[0]))
        else:
            raise CheckpointError(
                "bad-data", f"{path}: entry {i} names no picture", hint="name the JSON file of the picture release"
            )
    return found


def _find(name: str, images: Path, where: str) -> Path:
    """Where a picture lies below `images`: by the whole path, its last part, or the number of COCO and VG."""
    last = name.rsplit("/", 1)[-1]
    tried = [images / name.lstrip("/"), images / last]
    if last.isdigit():
        for file in (f"{last}.jpg", f"{int(last):012d}.jpg"):
            tried += [images / file, images / "val2017" / file, images / "vg_images" / file]
    if ".." not in Path(name).parts:
        for path in tried:
            if path.is_file():
                return path
    raise CheckpointError("no-image", f"{where}: no picture {printable(name)} in {images}", hint="check --images")


def read_vsr(captions: Path, images: Path) -> list[Item]:
    """The items of a VSR file: is the caption right, "yes" or "no"?

    Each line has `image` or `image_link`, `caption`, `label` (0 or 1), and in the release `relation`, `subj`, `obj`.
    Raises as `read_whatsup` does.
    """
    return list(_vsr_items(captions, images))


def _vsr_items(captions: Path, images: Path) -> Iterator[Item]:
    for count, (number, row) in enumerate(read_rows(captions)):
        where = f"{captions}: line {number}"
        name = row.get("image") or str(row.get("image_link", "")).rsplit("/", 1)[-1]
        if not isinstance(name, str) or not name or not isinstance(row.get("caption"), str):
            raise CheckpointError("bad-data", f"{where}: needs image or image_link, and caption", hint="a file of VSR")
        if row.get("label") not in (0, 1, "0", "1"):
            raise CheckpointError(
                "bad-data", f"{where}: label {row.get('label')!r} is not 0 or 1", hint="a file of VSR"
            )
        statement = row["caption"].strip().rstrip(".")
        question = f'Is the statement "{statement}." right about the image? Answer with yes or no.'
        yield Item(
            str(row.get("id", count)),
            (_find(name, images, where),),
            question,
            ("yes", "no"),
            "yes" if int(row["label"]) else "no",
            *(str(row.get(k, "")) for k in ("relation", "subj", "obj")),
            group=name,
        )
