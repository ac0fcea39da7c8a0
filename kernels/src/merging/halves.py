"""float16 to float32 and back by numpy, where the processor's instructions for it are not compiled (`halves.c`)."""

from typing import Any

import numpy as np

Buffer = bytes | bytearray | memoryview | np.ndarray[Any, Any]


def widen(out: Buffer, halves: Buffer) -> None:
    """float16 bytes as float32 bytes, exactly. Raises `ValueError` where sizes do not fit."""
    np.copyto(*_pair(np.frombuffer(out, np.float32), np.frombuffer(halves, np.float16)))


def narrow(out: Buffer, floats: Buffer) -> None:
    """float32 bytes as float16 bytes, to the nearest and of two to the even one; what is too large becomes infinite.
    Raises `ValueError` where sizes do not fit."""
    with np.errstate(over="ignore"):
        np.copyto(*_pair(np.frombuffer(out, np.float16), np.frombuffer(floats, np.float32)), casting="same_kind")


def _pair(out: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if len(out) != len(source):
        raise ValueError("the output is not of as many elements as the input")
    return out, source
