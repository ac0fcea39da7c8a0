"""Ranges of bytes in open files: reserved, written at offsets, and copied inside the kernel without their holes."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

_MAY_HAVE_HOLES = 1 << 20  # bytes; shorter ranges are copied without a look
_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY, errno.EPERM}


def copy_range(source: int, start: int, target: int, at: int, count: int) -> None:
    """Copy bytes between descriptors with `copy_file_range`, or through a buffer where the kernel will not. Holes are
    left out: what is written is zero before."""
    if count >= _MAY_HAVE_HOLES:
        for begin, length in _data_ranges(source, start, count):
            _copy_data(source, begin, target, at + begin - start, length)
    else:
        _copy_data(source, start, target, at, count)


def _copy_data(source: int, start: int, target: int, at: int, count: int) -> None:
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
            write_at(target, piece, at)
            moved = len(piece)
        start, at, count = start + moved, at + moved, count - moved


def _data_ranges(source: int, start: int, count: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what was ever written within the range, in order."""
    at, stop = start, start + count
    if stop > os.fstat(source).st_size:
        yield start, count  # it ends too early: copying says so
        return
    while at < stop:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        if begin >= stop:
            return
        at = min(os.lseek(source, begin, os.SEEK_HOLE), stop)
        yield begin, at - begin


def allocated(path: str, size: int) -> int:
    """How many bytes of disk a file of `size` bytes takes: less than that where it has holes."""
    with suppress(OSError):
        return min(os.stat(path).st_blocks * 512, size)
    return size


def reserve(fd: int, size: int) -> None:
    """Give the file `size` bytes, with their room on disk where the file system can. Raises OSError."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def start_writing(fd: int, offset: int, count: int) -> None:
    """Have a range that was written begin its way to disk, without waiting: less is left for the sync at the end. Where
    the system cannot be asked for it, that sync does it all."""
    libc = _libc()
    if count and hasattr(libc, "sync_file_range"):
        begin = 2  # SYNC_FILE_RANGE_WRITE
        libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(begin))


@cache
def _libc() -> ctypes.CDLL:
    """The C library, looked up once: a large tensor begins its way to disk in many parts."""
    return ctypes.CDLL(None)
