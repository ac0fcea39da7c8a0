"""Tensors on disk: where each lies, which form one sub-model, and the bytes of a single one.

Nothing here knows how a checkpoint is laid out; torch is imported inside the function that returns a tensor.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.errors import CheckpointError, UsageError, printable

if TYPE_CHECKING:
    import torch


class TensorRef(NamedTuple):
    """Where a tensor lives. `offset` is the file offset of its first byte, or -1 where there is no byte range: inside a
    pickle, or quantised in a GGUF file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Part:
    """A sub-model: its tensors (file order), its config and the names that decide where an output of it goes. `told` is
    the digest of what a GGUF file says beside its tensors, "" elsewhere."""

    name: str
    base: str
    tensors: dict[str, TensorRef]
    config: Mapping[str, Any] | None
    config_file: str | None
    files: tuple[str, ...]
    oddities: tuple[str, ...] = ()
    index: str | None = None  # relative to the root
    told: str = ""


def is_kept(file: str, refs: Iterable[TensorRef]) -> bool:
    """Whether the cache of digests may know a file's tensors. Which ones a pickle holds depends on the key that it was
    opened with."""
    return file.endswith(".gguf") or all(ref.offset >= 0 for ref in refs)


def read_chunks(ref: TensorRef, *, size: int = 4 << 20) -> "Iterator[memoryview]":
    """The bytes of a byte-range tensor, in pieces of at most `size`; each is overwritten by the next."""
    buffer = memoryview(bytearray(min(size, ref.nbytes)))
    with opened(ref) as fd:
        os.posix_fadvise(fd, ref.offset, ref.nbytes, os.POSIX_FADV_SEQUENTIAL)
        for position in range(0, ref.nbytes, size):
            piece = buffer[: min(size, ref.nbytes - position)]
            fill(fd, piece, ref.offset + position, ref)
            yield piece


def read_tensor(ref: TensorRef, *, rows: slice | None = None) -> "torch.Tensor":
    """Read a byte-range tensor (or `rows` of its first axis) into fresh memory with `preadv`."""
    import torch

    from surgery.store.dtypes import torch_dtype

    shape, offset, count = ref.shape, ref.offset, ref.nbytes
    if rows is not None:
        chosen = row_range(ref, rows)
        if shape[0] and ref.nbytes % shape[0]:
            raise UsageError("rows", f"rows of '{printable(ref.name)}' are not whole bytes", hint="read it whole")
        per_row = ref.nbytes // shape[0] if shape[0] else 0
        length = chosen.stop - chosen.start
        shape, offset, count = (length, *shape[1:]), ref.offset + chosen.start * per_row, length * per_row
    raw = torch.empty(count, dtype=torch.uint8)
    if count:
        with opened(ref) as fd:
            fill(fd, memoryview(raw.numpy()), offset, ref)  # type: ignore[arg-type]
    dtype = torch_dtype(ref.dtype)
    return raw if dtype is None else raw.view(dtype).reshape(shape)


def row_range(ref: TensorRef, rows: slice) -> slice:
    """`rows` with both ends filled in. Raises `UsageError` for a scalar or a step."""
    if not ref.shape:
        raise UsageError("rows", f"'{printable(ref.name)}' is a scalar and has no rows", hint="read it whole")
    start, stop, step = rows.indices(ref.shape[0])
    if step != 1:
        raise UsageError("rows", f"rows of '{printable(ref.name)}' must be contiguous", hint="use a slice of step 1")
    return slice(start, max(start, stop))


@contextmanager
def opened(ref: TensorRef) -> Iterator[int]:
    """A descriptor of the tensor's file."""
    try:
        fd = os.open(ref.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise CheckpointError("unreadable", f"{ref.file}: {err.strerror}", hint="it was there a moment ago") from None
    try:
        yield fd
    finally:
        os.close(fd)


def is_hole(ref: TensorRef) -> bool:
    """Whether no byte of a large tensor was ever written; they all read as zero then."""
    if ref.nbytes < 1 << 16:
        return False
    with opened(ref) as fd:
        try:
            return os.lseek(fd, ref.offset, os.SEEK_DATA) >= ref.offset + ref.nbytes
        except OSError as err:  # ENXIO: no data up to the end of the file, which may also end before the tensor does
            return err.errno == errno.ENXIO and os.fstat(fd).st_size >= ref.offset + ref.nbytes


def fill(fd: int, view: memoryview, offset: int, ref: TensorRef) -> None:
    """Read exactly `view` from `offset`."""
    while len(view):
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as err:
            raise CheckpointError("unreadable", f"{ref.file}: {err.strerror}", hint="check the disk") from None
        if count == 0:
            raise CheckpointError(
                "truncated", f"{ref.file}: ends inside '{printable(ref.name)}'", hint="fetch it again"
            )
        view, offset = view[count:], offset + count
