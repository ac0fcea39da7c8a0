"""What differs between two checkpoints: names, dtypes, shapes, values, configs and the files beside them.

Tensors of equal digest are never read again; the others are streamed in pieces of both sides, so memory does not grow
with the model. Sums are taken in float64. Nothing is written. torch is imported where values are compared.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.store import digests
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.header import DTYPE_BITS
from surgery.store.layout import natural, read_json
from surgery.store.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 16  # elements compared at a time: both sides in float64 stay in a core's cache
_PAPERS = (".md", ".png", ".jpg", ".gif", ".svg", ".pdf")  # documentation: no part of what a model is


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that both sides have and that is not the same, A against B.

    `changed` of `elements` have another value; `max_abs` and the sums (of d², a², b² and ab, d = a - b) are over pairs
    of finite values, and `nonfinite` counts changed pairs with an infinity or a NaN. Without numbers (`compared` false)
    the shapes differ or the dtype has no values. `same_as` is the tensor of A, under another name, that B's equals.
    """

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    compared: bool = False
    elements: int = 0
    changed: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    same_as: str | None = None

    @property
    def share(self) -> float | None:
        """Changed elements, 0 to 1."""
        return self.changed / self.elements if self.compared and self.elements else None

    @property
    def relative(self) -> float | None:
        """Relative L2 distance |a - b| / |a|."""
        return _relative(self.sums) if self.compared else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between both, as flat vectors."""
        return _cosine(self.sums) if self.compared else None

    def within(self, tolerance: float | None) -> bool:
        """Whether the largest difference is at most `tolerance`; without one, every byte counts."""
        return tolerance is not None and self.compared and not self.nonfinite and self.max_abs <= tolerance


@dataclass(frozen=True)
class BlockDiff:
    """The changed tensors of one block; `share` is over all its elements, the distances over the changed tensors."""

    block: str
    tensors: int
    changed: int
    share: float
    max_abs: float
    relative: float | None
    cosine: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that differs, A against B. `renamed` and `copied` are (name in A, name in B) of equal tensors: of one
    that A's name is gone from B, and of one that A still has. `config` is (file:key, value in A, value in B), `files`
    (path, "missing", "added" or "altered")."""

    names: tuple[str, str]
    counts: tuple[int, int]
    equal: int
    missing: tuple[str, ...]
    added: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    copied: tuple[tuple[str, str], ...]
    rows: tuple[TensorDiff, ...]
    sizes: Mapping[str, tuple[int, int]]
    config: tuple[tuple[str, Any, Any], ...]
    files: tuple[tuple[str, str], ...]
    tolerance: float | None
    notes: tuple[str, ...] = ()

    @property
    def beyond(self) -> tuple[TensorDiff, ...]:
        """The tensors whose difference counts."""
        return tuple(row for row in self.rows if not row.within(self.tolerance))

    @property
    def different(self) -> bool:
        """Whether anything differs that counts."""
        names = self.missing or self.added or self.renamed or self.copied
        return bool(names or self.beyond or self.config or self.files)

    def blocks(self) -> list[BlockDiff]:
        """The compared rows grouped by block, in order of names."""
        groups: dict[str, list[TensorDiff]] = {}
        for row in self.rows:
            groups.setdefault(block_of(row.name), []).append(row)
        return [_block(name, rows, *self.sizes[name]) for name, rows in sorted(groups.items(), key=_by_name)]


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerance: float | None = None,
    weights_only: bool = False,
    report: Callable[[str, Mapping[str, float]], None] = lambda event, numbers: None,
) -> Comparison:
    """Compare two checkpoints of any layouts. A plain model is set against the part of a pipeline that has its names.

    `tolerance` bounds the absolute difference of values that count as equal, whatever their dtypes; None asks for equal
    bytes. `weights_only` leaves configs and other side files out, as does a side that is a lone file.
    """
    a, b, notes = _aligned(a, b)
    known_a, known_b = a.tensor_digests, b.tensor_digests
    missing = sorted(a.tensors.keys() - b.tensors.keys(), key=natural)
    added = sorted(b.tensors.keys() - a.tensors.keys(), key=natural)
    renamed = _pairs(a, b, missing, added)
    gone, come = {old for old, _ in renamed}, {new for _, new in renamed}
    by_content = {_content(a, n): n for n in reversed(a.tensors)}
    copied = [(by_content[c], n) for n in added if n not in come and (c := _content(b, n)) in by_content]
    come |= {new for _, new in copied}
    common = [n for n in a.tensors if n in b.tensors]
    differing = [
        n for n in common if known_a[n] != known_b[n] or a.tensors[n][1:3] != b.tensors[n][1:3]
    ]  # dtype and shape
    rows = []
    with _one_thread() if differing else nullcontext():
        for done, name in enumerate(differing, start=1):
            same = by_content.get(_content(b, name))
            rows.append(_compare_tensor(a, b, name, same if same != name else None))
            report("compare", {"done": done, "total": len(differing)})
    sizes: dict[str, tuple[int, int]] = {}
    for name in common:
        tensors, elements = sizes.get(block_of(name), (0, 0))
        sizes[block_of(name)] = tensors + 1, elements + math.prod(a.tensors[name].shape)
    beside = not (weights_only or a.path.is_file() or b.path.is_file())
    return Comparison(
        names=(a.name, b.name),
        counts=(len(a.tensors), len(b.tensors)),
        equal=len(common) - len(differing),
        missing=tuple(n for n in missing if n not in gone),
        added=tuple(n for n in added if n not in come),
        renamed=tuple(renamed),
        copied=tuple(copied),
        rows=tuple(sorted(rows, key=lambda r: natural(r.name))),
        sizes=sizes,
        config=tuple(_config_differences(a, b)) if beside else (),
        files=tuple(_file_differences(a, b)) if beside else (),
        tolerance=tolerance,
        notes=notes,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces are too small to share: several threads would spend their time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def block_of(name: str) -> str:
    """The block of a tensor: its name up to the first number, or its first piece."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.split(".")[0]


def json_differences(before: Any, after: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, old, new) for every value that differs; objects are followed, a list is one value, None means absent."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*before, *after)):
            yield from json_differences(before.get(key), after.get(key), (*at, str(key)))
    elif digests.canonical(before) != digests.canonical(after):  # by bytes: True is not 1 here, and NaN is NaN
        yield at, before, after


def _aligned(a: Checkpoint, b: Checkpoint) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    plain_a, plain_b = "" in a.parts, "" in b.parts
    if plain_a == plain_b:
        return a, b, ()
    plain, pipeline = (a, b) if plain_a else (b, a)
    shared = {p.name: len(p.tensors.keys() & plain.tensors.keys()) for p in pipeline.parts.values()}
    best = max(shared, key=shared.__getitem__)
    if not shared[best]:
        return a, b, ()
    chosen = open_checkpoint(pipeline.path, name=f"{pipeline.name}:{best}", part=best)
    note = f"{plain.name} is one model: compared with {chosen.name}"
    return (a, chosen, (note,)) if plain_a else (chosen, b, (note,))


def _content(checkpoint: Checkpoint, name: str) -> tuple[str, str, tuple[int, ...]]:
    ref = checkpoint.tensors[name]
    return checkpoint.tensor_digests[name], ref.dtype, ref.shape


def _pairs(a: Checkpoint, b: Checkpoint, missing: list[str], added: list[str]) -> list[tuple[str, str]]:
    """Names that went with names that came, by equal content; among equals (all zeros, say) the last pieces decide."""
    found: dict[str, str] = {}
    for pieces in (2, 1, 0):
        waiting: dict[Any, list[str]] = {}
        for name in reversed(missing):
            if name not in found:
                waiting.setdefault((_content(a, name), _last(name, pieces)), []).append(name)
        taken = set(found.values())
        for name in added:
            candidates = waiting.get((_content(b, name), _last(name, pieces))) if name not in taken else None
            if candidates:
                found[candidates.pop()] = name
    return sorted(found.items(), key=lambda pair: natural(pair[0]))


def _last(name: str, pieces: int) -> tuple[str, ...]:
    return tuple(name.split(".")[-pieces:]) if pieces else ()


def _compare_tensor(a: Checkpoint, b: Checkpoint, name: str, same_as: str | None) -> TensorDiff:
    one, two = a.tensors[name], b.tensors[name]
    dtypes, shapes = (one.dtype, two.dtype), (one.shape, two.shape)
    if one.shape != two.shape or any(DTYPE_BITS[d] < 8 for d in dtypes):
        return TensorDiff(name, dtypes, shapes, same_as=same_as)
    elements = changed = nonfinite = 0
    largest = 0.0
    sums = [0.0, 0.0, 0.0, 0.0]
    for x, y in _pieces(a, b, one, two):
        differ, x, y = _as_numbers(x, y)
        elements += x.numel()  # of a complex tensor, the real numbers in it
        products = _products(x, y)
        if not math.isfinite(sum(products[1:])):
            finite = x.isfinite() & y.isfinite()
            differ = (x != y if differ is None else differ) & ~(x.isnan() & y.isnan())
            nonfinite += int((differ & ~finite).sum())
            x, y = x.where(finite, 0.0), y.where(finite, 0.0)
            products = _products(x, y)
        d = x - y
        # Of two different finite numbers the difference is never zero.
        changed += int((d if differ is None else differ).count_nonzero())
        low, high = d.aminmax()
        largest = max(largest, -float(low), float(high))
        sums = [total + new for total, new in zip(sums, products, strict=True)]
    return TensorDiff(
        name, dtypes, shapes, True, elements, changed, nonfinite, largest, (sums[0], sums[1], sums[2], sums[3]), same_as
    )


def _pieces(
    a: Checkpoint, b: Checkpoint, one: TensorRef, two: TensorRef
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """The same stretches of both tensors, flat, as stored."""
    import torch

    from surgery.store.dtypes import torch_dtype

    kinds = torch_dtype(one.dtype), torch_dtype(two.dtype)
    assert kinds[0] is not None and kinds[1] is not None  # sub-byte dtypes are not compared
    steps = tuple(_PIECE * DTYPE_BITS[ref.dtype] // 8 for ref in (one, two))
    for x, y in zip(a.chunks(one, size=steps[0]), b.chunks(two, size=steps[1]), strict=True):
        yield torch.frombuffer(_writable(x), dtype=kinds[0]), torch.frombuffer(_writable(y), dtype=kinds[1])


def _writable(piece: "bytes | memoryview") -> "memoryview | bytearray":
    """torch wants memory that it could write to; what a pickle maps may not be."""
    view = memoryview(piece)
    return bytearray(view) if view.readonly else view


def _products(x: "torch.Tensor", y: "torch.Tensor") -> tuple[float, float, float, float]:
    d = x - y
    return float(d.dot(d)), float(x.dot(x)), float(y.dot(y)), float(x.dot(y))


def _as_numbers(x: "torch.Tensor", y: "torch.Tensor") -> "tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]":
    """Both sides in float64, and for integers, which may lose digits there, which of them differ."""
    import torch

    def numbers(t: torch.Tensor) -> torch.Tensor:
        return (t.float() if t.dtype.itemsize == 1 and t.dtype.is_floating_point else t).double()

    if x.dtype.is_complex and y.dtype.is_complex:
        x, y = torch.view_as_real(x).flatten(), torch.view_as_real(y).flatten()
    elif x.dtype.is_complex or y.dtype.is_complex:
        x, y = (torch.view_as_real(t.to(torch.complex64)).flatten() for t in (x, y))
    if x.dtype == y.dtype and not x.dtype.is_floating_point:
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
        return x.view(whole) != y.view(whole), numbers(x), numbers(y)
    return None, numbers(x), numbers(y)


def _block(name: str, rows: list[TensorDiff], tensors: int, elements: int) -> BlockDiff:
    sums = tuple(sum(row.sums[i] for row in rows) for i in range(4))
    compared = any(row.compared for row in rows)
    return BlockDiff(
        block=name,
        tensors=tensors,
        changed=len(rows),
        share=sum(row.changed if row.compared else math.prod(row.shapes[0]) for row in rows) / max(1, elements),
        max_abs=max(row.max_abs for row in rows),
        relative=_relative(sums) if compared else None,
        cosine=_cosine(sums) if compared else None,
    )


def _relative(sums: tuple[float, ...]) -> float | None:
    """None where A is zero and B is not, or where squares overflow."""
    if not sums[1]:
        return None if sums[0] else 0.0
    ratio = sums[0] / sums[1]
    return math.sqrt(ratio) if math.isfinite(ratio) else None


def _cosine(sums: tuple[float, ...]) -> float | None:
    length = math.sqrt(sums[1]) * math.sqrt(sums[2])
    cosine = sums[3] / length if length else math.nan
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else None


def _by_name(item: tuple[str, Any]) -> Any:
    return natural(item[0])


def _config_differences(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    files = [[n for n in side.side_files if _is_config(n)] for side in (a, b)]
    for name in sorted({*files[0], *files[1]}):
        one, two = (read_json(c.root / name) if name in own else None for c, own in zip((a, b), files, strict=True))
        for path, old, new in json_differences(one, two):
            yield f"{name}:{'.'.join(path)}".rstrip(":"), old, new


def _is_config(name: str) -> bool:
    return name.endswith(("config.json", "model_index.json"))


def _file_differences(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, str]]:
    one, two = ({n for n in side.side_files if not _is_config(n) and not _is_paper(n)} for side in (a, b))
    for name in sorted(one | two):
        if name not in two:
            yield name, "missing"
        elif name not in one:
            yield name, "added"
        elif digests.file_digest(a.root / name) != digests.file_digest(b.root / name):
            yield name, "altered"


def _is_paper(name: str) -> bool:
    return name.endswith(_PAPERS) or Path(name).name.startswith(("LICENSE", "NOTICE"))
