"""How the tensors of models of one kind answer to each other, and where each stands in a gradient.

A model is stacks of numbered layers (`model.layers.N.`, `transformer.h.N.`, an encoder's and a decoder's) and what lies
outside them. The stack that slices cut is the language tower's, or the only one. Names outside layers are compared
without what stands before them (`transformer.wte.weight` and `wte.weight`), so that files saved with and without a head
go together. Nothing is left out in silence: a tensor that only a later model has is an error.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from surgery.arch.blocks import block_lists, split_block
from surgery.arch.language.towers import EMBED, HEAD, Tower, shapes_of, towers
from surgery.arch.merging.documents.settings import Document, Slice, Source
from surgery.errors import CheckpointError, UsageError, printable
from surgery.graph.op import Keep
from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import TensorRef

Key = tuple[int, int | None]
Layer = Mapping[str, str]

# Token embeddings and heads of layouts that call them otherwise.
_VOCABULARY = {
    "wte.weight": EMBED, "embed_in.weight": EMBED, "word_embeddings.weight": EMBED, "embeddings.weight": EMBED,
    "shared.weight": EMBED, "embed_out.weight": HEAD,
}  # fmt: skip
# Masks, positions and frequencies that older files hold beside the weights: never merged, not missed where absent.
_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)")


class Row(NamedTuple):
    """One output tensor: its name, its place in a gradient, the slice it belongs to, and each input's tensor by key."""

    name: str
    canonical: str
    t: float
    part: Slice
    inputs: Mapping[Key, TensorRef]


@dataclass(frozen=True)
class Layout:
    """One model's names. `main` is the prefix of the stack that slices cut, None where there are several and no
    language tower; `stacks` maps prefixes to layers, `outside` comparable names to full ones."""

    model: Checkpoint
    main: str | None
    stacks: Mapping[str, Mapping[int, Layer]]
    outside: Mapping[str, str]

    def ref(self, name: str) -> TensorRef:
        """A tensor by its full name."""
        return self.model.tensors[name]

    def find(self, canonical: str) -> TensorRef | None:
        """What answers to a name outside layers; the embedding is the head of a model that ties them."""
        name = self.outside.get(canonical) or (self.outside.get(EMBED) if canonical == HEAD else None)
        return None if name is None else self.ref(name)

    def layers(self) -> Mapping[int, Layer]:
        """The layers that slices cut. Raises `UsageError` for a model of several stacks."""
        if self.main is None:
            shown = ", ".join(f"{printable(p)} ({len(layers)})" for p, layers in self.stacks.items()) or "none"
            raise UsageError(
                "slices", f"{self.model.name}: slices cut one stack of layers, and it has {shown}", hint="use models:"
            )
        return self.stacks[self.main]


def layout_of(model: Checkpoint) -> Layout:
    """The stacks of a model and what lies outside them, from its names alone."""
    tower = _tower(model)
    listed = [b.prefix for b in block_lists(model.tensors)]
    main = f"{tower.prefix}layers." if tower is not None else listed[0] if len(listed) == 1 else None
    prefixes = list(dict.fromkeys([*([main] if main is not None else []), *listed]))
    stacks: dict[str, dict[int, dict[str, str]]] = {p: {} for p in prefixes}
    root = tower.prefix if tower is not None else re.sub(r"[^.]+\.$", "", main) if main is not None else ""
    outside = {full: canonical for canonical, full in tower.names.items()} if tower is not None else {}
    rest: dict[str, str] = {}
    for name in model.tensors:
        block = next(((p, found) for p in prefixes if (found := split_block(name, p))), None)
        if block is not None:
            stacks[block[0]].setdefault(block[1][0], {})[block[1][1]] = name
        else:
            short = name.removeprefix(root)
            rest[outside.get(name) or _VOCABULARY.get(short, short)] = name
    return Layout(model, main, stacks, rest)


def depth_of(model: Checkpoint) -> tuple[str, int]:
    """Prefix and number of the layers that slices cut. Raises `UsageError`."""
    layout = layout_of(model)
    count = len(layout.layers())
    assert layout.main is not None
    return layout.main, count


def plain_rows(
    document: Document, parents: Sequence[Checkpoint], first: Key, *, force: bool = False
) -> tuple[list[Row], list[Keep], list[str]]:
    """(rows, tensors that are kept as they are, warnings) where all models have one layout; layers are numbered anew
    through the slices. Raises `CheckpointError` for a tensor without a counterpart, unless `force` leaves out what only
    later models have."""
    layouts = {m: layout_of(parents[m]) for m in {k[0] for k in document.inputs()}}
    made = _Rows(document, layouts, first)
    made.outside()
    made.other_stacks()
    if document.sliced or layouts[first[0]].main is not None:
        made.slices()
    return made.rows, made.kept, made.left_out(force=force)


