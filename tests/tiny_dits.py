"""Diffusion transformers small enough to train in a test, and what tests ask of operators and configurations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from surgery.arch.dit.config import Graft, grafted_config, resolve_graft, slot_prefix, tensor_shapes
from surgery.arch.dit.diffusion import NoiseSchedule
from surgery.arch.dit.operator_spec import OperatorSpec
from surgery.arch.dit.operators import parse_operator
from surgery.arch.sources import Shape

COSINE_V = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"})
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "sample_size": 8,
    "cross_attention_dim": 24,
    "caption_channels": 10,
}


def dit_config(layers: int = 2, size: int = 8, classes: int = 3) -> dict[str, int]:
    """Of a DiT of width 16 on grey images of `size` pixels."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": layers,
        "sample_size": size,
        "patch_size": 2,
        "num_embeds_ada_norm": classes,
    }


def fresh_dit(config: Mapping[str, Any], *, seed: int) -> nn.Module:
    """A `DiTTransformer2DModel` of `config` with its default random weights, as `seed` gives them.

    The layers' constructors draw from the global generator; it is forked, so the caller's state is untouched.
    """
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = DiTTransformer2DModel(**config)
    return model


def with_grafts(config: Mapping[str, Any], *entries: tuple[int, str, str]) -> dict[str, Any]:
    """`config` with operators at (block, slot, `op[:k=v,…]`)."""
    placed = []
    for block, slot, text in entries:
        spec, args = resolve_graft(config, slot, text)
        placed.append(Graft(block, slot, spec.name, args))
    return grafted_config(config, placed)


def slot_tensors(config: Mapping[str, Any], block: int, slot: str) -> dict[str, Shape]:
    """Relative name -> shape of what fills one slot now, grafted or not."""
    prefix = slot_prefix(block, slot)
    return {name[len(prefix) :]: shape for name, shape in tensor_shapes(config).items() if name.startswith(prefix)}


def resolve_operator(text: str) -> tuple[OperatorSpec, dict[str, Any]]:
    """`op[:k=v,…]` -> the operator and all its arguments, checked. Raises UsageError."""
    spec, given = parse_operator(text)
    return spec, spec.resolve(given)
