"""Weighted sums of bfloat16 tensors by numpy, two elements at a time: what the compiled kernel computes, and its bits.

A 32-bit word holds two elements. Shifted left it is the first one as float32, masked it is the second; after the
arithmetic both are rounded where they lie and joined again, so nothing is widened or narrowed by a pass of its own.
That takes half of the time of widening, summing and rounding in turn.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

_UPPER, _HALF, _SIXTEEN, _ONE = np.uint32(0xFFFF0000), np.uint32(0x7FFF), np.uint32(16), np.uint32(1)
_INFINITE, _MINUS_INFINITE = 0x7F80, 0xFF80

Buffer = bytes | bytearray | memoryview
_Words = np.ndarray[Any, np.dtype[np.uint32]]


class _Scratch(threading.local):
    """Two float32 copies of a piece, made once a thread: asking the system for them each time costs more than sums."""

    def __init__(self) -> None:
        self._total, self._values = np.empty((2, 0), np.uint32), np.empty((2, 0), np.uint32)

    def of(self, words: int) -> tuple[_Words, _Words]:
        if self._total.shape[1] != words:
            self._total, self._values = np.empty((2, words), np.uint32), np.empty((2, words), np.uint32)
        return self._total, self._values


_scratch = _Scratch()


def weighted_sum(out: Buffer, weights: Sequence[float], inputs: Sequence[Buffer]) -> bool:
    """The sum of weights[i] inputs[i], bfloat16 bytes all of them, rounded to nearest even into `out`.

    Weights are rounded to float32; each product and each sum is one float32 operation. False where a result is not
    finite; `out` is then of no use. Raises `ValueError` where sizes differ.
    """
    count = len(out)
    if not inputs or len(weights) != len(inputs) or count % 2 or any(len(one) != count for one in inputs):
        raise ValueError("one weight an input, and an even number of bytes, the same for all")
    if count % 4:  # the last element has no neighbour: it gets a zero
        last = bytearray(4)
        finite = weighted_sum(last, weights, [bytes(one[count - 2 :]) + b"\0\0" for one in inputs])
        memoryview(out)[count - 2 :] = last[:2]
        even = [memoryview(one)[: count - 2] for one in inputs]
        return weighted_sum(memoryview(out)[: count - 2], weights, even) and finite if count > 2 else finite
    made = np.frombuffer(out, np.uint32)
    total, values = _scratch.of(len(made))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen at the end
        _scaled(inputs[0], weights[0], total)
        for one, weight in zip(inputs[1:], weights[1:], strict=True):
            _scaled(one, weight, values)
            np.add(total.view(np.float32), values.view(np.float32), total.view(np.float32))
    _round(total, values, made)
    # Stored infinities and NaN are the largest numbers of either sign when their bits are read as integers.
    largest, least = made.view(np.int16).max(initial=0), made.view(np.uint16).max(initial=0)
    return bool(largest < _INFINITE and least < _MINUS_INFINITE)


def _scaled(one: Buffer, weight: float, values: _Words) -> None:
    """An input as float32, first elements of all words before the second ones, times its weight."""
    raw = np.frombuffer(one, np.uint32)
    np.left_shift(raw, _SIXTEEN, values[0])
    np.bitwise_and(raw, _UPPER, values[1])
    numbers = values.view(np.float32)
    np.multiply(numbers, np.float32(weight), numbers)


def _round(bits: _Words, spare: _Words, made: _Words) -> None:
    """Both halves to nearest, ties to even, and side by side. A NaN stays one: its lower bits are zero, since what
    went in was bfloat16."""
    np.right_shift(bits, _SIXTEEN, spare)
    np.bitwise_and(spare, _ONE, spare)
    np.add(spare, _HALF, spare)
    np.add(spare, bits, spare)
    np.right_shift(spare[0], _SIXTEEN, spare[0])
    np.bitwise_and(spare[1], _UPPER, spare[1])
    np.bitwise_or(spare[0], spare[1], made)