class _Rows:
    """Collects rows, and what of each model has no place in them."""

    def __init__(self, document: Document, layouts: Mapping[int, Layout], first: Key) -> None:
        self.document, self.layouts, self.first = document, layouts, layouts[first[0]]
        self.parent = first[0]
        self.rows: list[Row] = []
        self.kept: list[Keep] = []
        self._extra: dict[int, list[str]] = {}

    def outside(self) -> None:
        """Embeddings, norms, heads and all else without a layer, at t = 0. What stands before the layers belongs to the
        first slice, what comes after them to the last."""
        slices = self.document.slices
        for canonical, name in self.first.outside.items():
            part = slices[0 if _before_layers(canonical) else -1]
            self._row(name, canonical, 0.0, part, {s.key: self._layout(s).find(canonical) for s in part.sources})
        for key in self.document.inputs():
            layout = self.layouts[key[0]]
            self._more(key[0], (n for c, n in layout.outside.items() if c not in self.first.outside))

    def other_stacks(self) -> None:
        """Stacks beside the main one, such as a vision encoder: whole, each with its own gradient; with slices at
        t = 0, as what lies outside."""
        part = self.document.slices[-1]
        for prefix, layers in self.first.stacks.items():
            if prefix == self.first.main:
                continue
            theirs = {s.key: self._layout(s).stacks.get(prefix, {}) for s in part.sources}
            counts = {s.key: len(theirs[s.key]) for s in part.sources}
            if len(set(counts.values())) > 1:
                raise _depths({self._layout(s).model.name: counts[s.key] for s in part.sources})
            for index, number in enumerate(sorted(layers)):
                t = 0.0 if self.document.sliced else index / (len(layers) - 1) if len(layers) > 1 else 1.0
                here = {k: stack.get(number, {}) for k, stack in theirs.items()}
                self._layer(layers[number], f"{prefix}{number}.", f"{prefix}{number}.", t, part, here)
        for key in self.document.inputs():
            layout = self.layouts[key[0]]
            strange = (p for p in layout.stacks if p not in self.first.stacks and p != layout.main)
            self._more(key[0], (n for p in strange for layer in layout.stacks[p].values() for n in layer.values()))

    def slices(self) -> None:
        """The main stack, slice by slice."""
        number = 0
        for part in self.document.slices:
            spans = [(s, _range(s, self._layout(s))) for s in part.sources]
            if len({len(span) for _, span in spans}) != 1:
                raise _depths({self._layout(s).model.name: len(span) for s, span in spans})
            count = len(spans[0][1])
            for index in range(count):
                t = index / (count - 1) if count > 1 else 1.0
                here = {s.key: self._layout(s).layers()[span[index]] for s, span in spans}
                like = here[part.sources[0].key]
                self._layer(like, f"{self.first.main}{number}.", f"layers.{number}.", t, part, here)
                number += 1

    def left_out(self, *, force: bool) -> list[str]:
        """Warnings about what only later models have; raises `CheckpointError` for weights among it."""
        warnings = []
        for model, names in self._extra.items():
            layout = self.layouts[model]
            names = list(dict.fromkeys(names))
            head = layout.outside.get(HEAD)
            if head in names:
                names.remove(head)
                warnings.append(
                    f"{layout.model.name}: '{printable(head)}' is left out, since {self.first.model.name} has no head "
                    "beside its embeddings"
                )
            if not names:
                continue
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            said = f"{layout.model.name} has '{printable(names[0])}'{more}, which {self.first.model.name} lacks"
            if not force:
                raise CheckpointError(
                    "incompatible", said, hint="the models must be of one architecture; --force leaves them out"
                )
            warnings.append(f"{said}: left out")
        return warnings

    def _layout(self, source: Source) -> Layout:
        return self.layouts[source.model]

    def _layer(self, like: Layer, start: str, canonical: str, t: float, part: Slice, here: Mapping[Key, Layer]) -> None:
        """A row for every tensor of one output layer."""
        for suffix in like:
            inputs = {
                k: self.layouts[k[0]].ref(layer[suffix]) if suffix in layer else None for k, layer in here.items()
            }
            self._row(start + suffix, canonical + suffix, t, part, inputs)
        for key, layer in here.items():
            self._more(key[0], (n for s, n in layer.items() if s not in like))

    def _row(self, name: str, canonical: str, t: float, part: Slice, inputs: Mapping[Key, TensorRef | None]) -> None:
        present = {k: ref for k, ref in inputs.items() if ref is not None}
        if _is_buffer(name, next(iter(present.values()), None)):
            key, ref = next(iter(present.items()))
            self.kept.append(Keep(name=name, dtype=ref.dtype, shape=ref.shape, ref=ref, parent=key[0]))
            return
        for key, ref in inputs.items():
            if ref is None:
                raise CheckpointError(
                    "incompatible",
                    f"{self.layouts[key[0]].model.name} has no counterpart of '{printable(name)}'",
                    hint="the models must be of one architecture",
                )
        self.rows.append(Row(name, canonical, t, part, present))

    def _more(self, model: int, names: Iterator[str]) -> None:
        layout = self.layouts[model]
        found = [n for n in names if not _is_buffer(n, layout.ref(n))]
        if found:
            self._extra.setdefault(model, []).extend(found)


def _tower(model: Checkpoint) -> Tower | None:
    fitting = [t for t in towers(shapes_of(model.tensors)) if EMBED in t.names]
    return fitting[0] if len(fitting) == 1 else None


def _before_layers(canonical: str) -> bool:
    return canonical.startswith(("wpe.", "shared.")) or ("embed" in canonical and "norm" not in canonical)


def _is_buffer(name: str, ref: TensorRef | None) -> bool:
    """Whether this is no weight: of names such as `attn.bias`, which may be either, those in the shape of a mask."""
    if ref is None or _BUFFER.fullmatch(name) is None:
        return False
    return not name.endswith("bias") or len(ref.shape) != 1


def _range(source: Source, layout: Layout) -> range:
    count = len(layout.layers())
    if source.last == -1:
        return range(count)
    if source.last > count:
        raise UsageError(
            "layer-range",
            f"layer_range [{source.first}, {source.last}]: {layout.model.name} has {count} layers",
            hint=f"the last one is [{count - 1}, {count}]",
        )
    return range(source.first, source.last)


def _depths(counts: Mapping[str, int]) -> CheckpointError:
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    return CheckpointError(
        "incompatible", f"the models differ in their number of layers: {shown}", hint="name slices: of both"
    )
