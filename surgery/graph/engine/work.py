"""The unit of work: how the bytes of one output tensor come to be, down to byte ranges of files on disk.

A unit holds no open file and no checkpoint, so a worker anywhere that sees the same files can carry it out: it reads
what it needs, computes, writes at a known offset and returns a digest. torch is imported where tensors are made.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, ResourceError, SurgeryError, printable
from surgery.graph.op import Compute, Op
from surgery.store.digests import canonical_digest
from surgery.store.ranges import copy_range, start_writing, write_at
from surgery.store.reader import MemoryReader, Reader, open_range
from surgery.store.tensors import TensorRef, read_chunks, read_tensor

if TYPE_CHECKING:
    import torch

CHUNK = 8 << 20  # bytes of a row-wise operation's output that are made at a time
_BEHIND = 8 << 20  # bytes that may wait in memory before the disk is told to take them
Pickles = Mapping[str, Mapping[str, "torch.Tensor"]]  # tensors of pickles by file and name; they have no byte range


@dataclass(frozen=True, slots=True)
class Joined:
    """Pieces (source, first byte, last byte) laid one after the other."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: "tuple[tuple[Source, int, int], ...]"


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """`op.run` makes it from `inputs`; `task` is the plan's entry. In a fused chain inputs are themselves made."""

    op: Op
    task: Compute
    inputs: "tuple[Source, ...]"
    seed: int

    @property
    def nbytes(self) -> int:
        return self.task.nbytes


Source = TensorRef | Joined | Made


@dataclass(frozen=True, slots=True)
class Unit:
    """One tensor to make: where its bytes go (file, offset), what it is called, and the memory that it takes. `hashed`:
    whether its digest is wanted."""

    name: str
    source: Source
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    targets: tuple[tuple[str, int], ...]
    peak: int
    place: tuple[str, int] = ("", 0)
    hashed: bool = True


@dataclass(frozen=True, slots=True)
class Copy:
    """Ranges (source file, offset, target offset, count) to move into one file. `hashed` are joined tensors by name
    whose digest follows from no parent's."""

    name: str
    target: str
    spans: tuple[tuple[str, int, int, int], ...]
    hashed: tuple[tuple[str, Joined], ...] = ()
    peak: int = 4 << 20
    place: tuple[str, int] = ("", 0)

    @property
    def nbytes(self) -> int:
        return sum(count for _, _, _, count in self.spans)


Job = Unit | Copy


@dataclass(frozen=True)
class Resources:
    """What one run may use: tensors in work at once, threads of one computation (part of what a repetition needs),
    bytes of all running units together (None: no limit)."""

    workers: int = 1
    threads: int = 1
    budget: int | None = None
    pickles: Pickles = field(default_factory=dict)


def carry_out(job: Job, pickles: Pickles) -> dict[str, str]:
    """Do one piece of work; returns sha256 by tensor name of what was hashed on the way. Raises OSError from the
    target's disk, and the errors of the operation with the tensor's name."""
    if isinstance(job, Copy):
        return _copy(job)
    state, position, begun = hashlib.sha256() if job.hashed else None, 0, 0
    opened = [(os.open(path, os.O_WRONLY | os.O_CLOEXEC), offset) for path, offset in job.targets]
    try:
        for piece in _bytes_of(job, pickles):
            for fd, offset in opened:
                write_at(fd, piece, offset + position)
            if state is not None:
                state.update(piece)
            position += len(piece)
            del piece  # not beside the next one
            if position - begun >= _BEHIND or position == job.nbytes:
                for fd, offset in opened:
                    start_writing(fd, offset + begun, position - begun)
                begun = position
    finally:
        for fd, _ in opened:
            os.close(fd)
    if position != job.nbytes:
        raise CheckpointError(
            "bad-plan", f"'{printable(job.name)}' came out as {position} bytes", hint="a fault in the operation"
        )
    return {job.name: state.hexdigest()} if state is not None else {}


