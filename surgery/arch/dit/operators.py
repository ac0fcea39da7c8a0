"""The operators that a graft can put in place of a DiT block's attention or MLP (arXiv 2506.05340, Tab. 3 and 4).

All that a plan needs of an operator is arithmetic on the width D, the heads H and the tokens N, so nothing here imports
torch. The modules themselves are in `modeling.py`, the file that travels with grafted weights.

FLOPs count 2 per multiply-add, without biases and activation functions. `core` is what mixes (softmax, convolutions
between gates, gates, scan; for an MLP everything), `features` what prepares and collects it (projections, featurizer).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from surgery.arch.dit import warmstart
from surgery.arch.dit.operator_spec import Args, Layout, OperatorSpec, Param, Place
from surgery.arch.sources import Constant, LogRange, Shape, Source, Tap, TimeStepBias, Uniform
from surgery.errors import UsageError, closest

SLOTS = ("attn", "mlp")
ACTIVATIONS = ("gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu")
GATED_ACTIVATIONS = ("geglu", "swiglu")  # their input projection holds value rows, then gate rows


def _linear(name: str, out: int, fan_in: int, *, bias: bool = True) -> Layout:
    bound = 1 / math.sqrt(fan_in)
    layout: Layout = {f"{name}.weight": Uniform((out, fan_in), bound)}
    return layout | ({f"{name}.bias": Uniform((out,), bound)} if bias else {})


def _filter(name: str, channels: int, k: int) -> Layout:
    bound = 1 / math.sqrt(k)
    return {f"{name}.weight": Uniform((channels, 1, k), bound), f"{name}.bias": Uniform((channels,), bound)}


def _tap(k: int, args: Args) -> int:
    """Which tap meets the current token."""
    return k // 2 if args["bidirectional"] else k - 1


# --- attention -------------------------------------------------------------------------------------------------------


def _heads_divide(at: Place, args: Args) -> None:
    if at.dim % at.heads:
        raise UsageError(
            "bad-operator",
            f"the width {at.dim} is not divisible by {at.heads} heads",
            hint="take an operator without heads, such as hyena-x",
        )


def _attention_layout(*names: str) -> Callable[[Place, Args], Layout]:
    def layout(at: Place, args: Args) -> Layout:
        linears: Layout = {}
        for name in names:
            linears |= _linear(name, at.dim, at.dim)
        return linears

    return layout


def _attention_cost(at: Place, args: Args) -> tuple[int, int]:
    """Per token and head 4·d·(visible keys) for qkᵀ and its product with v, 2·(visible keys) for the softmax."""
    visible = min(2 * args["w"] + 1, at.n_tokens) if "w" in args else at.n_tokens
    return at.n_tokens * visible * (4 * at.dim + 2 * at.heads), 8 * at.n_tokens * at.dim**2


def _warm_attention(
    at: Place, args: Args, fresh: Layout, old: Mapping[str, Shape], units: Sequence[int] | None
) -> dict[str, Source]:
    return warmstart.attention(fresh, old)


# --- Hyena family ----------------------------------------------------------------------------------------------------


def _hyena_layout(at: Place, args: Args) -> Layout:
    layout = _linear("in_proj", 3 * at.dim, at.dim)
    if "k" in args:
        layout |= _filter("short_filter", 3 * at.dim, args["k"])
    if "k_inner" in args:
        k = args["k_inner"]
        layout["inner_filter.weight"] = Tap((at.dim, 1, k), _tap(k, args))
        layout["inner_filter.bias"] = Constant((at.dim,), 0.0)
    return layout | _linear("out_proj", at.dim, at.dim)


def _hyena_cost(at: Place, args: Args) -> tuple[int, int]:
    """Per token and channel: two gates and the inner filter; 8·D for the projections, 3 featurizer filters."""
    unit = at.n_tokens * at.dim
    return (2 + 2 * args.get("k_inner", 0)) * unit, (8 * at.dim + 3 * 2 * args.get("k", 0)) * unit


def _warm_hyena(
    at: Place, args: Args, fresh: Layout, old: Mapping[str, Shape], units: Sequence[int] | None
) -> dict[str, Source]:
    filters = {"short_filter": "k", "inner_filter": "k_inner"}
    taps = {name: _tap(args[key], args) for name, key in filters.items() if key in args}
    return warmstart.hyena(fresh, old, taps=taps)


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _mamba_check(at: Place, args: Args) -> None:
    if at.dim * args["expand"] % args["headdim"]:
        raise UsageError(
            "bad-operator",
            f"operator 'mamba2': the inner width {at.dim * args['expand']} is no multiple of headdim {args['headdim']}",
            hint="give a headdim that divides it, e.g. mamba2:headdim=16",
        )


def _mamba_layout(at: Place, args: Args) -> Layout:
    inner = at.dim * args["expand"]
    heads, convolved = inner // args["headdim"], inner + 2 * args["d_state"]
    return {
        "mixer.dt_bias": TimeStepBias((heads,)),
        "mixer.A_log": LogRange((heads,)),
        "mixer.D": Constant((heads,), 1.0),
        **_filter("mixer.conv1d", convolved, args["d_conv"]),
        **_linear("mixer.in_proj", inner + convolved + heads, at.dim, bias=False),
        "mixer.norm.weight": Constant((inner,), 1.0),
        **_linear("mixer.out_proj", at.dim, inner, bias=False),
    }


def _mamba_cost(at: Place, args: Args) -> tuple[int, int]:
    """Core: 2·expand·d_state per token and channel, as published for the scan. Features: projections and filter."""
    inner = at.dim * args["expand"]
    convolved = inner + 2 * args["d_state"]
    projections = 2 * at.dim * (inner + convolved + inner // args["headdim"]) + 2 * inner * at.dim
    return 2 * inner * args["d_state"] * at.n_tokens, (projections + 2 * args["d_conv"] * convolved) * at.n_tokens


def _warm_nothing(
    at: Place, args: Args, fresh: Layout, old: Mapping[str, Shape], units: Sequence[int] | None
) -> dict[str, Source]:
    return warmstart.fresh_only(fresh, old)


# --- MLPs ------------------------------------------------------------------------------------------------------------


def _hidden(at: Place, args: Args) -> int:
    return int(args["r"] * at.dim)


def _mlp_check(at: Place, args: Args) -> None:
    if _hidden(at, args) < 1:
        raise UsageError(
            "bad-operator",
            f"r={args['r']:g} leaves no hidden unit at width {at.dim}",
            hint=f"give an r of at least {1 / at.dim:.3g}; 4 is the original",
        )


def _mlp_layout(at: Place, args: Args) -> Layout:
    hidden = _hidden(at, args)
    parts = 2 if args["activation"] in GATED_ACTIVATIONS else 1
    return _linear("net.0.proj", parts * hidden, at.dim) | _linear("net.2", at.dim, hidden)


def _mlp_cost(at: Place, args: Args) -> tuple[int, int]:
    parts = 2 if args["activation"] in GATED_ACTIVATIONS else 1
    return 2 * (parts + 1) * _hidden(at, args) * at.dim * at.n_tokens, 0


def _warm_mlp(
    at: Place, args: Args, fresh: Layout, old: Mapping[str, Shape], units: Sequence[int] | None
) -> dict[str, Source]:
    return warmstart.feed_forward(fresh, old, gated=args["activation"] in GATED_ACTIVATIONS, units=units)


def _mlp_hyena_check(at: Place, args: Args) -> None:
    _mlp_check(at, args)
    if args["n"] is not None and args["n"] != at.n_tokens:
        raise UsageError(
            "bad-operator",
            f"operator 'mlp-hyena-x' is tied to its number of tokens: {args['n']} asked, the model has {at.n_tokens}",
            hint="leave n out; the model's own sample_size decides",
        )


def _mlp_hyena_layout(at: Place, args: Args) -> Layout:
    hidden = _hidden(at, args)
    layout = _linear("in_proj", 3 * hidden, at.dim) | _filter("short_filter", at.n_tokens, args["k"])
    return layout | _linear("out_proj", at.dim, hidden)


def _mlp_hyena_cost(at: Place, args: Args) -> tuple[int, int]:
    """8·r·D for the projections, 3·r filters and 2·r gates, per token and channel: +0.28 % of an MLP with r = 4.

    The published +0.02 % counts the gates only.
    """
    hidden = _hidden(at, args)
    return (8 * hidden * at.dim + 2 * args["k"] * 3 * hidden + 2 * hidden) * at.n_tokens, 0


# --- registry --------------------------------------------------------------------------------------------------------

_FEATURIZER = Param(int, 4, "taps of the featurizer over the projected q, k, v", low=1)
_INNER = Param(int, 4, "taps of the filter between the gates", low=1)
_BIDIRECTIONAL = Param(bool, False, "centre the filters instead of looking back only (the published ones look back)")

OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for spec in (
        OperatorSpec(
            name="mha",
            slots=("attn",),
            summary="softmax attention, as the original",
            layout_of=_attention_layout("to_q", "to_k", "to_v", "to_out.0"),
            cost_of=_attention_cost,
            warm_of=_warm_attention,
            check=_heads_divide,
            auto_init="copy",
        ),
        OperatorSpec(
            name="swa",
            slots=("attn",),
            summary="softmax attention within a window of 2w+1 tokens",
            layout_of=_attention_layout("q_proj", "k_proj", "v_proj", "out_proj"),
            cost_of=_attention_cost,
            warm_of=_warm_attention,
            params_of={"w": Param(int, 4, "tokens visible on each side", low=1)},
            check=_heads_divide,
            auto_init="copy",
        ),
        OperatorSpec(
            name="hyena-se",
            slots=("attn",),
            summary="gated convolutions with featurizer and inner filter",
            layout_of=_hyena_layout,
            cost_of=_hyena_cost,
            warm_of=_warm_hyena,
            params_of={"k": _FEATURIZER, "k_inner": _INNER, "bidirectional": _BIDIRECTIONAL},
        ),
        OperatorSpec(
            name="hyena-x",
            slots=("attn",),
            summary="gated convolutions with featurizer only",
            layout_of=_hyena_layout,
            cost_of=_hyena_cost,
            warm_of=_warm_hyena,
            params_of={"k": _FEATURIZER, "bidirectional": _BIDIRECTIONAL},
        ),
        OperatorSpec(
            name="hyena-y",
            slots=("attn",),
            summary="gated convolutions with inner filter only",
            layout_of=_hyena_layout,
            cost_of=_hyena_cost,
            warm_of=_warm_hyena,
            params_of={"k_inner": _INNER, "bidirectional": _BIDIRECTIONAL},
        ),
        OperatorSpec(
            name="mamba2",
            slots=("attn",),
            summary="Mamba-2 selective state space",
            layout_of=_mamba_layout,
            cost_of=_mamba_cost,
            warm_of=_warm_nothing,
            params_of={
                "d_state": Param(int, 64, "size of the state of each channel", low=1),
                "d_conv": Param(int, 4, "taps of the filter before the scan", low=1),
                "expand": Param(int, 2, "inner width over the model's width", low=1),
                "headdim": Param(int, 16, "channels of a head", low=1),
            },
            check=_mamba_check,
        ),
        OperatorSpec(
            name="mlp",
            slots=("mlp",),
            summary="two linear layers with int(r·D) hidden units; r = 4 is the original",
            layout_of=_mlp_layout,
            cost_of=_mlp_cost,
            warm_of=_warm_mlp,
            params_of={
                "r": Param(float, 4, "hidden units over the model's width", low=0),
                "activation": Param(str, "gelu-approximate", "the model's activation_fn", choices=ACTIVATIONS),
            },
            check=_mlp_check,
            auto_init="copy",
        ),
        OperatorSpec(
            name="mlp-hyena-x",
            slots=("mlp",),
            summary="gated convolution along the channels, one filter a token",
            layout_of=_mlp_hyena_layout,
            cost_of=_mlp_hyena_cost,
            warm_of=_warm_nothing,
            params_of={
                "r": Param(float, 2, "width of each of q, k, v over the model's width", low=0),
                "k": Param(int, 4, "taps of each token's filter", low=1),
                "n": Param(int, None, "the number of tokens it is tied to; the model's where left out", low=1),
            },
            check=_mlp_hyena_check,
        ),
        OperatorSpec(
            name="identity-zero",
            slots=SLOTS,
            summary="output 0: the block passes its residual stream on",
            layout_of=lambda at, args: {},
            cost_of=lambda at, args: (0, 0),
            warm_of=_warm_nothing,
        ),
    )
}
ALIASES = {"hyena": "hyena-x", "mamba": "mamba2"}


def find_operator(name: str) -> OperatorSpec:
    """The operator of this exact name or alias; UsageError with the nearest names otherwise."""
    spec = OPERATORS.get(ALIASES.get(name, name))
    if spec is None:
        hint = closest(name, [*OPERATORS, *ALIASES])
        raise UsageError("bad-operator", f"there is no operator {name!r}", hint=hint)
    return spec


def parse_operator(text: str) -> tuple[OperatorSpec, dict[str, str]]:
    """`op` or `op:k=v,…` as written on the command line; the arguments given are neither checked nor completed.

    `r3` is `mlp:r=3` for any number. Raises UsageError for an unknown operator and for an argument without a value.
    """
    name, _, rest = text.strip().partition(":")
    given: dict[str, str] = {}
    if match := re.fullmatch(r"r(\d+(?:\.\d+)?)", name):
        name, given = "mlp", {"r": match[1]}
    spec = find_operator(name)
    for item in rest.split(",") if rest else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise UsageError("bad-operator", f"{text!r}: {item!r} is not key=value", hint="write e.g. hyena-x:k=4")
        if key in given:
            raise UsageError("bad-operator", f"{text!r} gives {key} twice", hint="give every argument once")
        given[key] = value
    return spec, given


def require_slot(spec: OperatorSpec, slot: str) -> None:
    """Raise UsageError unless the operator can replace `slot`."""
    if slot not in SLOTS:
        raise UsageError("bad-slot", f"there is no slot {slot!r} in a block", hint=closest(slot, list(SLOTS)))
    if slot not in spec.slots:
        fitting = [other.name for other in OPERATORS.values() if slot in other.slots]
        raise UsageError(
            "bad-operator",
            f"operator {spec.name!r} replaces {' or '.join(spec.slots)}, not {slot}",
            hint=f"for {slot} there are {', '.join(fitting)}",
        )


def modeling_source() -> tuple[str, bytes]:
    """File name and content of the modeling file that is shipped beside grafted weights.

    The name carries a hash of the content: diffusers keeps trusted code in one flat cache, where two files of one name
    would overwrite each other.
    """
    from hashlib import sha256
    from importlib.resources import files

    content = files("surgery.arch.dit").joinpath("modeling.py").read_bytes()
    return f"modeling_surgery_dit_{sha256(content).hexdigest()[:8]}.py", content
