"""Families of mixture-of-experts models as data: what their tensors are called on disk, and what their configs say.

Standard library only. A family is looked up by its `model_type`; `find_experts` reads which layers have experts from a
checkpoint's headers and holds them against the config. Names are those of the file: Transformers renames and fuses them
on loading, and a model that was saved with `save_original_format=False` has the other names on disk.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import CheckpointError, UsageError, printable
from surgery.store.tensors import TensorRef

COE = "coe_"  # start of a converted model's model_type, of its config keys and of the tensors it adds


@dataclass(frozen=True)
class Family:
    """One model type. `blocks` are the names a block of experts has on disk, `router` the tensors of its router on disk
    (first form that is there counts) with what each is called in an added router; `single` are the projections of one
    expert, `fused` the tensors that hold all experts."""

    model_type: str
    stem: str
    blocks: tuple[str, ...] = ("mlp",)
    routers: tuple[Mapping[str, str], ...] = ({"gate.weight": "weight"},)
    single: tuple[str, ...] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    fused: tuple[tuple[str, ...], ...] = (("experts.gate_up_proj", "experts.down_proj"),)
    pairs: bool = False  # the block returns a pair

    @property
    def coe_type(self) -> str:
        """The model_type of a converted model."""
        return COE + self.model_type

    @property
    def config_class(self) -> str:
        """The class of its configuration, in the file that travels with it."""
        return f"CoE{self.stem}Config"

    @property
    def model_class(self) -> str:
        """The class of the model there."""
        return f"CoE{self.stem}ForCausalLM"

    @property
    def module(self) -> str:
        """The file of that class, without its ending."""
        return f"modeling_coe_{self.model_type}"


_BIASED = ({"gate.weight": "weight", "gate.e_score_correction_bias": "e_score_correction_bias"},)
_ALL = (
    Family("qwen2_moe", "Qwen2Moe"),
    Family("qwen3_moe", "Qwen3Moe"),
    Family("olmoe", "Olmoe"),
    Family("mixtral", "Mixtral", blocks=("block_sparse_moe", "mlp"), single=("w1.weight", "w3.weight", "w2.weight")),
    Family("deepseek_v2", "DeepseekV2"),
    Family("deepseek_v3", "DeepseekV3", routers=_BIASED),
    Family("glm4_moe", "Glm4Moe", routers=_BIASED),
    Family(
        "gpt_oss",
        "GptOss",
        routers=({"router.weight": "weight", "router.bias": "bias"},),
        single=(),
        fused=(
            ("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj", "experts.down_proj_bias"),
            (
                "experts.gate_up_proj_blocks",
                "experts.gate_up_proj_scales",
                "experts.gate_up_proj_bias",
                "experts.down_proj_blocks",
                "experts.down_proj_scales",
                "experts.down_proj_bias",
            ),
        ),
        pairs=True,
    ),
    Family(
        "granitemoe",
        "GraniteMoe",
        blocks=("block_sparse_moe",),
        routers=({"router.layer.weight": "weight"}, {"router.weight": "weight"}),
        single=(),
        fused=(("input_linear.weight", "output_linear.weight"), ("experts.gate_up_proj", "experts.down_proj")),
    ),
    Family("qwen3_next", "Qwen3Next"),
)
FAMILIES: Mapping[str, Family] = {f.model_type: f for f in _ALL}

# Families that look convertible and are not, each with the reason.
REFUSED: Mapping[str, str] = {
    "phimoe": "its router (sparsemixer) takes exactly two experts by masking, not the k best",
    "llama4": "its router takes one expert and scales the expert's input, so passes cannot share out a list",
    "llama4_text": "its router takes one expert and scales the expert's input, so passes cannot share out a list",
    "jamba": "its blocks alternate with state-space layers under other names",
    "dbrx": "its experts and its router lie in one module of another signature",
}

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOPK = ("num_experts_per_tok", "experts_per_token")


@dataclass(frozen=True)
class ExpertLayer:
    """One block of experts on disk: the layer's number, the start of its names, and the tensors of its router by what
    each is called in an added router."""

    number: int
    prefix: str
    router: Mapping[str, TensorRef]


@dataclass(frozen=True)
class Experts:
    """What a checkpoint's experts are: N, K and H, the layers that have them, and how many layers there are."""

    family: Family
    count: int
    topk: int
    width: int
    inner: int
    layers: tuple[ExpertLayer, ...]
    depth: int
    fused: bool
    shared: bool  # some experts see every token


def chain_family(config: Mapping[str, Any]) -> Family | None:
    """The family that a Chain-of-Experts config was converted from; None for any other config."""
    kind = config.get("model_type")
    return FAMILIES.get(kind.removeprefix(COE)) if isinstance(kind, str) and kind.startswith(COE) else None


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config. Raises `UsageError` for a model without experts, for one that cannot be a chain (with the
    reason), and for one that is a chain already."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind.startswith(COE):
        raise UsageError(
            "already-coe",
            f"{where}: is a Chain-of-Experts checkpoint already ({kind})",
            hint=f"surgery coe {where} --collapse makes the plain model again",
        )
    if kind in REFUSED:
        raise UsageError("unsupported-router", f"{where}: {kind}: {REFUSED[kind]}", hint=_supported())
    if kind not in FAMILIES:
        shown = printable(str(kind)) if kind is not None else "no model_type in its config"
        raise UsageError("no-experts", f"{where}: no experts that we know ({shown})", hint=_supported())
    return FAMILIES[kind]


