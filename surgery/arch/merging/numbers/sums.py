"""Weighted sums of bfloat16 tensors in files, piece by piece, by the kernels of `surgery.kernels.merging`."""

from collections.abc import Iterator, Sequence

from surgery.arch.merging.numbers.arithmetic import PIECE
from surgery.kernels.merging import COMPILED, weighted_sum
from surgery.store.reader import FileReader, Reader


def weighted_sums(
    weights: Sequence[float], readers: Sequence[Reader], total: int
) -> Iterator[tuple[int, int, memoryview | None]]:
    """(first element, count, bytes) of sum_i w_i W_i, rounded to nearest even; the bytes are valid until the next.

    `weights` are those of float32. The bytes are None where a result is not finite: what that means is not looked into
    here.
    """
    piece = 2 * PIECE  # a megabyte: the kernel takes longer writes in larger parts, and numpy's calls cost nothing
    size = 2 * min(piece, total)
    out = memoryview(bytearray(size))
    inputs = [_Input(reader, size) for reader in readers]
    for start in range(0, total, piece):
        count = min(piece, total - start)
        made = out[: 2 * count]
        yield start, count, made if _sum(made, weights, inputs, 2 * start) else None


def _sum(out: memoryview, weights: Sequence[float], inputs: Sequence["_Input"], start: int) -> bool:
    if COMPILED:
        try:
            return weighted_sum(out, weights, [one.there(start, len(out)) for one in inputs])
        except OSError:
            pass  # a mapped file was cut, or its disk failed: reading it says which
    return weighted_sum(out, weights, [one.read(start, len(out)) for one in inputs])


class _Input:
    """One tensor's bytes: where the file is mapped, or in a buffer of its own."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader, self._size, self._buffer = reader, size, memoryview(b"")

    def there(self, start: int, count: int) -> memoryview:
        """Without a copy if that can be. Only the compiled kernel may look: it outlives a file that becomes shorter."""
        mapped = self._reader.mapped(start, count) if isinstance(self._reader, FileReader) else None
        return self.read(start, count) if mapped is None else mapped

    def read(self, start: int, count: int) -> memoryview:
        if not len(self._buffer):
            self._buffer = memoryview(bytearray(self._size))
        part = self._buffer[:count]
        self._reader.into(part, start)
        return part
