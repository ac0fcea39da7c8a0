"""The safetensors header: strict reader and writer, standard library only.

A file is 8 bytes of little-endian length, that many bytes of JSON, then the tensors' bytes without gaps. The reader is
stricter than the reference library where that one is lax (a repeated name keeps the last one there); everything after
`read_header` may assume a valid file. This module knows nothing of models, folders or operations.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

from surgery.errors import CheckpointError, printable

MAX_HEADER = 100_000_000  # the reference library's own limit, in bytes
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_BYTES = 1 << 62  # no file is larger; keeps products inside what pread and pwrite take

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


class TensorSpec(NamedTuple):
    """What one header row says: dtype, shape, and the byte range counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A parsed header. `tensors` is in file order, `data_start` is the file offset of the first tensor byte."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    oddities: tuple[str, ...] = ()


_text = json.encoder.encode_basestring  # of JSON, in UTF-8


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises ValueError when the bits do not fill whole bytes or the product is absurd."""
    return _nbytes_of(dtype, tuple(shape))


@lru_cache(4096)  # a model has thousands of tensors and a dozen shapes
def _nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    bits = DTYPE_BITS[dtype]
    for n in shape:
        bits *= n
        if bits > _MAX_BYTES * 8:  # before a long list of huge sizes becomes a number that takes minutes to multiply
            raise ValueError("the size overflows")
    if bits % 8:
        raise ValueError("the elements do not fill whole bytes")
    return bits // 8


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the file at `path`, without reading any tensor.

    Raises `CheckpointError` that names the file, the tensor and what is wrong.
    """
    shown = os.fspath(path)
    try:
        fd = os.open(shown, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise CheckpointError("unreadable", f"{shown}: {err.strerror}", hint="check the path and its rights") from None
    try:
        size = os.fstat(fd).st_size
        first = os.pread(fd, 8, 0)
        if len(first) < 8:
            _bad(shown, "too-small", f"the file has {size} bytes, fewer than the 8 of the header length")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            _bad(shown, "header-too-large", f"the header claims {length} bytes, more than {MAX_HEADER}")
        if length > size - 8:
            _bad(shown, "truncated", f"the header claims {length} bytes and the file holds {size - 8} after its start")
        raw = os.pread(fd, length, 8)
        while len(raw) < length:
            more = os.pread(fd, length - len(raw), 8 + len(raw))
            if not more:
                _bad(shown, "truncated", "the file ends inside its header")
            raw += more
    except OSError as err:
        raise CheckpointError("unreadable", f"{shown}: {err.strerror}", hint="check the path and its rights") from None
    finally:
        os.close(fd)
    return parse_header(raw, file_size=size, shown=shown)


def header_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a safetensors file's header bytes; with the tensors' digests it covers the whole file."""
    from hashlib import sha256

    start = read_header(path).data_start
    with open(path, "rb") as handle:
        return sha256(handle.read(start)).hexdigest()


def parse_header(raw: bytes, *, file_size: int, shown: str) -> Header:
    """Check the JSON of a header against the rules of the format. `shown` is the path for messages."""
    oddities = []
    if raw[:1] != b"{":
        oddities.append("the header does not start with '{'")
    document = _strict_json(raw, shown)
    if not isinstance(document, dict):
        _bad(shown, "malformed", "the header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _bad(shown, "malformed", "__metadata__ must map strings to strings")
    if not all(map(is_unicode, (*metadata.keys(), *metadata.values()))):
        _bad(shown, "malformed", "__metadata__ holds a lone surrogate, which is no text")
    rows = []
    for name, row in document.items():
        spec, extra = _row(name, row, shown)
        if extra:
            oddities.append(f"'{printable(name)}' has extra fields: {', '.join(map(printable, extra[:5]))}")
        rows.append((spec.start, spec.stop, name, spec))
    rows.sort(key=itemgetter(0, 1))
    data_start = 8 + len(raw)
    end = 0
    for start, stop, name, _ in rows:
        if start != end:
            what = "overlaps the tensor before it" if start < end else f"leaves a hole of {start - end} bytes before it"
            _bad(shown, "bad-offsets", f"'{printable(name)}' {what}")
        end = stop
    if data_start + end != file_size:
        what = "truncated" if data_start + end > file_size else "trailing-bytes"
        _bad(shown, what, f"the header describes {end} bytes of tensors and the file holds {file_size - data_start}")
    return Header({name: spec for _, _, name, spec in rows}, metadata, data_start, file_size, tuple(oddities))


def _row(name: str, row: Any, shown: str) -> tuple[TensorSpec, list[str]]:
    # There may be a hundred thousand rows: what only messages need is made for messages.
    if not name:
        _bad(shown, "malformed", "a tensor has an empty name")
    if not is_unicode(name):
        _bad(shown, "malformed", f"the name '{printable(name)}' holds a lone surrogate, which is no text")
    if not isinstance(row, dict):
        _bad(shown, "malformed", f"'{printable(name)}' is not an object")
    try:
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    except KeyError:
        missing = ", ".join(key for key in _FIELDS if key not in row)
        _bad(shown, "malformed", f"'{printable(name)}' lacks {missing}")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        what = f"dtype {printable(str(dtype))}, which the format does not know"
        _bad(shown, "unknown-dtype", f"'{printable(name)}' has {what}")
    if not _are_counts(shape):
        _bad(shown, "malformed", f"'{printable(name)}' has a shape that is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or max(offsets) > _MAX_BYTES:
        _bad(shown, "malformed", f"'{printable(name)}' has data_offsets that are not two byte positions")
    start, stop = offsets
    sizes = tuple(shape)
    try:
        size = _nbytes_of(dtype, sizes)
    except ValueError as err:
        _bad(shown, "bad-size", f"'{printable(name)}' {dtype}{printable(str(shape[:9]))}: {err}")
    if stop - start != size:
        what = f"{dtype}{printable(str(shape[:9]))}, {size} bytes, but its offsets span {stop - start}"
        _bad(shown, "bad-size", f"'{printable(name)}' is {what}")
    return TensorSpec(dtype, sizes, start, stop), sorted(row.keys() - set(_FIELDS)) if len(row) > 3 else []


def _are_counts(values: Any) -> bool:
    """Whether `values` is a list of whole numbers from 0 on; true and false are none."""
    if not isinstance(values, list):
        return False
    for n in values:  # noqa: SIM110  a generator for every row takes three times as long
        if type(n) is not int or n < 0:
            return False
    return True


class _Repeating(dict[str, Any]):
    """A JSON object in which `key` stands twice."""

    key = ""


def _strict_json(raw: bytes, shown: str) -> Any:
    repeating: list[_Repeating] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) == len(items):
            return found
        marked, seen = _Repeating(found), set()
        for key, _ in items:
            if key in seen:
                marked.key = key
                break
            seen.add(key)
        repeating.append(marked)
        return marked

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError:
        _bad(shown, "malformed", "the header is not UTF-8")
    except RecursionError:
        _bad(shown, "malformed", "the header is nested too deeply")
    except ValueError as err:
        _bad(shown, "malformed", f"the header is not JSON ({printable(str(err), limit=80)})")
    if repeating:
        _bad(shown, "duplicate-tensor", _what_repeats(document, repeating[0].key))
    return document


def _what_repeats(document: Any, key: str) -> str:
    """The sentence for a repeated key: which tensor it is, or which tensor it belongs to."""
    if isinstance(document, _Repeating):
        return f"'{printable(document.key)}' appears twice in the header"
    for name, row in document.items() if isinstance(document, dict) else ():
        if isinstance(row, _Repeating):
            return f"'{printable(name)}' gives '{printable(row.key)}' twice"
    return f"'{printable(key)}' appears twice in one object of the header"


def is_unicode(text: str) -> bool:
    """False for lone surrogates: JSON can spell them, UTF-8 and the reference library cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _bad(shown: str, code: str, what: str) -> NoReturn:
    hints = {
        "truncated": "the download or copy is incomplete; fetch the file again",
        "duplicate-tensor": "the file is ambiguous: write it again with one tensor for each name",
    }
    raise CheckpointError(code, f"{shown}: {what}", hint=hints.get(code, "the file is not a valid safetensors file"))


def _metadata(values: Mapping[str, str]) -> str:
    return json.dumps(dict(sorted(values.items())), separators=(",", ":"), ensure_ascii=False)


def plan_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header bytes of a file that will hold `tensors` (name, dtype, shape) in that order.

    Returns the bytes (length prefix included, padded with spaces to a multiple of 8) and each tensor's
    (file offset, byte count). Raises ValueError when a name stands twice or is none: a fault of the caller.
    """
    # Put together by hand: rows are alike, and the general encoder takes three times as long for them.
    rows = [f'"__metadata__":{_metadata(metadata)}'] if metadata else []
    inside: dict[str, tuple[int, int]] = {}
    position = 0
    for name, dtype, shape in tensors:
        if not name or name in inside or name == "__metadata__":
            raise ValueError(f"'{name}' stands twice, is empty or is reserved")
        size = nbytes_of(dtype, shape)
        sizes = ",".join(map(str, shape))
        end = position + size
        rows.append(f'{_text(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{position},{end}]}}')
        inside[name] = (position, size)
        position = end
    raw = ("{" + ",".join(rows) + "}").encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    places = {name: (base + start, size) for name, (start, size) in inside.items()}
    return struct.pack("<Q", len(raw)) + raw, places
