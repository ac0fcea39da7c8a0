"""Operator declarations: arguments, sizes, costs (arXiv 2506.05340, Tab. 2-4), fresh values, warm starts."""

import math
from typing import Any

import pytest
import torch
from tiny_dits import resolve_operator

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit import modeling
from surgery.arch.dit.config import NORM_PREFIX, SLOT_MODULES, Graft, grafted_config, tensor_shapes
from surgery.arch.dit.operators import OPERATORS, modeling_source, require_slot
from surgery.arch.sources import Concat, Constant, Rows, Same, Tap, Uniform, byte_ranges
from surgery.errors import UsageError

XL = {"dim": 1152, "heads": 16, "n_tokens": 256}
SMALL = {"dim": 16, "heads": 2, "n_tokens": 9}
ATTENTION = [name for name, spec in OPERATORS.items() if "attn" in spec.slots and name != "identity-zero"]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- names and arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("mha", "mha", {}),
        ("swa", "swa", {"w": 4}),
        ("hyena:k=7", "hyena-x", {"k": 7, "bidirectional": False}),
        ("hyena-se:k_inner=3,bidirectional=true", "hyena-se", {"k": 4, "k_inner": 3, "bidirectional": True}),
        ("mamba", "mamba2", {"d_state": 64, "d_conv": 4, "expand": 2, "headdim": 16}),
        ("r3", "mlp", {"r": 3, "activation": "gelu-approximate"}),
        ("r2.5", "mlp", {"r": 2.5, "activation": "gelu-approximate"}),
        ("mlp: r = 6.0", "mlp", {"r": 6, "activation": "gelu-approximate"}),
        ("mlp-hyena-x", "mlp-hyena-x", {"r": 2, "k": 4, "n": None}),
        ("identity-zero", "identity-zero", {}),
    ],
)
def test_operators_are_written_as_name_and_arguments(text: str, name: str, args: dict[str, Any]) -> None:
    spec, resolved = resolve_operator(text)
    assert (spec.name, resolved) == (name, args)
    assert spec.resolve(resolved) == resolved
    assert all(type(resolved[key]) is type(value) for key, value in args.items())


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("hyena-z", "no operator 'hyena-z'", "hyena-x"),
        ("", "no operator ''", "known"),
        ("hyena-x:kk=4", "no argument 'kk'", "'k'"),
        ("mha:k=4", "no argument 'k'", "takes no arguments"),
        ("hyena-x:k=0", "k must be a whole number of at least 1, not '0'", "taps"),
        ("hyena-x:k=2.5", "k must be a whole number", "taps"),
        ("hyena-x:k=four", "k must be a whole number", "taps"),
        ("hyena-x:bidirectional=maybe", "bidirectional must be true or false", "centre"),
        ("mlp:r=1e30", "r must be at most 1,000,000, not '1e30'", "hidden"),
        ("swa:w=0", "w must be a whole number of at least 1", "visible"),
        ("r0", "r must be a number above 0", "hidden"),
        ("mlp:r=nan", "r must be a number above 0", "hidden"),
        ("mlp:activation=relu", "activation must be one of", "activation_fn"),
        ("hyena-x:k", "'k' is not key=value", "hyena-x:k=4"),
        ("hyena-x:k=4,k=5", "gives k twice", "once"),
        ("r3:r=4", "gives r twice", "once"),
    ],
)
def test_bad_operators_are_usage_errors(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        resolve_operator(text)
    assert hint in caught.value.hint


def test_a_truth_value_is_no_number() -> None:
    with pytest.raises(UsageError, match="k must be a whole number"):
        OPERATORS["hyena-x"].resolve({"k": True})


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("mha", {"heads": 3}, "16 is not divisible by 3 heads"),
        ("swa", {"heads": 5}, "16 is not divisible by 5 heads"),
        ("mlp:r=0.05", {}, "r=0.05 leaves no hidden unit at width 16"),
        ("mlp-hyena-x:n=10", {}, "10 asked, the model has 9"),
        ("mamba2:headdim=24", {}, "inner width 32 is no multiple of headdim 24"),
    ],
)
def test_operators_that_do_not_fit_the_block_are_usage_errors(text: str, place: dict[str, int], said: str) -> None:
    spec, args = resolve_operator(text)
    with pytest.raises(UsageError, match=said):
        spec.tensors(**{**SMALL, **place}, **args)


