"""Vocabularies of several models brought together, by mergekit's own rules for `tokenizer` and `tokenizer_source`.

mergekit builds the tokenizer and aligns embedding rows; this module calls it with local folders, saves the tokenizer's
files, and keeps what aligning needs. Importing it costs seconds, so it happens only for documents that ask for it.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.arch.language.towers import EMBED
from surgery.arch.merging.documents.rows import layout_of
from surgery.arch.merging.documents.settings import Document
from surgery.errors import CheckpointError, UsageError, printable
from surgery.graph.op import SideFile
from surgery.store.checkpoint import Checkpoint
from surgery.store.digests import canonical_digest

if TYPE_CHECKING:
    import torch

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """A merged vocabulary: how many rows embeddings get, the tokenizer's files, and mergekit's tables."""

    rows: int
    files: tuple[SideFile, ...]
    digest: str
    info: Any = field(repr=False)
    references: Mapping[Any, Any] = field(repr=False)
    tokens: Mapping[str, Any] = field(repr=False)
    multiple: int | None = None
    base: Any = None
    warnings: tuple[str, ...] = ()

    @property
    def replaces(self) -> tuple[str, ...]:
        """Side files of a model that no longer hold."""
        return _FILES

    def aligned(self, tensors: "Sequence[torch.Tensor]", keys: Sequence[Any]) -> "list[torch.Tensor]":
        """Embeddings or heads [old rows, ...] of the inputs `keys`, each as [rows, ...] in the merged order."""
        from mergekit.tokenizer.embed import PermutedVocabulary

        task = PermutedVocabulary.model_construct(
            gather_tensors=None,
            tokenizer_task=None,
            tokens=self.tokens or None,
            pad_to_multiple_of=self.multiple,
            base_model=self.base,
            vocabulary_axis=0,
        )
        models = [self.references[key] for key in keys]
        with _quiet():
            found = task.execute(tokenizer_info=self.info, tensors=dict(zip(models, tensors, strict=True)))
        return [found[model] for model in models]


def merged_vocabulary(document: Document, parents: Sequence[Checkpoint]) -> Vocabulary:
    """Build the tokenizer that a document asks for. Raises `CheckpointError` where a model has none that loads."""
    from mergekit.common import ModelReference
    from mergekit.tokenizer.build import build_tokenizer
    from mergekit.tokenizer.config import TokenEmbeddingConfig

    given = document.tokenizer or {}
    keys = document.inputs()
    for parent in parents:
        parent.file("tokenizer.json")  # a step that is not made yet has its tokenizer from here on
    references = {
        key: ModelReference.model_validate({"model": {"path": str(parents[key[0]].path.resolve())}}) for key in keys
    }
    if len(set(references.values())) != len(keys):
        raise CheckpointError(
            "tokenizer",
            "a model stands twice, with and without an adapter, beside tokenizer options",
            hint="apply it first",
        )

    def reference(model: Any) -> Any:
        key = (model[0], model[1]) if isinstance(model, list) else (model, None)
        return references.get(key) or ModelReference.model_validate(
            {"model": {"path": str(parents[key[0]].path.resolve())}}
        )

    tokens = {}
    for token, body in (given.get("tokens") or {}).items():
        source = body.get("source")
        if isinstance(source, Mapping):
            source = {**source, **({"model": reference(source["model"])} if "model" in source else {})}
        elif source is not None:
            source = reference(source)
        tokens[token] = TokenEmbeddingConfig(source=source, force=body.get("force", False))
    wanted = given.get("source", "union")
    base = references[document.base] if document.base is not None else None
    said = _Said()
    try:
        with said.listening(), _ordered():
            info = build_tokenizer(
                base_model=base,
                referenced_models=list(references.values()),
                tokenizer_source=wanted if wanted in ("union", "base") else reference(wanted),
                trust_remote_code=False,
                add_tokens=list(tokens),
            )
    except Exception as err:  # transformers' and tokenizers' errors are of many kinds
        first = printable(str(err).strip().split("\n")[0], limit=160)
        raise CheckpointError(
            "tokenizer", f"the tokenizers do not go together: {first}", hint="each model needs its tokenizer's files"
        ) from None
    vocab = info.tokenizer.get_vocab()
    for rows_of in info.permutations.values():
        for index in vocab.values():
            rows_of.setdefault(index, -1)  # a token beyond the model's rows: mergekit forgets it, and stops later
    heights = {}
    for key in keys:
        embedding = layout_of(parents[key[0]]).find(EMBED)
        heights[references[key]] = embedding.shape[0] if embedding is not None else 0
    _check_tokens(tokens, info, heights)
    lacking = [t for t, n in vocab.items() if t not in tokens and all(p[n] < 0 for p in info.permutations.values())]
    rows, multiple = len(vocab), given.get("pad_to_multiple_of")
    if multiple and rows % multiple:
        rows += multiple - rows % multiple
    with tempfile.TemporaryDirectory() as folder:
        info.tokenizer.save_pretrained(folder)
        files = tuple(SideFile(p.name, content=p.read_bytes()) for p in sorted(Path(folder).iterdir()) if p.is_file())
    digest = canonical_digest(
        {"vocab": vocab, "maps": [sorted(info.permutations[references[k]].items()) for k in keys]}
    )
    return Vocabulary(rows, files, digest, info, references, tokens, multiple, base, _warnings(said, tokens, lacking))


def _warnings(said: "_Said", tokens: Mapping[str, Any], lacking: Sequence[str]) -> tuple[str, ...]:
    """What mergekit said, but for tokens that were asked for, and how many tokens get rows of zeros."""
    found = [text for text in said.warnings if not any(repr(token) in text for token in tokens)]
    if lacking:
        shown = ", ".join(printable(t) for t in sorted(lacking)[:3])
        found.append(
            f"{len(lacking):,} tokens of the new tokenizer are in none of the models, their rows are 0: {shown}"
        )
    return tuple(found)


def _check_tokens(tokens: Mapping[str, Any], info: Any, heights: Mapping[Any, int]) -> None:
    """Refuse a row that is to come from a token which its model does not have; `heights` are rows of embeddings."""
    for token, config in tokens.items():
        source = config.source
        model = getattr(source, "model", None) if hasattr(source, "kind") else source
        if model is None:
            continue
        vocabulary = info.original_vocabs.get(model)
        number = getattr(source, "token_id", None)
        wanted = getattr(source, "token", None) or token
        there = wanted in vocabulary if vocabulary is not None and number is None else number is not None
        if not there or (number is not None and number >= heights.get(model, 0)):
            shown = f"'{printable(wanted)}'" if number is None else f"number {number}"
            raise UsageError(
                "tokenizer",
                f"tokenizer: '{printable(token)}' is to come from a token that {model} does not have: {shown}",
                hint="source: {kind: model_token, model: MODEL, token: TOKEN}, or kind: zero",
            )


class _Said(logging.Handler):
    """What mergekit says while it builds a tokenizer, as warnings; its progress bars go nowhere."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.WARNING:
            return  # the text of an exception, after which it says what it does about it
        text = printable(record.getMessage().split("\n")[0])
        if text not in self.warnings:
            self.warnings.append(text)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        log = logging.getLogger("mergekit")
        before = log.propagate
        log.addHandler(self)
        log.propagate = False
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            log.propagate = before
            log.removeHandler(self)


@contextlib.contextmanager
def _ordered() -> Iterator[None]:
    """Vocabularies in the order of their numbers: the tokenizers library gives them in an order that changes from call
    to call, and a union would number its new tokens by it."""
    from transformers import PreTrainedTokenizerFast

    owner = next(c for c in PreTrainedTokenizerFast.__mro__ if "get_vocab" in vars(c))
    plain = vars(owner)["get_vocab"]

    def in_order(self: Any) -> dict[str, int]:
        return dict(sorted(plain(self).items(), key=lambda item: item[1]))

    owner.get_vocab = in_order
    try:
        yield
    finally:
        owner.get_vocab = plain


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without mergekit's lines about single tokens, which it writes to the root logger; the plan has said it."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def others(record: logging.LogRecord) -> bool:
        return "mergekit" not in record.pathname

    root.addHandler(handler)
    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)
        root.removeHandler(handler)
