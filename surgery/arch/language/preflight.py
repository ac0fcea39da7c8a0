"""Do two towers mean the same by the same shapes? Configs side by side, and how alike the weights are.

Eight heads of 8 and four heads of 16 have equal shapes and nothing else in common, so shapes are not enough. Pure
functions of configs; the likeness reads a fixed sample of a few matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.arch.language.families import DEFAULTS, text_config
from surgery.arch.language.towers import TowerMap
from surgery.arch.language.vocabulary import first_tokens
from surgery.errors import CheckpointError, printable
from surgery.graph.planned import Planned
from surgery.store.checkpoint import Checkpoint
from surgery.store.reader import open_reader
from surgery.store.tensors import TensorRef

# What must agree: another value means other functions of the same tensors.
_MUST = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "hidden_act",
    "num_experts", "num_local_experts", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip
# What should: the merged tower runs with the host's.
_SHOULD = (
    "rms_norm_eps", "sliding_window", "layer_types", "attention_bias", "max_position_embeddings", "vocab_size",
    "tie_word_embeddings", "dtype",
)  # fmt: skip
# What other families call the same.
_ALIASES = {
    "n_head": "num_attention_heads", "n_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "n_embd": "hidden_size", "d_model": "hidden_size", "n_inner": "intermediate_size", "ffn_dim": "intermediate_size",
    "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps", "layer_norm_eps": "rms_norm_eps",
    "norm_eps": "rms_norm_eps", "n_positions": "max_position_embeddings",
}  # fmt: skip
_QUANTISED = ("F8_", "F4", "F6_", "U8", "I8")
UNRELATED = 0.5  # cosine; siblings have more than 0.9, models that share nothing about 0
_SAMPLED = 8  # matrices
_SAMPLE = 1 << 15  # elements of each


@dataclass(frozen=True)
class Preflight:
    """`faults` stop a merge, `warnings` are told and stop it under strict. `likeness` is a cosine, None if unknown;
    `role` is what the model beside the host is called."""

    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    likeness: float | None = None
    role: str = "donor"


def examine(host: Checkpoint, donor: Checkpoint, mapped: TowerMap, *, role: str = "donor") -> Preflight:
    """Host and donor (or another model, of that role) side by side: configs, tokenizers, likeness of the weights."""
    found = compare_configs(
        host.part().config,
        donor.part().config,
        cross_layers=mapped.cross_layers,
        host_name=host.name,
        donor_name=donor.name,
        role=role,
    )
    tokens = _tokens_differ(host, donor, role)
    alike = None
    if not isinstance(host, Planned) and not isinstance(donor, Planned):  # a step never written has no values yet
        alike = likeness(host, donor, mapped)
    return replace(found, warnings=(*found.warnings, *([tokens] if tokens else [])), likeness=alike, role=role)


def compare_configs(
    host: Mapping[str, Any] | None,
    donor: Mapping[str, Any] | None,
    *,
    cross_layers: Sequence[int] = (),
    host_name: str = "host",
    donor_name: str = "donor",
    role: str = "donor",
) -> Preflight:
    """Set the host's text config against the donor's. Keys that a config leaves out have their class's default where
    that is known; a key that only one side states is not compared."""
    if host is None or donor is None:
        missing = host_name if host is None else donor_name
        return Preflight((), (f"{missing} has no config.json: heads and rotary settings were not compared",))
    mine, theirs = _facts(host), _facts(donor)
    faults = [_said(key, mine[key], theirs[key], role) for key in _MUST if _differ(mine, theirs, key)]
    for name, config in ((host_name, host), (donor_name, donor)):
        if _quantised(config):
            faults.append(f"quantization_config: {name} is quantised; merge the model that it was quantised from")
    warnings = [_said(key, mine[key], theirs[key], role) for key in _SHOULD if _differ(mine, theirs, key)]
    own, other = rope(text_config(host)), rope(text_config(donor))
    warnings += [
        f"rope {key}: host {own.get(key)}, {role} {other.get(key)}; the merged tower runs with the host's"
        for key in sorted(own.keys() | other.keys())
        if own.get(key) != other.get(key)
    ]
    if cross_layers:
        warnings.append(f"layers {', '.join(map(str, cross_layers))} are cross-attention and stay the host's")
    return Preflight(tuple(faults), tuple(warnings))


def check_stored(tensors: Mapping[str, TensorRef], names: Sequence[str], where: str) -> None:
    """Raise `CheckpointError` when a tensor to be merged is quantised."""
    for name in names:
        if tensors[name].dtype.startswith(_QUANTISED):
            raise CheckpointError(
                "quantized",
                f"{where}: '{printable(name)}' is stored as {tensors[name].dtype}; quantised weights have no average",
                hint="merge the model that it was quantised from",
            )


def likeness(host: Checkpoint, donor: Checkpoint, mapped: TowerMap) -> float | None:
    """The cosine between a fixed sample of the layers' matrices in both; None where there is nothing to compare.

    Eight matrices spread over the layers, the first 32768 elements of each: a few hundred kilobytes.
    """
    import numpy as np

    from surgery.arch.merging.numbers.arithmetic import FLOATS, Source

    pairs = [
        (host.tensors[mine], donor.tensors[theirs])
        for name, (mine, theirs) in mapped.names.items()
        if name.startswith("layers.")
        and len(host.tensors[mine].shape) == 2
        and {host.tensors[mine].dtype, donor.tensors[theirs].dtype} <= set(FLOATS)
    ]
    chosen = [pairs[i * len(pairs) // _SAMPLED] for i in range(_SAMPLED)] if len(pairs) > _SAMPLED else pairs
    cosines = []
    for one, two in chosen:
        count = min(_SAMPLE, _elements(one), _elements(two))
        with open_reader(host, one) as a, open_reader(donor, two) as b:
            x, y = (Source(r, np.float64, count).read(0, count) for r in (a, b))
            length = float(np.sqrt((x @ x) * (y @ y)))
            if length > 0 and np.isfinite(length):
                cosines.append(float(x @ y) / length)
    return sum(cosines) / len(cosines) if cosines else None


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a text config in one form, of transformers 5 (`rope_parameters`) and of before
    (`rope_theta` with `rope_scaling`, a second theta for local layers). Sections of multimodal rope are left out: on
    text they are plain rope."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        if parameters and all(isinstance(v, Mapping) for v in parameters.values()):  # one for each kind of layer
            return {kind: _rope(inner) for kind, inner in parameters.items()}
        return _rope({"partial_rotary_factor": config.get("partial_rotary_factor"), **parameters})
    scaling = config.get("rope_scaling")
    found = dict(scaling) if isinstance(scaling, Mapping) else {}
    found["rope_theta"] = config.get("rope_theta", _defaults(config).get("rope_theta"))
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if "rope_local_base_freq" in config:
        local = _rope({"rope_theta": config["rope_local_base_freq"]})
        return {"full_attention": _rope(found), "sliding_attention": local}
    return _rope(found)


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(parameters)
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    for key in ("type", "mrope_section", "mrope_interleaved"):
        found.pop(key, None)
    if found.get("partial_rotary_factor") == 1:
        found.pop("partial_rotary_factor")
    found["type"] = "default" if kind in ("mrope", "default") else kind
    return {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in found.items()
            if v is not None}  # fmt: skip


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of its text model, with the class's defaults for what it leaves out."""
    inner = text_config(config)
    stated = {_ALIASES.get(k, k): v for k, v in inner.items() if v is not None}
    facts: dict[str, Any] = {**{k: v for k, v in _defaults(inner).items() if k not in inner}, **stated}
    facts.setdefault("dtype", inner.get("torch_dtype", config.get("dtype", config.get("torch_dtype"))))
    facts["hidden_act"] = facts.get("hidden_activation") or facts.get("hidden_act")
    heads, hidden = facts.get("num_attention_heads"), facts.get("hidden_size")
    if isinstance(heads, int) and heads:
        facts.setdefault("num_key_value_heads", heads)
        if isinstance(hidden, int):
            facts.setdefault("head_dim", hidden // heads)
    for key in ("tie_word_embeddings",):
        if key in config:
            facts[key] = config[key]
    if "sliding_window" in inner and (inner["sliding_window"] is None or inner.get("use_sliding_window") is False):
        facts["sliding_window"] = "none"
    # Lists with one value a layer say how layers attend; where all attend alike a config may leave them out.
    kinds = facts.get("layer_types")
    if isinstance(kinds, list) and set(kinds) == {"full_attention"}:
        facts.pop("layer_types")
    return facts


def _defaults(inner: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = str(inner.get("model_type", ""))  # of the text class, or in files of before of the model around it
    return next((DEFAULTS[k] for k in (kind, f"{kind}_text", f"{kind}_text_model") if k in DEFAULTS), {})


def _differ(mine: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    one, two = mine.get(key), theirs.get(key)
    if one is None or two is None or one == two:
        return False
    aliases = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
    return aliases.get(str(one), one) != aliases.get(str(two), two)


def _said(key: str, mine: Any, theirs: Any, role: str) -> str:
    one, two = (printable(str(v), limit=60) for v in (mine, theirs))
    return f"{key}: host {one}, {role} {two}"


def _tokens_differ(host: Checkpoint, donor: Checkpoint, role: str) -> str:
    """What to say of two tokenizers of which an early token differs; "" where none does or one is missing."""
    mine, theirs = first_tokens(host), first_tokens(donor)
    for number in sorted(mine.keys() & theirs.keys()):
        if mine[number] != theirs[number]:
            one, two = (printable(t[number], limit=40) for t in (mine, theirs))
            return f"tokenizer: token {number} is '{one}' in the host's and '{two}' in the {role}'s"
    return ""


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` when a model's config says that its weights are quantised."""
    if _quantised(checkpoint.part().config or {}):
        raise CheckpointError(
            "incompatible",
            f"{checkpoint.name} is quantised (quantization_config); quantised weights have no average",
            hint="merge the model that it was quantised from",
        )


def _quantised(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("quantization_config", "compression_config")) or any(
        _quantised(v) for k, v in config.items() if isinstance(v, Mapping) and k.endswith("config")
    )


def _elements(ref: TensorRef) -> int:
    count = 1
    for n in ref.shape:
        count *= n
    return count


def stop_on(found: Preflight, *, strict: bool, force: bool) -> Iterator[str]:
    """The warnings of a preflight; raises `CheckpointError` where it forbids the merge. `force` turns faults into
    warnings, `strict` warnings into faults."""
    if found.faults and not force:
        raise CheckpointError(
            "incompatible",
            f"host and {found.role} do not fit: {'; '.join(found.faults[:3])}",
            hint="equal shapes mean different functions here; --force merges anyway",
        )
    if found.likeness is not None and found.likeness < UNRELATED and not force:
        raise CheckpointError(
            "unrelated",
            f"host and {found.role} do not look related: the cosine of their weights is {found.likeness:.2f}, siblings "
            "have 0.9 or more",
            hint="they come from different base models; --force merges anyway",
        )
    if found.warnings and strict:
        raise CheckpointError(
            "incompatible", f"--strict: {'; '.join(found.warnings[:3])}", hint="leave --strict out to merge anyway"
        )
    yield from found.faults
    yield from found.warnings
    if found.likeness is not None and found.likeness < UNRELATED:
        yield f"host and {found.role} do not look related: the cosine of their weights is {found.likeness:.2f}"
