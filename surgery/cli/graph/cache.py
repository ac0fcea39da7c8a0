"""Commands about the cache: what is in it, where, and how much of it is kept."""

import time
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.errors import CheckpointError, Mismatch, UsageError, printable
from surgery.graph.shards import parse_size
from surgery.store import cache
from surgery.store.digests import cache_folder


def ls(as_json: flags.AsJson = False) -> None:
    """List the cached results, the longest unused first.

    Example:  surgery cache ls
    """
    found = _entries()
    rows = [_row(entry) for entry in found]
    if as_json:
        output.data_json({"path": str(cache_folder()), "size": sum(e.size for e in found), "nodes": rows})
        return
    output.table(
        ["key", "operation", "parents", "size", "used"],
        [
            [
                r["key"][:12],
                r["op"] or "damaged",
                ", ".join(r["parents"]),
                output.count(r["size"], "B"),
                _ago(r["used"]),
            ]
            for r in rows
        ],
    )
    output.note(f"{len(rows):,} results, {output.count(sum(e.size for e in found), 'B')} in {cache_folder()}")


def path(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Start of a key: the folder of that result.")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Print the folder of the cache, or of one result in it.

    Example:  surgery inspect $(surgery cache path 3f2a)
    """
    where = cache_folder()
    if key is not None:
        fitting = [e for e in _entries() if e.key.startswith(key.removeprefix("sha256:"))]
        if len(fitting) != 1:
            what = "no result has" if not fitting else f"{len(fitting)} results have"
            raise UsageError("key", f"{what} a key that starts with {printable(key)}", hint="surgery cache ls")
        where = fitting[0].path
    if as_json:
        output.data_json({"path": str(where)})
    else:
        output.data(str(where))


def gc(
    max_size: Annotated[
        str, typer.Option("--max-size", metavar="SIZE", help="What may stay, e.g. 200GB; 0 for nothing.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Remove the longest unused results until the rest fits; what a running command reads stays.

    Example:  surgery cache gc --max-size 50GB
    """
    limit = 0 if max_size.strip() == "0" else parse_size(max_size)
    _entries()  # says why, where the folder cannot be read
    removed, held = cache.collect(limit, dry_run=dry_run)
    freed = sum(e.size for e in removed)
    if as_json:
        output.data_json(
            {"removed": [e.key for e in removed], "freed": freed, "held": [e.key for e in held], "dry_run": dry_run}
        )
        return
    output.data(f"{'would remove' if dry_run else 'removed'} {len(removed):,} results, {output.count(freed, 'B')}")
    for entry in held:
        output.warn(f"{entry.key[:12]} is in use and stays")


def verify(as_json: flags.AsJson = False) -> None:
    """Read every byte of the cached results; what is damaged is dropped, and the exit status is 1.

    Example:  surgery cache verify
    """
    from surgery.errors import SurgeryError
    from surgery.graph.lineage import verify as check
    from surgery.store.checkpoint import open_checkpoint

    faults: dict[str, str] = {}
    found = _entries()
    for entry in found:
        try:
            wrong = check(open_checkpoint(entry.path))
        except SurgeryError as err:
            wrong = [err.message]
        if wrong:
            faults[entry.key] = wrong[0]
            output.warn(f"{entry.key[:12]}: {wrong[0]}: dropped")
            cache.drop(entry.path)
    if as_json:
        output.data_json({"checked": len(found), "dropped": faults})
    else:
        output.data(f"{len(found):,} results checked, {len(faults):,} dropped")
    if faults:
        raise Mismatch("cache", f"{len(faults)} damaged results were dropped", hint="they are made again when needed")


def _entries() -> list[cache.Entry]:
    try:
        return cache.entries()
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{err.filename or cache_folder()}: {err.strerror}", hint="SURGERY_CACHE names another folder"
        ) from None


def _row(entry: cache.Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "key": entry.key,
        "path": str(entry.path),
        "size": entry.size,
        "used": entry.used,
        "op": printable(record["steps"][-1]["op"]) if record else None,
        "parents": [printable(name) for name in record["parents"]] if record else [],
        "digest": record["digest"] if record else None,
    }


def _ago(moment: float) -> str:
    """How long ago; a moment that is yet to come, by a clock that was put back, is now."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"
