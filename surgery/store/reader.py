"""Any stretch of one tensor's bytes: read into memory that the caller owns and uses again, or looked at where it lies.

`preadv` into small buffers keeps a process at their size, where a mapped file would count as resident. Where only a few
MiB are mapped at a time that holds too, and no byte is copied. Standard library only.
"""

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from surgery.errors import CheckpointError
from surgery.store.checkpoint import Checkpoint, TensorRef

_WINDOW = 4 << 20  # bytes of a file that are mapped at a time
_POPULATE_READ = 22  # Linux' MADV_POPULATE_READ


class Reader(Protocol):
    """Bytes of one tensor in row-major order; `dtype` is the format's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def into(self, view: memoryview, start: int) -> None:
        """Fill `view`, a flat view of bytes, from byte `start` of the tensor on."""
        ...


class FileReader:
    """Reads from an open descriptor."""

    def __init__(self, ref: TensorRef, fd: int) -> None:
        self.name, self.dtype, self.shape = ref.name, ref.dtype, ref.shape
        self._ref, self._fd = ref, fd
        self._window, self._first = memoryview(b""), 0  # what is mapped, and where in the file it begins
        self._maps = sys.platform == "linux"

    def into(self, view: memoryview, start: int) -> None:
        at = self._ref.offset + start
        while len(view):
            try:
                count = os.preadv(self._fd, [view], at)
            except OSError as err:
                raise CheckpointError(
                    "unreadable", f"{self._ref.file}: {err.strerror}", hint="check the disk"
                ) from None
            if count == 0:
                raise CheckpointError(
                    "truncated", f"{self._ref.file}: ends inside '{self.name}'", hint="fetch it again"
                )
            view, at = view[count:], at + count

    def look(self, start: int, count: int) -> memoryview | None:
        """Bytes [start, start + count) in the system's file cache, to be read only; None where they cannot be mapped,
        which `into` finds the reason of."""
        at = self._ref.offset + start - self._first
        if at < 0 or at + count > len(self._window):
            if not self._maps or not self._map(start, count):
                self._maps = False
                return None
            at = self._ref.offset + start - self._first
        return self._window[at : at + count]

    def _map(self, start: int, count: int) -> bool:
        first = self._ref.offset + start
        first -= first % mmap.ALLOCATIONGRANULARITY
        last = min(self._ref.offset + max(start + count, start + _WINDOW), self._ref.offset + self._ref.nbytes)
        try:
            # Private, so that libraries which want a buffer to be writable take it; nothing is written.
            window = mmap.mmap(
                self._fd, last - first, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=first
            )
            # A page that cannot be read is an error here; touching it would be a signal, which ends the process.
            window.madvise(_POPULATE_READ)
        except (OSError, ValueError):
            return False
        # The window before this one goes when the last view of it does.
        self._window, self._first = memoryview(window), first
        return True


class MemoryReader:
    """Reads from bytes that are in memory already: tensors of a pickle, or made on the way."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._data = data

    def into(self, view: memoryview, start: int) -> None:
        view[:] = self._data[start : start + len(view)]


def look(reader: Reader, start: int, count: int, buffer: memoryview) -> memoryview:
    """Bytes [start, start + count) of a reader where they lie, or read into the front of `buffer`. To be read only;
    valid until the next look at the reader or use of the buffer."""
    seen = reader.look(start, count) if isinstance(reader, FileReader) else None
    if seen is None:
        seen = buffer[:count]
        reader.into(seen, start)
    return seen


@contextmanager
def open_range(ref: TensorRef) -> Iterator[Reader]:
    """A reader of a tensor that is a range of a file, which is open until the block ends."""
    try:
        fd = os.open(ref.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise CheckpointError("unreadable", f"{ref.file}: {err.strerror}", hint="it was there a moment ago") from None
    try:
        yield FileReader(ref, fd)
    finally:
        os.close(fd)


@contextmanager
def open_reader(checkpoint: Checkpoint, ref: TensorRef) -> Iterator[Reader]:
    """A reader of `ref`, a tensor of `checkpoint`; its file is open until the block ends."""
    if ref.offset < 0:
        from surgery.store.dtypes import as_bytes

        data = memoryview(as_bytes(checkpoint.read_ref(ref))).cast("B")
        yield MemoryReader(ref.name, ref.dtype, ref.shape, data)
    else:
        with open_range(ref) as reader:
            yield reader