def test_slots() -> None:
    require_slot(OPERATORS["identity-zero"], "attn")
    require_slot(OPERATORS["identity-zero"], "mlp")
    with pytest.raises(UsageError, match="'mlp' replaces mlp, not attn") as caught:
        require_slot(OPERATORS["mlp"], "attn")
    assert "hyena-x" in caught.value.hint


def test_the_two_tables_that_must_agree_do() -> None:
    """The travelling file cannot import the declarations, so it repeats three names."""
    assert list(modeling.OPERATORS) == list(OPERATORS)
    assert modeling.SLOT_MODULES == SLOT_MODULES
    assert modeling.NORM_PREFIX == NORM_PREFIX


def test_the_modeling_file_is_named_by_its_content() -> None:
    name, content = modeling_source()
    assert name.startswith("modeling_surgery_dit_") and name.endswith(".py") and len(name) == 32
    assert b"class SurgeryDiTTransformer2DModel" in content
    assert b"import surgery" not in content and b"from surgery" not in content


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("mha", 5_313_024),
        ("swa", 5_313_024),
        ("hyena-se", 5_336_064),
        ("hyena-x", 5_330_304),
        ("hyena-y", 5_318_784),
        ("mamba2", 8_290_864),
        ("mlp", 10_622_592),
        ("r3", 7_967_232),
        ("r6", 15_933_312),
        ("mlp-hyena-x", 10_626_176),
        ("identity-zero", 0),
    ],
)
def test_parameters_at_full_size(text: str, params: int) -> None:
    spec, args = resolve_operator(text)
    assert spec.params(**XL, **args) == params
    with torch.device("meta"):
        module = spec.build(**XL, **args)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == spec.tensors(**XL, **args)


@pytest.mark.parametrize(
    ("text", "slot", "totals"),
    [
        ("mha", "attn", (749_826_464, 749_826_464, 749_826_464)),
        ("swa", "attn", (749_826_464, 749_826_464, 749_826_464)),
        ("hyena-se", "attn", (750_149_024, 750_310_304, 750_471_584)),
        ("hyena-x", "attn", (750_068_384, 750_189_344, 750_310_304)),
        ("hyena-y", "attn", (749_907_104, 749_947_424, 749_987_744)),
        ("mamba2", "attn", (791_516_224, 812_361_104, 833_205_984)),
        ("r3", "mlp", (712_651_424, 694_063_904, 675_476_384)),
        ("r6", "mlp", (824_176_544, 861_351_584, 898_526_624)),
        ("mlp-hyena-x", "mlp", (749_876_640, 749_901_728, 749_926_816)),
    ],
)
def test_total_parameters_after_14_21_and_28_grafts(text: str, slot: str, totals: tuple[int, ...]) -> None:
    config = ARCHITECTURES["dit-xl-2"].transformer
    spec, args = resolve_operator(text)
    for blocks, total in zip((14, 21, 28), totals, strict=True):
        grafted = grafted_config(config, [Graft(block, slot, spec.name, args) for block in range(blocks)])
        assert sum(math.prod(shape) for shape in tensor_shapes(grafted).values()) == total


# Two printed decimals; the MLPs' +50 % leaves out the output bias, which does not grow (49.9946 %).
ROUNDING = 0.006


def percent(new: float, old: float, share: float) -> float:
    return 100 * share * (new - old) / old


