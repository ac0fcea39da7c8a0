"""Plan a mergekit document: any number of models, slices, gradients, filters, tokenizer options.

Plain models of one layout are merged name by name. Where one of them is a vision-language model and the others are
text models, or the block `surgery:` names a host, the others are merged into that host's tower. Linear, slerp and
passthrough are made in pieces; every other method by mergekit's own kernel, bit for bit.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.arch.blocks import BlockList, edit_depth
from surgery.arch.carried import FLOATS, config_edits, indexes, part_names, with_dtype
from surgery.arch.language.families import family_of
from surgery.arch.language.preflight import refuse_quantised
from surgery.arch.merging.adapters import open_adapter
from surgery.arch.merging.card import card, card_digest
from surgery.arch.merging.documents.entries import EntryMaker
from surgery.arch.merging.documents.rows import Key, depth_of, plain_rows
from surgery.arch.merging.documents.settings import Document, Slice, Source
from surgery.arch.merging.documents.vocabularies import Vocabulary, merged_vocabulary
from surgery.arch.merging.files import files_of, named_template
from surgery.arch.merging.pair import plain_model
from surgery.arch.merging.selection import layer_of
from surgery.errors import UsageError
from surgery.graph.op import Compute, Entry, Plan, SideFile
from surgery.graph.planned import Planned
from surgery.store.checkpoint import Checkpoint


def plan_document(
    text: str, parents: Sequence[Checkpoint], *, arithmetic: str = "auto", strict: bool = False, force: bool = False
) -> Plan:
    """The plan of a document whose models are numbers into `parents`.

    Raises UsageError for a document that does not fit them, CheckpointError for models that do not fit one another.
    """
    for parent in parents:
        plain_model(parent)
        refuse_quantised(parent)
    document = read_document(text)
    _check_sources(document, parents)
    adapters = {key: open_adapter(parents[key[1]], parents[key[0]]) for key in document.inputs() if key[1] is not None}
    if arithmetic == "mergekit":
        from surgery.arch.merging.documents.delegate import check_models

        check_models(json.loads(text), parents)
    host = _host(document, parents)
    if host is not None:
        from surgery.arch.merging.documents.tower import tower_rows

        first, rows, kept, warnings = tower_rows(document, parents, host, strict=strict, force=force)
    else:
        first = document.base or document.slices[0].sources[0].key
        rows, kept, warnings = plain_rows(document, parents, first, force=force)
    vocabulary = merged_vocabulary(document, parents) if document.tokenizer is not None else None
    maker = EntryMaker(document, parents, adapters, vocabulary, arithmetic)
    warnings = [*warnings, *maker.unknown_parameters(), *(vocabulary.warnings if vocabulary else ())]
    entries = [*maker.entries(rows, first), *kept]
    plan = _finished(document, parents, first, entries, vocabulary, warnings, mirrored=not document.sliced)
    if host is not None:
        numbers = {n for row in rows if (n := layer_of(row.canonical)) is not None}
        plan.report["into"] = {"name": parents[host].name, "layers": sorted(numbers)}
    if arithmetic == "mergekit":
        from surgery.arch.merging.documents.delegate import handed_over

        return handed_over(plan)
    return plan


def read_document(text: str) -> Document:
    """The document with every form turned into slices. Raises `UsageError` for what does not fit the models."""
    try:
        given = json.loads(text)
        method = given["merge_method"]
    except (ValueError, TypeError, KeyError):
        raise UsageError("config", "config: not a mergekit document", hint="surgery merge --config FILE") from None
    base = _key(given["base_model"]) if "base_model" in given else None
    module: Mapping[str, Any] = given
    if "modules" in given:
        if len(given["modules"]) != 1:
            raise UsageError(
                "modules",
                f"the document has {len(given['modules'])} modules; one language model has one",
                hint="a vision-language model and text models are merged by models: or HOST DONOR",
            )
        (module,) = given["modules"].values()
    inner = module.get("parameters") if module is not given else None
    if module.get("slices"):
        slices = tuple(
            Slice(
                tuple(_source(s) for s in part["sources"]),
                _key(part["base_model"]) if "base_model" in part else base,
                part.get("parameters"),
            )
            for part in module["slices"]
        )
    else:
        sources = [Source(*_key(m["model"]), 0, -1, m.get("parameters")) for m in module.get("models", [])]
        if base is not None and base not in [s.key for s in sources]:
            sources.append(Source(*base, 0, -1))
        slices = (Slice(tuple(sources), base),)
    tokenizer = given.get("tokenizer")
    if given.get("tokenizer_source") is not None:
        tokenizer = {"source": given["tokenizer_source"]}
    return Document(
        method,
        slices,
        base,
        inner,
        given.get("parameters"),
        given.get("dtype"),
        given.get("out_dtype"),
        tokenizer,
        given.get("chat_template"),
        bool(module.get("slices")),
        given.get("surgery", {}),
    )


def _check_sources(document: Document, parents: Sequence[Checkpoint]) -> None:
    """Refuse a model that stands twice where its settings could not be told apart."""
    for part in document.slices:
        keys = [s.key for s in part.sources]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(
                    "models",
                    f"{parents[key[0]].name} stands {keys.count(key)} times among the models that are merged",
                    hint="name it once, with the sum of its weights",
                )


def _key(model: Any) -> Key:
    return (model[0], model[1]) if isinstance(model, list) else (model, None)


def _source(given: Mapping[str, Any]) -> Source:
    first, last = given["layer_range"]
    return Source(*_key(given["model"]), first, last, given.get("parameters"))


def _host(document: Document, parents: Sequence[Checkpoint]) -> int | None:
    """The model whose tower the others are merged into, where they are not all of one layout or our block says what to
    merge. Raises `UsageError` where it is not clear."""
    if "host" in document.ours:
        return _key(document.ours["host"])[0]
    models = list(dict.fromkeys(k[0] for k in document.inputs()))
    families = {m: family_of(parents[m].part().config) for m in models}
    seeing = [m for m in models if families[m] is not None]
    based = document.base[0] if document.base is not None else None
    if seeing and len(seeing) < len(models):
        if len(seeing) > 1 and based not in seeing:
            raise UsageError(
                "host", "several of the models are vision-language models", hint="surgery: {host: MODEL} names the host"
            )
        return seeing[0] if len(seeing) == 1 else based
    if document.ours and based is None:
        raise UsageError(
            "host",
            f"the block surgery: says {', '.join(document.ours)}, and not of which model",
            hint="surgery: {host: MODEL} names the one that keeps all that is not merged",
        )
    return based if document.ours else None


def _raised(base: Checkpoint, entries: Sequence[Entry]) -> str | None:
    """The dtype that all merged floats have, where inputs of several dtypes gave one that the base does not have."""
    found = {e.dtype for e in entries if e.dtype in FLOATS.values()}
    before = {ref.dtype for ref in base.tensors.values()}
    names = {v: k for k, v in FLOATS.items()}
    return names[found.pop()] if len(found) == 1 and not found <= before else None


def _finished(
    document: Document,
    parents: Sequence[Checkpoint],
    first: Key,
    entries: Sequence[Entry],
    vocabulary: Vocabulary | None,
    warnings: Sequence[str],
    *,
    mirrored: bool,
) -> Plan:
    base = parents[first[0]]
    part = base.part()
    edited: dict[str, Any] = {}
    edits: tuple[tuple[str, Any, Any], ...] = ()
    if part.config is not None and part.config_file is not None:
        config = dict(part.config)
        wanted = document.out_dtype or document.dtype or _raised(base, entries)
        if wanted:
            config = with_dtype(config, wanted)
        if document.sliced:
            prefix, count = depth_of(base)
            order = [s.first + i for piece in document.slices for s in piece.sources[:1] for i in range(piece.count)]
            where = f"{base.name}: {part.config_file}"
            if max(order) < count:
                edit = edit_depth(config, BlockList(prefix, count), order, where=where)
                config, warnings = edit.config, [*warnings, *edit.warnings]
            else:
                config["num_hidden_layers"] = len(order)
        if vocabulary is not None:
            config["vocab_size"] = vocabulary.rows
        if config != part.config:
            edited[part.config_file] = config
            edits = config_edits(part.config_file, part.config, config)
    files = [f for f in files_of(base, base, edited, chat_template=None) if f.relative != "README.md"]
    inputs: dict[str, str] = {}
    if vocabulary is not None:
        files = [f for f in files if f.relative not in vocabulary.replaces] + list(vocabulary.files)
        inputs["vocabulary"] = vocabulary.digest
    if document.chat_template is not None:
        used = [parents[k[0]] for k in document.inputs()]
        text = named_template(document.chat_template, used)
        files = [f for f in files if f.relative not in ("chat_template.jinja", "chat_template.json")]
        files += [SideFile("chat_template.jinja", content=text.encode())] if text else []
    names = {e.name for e in entries}
    mirrored = (
        mirrored and names == set(base.tensors) and base.layout in ("hf", "file") and not isinstance(base, Planned)
    )
    merged = [e for e in entries if isinstance(e, Compute)]
    report = {
        "method": document.method,
        "models": [
            parents[k[0]].name + (f"+{parents[k[1]].name}" if k[1] is not None else "") for k in document.inputs()
        ],
        "merged": {"tensors": len(merged), "bytes": sum(e.nbytes for e in merged)},
        "copied": {
            "tensors": len(entries) - len(merged),
            "bytes": sum(e.nbytes for e in entries) - sum(e.nbytes for e in merged),
        },
    }
    files.append(SideFile("README.md", content=card(report, parents).encode(), digest=card_digest(parents)))
    if mirrored:
        files += list(indexes(base))
    else:
        files = [f for f in files if not f.relative.endswith(".index.json")]
    return Plan(
        tuple(entries), part_names(base), tuple(files), config_edits=edits, warnings=tuple(warnings), report=report,
        inputs=inputs, mirror=base if mirrored else None,
    )  # fmt: skip
