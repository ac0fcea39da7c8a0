"""The cache of results, addressed by the key of the work that made them.

`v1/nodes/ab/<key>/` are published checkpoints, read-only; `v1/locks/<key>` is held by whoever reads one, and its time
says when it was last used. `v1/results.sqlite` remembers what each key gave and where a result lies outside the cache,
and by their own keys where single tensors lie. All of it only saves work: without a usable folder everything is
computed, and what does not match its record any more is dropped.
"""

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from surgery.errors import SurgeryError
from surgery.store import digests
from surgery.store.checkpoint import open_checkpoint
from surgery.store.digests import cache_folder
from surgery.store.layout import LINEAGE_FILE
from surgery.store.record import is_intact, read_record, undigested

Warn = Callable[[str], None]


class Known(NamedTuple):
    """What a key gave: the digests of the result and where it was last put."""

    digest: str
    config: str
    path: str


class Piece(NamedTuple):
    """A range of a file that holds a tensor made before: `identity` is that of the file then."""

    file: str
    identity: tuple[int, int, int, int]
    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A node of the cache as `surgery cache ls` shows it. `used` is in seconds since 1970, `record` None where it is
    damaged."""

    key: str
    path: Path
    size: int
    used: float
    record: Mapping[str, Any] | None


def node_path(key: str) -> Path:
    """Where the result of the work `key` is kept."""
    return cache_folder() / "nodes" / key[:2] / key


# What was made


def recall(key: str) -> Known | None:
    """What the work `key` gave when it was last done here."""
    rows = _ask("SELECT digest, config, path FROM results WHERE key=?", (key,))
    return Known(*rows[0]) if rows else None


def keep_result(key: str, known: Known) -> None:
    """Remember what the work `key` gave."""
    _tell("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", [(key, *known)])


def recall_step(recipe: str, step: str) -> dict[str, Any] | None:
    """What a step of a recipe was when it was last run: the words of `keep_step`."""
    rows = _ask("SELECT about FROM steps WHERE recipe=? AND step=?", (recipe, step))
    with suppress(ValueError):
        about = json.loads(rows[0][0]) if rows else None
        return about if isinstance(about, dict) else None
    return None


def keep_step(recipe: str, step: str, about: Mapping[str, Any]) -> None:
    """Remember what a step was."""
    _tell("INSERT OR REPLACE INTO steps VALUES (?, ?, ?)", [(recipe, step, json.dumps(about))])


def recall_tensors(keys: Iterable[str]) -> dict[str, Piece]:
    """Where tensors of these keys lie, in files that have not been touched since."""
    wanted = list(keys)
    found: dict[str, Piece] = {}
    now: dict[str, tuple[int, int, int, int] | None] = {}
    for start in range(0, len(wanted), 500):
        part = wanted[start : start + 500]
        marks = ",".join("?" * len(part))
        for row in _ask(f"SELECT * FROM tensors WHERE key IN ({marks})", part):
            piece = Piece(row[1], (row[2], row[3], row[4], row[5]), row[6], row[7], row[8])
            if piece.file not in now:
                try:
                    now[piece.file] = digests.identity(piece.file)
                except OSError:
                    now[piece.file] = None
            if now[piece.file] == piece.identity:
                found[row[0]] = piece
    return found


def keep_tensors(pieces: Mapping[str, Piece]) -> None:
    """Remember where tensors lie, by key."""
    rows = [(k, p.file, *p.identity, p.offset, p.nbytes, p.sha256) for k, p in pieces.items()]
    _tell("INSERT OR REPLACE INTO tensors VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


# Results that lie there


def find_whole(path: Path, key: str, warn: Warn) -> dict[str, Any] | None:
    """The record of the folder at `path` if it is still, byte for byte, the result of the work `key`; one that says
    nothing of some tensors' bytes is not taken."""
    if not (path / LINEAGE_FILE).is_file():
        return None
    try:
        record = read_record(path / LINEAGE_FILE)
        if record["steps"][-1]["key"] != f"sha256:{key}" or undigested(record):
            return None
        fault = _fault(path, record) if is_intact(record) else "its record was altered"
    except (SurgeryError, OSError) as err:
        fault = getattr(err, "message", None) or str(err)
    if fault is None:
        return record
    warn(f"{path} is no longer what was made there ({fault}): made anew")
    return None


def find_node(key: str, warn: Warn) -> Path | None:
    """The cached result of the work `key`; one that is damaged is dropped."""
    path = node_path(key)
    try:
        if not path.is_dir():
            return None
    except OSError:
        return None
    if find_whole(path, key, warn) is None:
        drop(path)
        return None
    touch(key)
    return path


