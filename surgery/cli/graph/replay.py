"""The command that builds a checkpoint again."""

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import Mismatch, UsageError, printable
from surgery.graph.replay import Replayed, ReplayOptions
from surgery.graph.replay import replay as rebuild
from surgery.graph.run import RunOptions
from surgery.steps import load_step


def replay(
    source: Annotated[
        str, typer.Argument(metavar="OUT", help="What surgery made, or - for its path on standard input.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder of the new build.")],
    parent: Annotated[
        list[str] | None, typer.Option("--parent", metavar="NAME=PATH", help="Where a parent is now, repeatable.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Rebuild parents that are not found from their own records.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="[default: the recorded one]")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: the recorded number]")] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Tensors in work at once [default: the cores].")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that surgery made.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a replay that was interrupted.")] = False,
    offline: flags.Offline = False,
    as_json: flags.JsonNotPath = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Build a checkpoint again from its record and compare; exit 1 when another result comes out.

    Parents are looked for where they were, beside OUT, in the cache and at their hub commit, and must have the recorded
    digests.

    Example:  surgery replay out/hyena --to out/again
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    checkpoint = open_source(source, offline=offline)
    extra = {"workers": workers} if workers else {}
    run = RunOptions(overwrite=overwrite, resume=resume, offline=offline, **extra)
    options = ReplayOptions(_given(parent or []), deep, device, threads, run)
    with output.Progress() as report:
        found = rebuild(checkpoint, to, load_step, options=options, report=report)
    _show(found, as_json=as_json)
    if not found.equal:
        differing = f"{len(found.tensors):,} tensors" if found.tensors else f"{len(found.files):,} files"
        raise Mismatch(
            "replay",
            f"{found.result.path}: {differing} are not as {checkpoint.name} records them: {'; '.join(found.reasons)}",
            hint=f"surgery diff {checkpoint.name} {found.result.path} says by how much",
        )
    unsure = f" ({found.undigested:,} of them, never digested, as they lie there)" if found.undigested else ""
    output.note(
        f"the same: {len(found.result.record['tensors']):,} tensors and every side file are as recorded{unsure}"
    )
    for name in found.assumed:
        output.note(f"parent {printable(name)} was never digested: that it is the one of then is your word")


def _given(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise UsageError("parent", f"--parent {text}: not NAME=PATH", hint="surgery log OUT shows the names")
        found[name] = path
    return found


def _show(found: Replayed, *, as_json: bool) -> None:
    if as_json:
        record = found.result.record
        rows = {"path": str(found.result.path), "equal": found.equal, "digest": record["digest"]}
        counts = {"tensors": len(record["tensors"]), "undigested": found.undigested, "assumed": list(found.assumed)}
        counts |= {"differing": list(found.tensors), "files": list(found.files)}
        output.data_json(rows | counts | {"reasons": list(found.reasons)})
        return
    output.data(str(found.result.path))
    for name in [*found.tensors, *found.files][:10]:
        output.note(f"differs: {printable(name)}")
