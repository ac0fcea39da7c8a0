"""Numbers in and out of their stored form, in pieces: decode to float32, round back, draw reproducible random bits.

numpy only: starting torch costs more than merging a gigabyte. Arithmetic is float32, float64 where an input is; results
are rounded once, to nearest and ties to even, which are the bits that torch gives. Random bits come from a counter
(Philox) that is set by the tensor's seed and the element's number, so they do not depend on pieces, threads or shards.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.errors import CheckpointError, printable
from surgery.kernels.merging import narrow, widen
from surgery.store.reader import Reader

PIECE = 1 << 18  # elements: float32 copies of three tensors stay in a core's cache, and calls cost nothing
FLOATS = ("BF16", "F16", "F32", "F64")
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_STORED: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
_NAN = 0x7FC0  # torch's bfloat16 of a NaN

Array = np.ndarray[Any, Any]


def working_dtype(dtypes: Sequence[str]) -> Any:
    """numpy's dtype of the arithmetic between tensors stored so."""
    return np.float64 if "F64" in dtypes else np.float32


class Source:
    """Decodes stretches of one tensor into an array of its own, which the next call fills again."""

    def __init__(self, reader: Reader, work: Any, piece: int = PIECE) -> None:
        self.reader, self._work = reader, work
        self._raw = np.empty(piece, _STORED[reader.dtype])
        self._bytes = (
            memoryview(self._raw).cast("B")
            if reader.dtype != "F16"
            else memoryview(self._raw.view(np.uint16)).cast("B")
        )
        same = self._raw.dtype == work
        self._wide = np.empty(piece, np.uint32) if reader.dtype == "BF16" else None
        self._out = (
            self._raw if same else self._wide.view(np.float32) if self._wide is not None else np.empty(piece, work)
        )
        self._last = np.empty(piece, work) if self._wide is not None and work != np.float32 else None

    def read(self, start: int, count: int) -> Array:
        """Elements [start, start + count) as an array of the working dtype."""
        size = SIZES[self.reader.dtype]
        self.reader.into(self._bytes[: count * size], start * size)
        if self._wide is not None:
            wide = self._wide[:count]
            np.copyto(wide, self._raw[:count])
            np.left_shift(wide, 16, out=wide)
            if self._last is not None:
                np.copyto(self._last[:count], self._out[:count])
                return self._last[:count]
        elif self.reader.dtype == "F16" and self._out.dtype == np.float32:
            widen(self._out[:count], self._raw[:count])
        elif self._out is not self._raw:
            np.copyto(self._out[:count], self._raw[:count])
        return self._out[:count]