@pytest.mark.parametrize(
    ("text", "core", "features", "params"),
    [
        ("hyena-se", (-49.52, -74.27, -99.03), (0.13, 0.20, 0.26), (0.22, 0.33, 0.43)),
        ("hyena-x", (-49.90, -74.85, -99.81), (0.13, 0.20, 0.26), (0.16, 0.24, 0.33)),
        ("hyena-y", (-49.52, -74.27, -99.03), (0, 0, 0), (0.05, 0.08, 0.11)),
        ("swa", (-48.24, -72.36, -96.48), (0, 0, 0), (0, 0, 0)),
        ("mamba2", (-37.59, -56.38, -75.17), None, (28.02, 42.04, 56.05)),
        ("r3", (-12.5, -18.75, -25), None, (-12.5, -18.75, -25)),
        ("r6", (25, 37.5, 50), None, (25, 37.5, 50)),
    ],
)
def test_published_deltas_at_half_three_quarters_and_all(
    text: str, core: tuple[float, ...], features: tuple[float, ...] | None, params: tuple[float, ...]
) -> None:
    """Tab. 2 and 4: FLOPs and parameters against the operator replaced, at 256 tokens.

    mamba2's published feature increase (+77.89 % at half) is twice what its projections cost; see the next test.
    """
    spec, args = resolve_operator(text)
    old = OPERATORS["mha" if "attn" in spec.slots else "mlp"]
    new_cost, old_cost = spec.flops(**XL, **args), old.flops(**XL)
    for i, share in enumerate((0.5, 0.75, 1.0)):
        assert percent(new_cost[0], old_cost[0], share) == pytest.approx(core[i], abs=ROUNDING)
        assert percent(spec.params(**XL, **args), old.params(**XL), share) == pytest.approx(params[i], abs=ROUNDING)
        if features is not None:
            assert percent(new_cost[1], old_cost[1], share) == pytest.approx(features[i], abs=ROUNDING)


def test_deltas_that_differ_from_the_published_ones_for_a_stated_reason() -> None:
    mamba, attention = OPERATORS["mamba2"].flops(**XL), OPERATORS["mha"].flops(**XL)
    # +155.77 % is printed; counting projections and filter gives that as the ratio, not as the increase.
    assert mamba[1] / attention[1] == pytest.approx(1.5577, abs=0.006)
    conv, mlp = OPERATORS["mlp-hyena-x"].flops(**XL)[0], OPERATORS["mlp"].flops(**XL)[0]
    # +0.02 % is printed, which is the gates alone; the channel convolution is counted here.
    assert percent(conv, mlp, 1) == pytest.approx(0.28, abs=ROUNDING)
    gates = 2 * 2 * XL["dim"] * XL["n_tokens"]
    assert percent(mlp + gates, mlp, 1) == pytest.approx(0.02, abs=ROUNDING)


def test_flops_of_attention_follow_the_formula() -> None:
    n, d, h = XL["n_tokens"], XL["dim"], XL["heads"]
    assert OPERATORS["mha"].flops(**XL) == (n * d * 4 * n + 2 * h * n * n, 8 * n * d * d)
    assert OPERATORS["swa"].flops(**XL, w=300) == OPERATORS["mha"].flops(**XL)


# --- fresh values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*OPERATORS, "hyena-se:bidirectional=true"])
def test_fresh_values_are_distributed_as_the_constructor_draws_them(text: str) -> None:
    spec, args = resolve_operator(text)
    place = {"dim": 64, "heads": 4, "n_tokens": 16}
    torch.manual_seed(0)
    constructed = modeling.OPERATORS[spec.name](64, 4, 16, **args).state_dict()
    assert list(constructed) == list(spec.tensors(**place, **args))
    for name, theirs in constructed.items():
        source = spec.layout(**place, **args)[name]
        ours = source.evaluate({}, draw(1))
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if not source.random:
            assert torch.allclose(ours, theirs), name
            continue
        noise = 6 * theirs.std() / math.sqrt(theirs.numel())
        assert abs(ours.mean() - theirs.mean()) < 2 * noise, name
        if theirs.numel() > 500:
            assert abs(ours.std() / theirs.std() - 1) < 0.15, name
            assert abs(ours.abs().max() / theirs.abs().max() - 1) < 0.1, name


