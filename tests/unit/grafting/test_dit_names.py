"""Names and shapes from configurations, against diffusers' own constructors on the meta device."""

import math
from typing import Any

import pytest
import torch
from tiny_dits import PIXART, slot_tensors, with_grafts

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.build import build_model, model_from_state
from surgery.arch.dit.config import (
    Dims,
    family,
    grafts,
    initial_values,
    resolve_graft,
    slot_prefix,
    stock_init,
    stock_operator,
    tensor_shapes,
)
from surgery.errors import CheckpointError, UsageError

DIGITS = ARCHITECTURES["dit-digits"].transformer


def shapes_of_module(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("dit-xl-2", 538, 749_826_464), ("pixart-sigma", 603, 610_856_096)],
)
def test_published_sizes(name: str, tensors: int, parameters: int) -> None:
    shapes = tensor_shapes(ARCHITECTURES[name].transformer)
    assert (len(shapes), count(shapes)) == (tensors, parameters)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_known_architecture_has_diffusers_names_and_shapes(name: str) -> None:
    config = dict(ARCHITECTURES[name].transformer)
    assert tensor_shapes(config) == shapes_of_module(config)


def test_digits_model_has_the_size_it_is_known_for() -> None:
    assert count(tensor_shapes(DIGITS)) == 584_900


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_bias": False},
        {"norm_elementwise_affine": True},
        {"out_channels": 2},
        {"patch_size": 4},
        *({"activation_fn": name} for name in ("gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu")),
    ],
)
def test_dit_variants(change: dict[str, Any]) -> None:
    config = {**DIGITS, **change}
    assert tensor_shapes(config) == shapes_of_module(config)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"cross_attention_dim": None},
        {"cross_attention_dim": 16, "attention_bias": False},
        {"caption_channels": None},
        {"use_additional_conditions": True},
        {"sample_size": 128},
        {"norm_elementwise_affine": True},
        {"out_channels": None},
    ],
)
def test_pixart_variants(change: dict[str, Any]) -> None:
    config = {**PIXART, **change}
    assert tensor_shapes(config) == shapes_of_module(config)


def test_absent_fields_take_the_defaults_of_the_stock_class() -> None:
    for name in ("DiTTransformer2DModel", "PixArtTransformer2DModel"):
        config = {"_class_name": name}
        assert tensor_shapes(config) == shapes_of_module(config)


