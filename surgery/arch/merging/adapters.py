"""LoRA adapters in PEFT's format: read from a folder, applied to weights whole or in pieces, cut out of a difference.

W' = W + s B A with s = alpha / r (alpha / sqrt(r) for rsLoRA). The product is taken in float32 and rounded to the
weight's dtype before it is added, and the sum again, which is what PEFT's own merge does.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, printable
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json
from surgery.store.reader import MemoryReader, Reader
from surgery.store.tensors import TensorRef

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """The factors of every adapted weight, by the weight's name: A [r, in] and B [out, r]."""

    name: str
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[TensorRef, TensorRef]]
    transposed: bool = False  # weights are stored [in, out], as GPT-2's
    modules: Mapping[str, str] = field(default_factory=dict)  # what the adapter calls the module of a weight

    def touches(self, weight: str) -> bool:
        """Whether the adapter changes this weight."""
        return weight in self.pairs

    def factors(self, weight: str) -> tuple[TensorRef, TensorRef]:
        """A and B of a weight."""
        return self.pairs[weight]

    def scale_of(self, weight: str) -> float:
        """What B A is multiplied by."""
        module = self.modules.get(weight, weight.removesuffix(".weight"))
        rank = self.pairs[weight][0].shape[0]
        alpha = self.config.get("lora_alpha", rank)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a PEFT adapter and not a model."""
    return checkpoint.path.is_dir() and (checkpoint.root / CONFIG).is_file()


def open_adapter(adapter: Checkpoint, model: Checkpoint) -> Adapter:
    """The adapter of a model. Raises `CheckpointError` for another kind than LoRA, and where it does not fit."""
    if not is_adapter(adapter):
        raise CheckpointError(
            "no-adapter", f"{adapter.name}: no {CONFIG} beside the weights", hint="name a folder that PEFT saved"
        )
    config = read_json(Path(adapter.root) / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        what = "DoRA" if kind == "LORA" and config.get("use_dora") else str(kind)
        what = "LoRA with whole modules" if kind == "LORA" and config.get("modules_to_save") else what
        raise CheckpointError(
            "adapter",
            f"{adapter.name}: an adapter of kind {printable(what)}",
            hint="plain LoRA is applied; merge it with peft",
        )
    _check_config(adapter.name, config)
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in adapter.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(
                "adapter", f"{adapter.name}: '{printable(name)}' is no factor of a LoRA", hint="merge it with peft"
            )
        found.setdefault(f"{match[1]}.weight", {})[match[2]] = ref
    transposed = bool(config.get("fan_in_fan_out"))
    pairs = {}
    names = _on_disk(found, model)
    for own, factors in found.items():
        weight = names.get(own, own)
        if set(factors) != {"A", "B"} or weight not in model.tensors:
            raise CheckpointError(
                "adapter",
                f"{adapter.name}: '{printable(own)}' has no pair of factors, or {model.name} no such weight",
                hint="the adapter was trained on another model",
            )
        a, b, shape = factors["A"], factors["B"], model.tensors[weight].shape
        want = shape[::-1] if transposed else shape
        if (b.shape[:1] + a.shape[1:]) != want or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                "adapter",
                f"{adapter.name}: {list(b.shape)} times {list(a.shape)} is not '{printable(weight)}' {list(shape)}",
                hint="the adapter was trained on a model of another size",
            )
        pairs[weight] = (a, b)
    modules = {names.get(own, own): own.removesuffix(".weight") for own in found}
    return Adapter(adapter.name, config, pairs, transposed, modules)


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for numbers that are none and patterns that do not compile."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError("adapter", f"{name}: alpha_pattern is no mapping", hint=f"check {CONFIG}")
    for key, value in (("lora_alpha", config.get("lora_alpha", 1)), *patterns.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            shown = f"{printable(str(key), limit=60)} is {printable(repr(value), limit=60)}"
            raise CheckpointError("adapter", f"{name}: {shown}", hint=f"a number in {CONFIG}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error:
            raise CheckpointError(
                "adapter",
                f"{name}: alpha_pattern '{printable(pattern, limit=60)}' is no pattern",
                hint=f"check {CONFIG}",
            ) from None


def _on_disk(weights: Iterable[str], model: Checkpoint) -> dict[str, str]:
    """The names on disk of weights that an adapter calls by their names in memory: PEFT knows no others, and the files
    of a vision-language model have older ones. transformers is asked only where a name is not there as it is."""
    config = model.part().config
    if all(weight in model.tensors for weight in weights) or config is None or "model_type" not in config:
        return {}
    from surgery.arch.language.exact import names_in_memory

    return {memory: disk for disk, memory in names_in_memory(model).items()}


def applied(
    weight: "torch.Tensor", a: "torch.Tensor", b: "torch.Tensor", scale: float, *, transposed: bool = False
) -> "torch.Tensor":
    """`weight` with the adapter merged into it, in its own dtype."""
    delta = (b.float() @ a.float()) * scale
    if transposed:
        delta = delta.T
    return weight + delta.to(weight.dtype)


class AdaptedReader:
    """A weight with an adapter applied, read in pieces: rows of B times A, a few at a time."""

    def __init__(self, weight: Reader, a: Reader, b: Reader, scale: float, *, transposed: bool) -> None:
        import numpy as np

        self.name, self.dtype, self.shape = weight.name, weight.dtype, weight.shape
        self._weight, self._scale = weight, np.float32(scale)
        left, right = _matrix(b), _matrix(a)
        self._left, self._right = (right.T.copy(), left.T.copy()) if transposed else (left, right)

    def into(self, view: memoryview, start: int) -> None:
        """Rows are whole in the product, whatever the stretch of bytes."""
        import numpy as np

        from surgery.arch.merging.numbers.arithmetic import SIZES, Sink, Source
        from surgery.arch.merging.numbers.measure import Sample

        size = SIZES[self.dtype]
        columns = self.shape[1]
        first, count = start // size, len(view) // size
        top, bottom = first // columns, -(-(first + count) // columns)
        delta = (self._left[top:bottom] @ self._right) * self._scale
        flat = np.ascontiguousarray(delta).reshape(-1)[first - top * columns :][:count]
        stored = Sink(self.dtype, self.name, count).encode(flat.copy(), 0)
        rounded = Source(MemoryReader(self.name, self.dtype, (count,), stored), np.float32, count).read(0, count)
        weights = Source(Sample(self._weight, [(first, count)], size), np.float32, count).read(0, count)
        view[:] = Sink(self.dtype, self.name, count).encode(weights + rounded, 0)


def _matrix(reader: Reader) -> Any:
    """A factor as float32 [rows, columns]."""
    import numpy as np

    from surgery.arch.merging.numbers.arithmetic import Source

    count = reader.shape[0] * reader.shape[1]
    return Source(reader, np.float32, count).read(0, count).copy().reshape(reader.shape)


def factorise(delta: "torch.Tensor", rank: int, *, seed: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """(A [r, in], B [out, r]) of the best approximation of `delta` by B A, in float32, singular values shared evenly.

    Exact for matrices with a side of up to 1024; larger ones by subspace iteration (Halko et al., 0909.4061) from a
    seeded start, whose error beyond the best is far below the part that is cut off.
    """
    import torch

    delta = delta.float()
    if min(delta.shape) <= 1024:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        width = min(rank + 32, *delta.shape)
        q = torch.linalg.qr(delta @ torch.randn(delta.shape[1], width, generator=generator))[0]
        for _ in range(6):
            q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q)[0])[0]
        inner, s, vt = torch.linalg.svd(q.T @ delta, full_matrices=False)
        u = q @ inner
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root
