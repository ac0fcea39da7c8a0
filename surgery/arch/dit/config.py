"""Diffusion transformers as diffusers stores them: family, sizes, tensor names and shapes, from `config.json` alone.

Covers `DiTTransformer2DModel`, `PixArtTransformer2DModel`, the old `Transformer2DModel` where it means one of the two,
and our grafted forms of both. Standard library only; torch is imported by the sources, where values are drawn.

A grafted configuration names the class `Surgery<stock class>`, lists its operators under `surgery_grafts`, and prefixes
`norm_type` with "surgery:", so that the stock class refuses it instead of loading it with random operators.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.arch.dit.operator_spec import OperatorSpec
from surgery.arch.dit.operators import (
    ACTIVATIONS,
    OPERATORS,
    SLOTS,
    find_operator,
    modeling_source,
    parse_operator,
    require_slot,
)
from surgery.arch.sources import Constant, Fresh, Normal, Shape, Uniform
from surgery.errors import CheckpointError, UsageError, closest

if TYPE_CHECKING:
    pass

SLOT_MODULES = {"attn": "attn1", "mlp": "ff"}
CLASS_PREFIX = "Surgery"
NORM_PREFIX = "surgery:"
_NORM_TYPES = {"DiTTransformer2DModel": "ada_norm_zero", "PixArtTransformer2DModel": "ada_norm_single"}
_TIME_CHANNELS = 256  # width of the sinusoidal time features, fixed in diffusers
# What the stock constructors take where a configuration is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "dit": {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": None,
        "num_layers": 28,
        "attention_bias": True,
        "sample_size": 32,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
    }
}
_DEFAULTS["pixart"] = _DEFAULTS["dit"] | {
    "out_channels": 8,
    "sample_size": 128,
    "cross_attention_dim": 1152,
    "caption_channels": None,
    "use_additional_conditions": None,
    "attention_type": "default",
}
# A damaged config must not make a plan of a million blocks: no field of a model that exists comes near these.
_MOST_BLOCKS, _MOST = 10_000, 1 << 24
_OPTIONAL = {"out_channels", "cross_attention_dim", "caption_channels", "use_additional_conditions", "attention_type"}


@dataclass(frozen=True)
class Family:
    """Which model a configuration describes. `name` is "dit" or "pixart"; `grafted` where our class must read it."""

    name: str
    stock_class: str
    norm_type: str
    grafted: bool

    @property
    def grafted_class(self) -> str:
        """Class that carries grafted operators."""
        return CLASS_PREFIX + self.stock_class

    @property
    def model_class(self) -> str:
        """Class that the configuration needs."""
        return self.grafted_class if self.grafted else self.stock_class


def family(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a configuration; `where` names the file in errors. Raises CheckpointError for any other model."""
    written = config.get("_class_name")
    if not isinstance(written, str):
        raise CheckpointError(
            "bad-config",
            f"{where} names no model class",
            hint="a diffusers model folder has config.json with _class_name; is this its transformer folder?",
        )
    stock = written.removeprefix(CLASS_PREFIX)
    norm_type = str(config.get("norm_type", "(absent)")).removeprefix(NORM_PREFIX)
    if stock == "Transformer2DModel":
        # diffusers decides by norm_type what the old class stands for.
        stock = next((name for name, norm in _NORM_TYPES.items() if norm == norm_type), stock)
    if stock not in _NORM_TYPES:
        pipeline = "name the pipeline's transformer folder, which holds the model" if stock.endswith("Pipeline") else ""
        raise CheckpointError(
            "unknown-architecture",
            f"{where}: {written} is neither a DiT nor a PixArt transformer",
            hint=pipeline or f"supported: {', '.join(_NORM_TYPES)}",
        )
    if norm_type not in ("(absent)", _NORM_TYPES[stock]):
        raise CheckpointError(
            "bad-config",
            f"{where}: {stock} needs norm_type {_NORM_TYPES[stock]!r}, not {config['norm_type']!r}",
            hint="leave norm_type out, or give it that value",
        )
    return Family(
        name="dit" if stock.startswith("DiT") else "pixart",
        stock_class=stock,
        norm_type=_NORM_TYPES[stock],
        grafted=written.startswith(CLASS_PREFIX) or bool(config.get("surgery_grafts")),
    )