def test_building_needs_no_global_randomness() -> None:
    before = torch.random.get_rng_state()
    one, two = (OPERATORS["mamba2"].build(**SMALL, generator=draw(5)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in one.parameters())


# --- warm starts -----------------------------------------------------------------------------------------------------


def warm(text: str, old: torch.nn.Module, seed: int = 0, **more: Any) -> torch.nn.Module:
    """The operator `text` started from `old` by its copy plan."""
    spec, args = resolve_operator(text)
    state = old.state_dict()
    plan = spec.copy_plan({name: tuple(t.shape) for name, t in state.items()}, **SMALL, **args, **more)
    assert {name: value.shape for name, value in spec.layout(**SMALL, **args).items()} == {
        name: tuple(source.evaluate(state, draw()).shape) for name, source in plan.items()
    }
    module, generator = spec.build(**SMALL, **args), draw(seed)
    module.load_state_dict({name: source.evaluate(state, generator) for name, source in plan.items()})
    return module


def u_BND(seed: int = 9) -> torch.Tensor:
    return torch.randn(2, SMALL["n_tokens"], SMALL["dim"], generator=draw(seed))


def test_copied_attention_gives_the_same_bits() -> None:
    old = OPERATORS["mha"].build(**SMALL, generator=draw(1))
    assert torch.equal(warm("mha", old)(u_BND()), old(u_BND()))


def test_copied_window_attention_that_sees_everything_is_attention() -> None:
    old = OPERATORS["mha"].build(**SMALL, generator=draw(1))
    assert torch.allclose(warm("swa:w=8", old)(u_BND()), old(u_BND()), atol=1e-6)
    assert not torch.allclose(warm("swa:w=1", old)(u_BND()), old(u_BND()), atol=1e-3)


def test_attention_without_bias_is_copied_as_bias_zero() -> None:
    from diffusers.models.attention_processor import Attention

    old = Attention(query_dim=16, heads=2, dim_head=8, bias=False)
    assert torch.allclose(warm("mha", old)(u_BND()), old(u_BND()), atol=1e-6)
    assert torch.equal(warm("hyena-x", old).in_proj.bias, torch.zeros(48))


@pytest.mark.parametrize("text", ["r6", "mlp:r=4.5", "r4", "mlp:r=6,activation=geglu", "mlp:r=6,activation=swiglu"])
def test_a_wider_copied_mlp_is_the_same_function(text: str) -> None:
    activation = resolve_operator(text)[1]["activation"]
    old = OPERATORS["mlp"].build(**SMALL, activation=activation, generator=draw(1))
    assert torch.allclose(warm(text, old)(u_BND()), old(u_BND()), atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu-approximate", "geglu"])
def test_a_narrower_copied_mlp_keeps_the_units_asked_for(activation: str) -> None:
    """Dropping units whose output weights are 0 changes nothing, so the right ones were kept."""
    old = OPERATORS["mlp"].build(**SMALL, activation=activation, generator=draw(1))
    text = f"mlp:r=3,activation={activation}"
    kept = tuple(range(5, 53))
    with torch.no_grad():
        old.net[2].weight[:, :5] = 0
        old.net[2].weight[:, 53:] = 0
    assert torch.allclose(warm(text, old, units=kept)(u_BND()), old(u_BND()), atol=1e-6)
    with torch.no_grad():
        old.net[2].weight[:, 48:] = 0
    assert torch.allclose(warm(text, old)(u_BND()), old(u_BND()), atol=1e-6)


def test_units_must_be_one_old_unit_for_each_new_one() -> None:
    old = OPERATORS["mlp"].tensors(**SMALL)
    for units in ([0, 1], [0] * 48, range(20, 68)):
        with pytest.raises(UsageError, match="48 different ones of 0-63"):
            OPERATORS["mlp"].copy_plan(old, **SMALL, r=3, units=units)
    with pytest.raises(UsageError, match="no hidden units"):
        OPERATORS["hyena-x"].copy_plan({}, **SMALL, units=[1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_copied_hyena_starts_as_the_gated_product_of_the_old_projections(bidirectional: bool) -> None:
    old = OPERATORS["mha"].build(**SMALL, generator=draw(1))
    expected = old.to_out[0](old.to_q(u_BND()) * old.to_k(u_BND()) * old.to_v(u_BND()))
    for name in ("hyena-se", "hyena-x", "hyena-y"):
        module = warm(f"{name}:bidirectional={bidirectional}", old)
        assert torch.allclose(module(u_BND()), expected, atol=1e-6)


def test_plain_copies_are_byte_ranges_and_the_rest_is_not() -> None:
    old = OPERATORS["mha"].tensors(**SMALL)
    plan = OPERATORS["hyena-x"].copy_plan(old, **SMALL)
    assert byte_ranges(plan["in_proj.weight"]) == (
        ("to_q.weight", 0, 16),
        ("to_k.weight", 0, 16),
        ("to_v.weight", 0, 16),
    )
    assert byte_ranges(plan["out_proj.weight"]) == (("to_out.0.weight", 0, None),)
    assert plan["short_filter.weight"] == Tap((48, 1, 4), 3)
    assert byte_ranges(plan["short_filter.weight"]) is None
    narrow = OPERATORS["mlp"].copy_plan(OPERATORS["mlp"].tensors(**SMALL), **SMALL, r=3)
    assert byte_ranges(narrow["net.0.proj.weight"]) == (("net.0.proj.weight", 0, 48),)
    assert byte_ranges(narrow["net.2.weight"]) is None
    assert narrow["net.2.bias"] == Same("net.2.bias")


def test_every_tensor_says_what_it_reads_and_whether_it_is_drawn() -> None:
    wide = OPERATORS["mlp"].copy_plan(OPERATORS["mlp"].tensors(**SMALL), **SMALL, r=6)
    assert wide["net.0.proj.weight"] == Concat((Rows("net.0.proj.weight", 0, 64), Uniform((32, 16), 0.25)))
    assert wide["net.0.proj.weight"].random and not wide["net.2.weight"].random
    assert wide["net.2.weight"] == Concat((Same("net.2.weight"), Constant((16, 32), 0.0)), axis=1)
    assert wide["net.2.weight"].sources == ("net.2.weight",)


def test_drawn_parts_take_the_dtype_of_the_copied_ones() -> None:
    old = OPERATORS["mlp"].build(**SMALL, generator=draw(1)).to(torch.bfloat16).state_dict()
    wide = OPERATORS["mlp"].copy_plan({name: tuple(t.shape) for name, t in old.items()}, **SMALL, r=6)
    assert {source.evaluate(old, draw()).dtype for source in wide.values()} == {torch.bfloat16}


@pytest.mark.parametrize("text", [*ATTENTION, "hyena-se:bidirectional=true"])
def test_the_same_operator_again_is_copied_whole(text: str) -> None:
    spec, args = resolve_operator(text)
    old = spec.build(**SMALL, **args, generator=draw(1))
    again = warm(text, old, source_op=(spec.name, args))
    assert torch.equal(again(u_BND()), old(u_BND()))


def test_operators_with_nothing_in_common_start_fresh_and_say_so() -> None:
    for name, old in (("mamba2", "mha"), ("mha", "hyena-x"), ("hyena-x", "mamba2"), ("mlp", "mlp-hyena-x")):
        plan = OPERATORS[name].copy_plan(OPERATORS[old].tensors(**SMALL), **SMALL)
        projections = [source for target, source in plan.items() if "filter" not in target]
        assert all(not source.sources and source.note for source in projections), (name, old)
    gated = OPERATORS["mlp"].tensors(**SMALL, activation="geglu")
    assert OPERATORS["mlp"].copy_plan(gated, **SMALL)["net.0.proj.weight"].note


def test_attention_and_window_attention_start_from_each_other() -> None:
    old = OPERATORS["swa"].build(**SMALL, w=8, generator=draw(1))
    assert torch.allclose(warm("mha", old)(u_BND()), old(u_BND()), atol=1e-6)


def test_the_hyena_family_shares_projections() -> None:
    old = OPERATORS["hyena-se"].build(**SMALL, generator=draw(1))
    new = warm("hyena-y", old, source_op=("hyena-se", {}))
    assert torch.equal(new.in_proj.weight, old.in_proj.weight)
    assert torch.equal(new.out_proj.bias, old.out_proj.bias)