def _copy(job: Copy) -> dict[str, str]:
    opened: dict[str, int] = {}
    target = os.open(job.target, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for source, start, at, count in job.spans:
            if source not in opened:
                opened[source] = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            copy_range(opened[source], start, target, at, count)
    finally:
        for fd in (*opened.values(), target):
            os.close(fd)
    found = {}
    for name, joined in job.hashed:
        state = hashlib.sha256()
        for ref, start, stop in joined.pieces:
            assert isinstance(ref, TensorRef)
            for chunk in read_chunks(ref._replace(offset=ref.offset + start, nbytes=stop - start)):
                state.update(chunk)
        found[name] = state.hexdigest()
    return found


def _bytes_of(unit: Unit, pickles: Pickles) -> Iterator[Any]:
    """The tensor's bytes in order: whole, or a row-wise operation's in pieces."""
    source = unit.source
    if isinstance(source, Made) and source.task.streamed:
        yield from _stream(source, pickles)
        return
    rows = chunk_rows(source)
    if rows is None:
        from surgery.store.dtypes import as_bytes

        yield as_bytes(_tensor(source, pickles))
        return
    assert isinstance(source, Made)
    for start in range(0, unit.shape[0], rows):
        yield _chunk(source, slice(start, min(start + rows, unit.shape[0])), pickles)


def _chunk(source: Made, rows: slice, pickles: Pickles) -> Any:
    """The bytes of some rows; nothing else of them is held when it returns."""
    from surgery.store.dtypes import as_bytes, torch_dtype

    made = _apply(source, [_rows(ref, rows, pickles) for ref in source.inputs])  # type: ignore[arg-type]
    if tuple(made.shape) != (rows.stop - rows.start, *source.task.shape[1:]):
        raise _wrong_shape(source, made)
    return as_bytes(made.to(torch_dtype(source.task.dtype)))


def _stream(source: Made, pickles: Pickles) -> Iterator[memoryview]:
    """The bytes of a streamed entry in order; a piece is valid until the next one is asked for."""
    task, count = source.task, 0
    with ExitStack() as opened:
        readers = [opened.enter_context(_reader(inner, pickles)) for inner in source.inputs]
        with _told_of(source, lambda: [f"{r.dtype}{list(r.shape)}" for r in readers]):
            for piece in source.op.stream(task, readers, tensor_seed(source.seed, source.op, task.full_name)):  # type: ignore[attr-defined]
                view = memoryview(piece).cast("B")
                count += len(view)
                if count > task.nbytes:
                    break
                yield view
    if count != task.nbytes:
        raise CheckpointError(
            "bad-plan", f"'{printable(task.full_name)}' came out as {count} bytes", hint="a fault in the operation"
        )


@contextmanager
def _reader(source: Source, pickles: Pickles) -> Iterator[Reader]:
    if isinstance(source, TensorRef) and source.offset >= 0:
        with open_range(source) as reader:
            yield reader
        return
    from surgery.store.dtypes import as_bytes

    held = source.task if isinstance(source, Made) else source
    data = memoryview(as_bytes(_tensor(source, pickles))).cast("B")
    yield MemoryReader(held.name if isinstance(held, TensorRef | Compute) else "", held.dtype, held.shape, data)


def chunk_rows(source: Source) -> int | None:
    """How many rows at a time a large tensor of a row-wise operation (`op.row_wise`) is made; None: all at once."""
    if not isinstance(source, Made) or source.nbytes <= 2 * CHUNK or not source.task.shape or source.task.random:
        return None
    rows = source.task.shape[0]
    same = all(isinstance(ref, TensorRef) and ref.shape[:1] == (rows,) for ref in source.inputs)
    if not getattr(source.op, "row_wise", False) or not same or source.nbytes % rows:
        return None
    return max(1, CHUNK // (source.nbytes // rows))


def _rows(ref: TensorRef, rows: slice, pickles: Pickles) -> "torch.Tensor":
    return pickles[ref.file][ref.name][rows].contiguous() if ref.offset < 0 else read_tensor(ref, rows=rows)


def _tensor(source: Source, pickles: Pickles) -> "torch.Tensor":
    """The tensor that a source stands for, in its planned dtype."""
    from surgery.store.dtypes import as_bytes, torch_dtype

    if isinstance(source, TensorRef):
        return pickles[source.file][source.name].contiguous() if source.offset < 0 else read_tensor(source)
    if isinstance(source, Joined):
        import torch

        raw = torch.empty(source.nbytes, dtype=torch.uint8)
        at = 0
        for inner, start, stop in source.pieces:
            if isinstance(inner, TensorRef) and inner.offset >= 0:
                for chunk in read_chunks(inner._replace(offset=inner.offset + start, nbytes=stop - start)):
                    raw.numpy()[at : at + len(chunk)] = bytearray(chunk)
                    at += len(chunk)
            else:
                raw.numpy()[at : at + stop - start] = as_bytes(_tensor(inner, pickles))[start:stop]
                at += stop - start
        kind = torch_dtype(source.dtype)
        return raw if kind is None else raw.view(kind).reshape(source.shape)
    if source.task.streamed:
        import torch

        raw = torch.empty(source.nbytes, dtype=torch.uint8)
        at = 0
        for piece in _stream(source, pickles):
            raw.numpy()[at : at + len(piece)] = piece
            at += len(piece)
        kind = torch_dtype(source.task.dtype)
        return raw if kind is None else raw.view(kind).reshape(source.task.shape)
    made = _apply(source, [_tensor(inner, pickles) for inner in source.inputs])
    if tuple(made.shape) != source.task.shape:
        raise _wrong_shape(source, made)
    return made.to(torch_dtype(source.task.dtype))


def _apply(made: Made, inputs: "list[torch.Tensor]") -> "torch.Tensor":
    """`op.run`, with whatever goes wrong told of this tensor."""
    task = made.task
    with _told_of(made, lambda: [f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for t in inputs]):
        return made.op.run(task, inputs, seeded(made.seed, made.op, task.full_name) if task.random else None)


@contextmanager
def _told_of(made: Made, shapes: Callable[[], list[str]]) -> Iterator[None]:
    """What goes wrong inside an operation, as an error that names tensor, operation and inputs."""
    try:
        yield
    except (SurgeryError, OSError, GeneratorExit):
        raise
    except Exception as err:
        what = f"{made.op.name} could not make '{printable(made.task.full_name)}' from "
        what += ", ".join(shapes()) or "nothing"
        if isinstance(err, MemoryError) or "allocate memory" in str(err):
            raise ResourceError("memory", f"{what}: not enough memory", hint="use fewer --workers") from err
        first = printable(str(err).strip().split("\n")[0] or type(err).__name__)
        raise SurgeryError("failed", f"{what}: {first}", hint="SURGERY_DEBUG=1 shows where") from err


def _wrong_shape(made: Made, tensor: "torch.Tensor") -> CheckpointError:
    name = printable(made.task.full_name)
    return CheckpointError("bad-plan", f"'{name}' came out as {list(tensor.shape)}", hint="a fault in the operation")


def seeded(seed: int, op: Op, name: str) -> "torch.Generator":
    """The generator of one output tensor: independent of order, workers and the other tensors."""
    import torch

    return torch.Generator().manual_seed(tensor_seed(seed, op, name))


def tensor_seed(seed: int, op: Op, name: str) -> int:
    """The seed of one output tensor, 63 bits."""
    text = f"{seed}\0{op.name}\0{op.version}\0{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def peak_of(source: Source) -> int:
    """Bytes in memory at once while `source` is made: inputs, output and scratch, one input after the other."""
    if isinstance(source, TensorRef):
        return source.nbytes
    if isinstance(source, Joined):
        return source.nbytes + max((peak_of(s) for s, _, _ in source.pieces if not _is_range(s)), default=0)
    if source.task.streamed:
        return source.task.scratch + sum(peak_of(s) for s in source.inputs if not _is_range(s))
    rows = chunk_rows(source)
    if rows is not None:
        total = sum(s.nbytes for s in source.inputs) + source.nbytes + source.task.scratch
        return total * rows // source.task.shape[0] + 1
    held = most = 0
    for inner in source.inputs:
        most = max(most, held + peak_of(inner))
        held += inner.nbytes
    return max(most, held + source.nbytes + source.task.scratch)


def uses_torch(job: Job) -> bool:
    """Whether carrying the job out needs torch: a streamed tensor that is read from files is bytes to its operation,
    which does with less unless it says so (`op.with_torch`)."""
    if not isinstance(job, Unit):
        return False
    source = job.source
    if not (isinstance(source, Made) and source.task.streamed and all(map(_is_range, source.inputs))):
        return True
    return bool(getattr(source.op, "with_torch", False))


def load_torch() -> None:
    """Import torch without the collector of cycles, which finds nothing there and takes a quarter of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if collecting:
            gc.enable()


def place_of(source: Source) -> tuple[str, int]:
    """Where its first input lies: work in this order reads files from front to back."""
    while not isinstance(source, TensorRef):
        inner = source.inputs if isinstance(source, Made) else [s for s, _, _ in source.pieces]
        if not inner:
            return ("", 0)
        source = inner[0]
    return (source.file, source.offset)


def leaves(source: Source) -> Iterator[TensorRef]:
    """Every tensor on disk that `source` reads."""
    if isinstance(source, TensorRef):
        yield source
        return
    for inner in source.inputs if isinstance(source, Made) else [s for s, _, _ in source.pieces]:
        yield from leaves(inner)


def tensor_keys(
    sources: Mapping[str, Source | None], known: Mapping[str, Mapping[str, str]], device: str
) -> dict[str, str]:
    """The identity of every computed tensor whose operation says what it depends on (`op.tensor_params(task)`): equal
    keys mean equal bytes, whatever else was edited. `known` are sha256 of tensors on disk by file and name."""
    circumstances = [installed_version("torch"), device.split(":")[0]]
    keys = {}
    for name, source in sources.items():
        if isinstance(source, Made) and (described := _described(source, known)) is not None:
            keys[name] = canonical_digest([described, circumstances])
    return keys


def _described(source: Source, known: Mapping[str, Mapping[str, str]]) -> Any:
    """A JSON value that says how a source's bytes come to be; None where nobody can say."""
    if isinstance(source, TensorRef):
        sha = known.get(source.file, {}).get(source.name)
        return None if sha is None else [sha, source.dtype, source.shape]
    if isinstance(source, Joined):
        pieces = [[_described(s, known), start, stop] for s, start, stop in source.pieces]
        return None if any(p[0] is None for p in pieces) else [pieces, source.dtype, source.shape]
    tell = getattr(source.op, "tensor_params", None)
    inputs = [_described(inner, known) for inner in source.inputs]
    task, op = source.task, source.op
    if tell is None or None in inputs or (params := tell(task)) is None:
        return None
    drawn = [source.seed, task.full_name] if task.random or task.streamed else []
    return [getattr(op, "plugin", op.name), op.version, params, task.dtype, task.shape, drawn, inputs]


def is_range(source: Source) -> bool:
    """Whether the bytes can be moved without being looked at."""
    return _is_range(source) or (isinstance(source, Joined) and all(_is_range(s) for s, _, _ in source.pieces))


def _is_range(source: Source) -> bool:
    return isinstance(source, TensorRef) and source.offset >= 0


def join(dtype: str, shape: tuple[int, ...], nbytes: int, pieces: Sequence[tuple[Source, int, int]]) -> Joined:
    """A `Joined` whose pieces are flat: a slice of something joined becomes slices of its pieces."""
    flat: list[tuple[Source, int, int]] = []
    for source, start, stop in pieces:
        if not isinstance(source, Joined):
            flat.append((source, start, stop))
            continue
        at = 0
        for inner, first, last in source.pieces:
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                flat.append((inner, first + low - at, first + high - at))
            at += last - first
    return Joined(dtype, shape, nbytes, tuple(flat))
