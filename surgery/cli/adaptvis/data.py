"""adaptvis data: make scenes, import benchmarks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.errors import UsageError

_Images = Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of the pictures.")]
_Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE.jsonl", help="File to write.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was made before.")]
_Val = Annotated[float | None, typer.Option("--val-fraction", help="Also write val and test files, split by group.")]
_Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]


def make(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to make.")],
    groups: Annotated[
        int, typer.Option("--groups", min=2, help="Sets of four questions, one for each relation.")
    ] = 125,
    questions: Annotated[str, typer.Option("--questions", help="About two things, one, or both.")] = "two",
    objects: Annotated[str, typer.Option("--objects", metavar="A-B", help="Things in a scene.")] = "2-4",
    radius: Annotated[
        str, typer.Option("--radius", metavar="A-B", help="Half the side of a thing, in pixels of 96.")
    ] = "7.5-12",
    noise: Annotated[float, typer.Option("--noise", help="Standard deviation of the noise on pixels, of 255.")] = 10.0,
    size: Annotated[int, typer.Option("--size", help="Side of a picture in pixels; things grow with it.")] = 96,
    val_fraction: Annotated[float, typer.Option("--val-fraction", help="Share of the groups in val.jsonl.")] = 0.2,
    seed: _Seed = 0,
    overwrite: _Overwrite = False,
    as_json: flags.JsonNotPath = False,
    quiet: flags.Quiet = False,
) -> None:
    """Draw scenes of simple things and ask where they are: val.jsonl, test.jsonl and the pictures.

    Example:  surgery adaptvis data make -o scenes

    Harder:  surgery adaptvis data make -o hard --objects 5-6 --radius 4-7 --noise 40
    """
    from surgery.data.spatial.make import make_scenes
    from surgery.data.spatial.scenes import SceneSettings

    output.Talk.quiet = quiet
    few, most = _range("--objects", objects)
    small, large = _range("--radius", radius)
    settings = SceneSettings(size, (int(few), int(most)), (small * size / 96, large * size / 96), noise)
    with output.Progress() as report:
        counts = make_scenes(
            out,
            groups=groups,
            questions=questions,
            settings=settings,
            val=val_fraction,
            seed=seed,
            overwrite=overwrite,
            report=report,
        )
    output.note(f"{counts['val']} questions in {out / 'val.jsonl'}, {counts['test']} in {out / 'test.jsonl'}")
    _answer(out, counts, as_json=as_json)


def import_whatsup(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS.jsonl", help="A question file of AdaptVis.")],
    annotations: Annotated[
        Path, typer.Option("--annotations", metavar="FILE.json", help="The picture release's JSON, in the same order.")
    ],
    images: _Images,
    out: _Out,
    val_fraction: _Val = None,
    seed: _Seed = 1,
    overwrite: _Overwrite = False,
    as_json: flags.JsonNotPath = False,
    quiet: flags.Quiet = False,
) -> None:
    """Import What's Up (Controlled A and B, COCO, VG): question file, annotations and pictures into one file.

    Example:  surgery adaptvis data import whatsup A.jsonl --annotations controlled_images_dataset.json --images data
    -o controlled_a.jsonl --val-fraction 0.2
    """
    from surgery.data.spatial.whatsup import read_whatsup

    output.Talk.quiet = quiet
    flags.check_file("-o", out, ".jsonl", overwrite=overwrite)
    _write(out, read_whatsup(questions, annotations, images), val_fraction, seed, overwrite, as_json=as_json)


def import_vsr(
    captions: Annotated[Path, typer.Argument(metavar="CAPTIONS.jsonl", help="A file of VSR, such as test.jsonl.")],
    images: _Images,
    out: _Out,
    val_fraction: _Val = None,
    seed: _Seed = 1,
    overwrite: _Overwrite = False,
    as_json: flags.JsonNotPath = False,
    quiet: flags.Quiet = False,
) -> None:
    """Import VSR: is the statement about the picture right, yes or no?

    Example:  surgery adaptvis data import vsr test.jsonl --images train2017 -o vsr.jsonl
    """
    from surgery.data.spatial.whatsup import read_vsr

    output.Talk.quiet = quiet
    flags.check_file("-o", out, ".jsonl", overwrite=overwrite)
    _write(out, read_vsr(captions, images), val_fraction, seed, overwrite, as_json=as_json)


def _write(out: Path, items: list[Any], val: float | None, seed: int, overwrite: bool, *, as_json: bool) -> None:
    """One file, or with a share held out two beside it: NAME.val.jsonl and NAME.test.jsonl."""
    from surgery.data.spatial.items import split_groups, write_items

    parts = {out: items}
    if val is not None:
        held, rest = split_groups(items, val=val, seed=seed)
        parts = {out.with_suffix(".val.jsonl"): held, out.with_suffix(".test.jsonl"): rest}
        for path, part in parts.items():
            flags.check_file("-o", path, ".jsonl", overwrite=overwrite)
            if not part:
                raise UsageError("fraction", f"{path} would be empty", hint="another --val-fraction")
    for path, part in parts.items():
        write_items(path, part)
        output.note(f"{len(part)} questions in {path}")
    if not as_json:
        output.data("\n".join(map(str, parts)))
    else:
        output.data_json({"paths": {str(p): len(part) for p, part in parts.items()}})


def _answer(out: Path, counts: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        output.data_json({"path": str(out), "items": counts})
    else:
        output.data(str(out))


def _range(flag: str, text: str) -> tuple[float, float]:
    """ "2-4" as (2, 4); "3" as (3, 3)."""
    first, _, last = text.partition("-")
    try:
        return float(first), float(last or first)
    except ValueError:
        raise UsageError("range", f"{flag} {text}: not two numbers", hint=f"for example {flag} 2-4") from None