def find_experts(config: Mapping[str, Any], tensors: Mapping[str, TensorRef], where: str) -> Experts:
    """The experts of a checkpoint from its headers and config. Raises `UsageError` where no layer has any, and
    `CheckpointError` where names, shapes and config disagree."""
    family = family_of(config, where)
    depth = _number(config, ("num_hidden_layers",), where)
    # Blocks past the depth predict further tokens (DeepSeek-V3, GLM-4.5); Transformers leaves them out.
    layers = tuple(layer for layer in _layers(family, tensors, where) if layer.number < depth)
    if not layers:
        raise UsageError("no-experts", f"{where}: {family.model_type}, and no layer has experts", hint=_supported())
    count, topk = _number(config, _EXPERTS, where), _number(config, _TOPK, where)
    width = _number(config, ("hidden_size",), where)
    inner = _number(config, ("moe_intermediate_size", "intermediate_size"), where)
    fused = False
    for layer in layers:
        weight = layer.router["weight"]
        if weight.shape != (count, width):
            raise CheckpointError(
                "experts-disagree",
                f"{where}: '{printable(weight.name)}' is {list(weight.shape)} where the config has {count} experts of "
                f"width {width}",
                hint="the config belongs to another checkpoint",
            )
        fused = _check_layer(family, layer, count, tensors, where)
    if not 0 < topk <= count:
        raise CheckpointError("experts-disagree", f"{where}: {topk} experts per token of {count}", hint="a bad config")
    shared = any(n.startswith(f"{layers[0].prefix}.shared_expert") for n in tensors)
    return Experts(family, count, topk, width, inner, layers, depth, fused, shared)


def _layers(family: Family, tensors: Mapping[str, TensorRef], where: str) -> Iterable[ExpertLayer]:
    forms = [(b, r) for b in family.blocks for r in family.routers]
    for block, router in forms:
        first = next(iter(router))
        pattern = re.compile(rf"model\.layers\.([0-9]{{1,6}})\.{re.escape(block)}\.{re.escape(first)}")
        numbers = sorted(int(m[1]) for n in tensors if (m := pattern.fullmatch(n)))
        if not numbers:
            continue
        for number in numbers:
            prefix = f"model.layers.{number}.{block}"
            missing = [f"{prefix}.{n}" for n in router if f"{prefix}.{n}" not in tensors]
            if missing:
                raise CheckpointError("missing-tensor", f"{where}: '{missing[0]}' is missing", hint="fetch it again")
            yield ExpertLayer(number, prefix, {own: tensors[f"{prefix}.{n}"] for n, own in router.items()})
        return


def _check_layer(family: Family, layer: ExpertLayer, count: int, tensors: Mapping[str, TensorRef], where: str) -> bool:
    """Whether the layer's experts lie in fused tensors; raises unless all of the `count` experts are there."""
    for names in family.fused:
        found = [tensors[f"{layer.prefix}.{n}"] for n in names if f"{layer.prefix}.{n}" in tensors]
        if len(found) == len(names) and all(ref.shape[:1] == (count,) for ref in found):
            return True
        if len(found) == len(names):
            bad = next(ref for ref in found if ref.shape[:1] != (count,))
            raise CheckpointError(
                "experts-disagree",
                f"{where}: '{printable(bad.name)}' is {list(bad.shape)} where the config has {count} experts",
                hint="the config belongs to another checkpoint",
            )
    pattern = re.compile(rf"{re.escape(layer.prefix)}\.experts\.([0-9]{{1,6}})\.(.+)")
    known = set(family.single)
    have = {(int(m[1]), m[2]) for n in tensors if n.startswith(layer.prefix) and (m := pattern.fullmatch(n))}
    numbers = {e for e, name in have if name in known}
    if numbers != set(range(count)) and numbers:
        raise CheckpointError(
            "experts-disagree",
            f"{where}: layer {layer.number} has {len(numbers)} experts on disk where the config has {count}",
            hint="the config belongs to another checkpoint, or a shard is missing",
        )
    gone = [f"{layer.prefix}.experts.{e}.{n}" for e in range(count) for n in family.single if (e, n) not in have]
    if gone or not numbers:
        name = gone[0] if gone else f"{layer.prefix}.{family.fused[0][0]}"
        raise CheckpointError("missing-tensor", f"{where}: '{name}' is missing", hint="a shard is missing; fetch it")
    return False


def _number(config: Mapping[str, Any], keys: Sequence[str], where: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise CheckpointError("bad-config", f"{where}: config.json has no {keys[0]}", hint="a whole number above 0")


def _supported() -> str:
    return f"supported: {', '.join(FAMILIES)}"
