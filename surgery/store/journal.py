"""The journal of one run: which tensors are finished, so that a killed run can go on.

One JSON object a line. The first line names the work; every other one speaks of a tensor whose bytes were synced before
the line was written. A crash can tear lines, never make one true too early.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class Journal:
    """The open journal at `path` of the work `key`; a journal of other work is emptied. `done` maps "file\\0tensor" to
    the sha256 that an earlier run noted, None where it made no digests. Methods raise OSError."""

    def __init__(self, path: Path, key: str) -> None:
        known = read_journal(path, key)
        self.key = key
        self.done = known or {}
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags | (os.O_TRUNC if known is None else 0), 0o666)
        try:
            if known is None:
                self._write([{"surgery": 1, "key": key}])
            elif os.pread(self._fd, 1, os.fstat(self._fd).st_size - 1) != b"\n":
                _write_all(self._fd, b"\n")  # a torn last line must not swallow the next one
        except OSError:
            self.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Note finished tensors: rows of {"file", "tensor", "sha256"}, null for one without a digest. Their bytes must
        be on disk by now."""
        self._write(rows)

    def forget(self, relative: str | None = None) -> None:
        """Stop trusting what an earlier run noted, for one file or for all. It is on disk when this returns: the bytes
        may be changed then, and this run may be killed as well."""
        self._keep(lambda key, _: relative is not None and not key.startswith(f"{relative}\0"))

    def forget_undigested(self) -> None:
        """The same for tensors that were noted without a digest."""
        self._keep(lambda _, sha: sha is not None)

    def _keep(self, wanted: Callable[[str, str | None], bool]) -> None:
        kept = {k: sha for k, sha in self.done.items() if wanted(k, sha)}
        if len(kept) == len(self.done):
            return
        self.done = kept
        os.ftruncate(self._fd, 0)
        names = ((*key.split("\0", 1), sha) for key, sha in kept.items())
        self._write([{"surgery": 1, "key": self.key}, *({"file": f, "tensor": t, "sha256": s} for f, t, s in names)])

    def close(self) -> None:
        """Close the file; nothing is pending in it."""
        os.close(self._fd)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        _write_all(self._fd, "".join(json.dumps(row) + "\n" for row in rows).encode())
        os.fsync(self._fd)


def read_journal(path: Path, key: str) -> dict[str, str | None] | None:
    """Finished tensors, "file\\0tensor" to sha256 (None: no digest was made), or None when there is no journal of the
    work `key`."""
    try:
        lines = path.read_text("utf-8", errors="replace").split("\n")
    except OSError:
        return None
    rows = []
    for line in lines:
        with suppress(ValueError):  # torn, or the line end that was put behind a torn one
            rows.append(json.loads(line))
    if not rows or not isinstance(rows[0], dict) or rows[0].get("key") != key:
        return None
    return {
        f"{row['file']}\0{row['tensor']}": row["sha256"]
        for row in rows[1:]
        if isinstance(row, dict)
        and all(isinstance(row.get(k), str) for k in ("file", "tensor"))
        and isinstance(row.get("sha256", 0), str | None)
    }


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]
