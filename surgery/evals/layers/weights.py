"""The weights of a loaded model's language tower, changed in memory and put back byte by byte.

Nothing here is written to disk. Projections are found by the names that transformers gives them; a layer whose parts
have other names is refused instead of being left half as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.arch.language.locate import locate_tower
from surgery.arch.language.towers import TowerMap, match_towers, named_tower, shapes_of, towers
from surgery.errors import CheckpointError, UsageError, closest
from surgery.store.checkpoint import Checkpoint

MODULES = ("attn", "mlp", "block")
ABLATIONS = ("zero", "uniform", "base", "donor")

# What mixes tokens and what does not, in transformers' decoder layers; LFM2's short convolution stands for attention.
_PARTS = {
    "attn": ("self_attn", "cross_attn", "attention", "attn", "conv"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn"),
}
_LAST = {"o_proj", "out_proj", "down_proj", "w2", "c_proj", "dense", "dense_4h_to_h", "fc2", "output_linear"}
_ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class Tower:
    """The decoder of a model in memory: `prefix` is where its parameters begin in the model's names."""

    model: Any
    decoder: Any
    prefix: str

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks, from the bottom up."""
        return self.decoder.layers

    def parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Every parameter of one layer, by its name in the model."""
        start = f"{self.prefix}layers.{layer}."
        return {start + name: p for name, p in self.layers[layer].named_parameters()}


def tower_of(model: Any, name: str = "the model") -> Tower:
    """The decoder of a language or vision-language model. Raises CheckpointError for a model without numbered decoder
    layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise CheckpointError(
            "no-tower", f"{name}: {type(model).__name__} has no list of decoder layers", hint="name a decoder model"
        )
    inside = next(where for where, module in model.named_modules() if module is decoder)
    return Tower(model, decoder, f"{inside}." if inside else "")


def ablation(tower: Tower, layer: int, module: str, how: str, other: "OtherTower | None" = None) -> "Edit":
    """What to write into one layer.

    zero     the last projection of the module becomes 0: the module adds nothing to the residual stream
    uniform  every projection of the module becomes 1/rows (the released code of arXiv 2505.05464)
    base, donor  the weights of the same layer of `other`: the module's, or with `block` all of the layer's

    Raises UsageError for unknown words, CheckpointError when the module's projections cannot be told.
    """
    if module not in MODULES:
        raise UsageError("module", f"no module '{module}'", hint=closest(module, list(MODULES)))
    if how not in ABLATIONS:
        raise UsageError("ablate", f"no ablation '{how}'", hint=closest(how, list(ABLATIONS)))
    parts = [_part(tower, layer, kind) for kind in (("attn", "mlp") if module == "block" else (module,))]
    if how in ("base", "donor"):
        assert other is not None
        chosen = tower.parameters(layer)
        if module != "block":
            inside = {id(p) for p in parts[0].parameters()}
            chosen = {name: p for name, p in chosen.items() if id(p) in inside}
        return Edit(tuple((p, other.read(name)) for name, p in chosen.items() if other.has(name)))
    writes: list[tuple[nn.Parameter, torch.Tensor | float]] = []
    for part in parts:
        found = list(_projections(part))
        if how == "zero":
            last = [(name, p) for name, p in found if name.rsplit(".", 1)[-1] in _LAST]
            if not last:
                raise _unknown(layer, part)
            writes += [(p, 0.0) for name, _ in last for p in _with_bias(part, name)]
        else:
            writes += [(p, 1.0 / p.shape[-2]) for _, p in found]
    return Edit(tuple(writes))


@dataclass(frozen=True)
class Edit:
    """Parameters and what to write into them: a tensor of the same shape, or one number."""

    writes: tuple[tuple[nn.Parameter, torch.Tensor | float], ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The edit, for as long as the block runs; whatever happens in it, the bytes are then what they were."""
        with kept([p for p, _ in self.writes]), torch.no_grad():
            for parameter, value in self.writes:
                if isinstance(value, torch.Tensor):
                    parameter.copy_(value)
                else:
                    parameter.fill_(value)
            yield


@contextmanager
def kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the parameters back to their present bytes at the end of the block."""
    saved = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


class OtherTower:
    """The language tower of a checkpoint on disk beside that of a model in memory: tensors by the model's own names,
    read when they are asked for. Raises CheckpointError when the towers do not fit."""

    def __init__(self, tower: Tower, name: str, other: Checkpoint) -> None:
        shapes = {n: tuple(p.shape) for n, p in tower.model.named_parameters()}
        self.map: TowerMap = match_towers(
            [named_tower(towers(shapes), tower.prefix, name)],
            locate_tower(other),
            shapes,
            shapes_of(other.tensors),
            host_name=name,
            donor_name=other.name,
        )
        self._other = other
        self.names: Mapping[str, str] = {mine: theirs for mine, theirs in self.map.names.values()}

    def has(self, name: str) -> bool:
        """Whether the other tower has this tensor."""
        return name in self.names

    def read(self, name: str) -> torch.Tensor:
        """The other tower's tensor, as stored."""
        return self._other.read(self.names[name])


def _part(tower: Tower, layer: int, kind: str) -> nn.Module:
    block = tower.layers[layer]
    for name in _PARTS[kind]:
        if isinstance(part := getattr(block, name, None), nn.Module):
            return part
    inside = ", ".join(name for name, _ in block.named_children())
    raise CheckpointError(
        "no-module",
        f"layer {layer} ({type(block).__name__}) has no part that we know as {kind}: {inside}",
        hint="leave the layer out with --layers, or probe another --module",
    )


def _projections(part: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name without .weight, weight) of every matrix of a part, experts [n, rows, columns] too, routers not."""
    for name, parameter in part.named_parameters():
        owner = name.removesuffix(".weight")
        if parameter.dim() in (2, 3) and not name.endswith("bias") and owner.rsplit(".", 1)[-1] not in _ROUTERS:
            yield owner, parameter


def _with_bias(part: nn.Module, owner: str) -> Iterator[nn.Parameter]:
    named = dict(part.named_parameters())
    yield from (named[n] for n in (owner, f"{owner}.weight", f"{owner}.bias", f"{owner}_bias") if n in named)


def _unknown(layer: int, part: nn.Module) -> CheckpointError:
    names = ", ".join(name for name, _ in _projections(part)) or "none"
    return CheckpointError(
        "no-module",
        f"layer {layer}: the last projection of {type(part).__name__} cannot be told among {names}",
        hint="use --ablate uniform, base or donor",
    )
