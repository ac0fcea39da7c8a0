"""Vocabularies of several models brought together, by mergekit's own rules for `tokenizer` and `tokenizer_source`.

mergekit builds the tokenizer and aligns embedding rows; this module calls it with local folders, saves the tokenizer's
files, and keeps what aligning needs. Importing it costs seconds, so it happens only for documents that ask for it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.arch.merging.settings import Document
from surgery.errors import CheckpointError, printable
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
        found = task.execute(tokenizer_info=self.info, tensors=dict(zip(models, tensors, strict=True)))
        return [found[model] for model in models]


def merged_vocabulary(document: Document, parents: Sequence[Checkpoint]) -> Vocabulary:
    """Build the tokenizer that a document asks for. Raises `CheckpointError` where a model has none that loads."""
    from mergekit.common import ModelReference
    from mergekit.tokenizer.build import build_tokenizer
    from mergekit.tokenizer.config import TokenEmbeddingConfig

    given = document.tokenizer or {}
    keys = document.inputs()
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
    try:
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
    rows, multiple = len(vocab), given.get("pad_to_multiple_of")
    if multiple and rows % multiple:
        rows += multiple - rows % multiple
    with tempfile.TemporaryDirectory() as folder:
        info.tokenizer.save_pretrained(folder)
        files = tuple(SideFile(p.name, content=p.read_bytes()) for p in sorted(Path(folder).iterdir()) if p.is_file())
    digest = canonical_digest(
        {"vocab": vocab, "maps": [sorted(info.permutations[references[k]].items()) for k in keys]}
    )
    return Vocabulary(rows, files, digest, info, references, tokens, multiple, base)
