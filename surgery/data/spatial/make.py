"""Make a folder of questions about drawn scenes: `val.jsonl`, `test.jsonl`, the pictures in `img/`, and `scenes.json`,
which says how they were made.

A group is one pair of things in the four relations, each in a picture of its own, as in the controlled photographs of
What's Up: pair and set accuracy are defined on it. A group is never split between validation and test.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from surgery.data.spatial.items import Item, split_groups, write_items
from surgery.data.spatial.scenes import NOUNS, PLACES, RELATIONS, Question, SceneSettings, ask, draw, place
from surgery.errors import OutputError, ResourceError, UsageError
from surgery.store.writer import raise_os

KINDS = ("two", "one", "both")
Report = Callable[[str, Mapping[str, float]], None]


def make_scenes(
    out: Path,
    *,
    groups: int = 125,
    questions: str = "two",
    settings: SceneSettings | None = None,
    val: float = 0.2,
    seed: int = 0,
    overwrite: bool = False,
    report: Report = lambda event, numbers: None,
) -> dict[str, int]:
    """Draw `groups` groups of four questions ("two" objects, "one" object, or every other group of each: "both") into
    the folder `out`, which appears whole or not at all. Returns the number of items of each split.

    Equal arguments give equal bytes. Raises UsageError for arguments out of range, OutputError when `out` is there or
    cannot be written, ResourceError without Pillow.
    """
    settings = settings or SceneSettings()
    _check(out, groups, questions, settings, val, overwrite)
    folder = _scratch(out)
    try:
        (folder / "img").mkdir()
        items: list[Item] = []
        for g in range(groups):
            single = questions == "one" or (questions == "both" and g % 2 == 1)
            items += _group(folder, g, single, settings, seed, first=len(items) + 1)
            report("scenes", {"done": g + 1, "total": groups})
        parts = dict(zip(("val", "test"), split_groups(items, val=val, seed=seed), strict=True))
        for name, part in parts.items():
            write_items(folder / f"{name}.jsonl", part)
        how = {"scenes": 1, "groups": groups, "questions": questions, "val": val, "seed": seed, **asdict(settings)}
        (folder / "scenes.json").write_text(json.dumps(how, indent=2) + "\n")
        os.chmod(folder, 0o777 & ~_umask())
        _publish(folder, out)
    except OSError as err:
        raise_os(err, str(out))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: len(part) for name, part in parts.items()}


def _group(folder: Path, g: int, single: bool, settings: SceneSettings, seed: int, first: int) -> list[Item]:
    """The four items of one group, their pictures written."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng([seed, g])
    pair = [int(n) for n in generator.permutation(len(NOUNS))[: 1 if single else 2]]
    items = []
    for k, wanted in enumerate(PLACES if single else RELATIONS):
        while True:
            objects = place(generator, settings, pair)
            question = ask(objects[0], None if single else objects[1], settings.size)
            if question is not None and question.answer == wanted:
                break
        buffer = BytesIO()
        Image.fromarray(draw(objects, settings, generator)).save(buffer, format="PNG")
        path = folder / "img" / f"{first + k:04d}.png"
        path.write_bytes(buffer.getvalue())
        items.append(_item(f"{first + k:04d}", path, question, group=f"{g:04d}"))
    return items


def _item(name: str, path: Path, question: Question, group: str) -> Item:
    about = [question.subject, *([question.other] if question.other else [])]
    return Item(
        name,
        (path,),
        question.text,
        question.options,
        question.answer,
        question.answer,
        question.subject.name,
        question.other.name if question.other else "",
        group,
        tuple((thing.name, thing.box) for thing in about),
    )


def _check(out: Path, groups: int, questions: str, settings: SceneSettings, val: float, overwrite: bool) -> None:
    if questions not in KINDS:
        raise UsageError("questions", f"--questions {questions}: unknown", hint=f"one of {', '.join(KINDS)}")
    if groups < 2 or not 0 < val < 1 or not 0 < round(val * groups) < groups:
        raise UsageError("groups", f"{groups} groups with a share of {val:g} held out", hint="leave some on each side")
    if settings.objects[1] < 2 and questions != "one":
        raise UsageError("scene", "two things are asked about, but scenes hold one", hint="--objects 2-4")
    if os.path.lexists(out) and not (overwrite and (out / "scenes.json").is_file() and not out.is_symlink()):
        hint = "name another folder" + ("" if overwrite else ", or pass --overwrite to replace scenes made before")
        raise OutputError("exists", f"{out}: is already there", hint=hint)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ResourceError("missing-package", "pictures need Pillow", hint="install surgery[images]") from None


def _scratch(out: Path) -> Path:
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as err:
        raise_os(err, str(out))


def _publish(folder: Path, out: Path) -> None:
    """Rename into place; scenes that are replaced go only after the new ones stand."""
    if not os.path.lexists(out):
        os.rename(folder, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    os.rename(out, aside / "old")
    os.rename(folder, out)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
