"""Documents whose models have different layouts: everything is merged into the host's language tower.

The weights are those of the document, in mergekit's sense; which tensors take part is as for HOST DONOR, with the
`layers`, `include` and `exclude` of our own block. All that is not selected stays the host's.
"""

from collections.abc import Sequence

from surgery.arch.language.locate import locate_towers
from surgery.arch.language.preflight import examine, stop_on
from surgery.arch.language.towers import TowerMap
from surgery.arch.layers import parse_spans
from surgery.arch.merging.card import short_name
from surgery.arch.merging.documents.rows import Key, Row
from surgery.arch.merging.documents.settings import Document
from surgery.arch.merging.selection import layer_of, select
from surgery.errors import UsageError
from surgery.graph.op import Entry, Keep
from surgery.store.checkpoint import Checkpoint


def tower_rows(
    document: Document, parents: Sequence[Checkpoint], host: int, *, strict: bool = False, force: bool = False
) -> tuple[Key, list[Row], list[Entry], list[str]]:
    """(the host's key, rows of the selected tensors, entries of all others, warnings of the preflight)."""
    if document.sliced or document.tokenizer is not None:
        raise UsageError(
            "slices",
            "slices and tokenizer options are for models of one layout",
            hint="use models:, with surgery: {layers: 12-28} for some layers",
        )
    if document.ours.get("vocab", "host") != "host":
        raise UsageError("vocab", "vocab in a document is host", hint="surgery merge HOST DONOR --vocab by-token")
    (part,) = document.slices
    mine = parents[host]
    maps: dict[Key, TowerMap] = {}
    warnings: list[str] = []
    for source in part.sources:
        if source.model == host:
            continue
        other = parents[source.model]
        maps[source.key] = locate_towers(mine, other)
        found = examine(mine, other, maps[source.key])
        warnings += [f"{short_name(other)}: {said}" for said in stop_on(found, strict=strict, force=force)]
    if not maps:
        raise UsageError("models", f"nothing is merged into {mine.name}", hint="name a text model as well")
    shared = next(iter(maps.values()))
    names = [c for c in shared.names if all(c in m.names for m in maps.values())]
    spec = document.ours.get("layers")
    layers = parse_spans(str(spec) if spec is not None else "all", shared.host_count, option="layers")
    chosen = select(
        names,
        layers,
        final_norm=spec is None,
        include=document.ours.get("include", ()),
        exclude=document.ours.get("exclude", ()),
    )
    first = next((s.key for s in part.sources if s.model == host), (host, None))
    rows: list[Row] = []
    taken: set[str] = set()
    for canonical in chosen:
        layer = layer_of(canonical)
        t = 0.0 if layer is None else layer / (shared.host_count - 1) if shared.host_count > 1 else 1.0
        name = shared.names[canonical][0]
        taken.add(name)
        inputs = {
            s.key: mine.tensors[name] if s.model == host else parents[s.model].tensors[maps[s.key].names[canonical][1]]
            for s in part.sources
        }
        rows.append(Row(name, canonical, t, part, inputs))
    kept: list[Entry] = [
        Keep(name=n, dtype=r.dtype, shape=r.shape, ref=r, parent=host)
        for n, r in mine.tensors.items()
        if n not in taken
    ]
    return first, rows, kept, warnings