def test_legacy_class_is_resolved_by_norm_type() -> None:
    legacy = {**DIGITS, "_class_name": "Transformer2DModel", "num_vector_embeds": None}
    assert family(legacy).stock_class == "DiTTransformer2DModel"
    assert tensor_shapes(legacy) == tensor_shapes(DIGITS) == shapes_of_module(legacy)
    text = {**PIXART, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
    assert family(text).name == "pixart"


def test_dims_of_the_digits_model() -> None:
    dims = Dims.from_config(DIGITS)
    assert (dims.dim, dims.heads, dims.n_tokens, dims.n_layers, dims.classes) == (64, 4, 16, 6, 10)
    assert Dims.from_config(ARCHITECTURES["pixart-sigma"].transformer).n_tokens == 16_384


def test_slot_prefix() -> None:
    assert slot_prefix(3, "attn") == "transformer_blocks.3.attn1."
    assert slot_prefix(3, "mlp") == "transformer_blocks.3.ff."


@pytest.mark.parametrize("config", [DIGITS, PIXART])
def test_grafted_shapes_are_those_of_the_grafted_module(config: Any) -> None:
    grafted = with_grafts(
        config,
        (0, "attn", "hyena-se:k=3,k_inner=5"),
        (0, "mlp", "mlp-hyena-x"),
        (1, "attn", "mamba2"),
        (1, "mlp", "r3"),
    )
    assert tensor_shapes(grafted) == shapes_of_module(grafted)
    assert family(grafted).model_class == family(config).grafted_class


def test_grafting_a_grafted_model_merges_the_lists() -> None:
    once = with_grafts(DIGITS, (1, "attn", "swa"), (3, "attn", "swa"))
    twice = with_grafts(once, (3, "attn", "hyena-y"), (0, "mlp", "r6"))
    assert [(g.block, g.slot, g.op) for g in grafts(twice)] == [
        (0, "mlp", "mlp"),
        (1, "attn", "swa"),
        (3, "attn", "hyena-y"),
    ]
    assert twice["norm_type"] == "surgery:ada_norm_zero"
    assert set(slot_tensors(twice, 3, "attn")) == {
        f"{part}.{kind}" for part in ("in_proj", "inner_filter", "out_proj") for kind in ("weight", "bias")
    }


def test_an_mlp_graft_keeps_the_activation_of_its_model() -> None:
    gated = {**DIGITS, "activation_fn": "geglu"}
    assert resolve_graft(gated, "mlp", "r3")[1] == {"r": 3, "activation": "geglu"}
    assert stock_operator(gated, "mlp")[1] == {"r": 4, "activation": "geglu"}
    assert resolve_graft(gated, "mlp", "mlp:r=3,activation=gelu")[1]["activation"] == "gelu"


def test_a_graft_of_the_wrong_kind_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="replaces attn, not mlp"):
        resolve_graft(DIGITS, "mlp", "hyena-x")
    with pytest.raises(UsageError, match="no slot 'atn'"):
        resolve_graft(DIGITS, "atn", "hyena-x")
    with pytest.raises(UsageError, match="64 asked, the model has 16"):
        resolve_graft(DIGITS, "mlp", "mlp-hyena-x:n=64")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": None}, "names no model class"),
        ({"_class_name": "UNet2DConditionModel"}, "neither a DiT nor a PixArt"),
        ({"_class_name": "DiTPipeline"}, "neither a DiT nor a PixArt"),
        ({"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}, "neither a DiT nor a PixArt"),
        ({"norm_type": "ada_norm_single"}, "needs norm_type 'ada_norm_zero'"),
        ({"num_layers": 0}, "num_layers must be a whole number from 1 to 10000"),
        ({"num_layers": 10**6}, "num_layers must be a whole number from 1 to 10000"),
        ({"num_layers": "6"}, "num_layers must be a whole number"),
        ({"sample_size": None}, "sample_size must be a whole number"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm must be"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"activation_fn": "relu"}, "activation_fn must be one of"),
        ({"sample_size": 9}, "sample_size 9 is no multiple of patch_size 2"),
        ({"surgery_grafts": [{"block": 6, "slot": "attn", "op": "swa"}]}, "block 6; the model has 0-5"),
        ({"surgery_grafts": [{"block": 0, "slot": "attn", "op": "linear-magic"}]}, "no operator 'linear-magic'"),
        ({"surgery_grafts": [{"block": 0, "slot": "mlp", "op": "swa"}]}, "replaces attn, not mlp"),
        ({"surgery_grafts": [{"block": 0, "op": "swa"}]}, "instead of block, slot, op and args"),
        ({"surgery_grafts": [{"block": 0, "slot": "attn", "op": "swa"}] * 2}, "fills attn of block 0 twice"),
    ],
)
def test_bad_configurations_are_checkpoint_errors(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        tensor_shapes({**DIGITS, **change}, "transformer/config.json")
    assert "transformer/config.json" in caught.value.message


@pytest.mark.parametrize("config", [DIGITS, PIXART])
def test_fresh_stock_tensors_are_distributed_as_diffusers_draws_them(config: Any) -> None:
    """Same bound (or spread) tensor by tensor; means and spreads agree within the noise of their size."""
    import diffusers

    torch.manual_seed(0)
    fields = {name: value for name, value in config.items() if name != "_class_name"}
    reference = getattr(diffusers, config["_class_name"])(**fields).state_dict()
    shapes, draw = tensor_shapes(config), torch.Generator().manual_seed(1)
    for name, theirs in reference.items():
        ours = stock_init(name, shapes).evaluate({}, draw)
        spread = theirs.std() if theirs.numel() > 1 else theirs.abs()
        noise = 6 * spread / math.sqrt(theirs.numel()) + 1e-6
        assert abs(ours.mean() - theirs.mean()) < 2 * noise, name
        if theirs.numel() > 500:
            assert abs(ours.std() / theirs.std() - 1) < 0.15, name
            assert abs(ours.abs().max() / theirs.abs().max() - 1) < 0.3, name


def test_building_draws_from_the_generator_only_and_equal_seeds_give_equal_bits() -> None:
    grafted = with_grafts(DIGITS, (0, "attn", "mamba2"), (1, "mlp", "r3"))
    before = torch.random.get_rng_state()
    one, two, other = (build_model(grafted, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)]
    assert all(same)
    assert not torch.equal(one.proj_out_2.weight, other.proj_out_2.weight)
    assert list(initial_values(grafted)) == list(tensor_shapes(grafted))


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    state = dict(build_model(DIGITS).state_dict())
    state["proj_out_2.bias"] = state["proj_out_2.bias"][:-1]
    state["stray"] = state.pop("proj_out_1.bias")
    with pytest.raises(CheckpointError) as caught:
        model_from_state(DIGITS, state, where="model/config.json")
    for words in ("proj_out_1.bias is missing", "stray is not part", "proj_out_2.bias has shape (3,) instead of (4,)"):
        assert words in caught.value.message
