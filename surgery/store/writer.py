"""Write a checkpoint so that a crash leaves the target absent or whole.

Work happens in a hidden folder beside the target. Weight files are planned: header first, space reserved, then bytes at
known offsets in any order. `publish` syncs everything and renames. A journal of finished tensors makes a killed run
resumable. This module moves bytes; it knows no operation and no model.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from surgery.errors import Busy, CheckpointError, OutputError, ResourceError, SurgeryError
from surgery.store.header import plan_header
from surgery.store.journal import Journal, read_journal
from surgery.store.layout import safe_relative
from surgery.store.ranges import allocated, copy_range, reserve, write_at

_SYNC_BYTES = 256 << 20
_SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file that is yet to be written: its header and where each tensor goes (file offset, bytes).
    `taken_from` is the file that it is to be equal to, where it is one."""

    relative: str
    header: bytes
    places: Mapping[str, tuple[int, int]]
    size: int
    taken_from: str | None = None

    @classmethod
    def plan(
        cls, relative: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str]
    ) -> Self:
        """Lay out `tensors` (name, dtype, shape) in the given order."""
        header, places = plan_header(tensors, metadata=metadata)
        return cls(relative, header, places, len(header) + sum(count for _, count in places.values()))


class Workspace:
    """The hidden folder of one run, its lock and its journal. Use as a context manager.

    `key` names the work: a later run with the same key may resume. With `link` "hard", files that equal one of a parent
    become hard links (`linked`). Raises `OutputError` when the target exists (unless `overwrite`), `Busy` when another
    run writes it.
    """

    def __init__(
        self, target: Path, key: str, *, resume: bool = False, overwrite: bool = False, link: str = "copy"
    ) -> None:
        self.target = target.absolute()
        self.key = key
        self.folder = self.target.parent / f".{self.target.name}.surgery-{key[:12]}"
        self._resume, self._overwrite, self._link = resume, overwrite, link
        self.linked: set[str] = set()
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes, self._last_sync = 0, time.monotonic()
        self._files: dict[str, int] = {}
        self._made: set[str] = set()
        self._journal: Journal
        self._lock: int | None = None
        self._shown = str(target)
        check_target(target, overwrite=overwrite)

    def __enter__(self) -> Self:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            check_target(Path(self._shown), overwrite=self._overwrite)
            self._repair()
            if self.folder.is_symlink():
                self.folder.unlink()  # not ours: a run makes a folder
            if self.folder.is_dir():
                if not self._resume:
                    shutil.rmtree(self.folder)
            elif self._resume:
                self._refuse_other_runs()
            (self.folder / "out").mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.folder / "journal.jsonl", self.key)
        except OSError as err:
            self._leave()
            raise_os(err, self._shown)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.folder.is_dir():
            with suppress(SurgeryError):
                self.sync()  # what is finished by now need not be done again
        for fd in self._files.values():
            os.close(fd)
        self._journal.close()
        self._leave()

    def _leave(self) -> None:
        # Keep what a resume could use; an error of ours before any work was done leaves nothing behind.
        with suppress(OSError):
            if self._lock is not None and self.folder.is_dir() and not self._worth_keeping():
                shutil.rmtree(self.folder)
        self._drop_lock()

    @property
    def scratch(self) -> Path:
        """A folder inside the run for state that a resumed run reads again; it is not published."""
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def check_space(self, size: int) -> None:
        """Raise `ResourceError` when `size` bytes do not fit beside the target; what a resumed run holds counts."""
        stat = os.statvfs(self.folder)
        held = sum(f.stat().st_blocks * 512 for f in (self.folder / "out").rglob("*") if f.is_file())
        have = stat.f_bavail * stat.f_frsize + held
        if size > have:
            raise ResourceError(
                "disk-full",
                f"{self._shown}: needs {size:,} bytes and {have:,} are free",
                hint="free some space or name another disk",
            )

    def need(self, planned: PlannedFile) -> int:
        """Bytes of disk that `planned` takes; a file that is taken from another may have holes, or be a link."""
        if planned.taken_from is None:
            return planned.size
        return 0 if self._link == "hard" else allocated(planned.taken_from, planned.size)

    def begin_file(self, planned: PlannedFile) -> bool:
        """Create `planned` with its space reserved and its header written, or reopen it: True when it was there."""
        path = self._inside(planned.relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.exists()
            if known and path.stat().st_nlink > 1:
                path.unlink()  # a link of an earlier run to a file of the parent, which must not be written to
                known = False
            if planned.taken_from is not None and self._link == "hard":
                self._link_file(path, planned)
                return known
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._files[planned.relative] = fd
            self._made.add(planned.relative)
            if (
                known
                and os.fstat(fd).st_size == planned.size
                and os.pread(fd, len(planned.header), 0) == planned.header
            ):
                return True
            self.forget(planned.relative)
            os.ftruncate(fd, 0)
            if planned.size and self.need(planned) >= planned.size:
                reserve(fd, planned.size)
            else:
                os.ftruncate(fd, planned.size)
            write_at(fd, planned.header, 0)
        except OSError as err:
            raise_os(err, self._shown, need=planned.size)
        return False

    def _link_file(self, path: Path, planned: PlannedFile) -> None:
        assert planned.taken_from is not None
        path.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(planned.taken_from), path)
        except OSError as err:
            raise OutputError(
                "no-link",
                f"{self._shown}: {planned.taken_from} cannot be linked there: {err.strerror}",
                hint="leave out --link hard, or name an -o on the same disk",
            ) from None
        self._made.add(planned.relative)
        self.linked.add(planned.relative)

    def forget(self, relative: str | None = None) -> None:
        """Stop trusting what an earlier run noted, for one file or for all, before its bytes change."""
        try:
            self._journal.forget(relative)
        except OSError as err:
            raise_os(err, self._shown)

    def forget_undigested(self) -> None:
        """Stop trusting what an earlier run noted without a digest."""
        try:
            self._journal.forget_undigested()
        except OSError as err:
            raise_os(err, self._shown)

    @property
    def done(self) -> Mapping[str, str | None]:
        """ "file\0tensor" -> sha256 of what an earlier run that was killed had finished; None where it made none."""
        return self._journal.done

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
            write_at(self._files[planned.relative], view, offset)
        except OSError as err:
            raise_os(err, self._shown)

    def copy_range(self, planned: PlannedFile, at: int, source: int, start: int, count: int) -> None:
        """Move `count` bytes from descriptor `source` at `start` to file offset `at`, inside the kernel if it can."""
        try:
            copy_range(source, start, self._files[planned.relative], at, count)
        except OSError as err:
            raise_os(err, self._shown)

    def copy_file(self, source: Path, relative: str) -> None:
        """Copy a side file whole; a link is read through, never made."""
        try:
            reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise CheckpointError(
                "unreadable", f"{source}: {err.strerror}", hint="check the file and its rights"
            ) from None
        try:
            with self._new_file(relative) as fd:
                size = os.fstat(reader).st_size
                os.ftruncate(fd, size)
                copy_range(reader, 0, fd, 0, size)
        finally:
            os.close(reader)

    def link_file(self, source: Path, relative: str) -> None:
        """Share a file's bytes: an edit of one in place is an edit of both. Copied where the disk is another one."""
        path = self._inside(relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(source, path)
        except OSError as err:
            if err.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise_os(err, self._shown)
            self.copy_file(source, relative)
        self._made.add(relative)

    def put_file(self, relative: str, data: bytes) -> None:
        """Write a side file from memory."""
        with self._new_file(relative) as fd:
            write_at(fd, data, 0)

    @contextmanager
    def _new_file(self, relative: str) -> Iterator[int]:
        """A descriptor of a side file, emptied, and synced at the end."""
        path = self._inside(relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as err:
            raise_os(err, self._shown)
        self._made.add(relative)

    def note(self, relative: str, name: str, sha256: str | None, size: int) -> None:
        """Journal a finished tensor, with its digest if it has one; the file is synced before the line counts."""
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
            self._journal.append(self._pending)
        except OSError as err:
            raise_os(err, self._shown)
        self._pending, self._pending_bytes, self._last_sync = [], 0, time.monotonic()

    def publish(self) -> None:
        """Sync every file and folder and move the result to the target in one step."""
        out = self.folder / "out"
        try:
            for fd in self._files.values():
                os.fsync(fd)
            # Deepest folders first: what an earlier run with other shards left must not become part of the result.
            for place, _, names in os.walk(out, topdown=False):
                folder = Path(place)
                for name in names:
                    if (folder / name).relative_to(out).as_posix() not in self._made:
                        (folder / name).unlink()
                if folder != out and not any(folder.iterdir()):
                    folder.rmdir()
                else:
                    _sync_folder(folder)
            if self._overwrite and self.target.exists():
                _swap(out, self.target, self._aside)
            else:
                os.rename(out, self.target)  # takes the place of an empty folder and refuses any other one
            _sync_folder(self.target.parent)
        except OSError as err:
            raise_os(err, self._shown)
        for run in self._runs():
            shutil.rmtree(run, ignore_errors=True)  # also those of other commands: their target is taken now

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
        return has_scratch or bool(read_journal(self.folder / "journal.jsonl", self.key))

    def _runs(self) -> list[Path]:
        """The folders of all runs to this target; the lock says that none of them is at work but this one."""
        lead = f".{self.target.name}.surgery-"
        found = (
            e for e in os.scandir(self.target.parent) if e.name.startswith(lead) and e.is_dir(follow_symlinks=False)
        )
        return [Path(e.path) for e in found if re.fullmatch("[0-9a-f]{1,12}", e.name.removeprefix(lead))]

    def _refuse_other_runs(self) -> None:
        if self._runs():
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

    def _take_lock(self) -> None:
        path = self.target.parent / f".{self.target.name}.surgery.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
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
    """Refuse a target that exists, or that `overwrite` may not replace (a link, a file, a foreign folder)."""
    try:
        if target.is_symlink():
            raise OutputError("exists", f"{target}: is a link", hint="name a folder that is not there yet")
        if not target.exists():
            return
        empty = target.is_dir() and not any(target.iterdir())
    except OSError as err:
        raise_os(err, str(target))
    if not overwrite and not empty:
        raise OutputError(
            "exists", f"{target}: is already there", hint="name another -o, or pass --overwrite to replace it"
        )
    if overwrite and not empty and not (target / "surgery.json").is_file():
        raise OutputError("exists", f"{target}: --overwrite replaces only what surgery made", hint="name another -o")


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
    """Write one small file (a picture, a table) whole or not at all. A new file follows the umask, a replaced one keeps
    its mode. Raises `OutputError` or `ResourceError`."""
    temporary = path.parent / f".{path.name}.surgery-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a dead process that had the same number
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if path.is_file():
                os.fchmod(fd, path.stat().st_mode & 0o777)
            write_at(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as err:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise_os(err, str(path), need=len(data))


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
