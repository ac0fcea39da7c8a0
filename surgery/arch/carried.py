"""What an edit carries over unchanged around the tensors it touches: part names, configs, tokenizers, every side file.

Standard library only; no operation and no model is known here.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from surgery.graph.diff import json_differences
from surgery.graph.op import Entry, Keep, PartNames, SideFile, json_bytes
from surgery.store.checkpoint import Checkpoint
from surgery.store.digests import canonical_digest
from surgery.store.layout import BASES
from surgery.store.tensors import Part, TensorRef

FLOATS: Mapping[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHORT_FLOATS: Mapping[str, str] = {
    "fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16",
}  # fmt: skip
_LOADED = {"pytorch_model": "model"}  # loaders look for model.safetensors beside a config, whatever a .bin was called


def part_names(base: Checkpoint) -> tuple[PartNames, ...]:
    """The parts of an output that has the parts of `base`; a lone file becomes a folder with model.safetensors."""
    return tuple(PartNames(p.name, output_base(base, p)) for p in base.parts.values())


def output_base(base: Checkpoint, part: Part) -> str:
    """The stem of the weight files of `part` in an output folder, one that loaders (and we) recognise there."""
    stem = _LOADED.get(part.base, part.base)
    return stem if base.layout not in ("file", "gguf") or stem in BASES else "model"


def kept(part: Part, name: str, ref: TensorRef, *, into: str | None = None) -> Keep:
    """`ref` unchanged under `name`, in its own part or `into` another."""
    return Keep(part=part.name if into is None else into, name=name, dtype=ref.dtype, shape=ref.shape, ref=ref)


def keep_all(base: Checkpoint, *, but: Part | None = None) -> Iterator[Entry]:
    """Every tensor of every part as it is, without those of the part `but`."""
    for part in base.parts.values():
        if part is not but:
            for name, ref in part.tensors.items():
                yield kept(part, name, ref)


def full_name(part: Part, name: str) -> str:
    """The name that users see: `part/name` in a pipeline."""
    return f"{part.name}/{name}" if part.name else name


def side_files(base: Checkpoint, edited: Mapping[str, Any] | None = None) -> tuple[SideFile, ...]:
    """All side files of `base` at their places; those in `edited` (relative path -> JSON value) get new content."""
    edited = edited or {}
    files = [SideFile(n, source=str(base.root / n)) for n in base.side_files if n not in edited]
    if base.layout == "gguf":  # what the file says of the model is a config that no file holds, and so its tokenizer
        edited = {"config.json": base.part().config, **edited}
        unpacked = _Unpacked(base)
        names = (n for n in ("tokenizer.json", "tokenizer_config.json") if n not in edited)
        files += [SideFile(n, make=partial(unpacked.content, n), digest=unpacked.digest(n)) for n in names]
    return tuple(files) + tuple(SideFile(n, content=json_bytes(value)) for n, value in edited.items())


class _Unpacked:
    """The tokenizer files of a GGUF file, made once for all of them."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        from surgery.arch.language.load import tokenizer_files

        return tokenizer_files(self._base)

    def content(self, name: str) -> bytes:
        """One of the files."""
        return self.files[name]

    def digest(self, name: str) -> str:
        """What one of the files depends on: all that is said in the file, and what reads it. Without the gguf package
        there is none of them, and another result."""
        release = version("transformers").rpartition(".")[0] if find_spec("transformers") else ""
        return canonical_digest([name, self._base.part().told, release, find_spec("gguf") is not None])


def indexes(base: Checkpoint) -> tuple[SideFile, ...]:
    """The indexes of a checkpoint's shards, for an output that has the same files."""
    return tuple(SideFile(p.index, source=str(base.root / p.index)) for p in base.parts.values() if p.index)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every key that names a float dtype naming `dtype` (float32, bfloat16, …)."""
    edited: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            edited[key] = with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str) and value.removeprefix("torch.") in FLOATS:
            edited[key] = dtype
        else:
            edited[key] = value
    return edited


def config_edits(file: str, before: Any, after: Any) -> tuple[tuple[str, Any, Any], ...]:
    """(file:path.to.key, old, new) for every value that differs; objects are followed, lists are one value."""
    return tuple((f"{file}:{'.'.join(path)}", old, new) for path, old, new in json_differences(before, after))
