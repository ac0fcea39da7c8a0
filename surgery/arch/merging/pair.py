"""Plan the merge of a text model into another model's language tower: HOST DONOR [BASE].

From headers and configs alone: which tensors are merged by which formula, which are taken over, what the output's files
are. The output has the host's files under the host's names; vision encoder and projector are never touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.arch.carried import FLOATS, config_edits, indexes, part_names, with_dtype
from surgery.arch.language.families import family_of
from surgery.arch.language.locate import locate_towers
from surgery.arch.language.preflight import check_stored, examine, stop_on
from surgery.arch.language.towers import EMBED, HEAD, TowerMap, parse_layer_map
from surgery.arch.language.vocabulary import rows_by_policy
from surgery.arch.layers import parse_spans
from surgery.arch.merging.attached import Attached, attach
from surgery.arch.merging.card import card, card_digest, spans
from surgery.arch.merging.files import files_of
from surgery.arch.merging.method import SCRATCH, Method, Request, Task
from surgery.arch.merging.numbers.formulas import STREAMED, Formula
from surgery.arch.merging.numbers.kernels import is_random
from surgery.arch.merging.selection import check_layers, layer_of, select
from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.graph.op import Compute, Entry, Keep, Plan, SideFile
from surgery.graph.planned import Planned
from surgery.store.checkpoint import Checkpoint
from surgery.store.digests import canonical_digest
from surgery.store.tensors import TensorRef

_STORED = ("BF16", "F16", "F32", "F64")


def plan_pair(
    request: Request,
    host: Checkpoint,
    donor: Checkpoint,
    base: Checkpoint | None,
    attached: Sequence[Attached] = (),
) -> Plan:
    """The plan of a merge; `attached` are adapters of the models, which stand behind them among the parents. Raises
    `UsageError` and `CheckpointError` before anything is written."""
    for checkpoint in (host, donor, *((base,) if base else ())):
        plain_model(checkpoint)
    method = Method(request, host, donor, base)
    mapped = _map(request, host, donor)
    base_map = _map(request, host, base) if base is not None else None
    layers = _layers(request, mapped)
    check_layers(method.shares, mapped.host_count)
    chosen = _chosen(request, mapped, layers)
    check_stored(host.tensors, [mapped.names[c][0] for c in chosen], host.name)
    check_stored(donor.tensors, [mapped.names[c][1] for c in chosen], donor.name)
    warnings = _preflight(request, host, donor, mapped)
    if base is not None and base_map is not None:
        check_stored(base.tensors, [base_map.names[c][1] for c in chosen if c in base_map.names], base.name)
        found = examine(host, base, base_map, role="base")
        warnings += list(stop_on(replace(found, warnings=()), strict=request.strict, force=request.force))
    rows, inputs = _vocabulary(request, host, donor, base, mapped, base_map, chosen)
    if mapped.by_class:  # another version of transformers may answer otherwise
        inputs["tower"] = canonical_digest({c: list(pair) for c, pair in mapped.names.items()})
    entries = _entries(request, method, host, donor, base, mapped, base_map, chosen, layers, rows)
    entries = list(attach(entries, attached)) if attached else entries
    part = host.part()
    edited: dict[str, Any] = {}
    edits: tuple[tuple[str, Any, Any], ...] = ()
    if request.dtype and part.config is not None and part.config_file:
        edited[part.config_file] = with_dtype(part.config, request.dtype)
        edits = config_edits(part.config_file, part.config, edited[part.config_file])
    files = files_of(host, donor, edited, chat_template=request.chat_template)
    known = family_of(part.config)
    merged = [e for e in entries if isinstance(e, Compute) or (isinstance(e, Keep) and e.parent != 0)]
    copied = len(entries) - len(merged), sum(e.nbytes for e in entries) - sum(e.nbytes for e in merged)
    selected = [n for n in layers if any(layer_of(c) == n for c in chosen)]
    report = {
        "method": request.method,
        "dtype": request.dtype or "host's",
        "rounding": request.rounding,
        "numerics": request.numerics,
        "host": {"name": host.name, "class": _class_of(part.config), "family": known.name if known else None},
        "donor": {"name": donor.name, "class": _class_of(donor.part().config)},
        "base": base.name if base else None,
        "prefix": mapped.host_prefix,
        "found_by": mapped.by_class or "names",
        "layers": {"selected": selected, "of": mapped.host_count, "cross_attention": list(mapped.cross_layers)},
        "weights": method.said(layers, selected, outside=any(layer_of(c) is None for c in chosen)),
        "merged": {"tensors": len(merged), "bytes": sum(e.nbytes for e in merged)},
        "copied": {"tensors": copied[0], "bytes": copied[1]},
        "tensors": [
            {
                "canonical": c,
                "host": mapped.names[c][0],
                "donor": mapped.names[c][1],
                "weights": [round(w, 6) for w in method.weights(method.shares.at(layer_of(c), layers))],
            }
            for c in chosen
        ],
        "host_only": list(mapped.host_only),
        "donor_only": list(mapped.donor_only),
    }
    roles = ["host", "donor", *(["base"] if base else [])]
    for own in attached:
        report.setdefault("adapters", {})[roles[own.model]] = own.checkpoint.name
    models = [host, donor, *((base,) if base else ()), *(own.checkpoint for own in attached)]
    roles += [f"adapter of the {roles[own.model]}" for own in attached]
    page = SideFile("README.md", content=card(report, models, roles).encode(), digest=card_digest(models))
    files = (*(f for f in files if f.relative != "README.md"), page)
    mirrored = host.layout in ("hf", "file") and not isinstance(host, Planned)
    return Plan(
        tuple(entries),
        part_names(host),
        (*files, *(indexes(host) if mirrored else ())),
        config_edits=edits,
        warnings=tuple(warnings),
        report=report,
        inputs=inputs,
        mirror=host if mirrored else None,
    )


def _map(request: Request, host: Checkpoint, other: Checkpoint) -> TowerMap:
    return locate_towers(
        host,
        other,
        prefix=request.tower,
        layer_map=parse_layer_map(request.layer_map) if request.layer_map else None,
        ignore_extra=request.ignore_extra,
    )


def _layers(request: Request, mapped: TowerMap) -> tuple[int, ...]:
    """The layers asked for that have a counterpart; gradients run over these."""
    wanted = parse_spans("all" if request.layers is None else request.layers, mapped.host_count)
    found = tuple(n for n in wanted if n in mapped.layers)
    if not found:
        named = ", ".join(map(str, wanted))
        why = "are cross-attention" if set(wanted) <= set(mapped.cross_layers) else "are in no pair of --layer-map"
        raise UsageError(
            "nothing-selected",
            f"--layers {printable(request.layers or 'all')}: layers {named} {why} and have no counterpart",
            hint=f"layers with one: {spans(sorted(mapped.layers))}",
        )
    return found


def _chosen(request: Request, mapped: TowerMap, layers: Sequence[int]) -> tuple[str, ...]:
    include = request.include
    if request.vocab != "host":
        include = (*include, *(g for g, n in (("embed", EMBED), ("head", HEAD)) if n in mapped.names))
    tied = HEAD not in mapped.names and any(pattern in ("head", HEAD) for pattern in request.include)
    if tied and EMBED in mapped.names:
        raise UsageError(
            "head",
            "--include head: host or donor has no head of its own, it is tied to the embeddings",
            hint="--include embed merges the embeddings; a head is never added",
        )
    chosen = select(mapped.names, layers, final_norm=request.layers is None, include=include, exclude=request.exclude)
    if not chosen:
        raise UsageError(
            "nothing-selected", "no tensor of the tower is selected", hint="widen --layers or drop --exclude"
        )
    return chosen


def _preflight(request: Request, host: Checkpoint, donor: Checkpoint, mapped: TowerMap) -> list[str]:
    found = examine(host, donor, mapped)
    if family_of(host.part().config) is None and family_of(donor.part().config) is not None:
        said = f"{donor.name} sees images and {host.name} does not: the result is a text model; HOST stands first"
        found = replace(found, warnings=(said, *found.warnings))
    warnings = list(stop_on(found, strict=request.strict, force=request.force))
    if request.ignore_extra and mapped.donor_only:
        extra = [printable(n) for n, canonical in mapped.donor_only.items() if layer_of(canonical) is not None]
        warnings += [f"left out, only the donor has them: {', '.join(extra[:4])}"] if extra else []
    inside = [n for n, canonical in mapped.host_only.items() if layer_of(canonical) in mapped.layers]
    if inside:
        warnings.append(
            f"{len(inside)} tensors of the host's layers have no counterpart and stay: {printable(inside[0])}, …"
        )
    return warnings


def _vocabulary(
    request: Request,
    host: Checkpoint,
    donor: Checkpoint,
    base: Checkpoint | None,
    mapped: TowerMap,
    base_map: TowerMap | None,
    chosen: Sequence[str],
) -> tuple[dict[str, tuple[tuple[int, ...], ...]], dict[str, str]]:
    """Rows of embedding and head by canonical name, and the digest of what they were made from."""
    rows: dict[str, tuple[tuple[int, ...], ...]] = {}
    for canonical in chosen:
        if canonical not in (EMBED, HEAD):
            continue
        mine, theirs = mapped.names[canonical]
        one, two = host.tensors[mine], donor.tensors[theirs]
        if request.vocab == "host":
            if one.shape != two.shape:
                raise CheckpointError(
                    "vocabulary",
                    f"'{printable(mine)}' is {list(one.shape)} and '{printable(theirs)}' {list(two.shape)}",
                    hint="--vocab overlap or by-token merges the rows that both have",
                )
            continue
        found = [rows_by_policy(request.vocab, host, donor, host_rows=one.shape[0], donor_rows=two.shape[0])]
        if base is not None and base_map is not None and canonical in base_map.names:
            third = base.tensors[base_map.names[canonical][1]]
            found.append(rows_by_policy(request.vocab, host, base, host_rows=one.shape[0], donor_rows=third.shape[0]))
        unmapped = [any(r[i] < 0 for r in found) for i in range(one.shape[0])]
        rows[canonical] = tuple(tuple(-1 if gone else n for n, gone in zip(r, unmapped, strict=True)) for r in found)
    digest = {"vocabulary": canonical_digest({c: list(map(list, r)) for c, r in rows.items()})} if rows else {}
    return rows, digest


def _entries(
    request: Request,
    method: Method,
    host: Checkpoint,
    donor: Checkpoint,
    base: Checkpoint | None,
    mapped: TowerMap,
    base_map: TowerMap | None,
    chosen: Sequence[str],
    layers: Sequence[int],
    rows: Mapping[str, tuple[tuple[int, ...], ...]],
) -> list[Entry]:
    wanted = FLOATS[request.dtype] if request.dtype else None
    by_name = {mapped.names[c][0]: c for c in chosen}
    entries: list[Entry] = []
    for name, ref in host.tensors.items():
        canonical = by_name.get(name)
        dtype = wanted if wanted and ref.dtype in _STORED else ref.dtype
        if canonical is None:
            entries.append(_carried(name, ref, 0, dtype))
            continue
        other = donor.tensors[mapped.names[canonical][1]]
        if not {ref.dtype, other.dtype} <= set(_STORED):
            if ref.dtype != other.dtype:
                raise CheckpointError(
                    "incompatible",
                    f"'{printable(name)}' is {ref.dtype} in the host and {other.dtype} in the donor, not numbers to "
                    "merge",
                    hint="leave it out with --exclude",
                )
            entries.append(_carried(name, ref, 0, ref.dtype))
            continue
        weights = method.weights(method.shares.at(layer_of(canonical), layers))
        mapped_rows = rows.get(canonical, ())
        plain = method.name in ("linear", "slerp", "swap") and method.spec is None and not mapped_rows
        if plain and weights == (1.0, 0.0):
            entries.append(_carried(name, ref, 0, dtype))
        elif plain and weights == (0.0, 1.0):
            entries.append(_carried(name, other, 1, dtype))
        else:
            third = base.tensors[_base_name(base_map, canonical)] if base is not None and base_map else None
            entries.append(_computed(method, name, canonical, weights[0], ref, other, third, dtype, mapped_rows))
    return entries


def _carried(name: str, ref: TensorRef, parent: int, dtype: str) -> Entry:
    """A tensor as it is, or only rounded to another dtype."""
    if ref.dtype == dtype:
        return Keep(name=name, dtype=dtype, shape=ref.shape, ref=ref, parent=parent)
    task = Task(name, Formula("linear", (1.0,)))
    return Compute(
        name=name, dtype=dtype, shape=ref.shape, how=task, refs=(ref,), parent=parent, streamed=True, scratch=SCRATCH
    )


def _computed(
    method: Method,
    name: str,
    canonical: str,
    share: float,
    host: TensorRef,
    donor: TensorRef,
    base: TensorRef | None,
    dtype: str,
    rows: tuple[tuple[int, ...], ...],
) -> Compute:
    task = method.task(canonical, share, rows)
    refs: tuple[TensorRef, ...]
    sources: tuple[int, ...]
    if task.formula is not None:
        refs, sources = ((host, donor, base), (0, 1, 2)) if base is not None else ((host, donor), (0, 1))
        return Compute(
            name=name, dtype=dtype, shape=host.shape, how=task, refs=refs, sources=sources, streamed=True,
            scratch=SCRATCH,
        )  # fmt: skip
    assert task.kernel is not None
    if rows:
        raise UsageError(
            "vocab", f"--vocab goes with {', '.join(STREAMED)}, not with {task.kernel.method}", hint="--vocab host"
        )
    refs, sources = ((base, host, donor), (2, 0, 1)) if base is not None else ((host, donor), (0, 1))
    elements = host.nbytes // (2 if host.dtype in ("BF16", "F16") else 4)
    return Compute(
        name=name, dtype=dtype, shape=host.shape, how=task, refs=refs, sources=sources,
        random=is_random(task.kernel.method), scratch=4 * elements * (len(refs) + 3),
    )  # fmt: skip


def _base_name(mapped: TowerMap, canonical: str) -> str:
    if canonical not in mapped.names:
        raise CheckpointError(
            "incompatible", f"the base has no counterpart of '{canonical}'", hint="leave it out with --exclude"
        )
    return mapped.names[canonical][1]


def plain_model(checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for a pipeline."""
    if len(checkpoint.parts) != 1:
        raise UsageError(
            "part", f"{checkpoint.name}: a pipeline; merging is between models", hint="name a part: NAME:PART"
        )


def _class_of(config: Mapping[str, Any] | None) -> str | None:
    found = (config or {}).get("architectures")
    return str(found[0]) if isinstance(found, list) and found else None


def check_word(option: str, value: str, known: Sequence[str]) -> None:
    """Raise `UsageError` for a word that an option does not know."""
    if value not in known:
        raise UsageError(option, f"--{option} {printable(value)}: unknown", hint=closest(value, list(known)))
