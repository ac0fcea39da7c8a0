"""What a model answered, item by item, as JSON lines: a run that was killed goes on, a file never mixes two settings.

The first line says what was measured and how (`settings`); each other line is one finished item with its `id`. A line
is written by one append, so a crash can tear only the last one, and that is dropped when the file is opened again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import Busy, CheckpointError, OutputError, UsageError, printable
from surgery.store.writer import raise_os

FORMAT = 1


@dataclass(frozen=True)
class RecordFile:
    """A file of records as read: what was measured and how, and the items by id in the order of the file."""

    path: Path
    kind: str
    settings: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]


class Records:
    """An open file of records of `kind` made with `settings` (JSON values); `done` holds the items of an earlier run.

    A file that is there is gone on with if `resume`, replaced if `overwrite`, and else refused with OutputError.
    Raises UsageError naming each setting that differs from those of the file, Busy when another run writes to it.
    Use it as a context manager.
    """

    def __init__(
        self, path: Path, kind: str, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        self._wanted = {"surgery_records": FORMAT, "kind": kind, "settings": json.loads(json.dumps(dict(settings)))}
        there = os.path.lexists(path)
        if there and not (path.is_file() and not path.is_symlink() and (resume or overwrite)):
            raise OutputError("exists", f"{path}: is already there", hint="go on with --resume, or pass --overwrite")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o666)
        except OSError as err:
            raise_os(err, str(path))
        try:
            self._lock()
            self.done: dict[str, Mapping[str, Any]] = self._read(resume and not overwrite)
        except BaseException:
            os.close(self._fd)
            if not there and os.path.getsize(path) == 0:  # of a full disk: not even its first line is in it
                os.unlink(path)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one finished item, which has an `id` that the file does not hold yet."""
        name = str(row["id"])
        if name in self.done:
            raise UsageError("repeated-id", f"{self.path}: item '{printable(name)}' twice", hint="ids must be unique")
        self._write({**row, "id": name})
        self.done[name] = row

    def close(self) -> None:
        """Bring everything to disk and let go of the file."""
        try:
            os.fsync(self._fd)
        except OSError as err:
            raise_os(err, str(self.path))
        finally:
            os.close(self._fd)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                "records", f"{self.path}: another run is writing to it", hint="wait for it, or name another file"
            ) from None
        except OSError:
            return  # a file system without locks: two runs to one file cannot be told apart there

    def _read(self, resume: bool) -> dict[str, Mapping[str, Any]]:
        try:
            content = _content(self._fd)
            whole = content[: content.rfind(b"\n") + 1] if resume else b""
            if len(whole) < len(content):
                os.ftruncate(self._fd, len(whole))
        except OSError as err:
            raise_os(err, str(self.path))
        if not whole:
            self._write(self._wanted)
            return {}
        found = _parse(self.path, whole)
        differing = _differing(self._wanted["settings"], found.settings)
        if found.kind != self._wanted["kind"]:
            differing = [f"it holds {found.kind}, not {self._wanted['kind']}"]
        if differing:
            raise UsageError(
                "other-settings",
                f"{self.path}: was made with other settings: {'; '.join(differing[:4])}",
                hint="name another file, or replace it with --overwrite",
            )
        return dict(found.rows)

    def _write(self, row: Mapping[str, Any]) -> None:
        data = memoryview((json.dumps(row, ensure_ascii=True) + "\n").encode())
        try:
            while len(data):
                data = data[os.write(self._fd, data) :]
        except OSError as err:
            raise_os(err, str(self.path), need=len(data))


def read_records(path: Path) -> RecordFile:
    """Read a file of records; a torn last line is left out. Raises CheckpointError for anything else that is wrong."""
    try:
        content = path.read_bytes()
    except OSError as err:
        raise CheckpointError("unreadable", f"{path}: {err.strerror}", hint="check the path and its rights") from None
    return _parse(path, content[: content.rfind(b"\n") + 1])


def fingerprint(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys: how data and prompts are named in settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _content(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    data = bytearray()
    while len(data) < size and (piece := os.pread(fd, size - len(data), len(data))):
        data += piece
    return bytes(data)


def _parse(path: Path, content: bytes) -> RecordFile:
    lines = _objects(path, content)
    head = next(lines, None)
    if head is None or head.get("surgery_records") != FORMAT or not isinstance(head.get("settings"), dict):
        raise CheckpointError(
            "not-records",
            f"{path}: not a file of records of format {FORMAT}",
            hint="name a file that an evaluation of ours wrote with --out",
        )
    rows: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(lines, 2):
        name = row.get("id")
        if not isinstance(name, str) or name in rows:
            what = f"repeats item '{printable(name)}'" if isinstance(name, str) else "has no id"
            raise CheckpointError("bad-records", f"{path}: line {number} {what}", hint="restore or remove the file")
        rows[name] = row
    return RecordFile(path, str(head.get("kind")), head["settings"], rows)


def _objects(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CheckpointError(
                "bad-records", f"{path}: line {number} is not a JSON object", hint="restore or remove the file"
            )
        yield row


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    keys = [*mine, *(k for k in theirs if k not in mine)]
    return [f"{k} {_short(theirs.get(k))}, now {_short(mine.get(k))}" for k in keys if mine.get(k) != theirs.get(k)]


def _short(value: Any) -> str:
    text = printable(json.dumps(value), limit=80)
    return text if len(text) <= 40 else text[:39] + "…"