class Sink:
    """Encodes arrays of the working dtype as `dtype`; the bytes are valid until the next call."""

    def __init__(self, dtype: str, name: str, piece: int = PIECE, *, dither: "Bits | None" = None) -> None:
        self.dtype, self.name, self._dither = dtype, name, dither
        self._raw = np.empty(piece, _STORED[dtype])
        self._bits = np.empty(piece, np.uint32) if dtype == "BF16" else None

    def encode(self, values: Array, start: int) -> memoryview:
        """The bytes of `values`, which are overwritten; `start` is the number of the first element.

        Raises `CheckpointError` where a finite value has no finite neighbour in the stored form.
        """
        count = len(values)
        raw = self._raw[:count]
        if self._bits is not None:
            self._bfloat16(values, raw, start)
        elif self.dtype == "F16":
            self._float16(values, raw, start)
        else:
            np.copyto(raw, values, casting="same_kind")
        return memoryview(raw.view(np.uint16) if self.dtype == "F16" else raw).cast("B")

    def _bfloat16(self, values: Array, raw: Array, start: int) -> None:
        assert self._bits is not None
        if values.dtype == np.float64:
            values = values.astype(np.float32)
        bits, spare = values.view(np.uint32), self._bits[: len(values)]
        largest, smallest = values.max(initial=0), values.min(initial=0)
        broken = np.isnan(largest)  # a maximum is NaN where any value is
        nans = np.isnan(values) if broken else None
        if self._dither is not None:
            np.copyto(spare, self._dither.sixteen(start, len(values)))
        else:
            np.right_shift(bits, 16, out=spare)
            np.bitwise_and(spare, 1, out=spare)
            np.add(spare, 0x7FFF, out=spare)
        np.add(bits, spare, out=bits)
        np.right_shift(bits, 16, out=bits)
        np.copyto(raw, bits, casting="unsafe")
        if nans is not None:
            raw[nans] = _NAN
        elif (
            max(float(largest), -float(smallest)) > 3.38e38
            and np.isfinite([largest, smallest]).all()
            and (np.bitwise_and(raw, 0x7FFF) == 0x7F80).any()
        ):
            raise self._overflow(max(float(largest), -float(smallest)))

    def _float16(self, values: Array, raw: Array, start: int) -> None:
        if values.dtype == np.float32:
            narrow(raw, values)
        else:
            with np.errstate(over="ignore"):
                np.copyto(raw, values, casting="same_kind")
        if self._dither is not None:
            self._dithered(values, raw, start)
        # Infinities and NaN are the largest numbers of either sign when their bits are read as integers.
        if raw.view(np.int16).max(initial=0) < 0x7C00 and raw.view(np.uint16).max(initial=0) < 0xFC00:
            return
        overflow = np.isinf(raw)
        if np.isfinite(values[overflow]).any():
            raise self._overflow(float(np.abs(values[np.isfinite(values)]).max()))

    def _dithered(self, values: Array, raw: Array, start: int) -> None:
        """One of the two neighbours, each as likely as the value is near to it."""
        assert self._dither is not None
        nearest = raw.astype(np.float64)
        exact = values.astype(np.float64)
        towards = np.where(exact > nearest, np.float16(np.inf), np.float16(-np.inf)).astype(np.float16)
        with np.errstate(over="ignore", invalid="ignore"):
            other = np.nextafter(raw, towards)
            gap = other.astype(np.float64) - nearest
            share = np.where(np.isfinite(gap) & (gap != 0), (exact - nearest) / np.where(gap == 0, 1, gap), 0.0)
        draw = self._dither.sixteen(start, len(values)) / 65536.0
        np.copyto(raw, np.where((exact != nearest) & (draw < share), other, raw))

    def _overflow(self, largest: float) -> CheckpointError:
        kind = {"F16": "float16", "BF16": "bfloat16"}[self.dtype]
        return CheckpointError(
            "overflow",
            f"'{printable(self.name)}' gets values up to {largest:.4g}, beyond {kind}",
            hint="store the result in --dtype bfloat16 or float32",
        )


class Bits:
    """Random bits by element number: the same for any way of cutting a tensor into pieces. `stream` tells apart what
    is drawn for one tensor (masks of several inputs, rounding)."""

    _BLOCK = 4  # 64-bit words that one step of the counter gives

    def __init__(self, seed: int, stream: int) -> None:
        self._key = np.array([seed & (2**64 - 1), stream], np.uint64)

    def _words(self, first: int, last: int) -> tuple[Array, int]:
        """Words [first, last), and how many stand before `first` in the array."""
        block = first // self._BLOCK
        generator = np.random.Philox(key=self._key, counter=np.array([block, 0, 0, 0], np.uint64))
        skip = first - block * self._BLOCK
        return generator.random_raw(last - first + skip), skip

    def sixteen(self, start: int, count: int) -> Array:
        """Uniform 16-bit numbers for elements [start, start + count)."""
        words, _ = self._words(start // 4, -(-(start + count) // 4))
        offset = start - start // 4 * 4 + (start // 4 % self._BLOCK) * 4
        return words.view(np.uint16)[offset : offset + count]

    def below(self, share: float, start: int, count: int) -> Array:
        """True with probability `share` for elements [start, start + count)."""
        words, _ = self._words(start // 2, -(-(start + count) // 2))
        offset = start - start // 2 * 2 + (start // 2 % self._BLOCK) * 2
        limit = min(int(share * 2**32), 2**32 - 1)
        return words.view(np.uint32)[offset : offset + count] < np.uint32(limit)
