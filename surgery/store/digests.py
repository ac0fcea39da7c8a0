"""Digests of JSON values and of content, and a cache of tensor digests by file identity (device, inode, size, mtime).

The cache only saves hashing again; without a usable cache folder everything works, more slowly. `surgery verify` never
asks it.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8: the form that is hashed."""
    # Infinity is not JSON, but real configs hold it ("time_step_limit": [0.0, Infinity]).
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def canonical_digest(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def content_digest(rows: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """sha256 over the sorted (name, dtype, shape, tensor sha256): equal content gives equal digests in any layout."""
    return canonical_digest(sorted(rows))  # names differ, so nothing after them is compared


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache_folder() -> Path:
    """$SURGERY_CACHE, else surgery/ in $XDG_CACHE_HOME or ~/.cache; its `v1` holds the entries of this format."""
    if own := os.environ.get("SURGERY_CACHE"):
        return Path(own) / "v1"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "surgery" / "v1"


@cache
def zeros_digest(count: int) -> str:
    """sha256 (hex) of `count` zero bytes."""
    state, piece = hashlib.sha256(), bytes(1 << 20)
    for _ in range(count >> 20):
        state.update(piece)
    state.update(piece[: count & (1 << 20) - 1])
    return state.hexdigest()


def lookup(file: str) -> dict[str, str] | None:
    """Tensor digests of `file` if it is still the file they were made from, else None."""
    try:
        with _table() as table:
            row = table.execute(
                "SELECT tensors FROM digests WHERE dev=? AND ino=? AND size=? AND mtime=?", identity(file)
            )
            found = row.fetchone()
            known = json.loads(found[0]) if found else None
            return known if isinstance(known, dict) else None
    except (OSError, sqlite3.Error, ValueError, TypeError):
        return None


def remember(file: str, tensors: Mapping[str, str]) -> None:
    """Keep the digests of all tensors in `file`; a cache that cannot be written is passed over."""
    try:
        with _table() as table:
            row = (*identity(file), json.dumps(dict(tensors)))
            table.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?)", row)
    except (OSError, sqlite3.Error):
        return


def identity(file: str) -> tuple[int, int, int, int]:
    """What a file is known by: device, inode, size and time of change. Raises OSError."""
    found = os.stat(file)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextmanager
def _table() -> Iterator[sqlite3.Connection]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "digests.sqlite", timeout=5)
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS digests (dev INT, ino INT, size INT, mtime INT, tensors TEXT, "
            "PRIMARY KEY (dev, ino, size, mtime))"
        )
        with connection:
            yield connection
    finally:
        connection.close()
