"""Weighted sums of bfloat16 tensors, two elements at a time: the bits of the general path for half of its time.

A 32-bit word holds two elements. Shifted left it is the first one as float32, masked it is the second; after the
arithmetic both are rounded where they lie and joined again, so nothing is widened or narrowed by a pass of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from surgery.arch.merging.arithmetic import Array
from surgery.store.reader import Reader

_UPPER, _HALF, _SIXTEEN, _ONE = np.uint32(0xFFFF0000), np.uint32(0x7FFF), np.uint32(16), np.uint32(1)
_INFINITE, _MINUS_INFINITE = 0x7F80, 0xFF80


def weighted_sums(
    weights: Sequence[Any], readers: Sequence[Reader], total: int, piece: int
) -> Iterator[tuple[int, int, memoryview | None]]:
    """(first element, count, bytes) of sum_i w_i W_i, rounded to nearest even; the bytes are valid until the next.

    `weights` are float32. The bytes are None where a result is not finite: what that means is not looked into here.
    `piece` is even.
    """
    sums = None
    for start in range(0, total, piece):
        count = min(piece, total - start)
        if sums is None or count != sums.count:  # the last piece may be shorter, and has buffers of its own
            sums = _Sums(count)
        yield start, count, sums.make(weights, readers, start)


class _Sums:
    """Buffers for pieces of one size. An odd one fills all but a half of its last word, which stays zero."""

    def __init__(self, count: int) -> None:
        self.count, words = count, (count + 1) // 2
        self._nbytes = count * 2
        self._raw = np.zeros(words, np.uint32)
        self._stored = memoryview(self._raw).cast("B")
        self._sums, self._spare = (np.empty((2, words), np.uint32) for _ in range(2))
        self._out = np.empty(words, np.uint32)
        self._made = memoryview(self._out).cast("B")[: self._nbytes]
        self._signed, self._unsigned = self._out.view(np.int16), self._out.view(np.uint16)

    def make(self, weights: Sequence[Any], readers: Sequence[Reader], start: int) -> memoryview | None:
        """The bytes from element `start` on, or None."""
        total, values = self._sums, self._spare
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen at the end
            self._scaled(readers[0], start, weights[0], total)
            for reader, weight in zip(readers[1:], weights[1:], strict=True):
                self._scaled(reader, start, weight, values)
                np.add(total.view(np.float32), values.view(np.float32), total.view(np.float32))
        self._round(total, values)
        # Stored infinities and NaN are the largest numbers of either sign when their bits are read as integers.
        finite = np.maximum.reduce(self._signed) < _INFINITE and np.maximum.reduce(self._unsigned) < _MINUS_INFINITE
        return self._made if finite else None

    def _scaled(self, reader: Reader, start: int, weight: Any, values: Array) -> None:
        """The piece of one input as float32, first elements of all words before the second ones, times its weight."""
        reader.into(self._stored[: self._nbytes], start * 2)
        np.left_shift(self._raw, _SIXTEEN, values[0])
        np.bitwise_and(self._raw, _UPPER, values[1])
        numbers = values.view(np.float32)
        np.multiply(numbers, weight, numbers)

    def _round(self, bits: Array, spare: Array) -> None:
        """Both halves to nearest, ties to even, and side by side. A NaN stays one: its lower bits are zero, since what
        went in was bfloat16."""
        np.right_shift(bits, _SIXTEEN, spare)
        np.bitwise_and(spare, _ONE, spare)
        np.add(spare, _HALF, spare)
        np.add(spare, bits, spare)
        np.right_shift(spare[0], _SIXTEEN, spare[0])
        np.bitwise_and(spare[1], _UPPER, spare[1])
        np.bitwise_or(spare[0], spare[1], self._out)
