"""Adapters behind the models of a merge: HOST DONOR+ADAPTER.

An adapter stands behind its model among the parents. Tensors are planned as of the models alone; then those that an
adapter changes read it too, and what was kept as it is becomes the model's tensor with the adapter in it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from surgery.arch.merging.adapters import Adapter, is_adapter, open_adapter
from surgery.arch.merging.method import SCRATCH, Task
from surgery.arch.merging.numbers.formulas import Formula
from surgery.errors import UsageError
from surgery.graph.op import Compute, Entry, Keep
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Attached:
    """An adapter, the number of its model, and its own place among the parents."""

    model: int
    at: int
    adapter: Adapter
    checkpoint: Checkpoint


def models_and_adapters(parents: Sequence[Checkpoint]) -> tuple[list[Checkpoint], tuple[Attached, ...]]:
    """The models among the parents, and the adapters. Raises `UsageError` for an adapter without a model, and
    `CheckpointError` for one of another."""
    models: list[Checkpoint] = []
    found: list[Attached] = []
    for at, parent in enumerate(parents):
        if not is_adapter(parent):
            models.append(parent)
            continue
        if not models or any(a.model == len(models) - 1 for a in found):
            raise UsageError(
                "models",
                f"{parent.name}: an adapter, and no model of its own before it",
                hint="it stands behind its model, HOST DONOR+ADAPTER; several are applied by surgery lora apply",
            )
        found.append(Attached(len(models) - 1, at, open_adapter(parent, models[-1]), parent))
    return models, tuple(found)


def attach(entries: Iterable[Entry], attached: Sequence[Attached]) -> Iterator[Entry]:
    """The entries of a merge of models, with parents numbered as they stand and adapters applied."""
    own = {a.model: a for a in attached}
    for entry in entries:
        if isinstance(entry, Keep):
            adapter = own.get(entry.parent)
            if adapter is None or not adapter.adapter.touches(entry.ref.name):
                yield replace(entry, parent=_place(entry.parent, attached))
                continue
            how = Task(entry.name, Formula("linear", (1.0,)))
            entry = Compute(
                name=entry.name, dtype=entry.dtype, shape=entry.shape, how=how, refs=(entry.ref,), parent=entry.parent,
                streamed=True, scratch=SCRATCH,
            )  # fmt: skip
        yield _adapted(entry, own, attached) if isinstance(entry, Compute) else entry


def _adapted(entry: Compute, own: dict[int, Attached], attached: Sequence[Attached]) -> Compute:
    refs = [ref for _, ref in entry.inputs]
    sources = [_place(model, attached) for model, _ in entry.inputs]
    deltas = []
    for index, (model, ref) in enumerate(entry.inputs):
        found = own.get(model)
        if found is not None and found.adapter.touches(ref.name):
            deltas.append((index, len(refs), found.adapter.scale_of(ref.name), found.adapter.transposed))
            refs += found.adapter.factors(ref.name)
            sources += [found.at, found.at]
    factors = sum(ref.nbytes for ref in refs[len(entry.inputs) :])
    return replace(
        entry,
        refs=tuple(refs),
        sources=tuple(sources),
        how=replace(entry.how, deltas=tuple(deltas)),
        scratch=entry.scratch + 2 * factors,
    )


def _place(model: int, attached: Sequence[Attached]) -> int:
    """Where the model of this number stands among the parents."""
    return model + sum(a.model < model for a in attached)
