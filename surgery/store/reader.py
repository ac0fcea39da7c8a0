"""Any stretch of one tensor's bytes, read into memory that the caller owns and uses again.

Reading with `preadv` into small buffers keeps a process at their size, where a mapped file would count as resident.
Standard library only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from surgery.errors import CheckpointError
from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import TensorRef


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
