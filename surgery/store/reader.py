"""Any stretch of one tensor's bytes, read into memory that the caller owns and uses again.

Reading with `preadv` into small buffers keeps a process at their size, where a mapped file would count as resident, and
tells of a file that became shorter by an error, where a mapped one would by a signal. Code that bears with both may
look at a file through a small window instead, which saves a copy. Standard library only.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import TensorRef, fill, opened

_WINDOW = 4 << 20  # bytes
_LARGE_PAGE = 2 << 20  # bytes; a window that begins at a multiple is mapped by such pages where the kernel holds them


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
        self._window, self._first = memoryview(b""), 0

    def into(self, view: memoryview, start: int) -> None:
        fill(self._fd, view, self._ref.offset + start, self._ref)

    def mapped(self, start: int, count: int) -> memoryview | None:
        """`count` bytes from byte `start` on where the kernel holds the file, or None where it cannot be mapped.

        Looking at them is a bus error (a signal) once the file is cut. They are part of the process's memory until
        nothing refers to them and another call has moved the window.
        """
        at = self._ref.offset + start
        if not self._first <= at <= at + count <= self._first + len(self._window):
            self._window = memoryview(b"")  # the old one goes before the new one comes
            self._first = at // _LARGE_PAGE * _LARGE_PAGE
            stop = max(at + count, min(self._first + _WINDOW, self._ref.offset + self._ref.nbytes))
            try:
                found = mmap.mmap(self._fd, stop - self._first, prot=mmap.PROT_READ, offset=self._first)
            except (OSError, ValueError):  # the latter where the file ends before
                return None
            self._window = memoryview(found)
        return self._window[at - self._first : at - self._first + count]


class MemoryReader:
    """Reads from bytes that are in memory already: tensors of a pickle, or made on the way."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._data = data

    def into(self, view: memoryview, start: int) -> None:
        view[:] = self._data[start : start + len(view)]


@contextmanager
def open_range(ref: TensorRef) -> Iterator[Reader]:
    """A reader of a tensor that is a range of a file, which is open until the block ends."""
    with opened(ref) as fd:
        yield FileReader(ref, fd)


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
