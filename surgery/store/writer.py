"""Write a checkpoint so that a crash leaves the target absent or whole.

Work happens in a hidden folder beside the target. Weight files are planned: header first, space reserved, then bytes at
known offsets in any order. `publish` syncs everything and renames. A journal of finished tensors makes a killed run
resumable. This module moves bytes; it knows no operation and no model.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from surgery.errors import Busy, OutputError, ResourceError
from surgery.store.header import plan_header
from surgery.store.layout import safe_relative

_SYNC_BYTES = 256 << 20
_SYNC_SECONDS = 5.0
_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY}


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file that is yet to be written: its header and where each tensor goes (file offset, bytes)."""

    relative: str
    header: bytes
    places: Mapping[str, tuple[int, int]]
    size: int

    @classmethod
    def plan(
        cls, relative: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str]
    ) -> Self:
        """Lay out `tensors` (name, dtype, shape) in the given order."""
        header, places = plan_header(tensors, metadata=metadata)
        return cls(relative, header, places, len(header) + sum(count for _, count in places.values()))


class Workspace:
    """The hidden folder of one run, its lock and its journal. Use as a context manager.

    `key` names the work: a later run with the same key may resume. Raises `OutputError` when the target exists (unless
    `overwrite`), `Busy` when another run writes it.
    """

    def __init__(self, target: Path, key: str, *, resume: bool = False, overwrite: bool = False) -> None:
        self.target = target.absolute()
        self.key = key
        self.folder = self.target.parent / f".{self.target.name}.surgery-{key[:12]}"
        self.done: dict[str, str] = {}  # tensor -> sha256, as journalled by an earlier run that was killed
        self._resume, self._overwrite = resume, overwrite
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes, self._last_sync = 0, time.monotonic()
        self._files: dict[str, int] = {}
        self._lock: int | None = None
        self._shown = str(target)
        check_target(target, overwrite=overwrite)

    def __enter__(self) -> Self:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            check_target(Path(self._shown), overwrite=self._overwrite)
            self._repair()
            if self.folder.is_dir():
                if self._resume:
                    self.done = _read_journal(self.folder / "journal.jsonl", self.key)
                else:
                    shutil.rmtree(self.folder)
            elif self._resume:
                self._refuse_other_runs()
            (self.folder / "out").mkdir(parents=True, exist_ok=True)
            self._journal = os.open(
                self.folder / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
            if os.fstat(self._journal).st_size == 0:
                self._append([{"surgery": 1, "key": self.key}])
        except OSError as err:
            self._drop_lock()
            raise_os(err, self._shown)
        except BaseException:
            self._drop_lock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for fd in self._files.values():
            os.close(fd)
        os.close(self._journal)
        # Keep what a resume could use; an error of ours before any work was done leaves nothing behind.
        if self.folder.is_dir() and not self._worth_keeping():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._drop_lock()

    @property
    def scratch(self) -> Path:
        """A folder inside the run for state that a resumed run reads again; it is not published."""
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    @property
    def resumable(self) -> bool:
        """Whether the folder holds anything that `--resume` would use."""
        return self.folder.is_dir() and self._worth_keeping()

    def check_space(self, size: int) -> None:
        """Raise `ResourceError` when `size` bytes do not fit beside the target."""
        stat = os.statvfs(self.folder)
        have = stat.f_bavail * stat.f_frsize
        if size > have:
            raise ResourceError(
                "disk-full",
                f"{self._shown}: needs {size:,} bytes and {have:,} are free",
                hint="free some space or name another disk",
            )

    def begin_file(self, planned: PlannedFile) -> bool:
        """Create `planned` with its space reserved and its header written, or reopen it. True when it was there already."""
        path = self._inside(planned.relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.exists()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._files[planned.relative] = fd
            if (
                known
                and os.fstat(fd).st_size == planned.size
                and os.pread(fd, len(planned.header), 0) == planned.header
            ):
                return True
            os.ftruncate(fd, 0)
            if planned.size:
                _reserve(fd, planned.size)
            _pwrite(fd, planned.header, 0)
        except OSError as err:
            raise_os(err, self._shown, need=planned.size)
        return False

    def write(self, planned: PlannedFile, name: str, data: Any) -> None:
        """Put the bytes of tensor `name` at its place."""
        offset, count = planned.places[name]
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        if len(view) != count:
            raise OutputError(
                "wrong-size",
                f"'{name}' has {len(view)} bytes where the plan has {count}",
                hint="a fault in the operation",
            )
        try:
            _pwrite(self._files[planned.relative], view, offset)
        except OSError as err:
            raise_os(err, self._shown)

    def copy_range(self, planned: PlannedFile, at: int, source: int, start: int, count: int) -> None:
        """Move `count` bytes from file descriptor `source` at `start` to file offset `at`, inside the kernel if it can."""
        try:
            copy_range(source, start, self._files[planned.relative], at, count)
        except OSError as err:
            raise_os(err, self._shown)

    def copy_file(self, source: Path, relative: str) -> None:
        """Copy a side file whole; a link is read through, never made."""
        path = self._inside(relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(source, "rb", buffering=0) as reader:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                try:
                    copy_range(reader.fileno(), 0, fd, 0, os.fstat(reader.fileno()).st_size)
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as err:
            raise_os(err, self._shown)

    def put_file(self, relative: str, data: bytes) -> None:
        """Write a side file from memory."""
        path = self._inside(relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                _pwrite(fd, data, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as err:
            raise_os(err, self._shown)

    def note(self, relative: str, name: str, sha256: str, size: int) -> None:
        """Journal a finished tensor; the file is synced before the line counts."""
        self._pending.append({"file": relative, "tensor": name, "sha256": sha256})
        self._pending_bytes += size
        if self._pending_bytes >= _SYNC_BYTES or time.monotonic() - self._last_sync >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Flush the files of journalled tensors, then the journal."""
        if not self._pending:
            return
        try:
            for relative in {row["file"] for row in self._pending}:
                os.fdatasync(self._files[relative])
            self._append(self._pending)
        except OSError as err:
            raise_os(err, self._shown)
        self._pending, self._pending_bytes, self._last_sync = [], 0, time.monotonic()

    def published_path(self, relative: str) -> Path:
        """Where the file will lie once published."""
        return self.target / relative

    def publish(self) -> None:
        """Sync every file and folder and move the result to the target in one step."""
        out = self.folder / "out"
        try:
            for fd in self._files.values():
                os.fsync(fd)
            for folder, _, _ in os.walk(out):
                _sync_folder(Path(folder))
            if self._overwrite and self.target.exists():
                _swap(out, self.target, self._aside)
            else:
                os.rename(out, self.target)  # takes the place of an empty folder and refuses any other one
            _sync_folder(self.target.parent)
        except OSError as err:
            raise_os(err, self._shown)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _aside(self) -> Path:
        return self.target.parent / f".{self.target.name}.surgery-old"

    def _repair(self) -> None:
        """Undo the half-way state of an overwrite that was killed where two renames were needed."""
        if self._aside.exists():
            if self.target.exists():
                shutil.rmtree(self._aside)
            else:
                os.rename(self._aside, self.target)

    def _worth_keeping(self) -> bool:
        scratch = self.folder / "scratch"
        has_scratch = scratch.is_dir() and any(f.is_file() for f in scratch.rglob("*"))
        return has_scratch or len(_read_journal(self.folder / "journal.jsonl", self.key)) > 0

    def _refuse_other_runs(self) -> None:
        others = sorted(self.target.parent.glob(f".{_glob_escape(self.target.name)}.surgery-*"))
        if [o for o in others if o.is_dir() and o != self._aside]:
            raise OutputError(
                "changed-plan",
                f"{self._shown}: an unfinished run is there, of another command or other parents",
                hint="repeat the command exactly as it was, or drop --resume to start over",
            )

    def _inside(self, relative: str) -> Path:
        if not safe_relative(relative):
            raise OutputError(
                "unsafe-path", f"{relative!r} would leave the output folder", hint="a fault in the operation"
            )
        return self.folder / "out" / relative

    def _append(self, rows: list[dict[str, Any]]) -> None:
        _write_all(self._journal, "".join(json.dumps(row) + "\n" for row in rows).encode())
        os.fsync(self._journal)

    def _take_lock(self) -> None:
        path = self.target.parent / f".{self.target.name}.surgery.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 4096, 0).decode("utf-8", "replace").strip()
                os.close(fd)
                raise Busy(
                    "output",
                    f"{self._shown}: another run writes it ({holder or 'unknown'})",
                    hint="wait for it, or name another -o",
                ) from None
            # The holder removes the file when it ends: what we locked may no longer be what the path names.
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
            os.close(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n".encode(), 0)
        self._lock, self._lock_path = fd, path

    def _drop_lock(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, or that `overwrite` may not replace (a link, a file, a folder that is no checkpoint)."""
    if target.is_symlink():
        raise OutputError("exists", f"{target}: is a link", hint="name a folder that is not there yet")
    if not target.exists():
        return
    empty = target.is_dir() and not any(target.iterdir())
    if not overwrite and not empty:
        raise OutputError(
            "exists", f"{target}: is already there", hint="name another -o, or pass --overwrite to replace it"
        )
    if overwrite and not empty and not (target / "surgery.json").is_file():
        raise OutputError("exists", f"{target}: --overwrite replaces only what surgery made", hint="name another -o")


def copy_range(source: int, start: int, target: int, at: int, count: int) -> None:
    """Copy bytes between descriptors with `copy_file_range`, or through a buffer where the kernel will not."""
    while count > 0:
        try:
            moved = os.copy_file_range(source, target, min(count, 1 << 30), start, at)
        except OSError as err:
            if err.errno not in _NO_RANGE_COPY:
                raise
            moved = 0
        if moved == 0:
            piece = os.pread(source, min(count, 4 << 20), start)
            if not piece:
                raise OSError(errno.EIO, "the source became shorter while it was copied")
            _pwrite(target, piece, at)
            moved = len(piece)
        start, at, count = start + moved, at + moved, count - moved


def raise_os(err: OSError, shown: str, *, need: int | None = None) -> NoReturn:
    """Turn an OSError met while writing `shown` into the error of ours that it means."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        room = f", needs {need:,} bytes" if need else ""
        raise ResourceError(
            "disk-full", f"{shown}: no space left{room}", hint="free some space or name another disk"
        ) from err
    raise OutputError(
        "not-writable", f"{shown}: {err.strerror or err}", hint="check the folder and its rights"
    ) from err


def atomic_write(path: Path, data: bytes) -> None:
    """Write one small file (a picture, a table) whole or not at all, honouring umask."""
    temporary = path.parent / f".{path.name}.surgery-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise_os(err, str(path), need=len(data))


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def _pwrite(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def _read_journal(path: Path, key: str) -> dict[str, str]:
    done: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return done
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break  # the last line of a killed run may be torn
        if "key" in row and row["key"] != key:
            return {}
        if "tensor" in row:
            done[f"{row['file']}\0{row['tensor']}"] = row["sha256"]
    return done


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(out: Path, target: Path, aside: Path) -> None:
    exchange = 2  # RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        at_cwd = -100
        if libc.renameat2(at_cwd, os.fsencode(out), at_cwd, os.fsencode(target), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code))
    os.rename(target, aside)
    os.rename(out, target)
    shutil.rmtree(aside)


def _glob_escape(name: str) -> str:
    from glob import escape

    return escape(name)