@dataclass(frozen=True)
class Dims:
    """Sizes of a model: width D, heads H, tokens N, blocks L, and what its ends need."""

    dim: int
    heads: int
    n_tokens: int
    n_layers: int
    activation: str
    classes: int
    in_channels: int
    out_channels: int
    sample_size: int
    patch_size: int

    @property
    def place(self) -> dict[str, int]:
        """The keyword arguments that every operator wants."""
        return {"dim": self.dim, "heads": self.heads, "n_tokens": self.n_tokens}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "Dims":
        """Read the sizes, with the stock class's defaults for absent fields. Raises CheckpointError for bad values."""
        fields = _complete(config, where)
        heads, sample, patch = (fields[key] for key in ("num_attention_heads", "sample_size", "patch_size"))
        return cls(
            dim=heads * fields["attention_head_dim"],
            heads=heads,
            n_tokens=(sample // patch) ** 2,
            n_layers=fields["num_layers"],
            activation=fields["activation_fn"],
            classes=fields["num_embeds_ada_norm"],
            in_channels=fields["in_channels"],
            out_channels=fields["out_channels"] or fields["in_channels"],
            sample_size=sample,
            patch_size=patch,
        )


def _complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration with defaults filled in, every field that decides a shape checked."""
    kind = family(config, where).name
    fields = {key: config.get(key, default) for key, default in _DEFAULTS[kind].items()}
    for key, default in _DEFAULTS[kind].items():
        value = fields[key]
        if value is None and key in _OPTIONAL:
            continue
        if key == "activation_fn":
            fits, expected = value in ACTIVATIONS, "one of " + ", ".join(ACTIVATIONS)
        elif key == "attention_type":
            # The other types add gated layers for grounding boxes, which no published DiT or PixArt has.
            fits, expected = value == "default", "'default'"
        elif isinstance(default, bool) or key == "use_additional_conditions":
            fits, expected = isinstance(value, bool), "true or false"
        else:
            most = _MOST_BLOCKS if key == "num_layers" else _MOST
            fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
            expected = f"a whole number from 1 to {most}"
        if not fits:
            raise CheckpointError(
                "bad-config",
                f"{where}: {key} must be {expected}, not {value!r}",
                hint="the config is damaged or of another model; fetch it again",
            )
    if fields["sample_size"] % fields["patch_size"]:
        raise CheckpointError(
            "bad-config",
            f"{where}: sample_size {fields['sample_size']} is no multiple of patch_size {fields['patch_size']}",
            hint="one of the two was changed by hand",
        )
    if kind == "pixart" and fields["use_additional_conditions"] is None:
        fields["use_additional_conditions"] = fields["sample_size"] == 128
    return fields


def slot_prefix(block: int, slot: str) -> str:
    """What the names of a slot's tensors begin with, e.g. "transformer_blocks.3.attn1."."""
    return f"transformer_blocks.{block}.{SLOT_MODULES[slot]}."


@dataclass(frozen=True)
class Graft:
    """One operator in one slot; `args` complete."""

    block: int
    slot: str
    op: str
    args: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The entry of `surgery_grafts`."""
        return {"block": self.block, "slot": self.slot, "op": self.op, "args": dict(self.args)}


def grafts(config: Mapping[str, Any], where: str = "config.json") -> tuple[Graft, ...]:
    """The grafts recorded in a configuration, checked against it, by block. Raises CheckpointError for a bad entry."""
    dims = Dims.from_config(config, where)
    listed = config.get("surgery_grafts") or []
    found: dict[tuple[int, str], Graft] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        try:
            block, slot, op = entry["block"], entry["slot"], entry["op"]
            spec = find_operator(op)
            require_slot(spec, slot)
            args = spec.resolve(entry.get("args") or {})
            spec.tensors(**dims.place, **args)
        except UsageError as wrong:
            raise CheckpointError(
                "bad-graft",
                f"{where}: surgery_grafts: {wrong.message}",
                hint="the checkpoint may come from a newer version of surgery",
            ) from wrong
        except (KeyError, TypeError, AttributeError) as wrong:
            raise CheckpointError(
                "bad-graft",
                f"{where}: surgery_grafts has the entry {entry!r} instead of block, slot, op and args",
                hint="restore config.json, or graft the original again",
            ) from wrong
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < dims.n_layers:
            raise CheckpointError(
                "bad-graft",
                f"{where}: surgery_grafts names block {block!r}; the model has 0-{dims.n_layers - 1}",
                hint="restore config.json, or graft the original again",
            )
        if (block, slot) in found:
            raise CheckpointError(
                "bad-graft",
                f"{where}: surgery_grafts fills {slot} of block {block} twice",
                hint="restore config.json, or graft the original again",
            )
        found[block, slot] = Graft(block, slot, spec.name, args)
    return tuple(sorted(found.values(), key=_graft_order))


def _graft_order(graft: Graft) -> tuple[int, int]:
    return graft.block, SLOTS.index(graft.slot)


def resolve_graft(config: Mapping[str, Any], slot: str, text: str) -> tuple[OperatorSpec, dict[str, Any]]:
    """The operator `text` ("hyena-x:k=4") for `slot` of this model, with all its arguments.

    What the model decides is filled in: an mlp gets the model's activation, mlp-hyena-x its number of tokens. Raises
    UsageError for an unknown operator or argument, one that is not of the slot's kind, and one that does not fit.
    """
    dims = Dims.from_config(config)
    spec, given = parse_operator(text)
    require_slot(spec, slot)
    by_model: dict[str, dict[str, Any]] = {"mlp": {"activation": dims.activation}, "mlp-hyena-x": {"n": dims.n_tokens}}
    decided = by_model.get(spec.name, {})
    args = spec.resolve({**decided, **given})
    spec.tensors(**dims.place, **args)
    return spec, args


def stock_operator(config: Mapping[str, Any], slot: str) -> tuple[OperatorSpec, dict[str, Any]]:
    """The operator that an ungrafted block has in `slot`."""
    if slot not in SLOT_MODULES:
        raise UsageError("bad-slot", f"there is no slot {slot!r} in a block", hint=closest(slot, list(SLOT_MODULES)))
    return resolve_graft(config, slot, {"attn": "mha", "mlp": "mlp"}[slot])


def grafted_config(config: Mapping[str, Any], new: Iterable[Graft]) -> dict[str, Any]:
    """The configuration after `new` is merged over the grafts it lists already; what a later load needs is in it."""
    kind = family(config)
    merged = {(graft.block, graft.slot): graft for graft in (*grafts(config), *new)}
    module = modeling_source()[0].removesuffix(".py")
    return {
        **config,
        "_class_name": kind.grafted_class,
        "norm_type": NORM_PREFIX + kind.norm_type,
        "surgery_grafts": [graft.as_json() for graft in sorted(merged.values(), key=_graft_order)],
        "auto_map": {"AutoModel": f"{module}.{kind.grafted_class}"},
    }


# --- tensors ---------------------------------------------------------------------------------------------------------


def _linear(name: str, out: int, fan_in: int, *, bias: bool = True) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (out, fan_in)}
    return weight | ({f"{name}.bias": (out,)} if bias else {})


def _two_linears(name: str, out: int, fan_in: int) -> dict[str, Shape]:
    return _linear(f"{name}.linear_1", out, fan_in) | _linear(f"{name}.linear_2", out, out)


def _norm(name: str, dim: int, affine: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)} if affine else {}


def _attention(name: str, dim: int, context: int, bias: bool) -> dict[str, Shape]:
    inputs = (("to_q", dim), ("to_k", context), ("to_v", context))
    shapes: dict[str, Shape] = {}
    for part, fan_in in inputs:
        shapes |= _linear(name + part, dim, fan_in, bias=bias)
    return shapes | _linear(f"{name}to_out.0", dim, dim)


def _first_block(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Shape]:
    """The stock tensors of block 0."""
    dims, name = Dims.from_config(config), "transformer_blocks.0."
    dim, affine = dims.dim, fields["norm_elementwise_affine"]
    shapes: dict[str, Shape] = {}
    if family(config).name == "dit":
        shapes |= _two_linears(f"{name}norm1.emb.timestep_embedder", dim, _TIME_CHANNELS)
        # One class more than asked: the null class of classifier-free guidance.
        shapes[f"{name}norm1.emb.class_embedder.embedding_table.weight"] = (dims.classes + 1, dim)
        shapes |= _linear(f"{name}norm1.linear", 6 * dim, dim) | _norm(f"{name}norm3", dim, affine)
    else:
        shapes[f"{name}scale_shift_table"] = (6, dim)
        shapes |= _norm(f"{name}norm1", dim, affine) | _norm(f"{name}norm2", dim, affine)
        if fields["cross_attention_dim"] is not None:
            shapes |= _attention(f"{name}attn2.", dim, fields["cross_attention_dim"], fields["attention_bias"])
    shapes |= _attention(slot_prefix(0, "attn"), dim, dim, fields["attention_bias"])
    spec, args = stock_operator(config, "mlp")
    feed_forward = spec.tensors(**dims.place, **args)
    return shapes | {slot_prefix(0, "mlp") + key: shape for key, shape in feed_forward.items()}


def tensor_shapes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Shape]:
    """Name -> shape of every tensor of the model's state dict, grafted blocks included.

    Raises CheckpointError where the configuration is not that of a DiT or PixArt transformer or contradicts itself.
    """
    fields, dims = _complete(config, where), Dims.from_config(config, where)
    dim, patch = dims.dim, dims.patch_size
    shapes: dict[str, Shape] = {
        "pos_embed.proj.weight": (dim, dims.in_channels, patch, patch),
        "pos_embed.proj.bias": (dim,),
    }
    outputs = patch * patch * dims.out_channels
    if family(config, where).name == "dit":
        shapes |= _linear("proj_out_1", 2 * dim, dim) | _linear("proj_out_2", outputs, dim)
    else:
        shapes["scale_shift_table"] = (2, dim)
        shapes |= _linear("proj_out", outputs, dim) | _linear("adaln_single.linear", 6 * dim, dim)
        shapes |= _two_linears("adaln_single.emb.timestep_embedder", dim, _TIME_CHANNELS)
        if fields["use_additional_conditions"]:
            if dim % 3:
                raise CheckpointError(
                    "bad-config",
                    f"{where}: size conditions need a width divisible by 3, not {dim}",
                    hint="set use_additional_conditions to false",
                )
            for part in ("resolution", "aspect_ratio"):
                shapes |= _two_linears(f"adaln_single.emb.{part}_embedder", dim // 3, _TIME_CHANNELS)
        if fields["caption_channels"] is not None:
            shapes |= _two_linears("caption_projection", dim, fields["caption_channels"])
    # Every block has the same stock tensors; listing one and renaming it keeps deep models cheap.
    first = _first_block(config, fields)
    for block in range(dims.n_layers):
        shapes |= {name.replace(".0.", f".{block}.", 1): shape for name, shape in first.items()}
    for graft in grafts(config, where):
        prefix = slot_prefix(graft.block, graft.slot)
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
        grafted = OPERATORS[graft.op].tensors(**dims.place, **graft.args)
        shapes |= {prefix + name: shape for name, shape in grafted.items()}
    return shapes


def stock_init(name: str, shapes: Mapping[str, Shape]) -> Fresh:
    """How the stock constructor of diffusers fills one tensor of an ungrafted model.

    Linear and convolution layers are uniform within ±1/sqrt(fan-in), biases with the fan-in of their weight; class
    embeddings are N(0, 1), modulation tables N(0, 1/D), norms 1 and 0.
    """
    shape = shapes[name]
    if name.endswith("scale_shift_table"):
        return Normal(shape, shape[-1] ** -0.5)
    if name.endswith("embedding_table.weight"):
        return Normal(shape, 1.0)
    is_bias = name.endswith(".bias")
    weight = shapes[name.removesuffix("bias") + "weight"] if is_bias else shape
    if len(weight) == 1:
        return Constant(shape, 0.0 if is_bias else 1.0)
    return Uniform(shape, 1 / math.sqrt(math.prod(weight[1:])))


def initial_values(config: Mapping[str, Any]) -> dict[str, Fresh]:
    """Name -> fresh value of every tensor of a new model, grafted blocks included."""
    dims, shapes = Dims.from_config(config), tensor_shapes(config)
    values: dict[str, Fresh] = {}
    for graft in grafts(config):
        prefix = slot_prefix(graft.block, graft.slot)
        layout = OPERATORS[graft.op].layout(**dims.place, **graft.args)
        values |= {prefix + name: value for name, value in layout.items()}
    return {name: values.get(name) or stock_init(name, shapes) for name in shapes}
