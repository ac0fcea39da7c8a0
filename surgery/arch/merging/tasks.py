"""Carry out one planned tensor of a merge, and measure a plan."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version as installed_version
from typing import Any

from surgery.arch.merging.numbers.arithmetic import SIZES, Bits, Source
from surgery.arch.merging.numbers.formulas import ROUNDING, Formula, elements, stream
from surgery.arch.merging.numbers.kernels import Kernel
from surgery.arch.merging.numbers.measure import LITTLE, Merge, Sums, by_formula, measure_tensor
from surgery.arch.merging.pair import Task
from surgery.arch.merging.selection import layer_of
from surgery.graph.engine.work import tensor_seed
from surgery.graph.op import Compute, Op, Plan
from surgery.graph.planned import Planned
from surgery.store.checkpoint import Checkpoint
from surgery.store.reader import Reader, open_reader


def stream_task(task: Compute, readers: Sequence[Reader], seed: int) -> Iterator[memoryview]:
    """The bytes of a tensor that a formula makes. Rows of a vocabulary that have no counterpart are the host's own."""
    how: Task = task.how
    assert how.formula is not None
    if how.deltas:
        readers = _adapted(how, readers)
    if not how.rows:
        yield from stream(how.formula, readers, task.dtype, task.full_name, seed)
        return
    mapped = [_Rows(reader, readers[0], rows) for reader, rows in zip(readers[1:], how.rows, strict=False)]
    plain = stream(how.formula, [readers[0], *mapped], task.dtype, task.full_name, seed)
    kept = stream(Formula("linear", (1.0,)), readers[:1], task.dtype, task.full_name, seed)
    width = task.nbytes // task.shape[0]
    at = 0
    for piece, own in zip(plain, kept, strict=True):
        first, last = at // width, -(-(at + len(piece)) // width)
        for row in range(first, last):
            if how.rows[0][row] < 0:
                start, stop = max(0, row * width - at), min(len(piece), (row + 1) * width - at)
                piece[start:stop] = own[start:stop]
        at += len(piece)
        yield piece


def _adapted(how: Task, readers: Sequence[Reader]) -> list[Reader]:
    """The inputs with their adapters applied; the factors themselves are left out."""
    from surgery.arch.merging.adapters import AdaptedReader

    inputs = list(readers[: how.deltas[0][1]])
    for index, at, scale, transposed in how.deltas:
        inputs[index] = AdaptedReader(inputs[index], readers[at], readers[at + 1], scale, transposed=transposed)
    return inputs


class _Rows:
    """Another model's rows in the host's order; where there is none, the host's row stands in."""

    def __init__(self, reader: Reader, host: Reader, rows: Sequence[int]) -> None:
        self.name, self.dtype, self.shape = reader.name, reader.dtype, host.shape
        self._reader, self._rows = reader, rows
        count = elements(reader.shape)
        self._width = count // reader.shape[0] * SIZES[reader.dtype] if count else 0

    def into(self, view: memoryview, start: int) -> None:
        at = 0
        while at < len(view):
            row, inside = divmod(start + at, self._width)
            other = self._rows[row]
            many = 1  # neighbouring rows of the other model are one read
            while other >= 0 and row + many < len(self._rows) and self._rows[row + many] == other + many:
                if many * self._width - inside >= len(view) - at:
                    break
                many += 1
            count = min(many * self._width - inside, len(view) - at)
            if other >= 0:
                self._reader.into(view[at : at + count], other * self._width + inside)
            else:
                view[at : at + count] = bytes(count)
            at += count


def task_params(task: Compute) -> list[Any] | None:
    """What a merged tensor depends on beside its inputs, as JSON values: the formula or the kernel with its numbers,
    which rows answer to which, the adapters. None for tensors that a merged tokenizer lays out anew."""
    how: Task = task.how
    if how.vocabulary is not None:
        return None
    params: list[Any] = [repr(how.formula), repr(how.kernel), how.rows, how.deltas]
    return params if how.kernel is None else [*params, task.full_name, installed_version("mergekit")]


def run_task(task: Compute, tensors: "list[Any]", generator: Any) -> Any:
    """A tensor that a method of mergekit makes."""
    from surgery.arch.merging.numbers.kernels import merge
    from surgery.store.dtypes import torch_dtype

    how: Task = task.how
    assert how.kernel is not None
    seed = generator.initial_seed() if generator is not None else 0
    out = torch_dtype(task.dtype)
    assert out is not None
    if how.deltas:
        from surgery.arch.merging.adapters import applied

        inputs = list(tensors[: how.deltas[0][1]])
        for index, at, scale, transposed in how.deltas:
            inputs[index] = applied(inputs[index], tensors[at], tensors[at + 1], scale, transposed=transposed)
        tensors = inputs
    if how.vocabulary is not None:
        vocabulary, keys = how.vocabulary
        tensors = vocabulary.aligned(tensors, keys)
    return merge(how.kernel, tensors, out_dtype=out, seed=seed, name=task.full_name)


def _by_kernel(kernel: Kernel, seed: int) -> Merge:
    """A method of mergekit as it is measured, in float32."""

    def make(readers: Sequence[Reader], count: int) -> Any:
        import numpy as np
        import torch

        from surgery.arch.merging.numbers.kernels import merge

        tensors = [torch.from_numpy(Source(r, np.float32, count).read(0, count).copy()) for r in readers]
        return merge(kernel, tensors, out_dtype=torch.float32, seed=seed, name=readers[0].name).numpy()

    return make


def measure_plan(op: Op, plan: Plan, seed: int, parents: Sequence[Checkpoint]) -> dict[str, Any]:
    """{"layers": rows, "warnings": ...} of a merge of two, sampled; empty for other plans."""
    if any(isinstance(p, Planned) for p in parents):
        return {}  # steps of a chain that are never written have no values to look at yet
    sums: dict[int | str, Sums] = {}
    for entry in plan.entries:
        if not isinstance(entry, Compute) or not isinstance(entry.how, Task):
            continue
        how: Task = entry.how
        count = how.deltas[0][1] if how.deltas else len(entry.inputs)
        if count < 2 or how.rows or how.vocabulary is not None:
            continue
        layer = layer_of(how.canonical)
        own = sums.setdefault("outside" if layer is None else layer, Sums())
        number = tensor_seed(seed, op, entry.full_name)
        with ExitStack() as opened:
            readers: list[Reader] = [opened.enter_context(open_reader(parents[at], ref)) for at, ref in entry.inputs]
            if how.deltas:
                readers = _adapted(how, readers)
            if how.formula is not None:
                dither = Bits(number, ROUNDING) if how.formula.rounding == "stochastic" else None
                merge = by_formula(how.formula, number)
                measure_tensor(own, merge, readers, entry.dtype, entry.name, dither=dither)
            elif how.kernel is not None:
                # A base that is a model of its own stands first; the two that are compared come after it.
                pair = (1, 2) if how.kernel.base == 0 and len(readers) > 2 else (0, 1)
                measure_tensor(own, _by_kernel(how.kernel, number), readers, entry.dtype, entry.name, pair=pair)
    if not sums:
        return {}
    rows = [sums[k].row(k) for k in sorted(sums, key=lambda k: (isinstance(k, str), k))]
    for row in rows:
        if not row["relative"]:  # host and donor are equal: rounding alone is no intended change
            row["transfer"] = None
    low = [r["layer"] for r in rows if r["transfer"] is not None and r["transfer"] < LITTLE]
    return {"layers": rows, "little": low}