def _fault(path: Path, record: Mapping[str, Any]) -> str | None:
    """Why the folder is not what its record says; tensors that have not been touched since are not read again."""
    for row in record["output"]["files"]:
        file = path / row["path"]
        if not file.is_file() or file.stat().st_size != row["size"]:
            return f"{row['path']} is missing or has another size"
        if "sha256" in row and digests.file_digest(file) != row["sha256"]:
            return f"{row['path']} was altered"
    checkpoint = open_checkpoint(path)
    recorded = {name: row["sha256"] for name, row in record["tensors"].items()}
    return None if checkpoint.tensor_digests == recorded else "tensors were altered"


def protect(path: Path) -> None:
    """Make the files of a node read-only: an edit in place would spoil every later use."""
    with suppress(OSError):
        for file in path.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(file.stat().st_mode & ~0o222)


def drop(path: Path) -> None:
    """Remove a node."""
    shutil.rmtree(path, ignore_errors=True)


# Use and age


def touch(key: str) -> None:
    """Note that a node is used now. A clock that was put back must not make it look old: a use is later than all
    others."""
    folder = cache_folder() / "locks"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        latest = max((e.stat().st_mtime_ns for e in os.scandir(folder)), default=0)
        stamp = max(time.time_ns(), latest + 1)
        (folder / key).touch()
        os.utime(folder / key, ns=(stamp, stamp))


@contextmanager
def in_use(key: str) -> Iterator[None]:
    """Hold a node: it is not collected meanwhile."""
    folder = cache_folder() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / key, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError:
        yield  # a folder that cannot be written is not collected either
        return
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def entries() -> list[Entry]:
    """All nodes, the longest unused first. Raises OSError when the folder cannot be read."""
    folder = cache_folder()
    found = []
    for path in sorted((folder / "nodes").glob("??/*")) if _readable(folder) else []:
        if not path.is_dir() or path.name.startswith("."):
            continue
        size = sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file())
        lock = folder / "locks" / path.name
        used = lock.stat().st_mtime if lock.exists() else path.stat().st_mtime
        record = None
        with suppress(SurgeryError):
            record = read_record(path / LINEAGE_FILE)
        found.append(Entry(path.name, path, size, used, record))
    return sorted(found, key=lambda e: (e.used, e.key))


def collect(max_size: int, *, dry_run: bool = False) -> tuple[list[Entry], list[Entry]]:
    """Remove the longest unused nodes until the rest takes at most `max_size` bytes. Returns (removed, held back
    because somebody uses them). Unfinished work whose process is gone goes first."""
    if not dry_run:
        _remove_leftovers()
    everything = entries()
    total = sum(e.size for e in everything)
    removed: list[Entry] = []
    held: list[Entry] = []
    for entry in everything:
        if total <= max_size:
            break
        lock = cache_folder() / "locks" / entry.key
        with _exclusive(lock) as free:
            if not free:
                held.append(entry)
                continue
            if not dry_run:
                drop(entry.path)
                lock.unlink(missing_ok=True)
        removed.append(entry)
        total -= entry.size
    return removed, held


def _remove_leftovers() -> None:
    for path in (cache_folder() / "nodes").glob("??/.*.surgery-*"):
        target = path.name.removeprefix(".").rpartition(".surgery-")[0]
        with _exclusive(path.parent / f".{target}.surgery.lock") as free:
            if free and path.is_dir():
                drop(path)


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock at `path`, which is held inside."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        yield err.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return
    try:
        yield True
    finally:
        if not existed:
            path.unlink(missing_ok=True)
        os.close(fd)


def _readable(folder: Path) -> bool:
    if not folder.exists():
        return False
    os.listdir(folder)  # says why, where it may not be read
    return True


# The table

_TABLES = (
    "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, digest TEXT, config TEXT, path TEXT)",
    "CREATE TABLE IF NOT EXISTS steps (recipe TEXT, step TEXT, about TEXT, PRIMARY KEY (recipe, step))",
    "CREATE TABLE IF NOT EXISTS tensors (key TEXT PRIMARY KEY, file TEXT, dev INT, ino INT, size INT, mtime INT, "
    "offset INT, nbytes INT, sha256 TEXT)",
)


def _ask(query: str, values: Iterable[Any]) -> list[tuple[Any, ...]]:
    try:
        with _table() as table:
            return list(table.execute(query, tuple(values)))
    except (OSError, sqlite3.Error):
        return []


def _tell(query: str, rows: Iterable[tuple[Any, ...]]) -> None:
    with suppress(OSError, sqlite3.Error), _table() as table:
        table.executemany(query, list(rows))


@contextmanager
def _table() -> Iterator[sqlite3.Connection]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.sqlite"
    connection = sqlite3.connect(file, timeout=5)
    try:
        try:
            for statement in _TABLES:
                connection.execute(statement)
        except sqlite3.DatabaseError as err:
            if "not a database" not in str(err) and "malformed" not in str(err):
                raise
            connection.close()
            file.unlink(missing_ok=True)  # it only saves work
            connection = sqlite3.connect(file, timeout=5)
            for statement in _TABLES:
                connection.execute(statement)
        with connection:
            yield connection
    finally:
        connection.close()
