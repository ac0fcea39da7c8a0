"""Mixture-of-experts models known by name, and the tensors that a config asks for, as a checkpoint stores them.

Pure data and arithmetic: names, shapes and how each value is drawn, so that a model of any size is planned from its
config and written without ever being built. Legend of shapes: H hidden, I width of an expert, N experts.
"""

from collections.abc import Iterator, Mapping
from math import prod, sqrt
from typing import Any

from surgery.arch.moe.carrying import carried_files, coe_config
from surgery.arch.moe.chain import Chain
from surgery.arch.moe.families import COE, FAMILIES
from surgery.arch.sources import Constant, Normal, Source, Uniform
from surgery.errors import UsageError

_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_TINY_MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
}
_FINE = {"moe_intermediate_size": 32, "num_experts_per_tok": 4}

# The model of the paper (its "Experimental details"): DeepSeek-V2-Lite's design at 544 Mi parameters without embeddings
# (570,955,776 / 2^20, those of the layers), 63 routed experts and one shared.
_PAPER = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 1024,
    "intermediate_size": 10944,
    "moe_intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 63,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "pad_token_id": None,
}
_TINY_PAPER = {
    **_TINY,
    **_TINY_MLA,
    **_FINE,
    "n_routed_experts": 15,
    "first_k_dense_replace": 0,
    "topk_method": "greedy",
}


def paper_chain(iterations: int, k: int) -> Chain:
    """The published architecture with so many passes of k experts each: balance loss 0.001 a sequence, no gates."""
    return Chain(
        mode="paper",
        iterations=iterations,
        topk=(k,) * iterations,
        reselect="allow",
        routers="copy",
        gate="none",
        shared="every",
        aux="seq",
        aux_alpha=0.001,
        inner=True,
        outer=False,
        layers=None,
    )


def _plain(kind: str, **fields: Any) -> dict[str, Any]:
    family = FAMILIES[kind]
    return {"model_type": kind, "architectures": [f"{family.stem}ForCausalLM"], **fields}


def _paper(base: Mapping[str, Any], iterations: int, k: int) -> dict[str, Any]:
    family = FAMILIES["deepseek_v2"]
    return coe_config({**base, "num_experts_per_tok": k}, family, paper_chain(iterations, k).knobs())


MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-moe-tiny": _plain(
        "qwen3_moe", **_TINY, **_FINE, num_experts=16, head_dim=16, norm_topk_prob=True, decoder_sparse_step=1
    ),
    "qwen2-moe-tiny": _plain(
        "qwen2_moe",
        **_TINY, **_FINE, num_experts=16, shared_expert_intermediate_size=64, norm_topk_prob=False,
        decoder_sparse_step=1,
    ),
    "olmoe-tiny": _plain("olmoe", **{**_TINY, "intermediate_size": 32}, num_experts=16, num_experts_per_tok=4),
    "mixtral-tiny": _plain("mixtral", **_TINY, num_local_experts=8, num_experts_per_tok=2),
    "granitemoe-tiny": _plain(
        "granitemoe", **{**_TINY, "intermediate_size": 32}, num_local_experts=16, num_experts_per_tok=4
    ),
    "gpt-oss-tiny": _plain(
        "gpt_oss",
        **{**_TINY, "intermediate_size": 32}, num_local_experts=16, num_experts_per_tok=4, head_dim=16,
        attention_bias=True,
    ),
    "deepseek-v2-tiny": _plain(
        "deepseek_v2", **{**_TINY, **_TINY_MLA}, **_FINE, n_routed_experts=16, first_k_dense_replace=1,
        topk_method="greedy",
    ),
    "deepseek-v3-tiny": _plain(
        "deepseek_v3", **{**_TINY, **_TINY_MLA}, **_FINE, n_routed_experts=16, first_k_dense_replace=1,
        norm_topk_prob=True,
    ),
    "coe-tiny": _paper({"model_type": "deepseek_v2", **_TINY_PAPER}, 2, 2),
    "moe-544m": {"architectures": ["DeepseekV2ForCausalLM"], **_PAPER},
    "coe-544m": _paper(_PAPER, 2, 4),
}  # fmt: skip


def set_fields(config: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """The config with key=value settings; keys are those it has already. Raises `UsageError`."""
    import json

    from surgery.errors import closest

    out = dict(config)
    for text in settings:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError("set", f"--set {text}: no value", hint="write --set num_hidden_layers=8")
        if key not in out or key in ("model_type", "architectures", "auto_map"):
            raise UsageError("set", f"--set {key}: no such field of this architecture", hint=closest(key, sorted(out)))
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
        if type(out[key]) is not type(out[key] if config[key] is None else config[key]) and out[key] is not None:
            raise UsageError(
                "set", f"--set {text}: {json.dumps(config[key])} is of another kind", hint="true, 8, 0.1 or [4,4]"
            )
    count = out.get("coe_iterations")
    if isinstance(count, int) and len(out["coe_topk"] or ()) != count:
        if "coe_topk" in {t.partition("=")[0] for t in settings} or count < 1:
            raise UsageError("set", f"coe_topk {out['coe_topk']} for {count} passes", hint="one number a pass")
        out["coe_topk"] = [config["coe_topk"][0]] * count
    return out


def modeling_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """What has to lie beside the weights of a model that Transformers does not know."""
    kind = str(config["model_type"])
    return carried_files(FAMILIES[kind.removeprefix(COE)]) if kind.startswith(COE) else {}


def without_embeddings(values: Mapping[str, Source]) -> int:
    """Parameters of the layers, as the paper counts them: without embedding, output head and the norm before it."""
    return sum(prod(v.shape) for n, v in values.items() if n.startswith("model.layers."))


def initial_values(config: Mapping[str, Any]) -> dict[str, Source]:
    """Every tensor of the model as its family's checkpoints name it, and how its constructor draws it."""
    h, std = config["hidden_size"], config["initializer_range"]
    values: dict[str, Source] = {"model.embed_tokens.weight": Normal((config["vocab_size"], h), std)}
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        values |= {f"{prefix}self_attn.{n}": v for n, v in _attention(config).items()}
        values |= {f"{prefix}{n}": v for n, v in _experts(config, number)}
        values |= {f"{prefix}{n}_layernorm.weight": Constant((h,), 1.0) for n in ("input", "post_attention")}
    values["model.norm.weight"] = Constant((h,), 1.0)
    if not config["tie_word_embeddings"]:
        values["lm_head.weight"] = Normal((config["vocab_size"], h), std)
    return values


def _attention(config: Mapping[str, Any]) -> dict[str, Source]:
    kind, h, std = config["model_type"].removeprefix(COE), config["hidden_size"], config["initializer_range"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if kind.startswith("deepseek"):
        return _latent_attention(config)
    d = config.get("head_dim") or h // heads
    shapes = {"q_proj": (heads * d, h), "k_proj": (groups * d, h), "v_proj": (groups * d, h), "o_proj": (h, heads * d)}
    values: dict[str, Source] = {f"{n}.weight": Normal(s, std) for n, s in shapes.items()}
    biased = {"qwen2_moe": ("q_proj", "k_proj", "v_proj"), "gpt_oss": tuple(shapes)}.get(kind, ())
    values |= {f"{n}.bias": Constant(shapes[n][:1], 0.0) for n in biased}
    if kind == "qwen3_moe":
        values |= {f"{n}_norm.weight": Constant((d,), 1.0) for n in ("q", "k")}
    elif kind == "olmoe":
        values |= {"q_norm.weight": Constant((heads * d,), 1.0), "k_norm.weight": Constant((groups * d,), 1.0)}
    elif kind == "gpt_oss":
        values["sinks"] = Normal((heads,), std)
    return values


def _latent_attention(config: Mapping[str, Any]) -> dict[str, Source]:
    """Multi-head latent attention of DeepSeek-V2: keys and values go through a vector of kv_lora_rank numbers."""
    h, std, heads = config["hidden_size"], config["initializer_range"], config["num_attention_heads"]
    rank, rope, nope, v = (config[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    values: dict[str, Source] = {
        "kv_a_proj_with_mqa.weight": Normal((rank + rope, h), std),
        "kv_a_layernorm.weight": Constant((rank,), 1.0),
        "kv_b_proj.weight": Normal((heads * (nope + v), rank), std),
        "o_proj.weight": Normal((h, heads * v), std),
    }
    inner = config["q_lora_rank"]
    if inner is None:
        return values | {"q_proj.weight": Normal((heads * (nope + rope), h), std)}
    return values | {
        "q_a_proj.weight": Normal((inner, h), std),
        "q_a_layernorm.weight": Constant((inner,), 1.0),
        "q_b_proj.weight": Normal((heads * (nope + rope), inner), std),
    }


def _mlp(prefix: str, h: int, inner: int, std: float, names: tuple[str, str, str]) -> Iterator[tuple[str, Source]]:
    gate, up, down = names
    yield f"{prefix}{gate}", Normal((inner, h), std)
    yield f"{prefix}{up}", Normal((inner, h), std)
    yield f"{prefix}{down}", Normal((h, inner), std)


def _experts(config: Mapping[str, Any], number: int) -> Iterator[tuple[str, Source]]:
    kind, h, std = config["model_type"].removeprefix(COE), config["hidden_size"], config["initializer_range"]
    family = FAMILIES[kind]
    usual = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    if number < config.get("first_k_dense_replace", 0):
        yield from _mlp("mlp.", h, config["intermediate_size"], std, usual)
        return
    n = next(config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config)
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    block = f"{family.blocks[0]}."
    router = list(_router(config, n))
    yield from ((f"{block}{next(k for k, own in family.routers[0].items() if own == name)}", v) for name, v in router)
    if config.get("coe_routers") == "own":
        for t in range(config["coe_iterations"] - 1):
            yield from ((f"{block}coe_gates.{t}.{name}", v) for name, v in router)
    if kind == "gpt_oss":
        yield f"{block}experts.gate_up_proj", Normal((n, h, 2 * inner), std)
        yield f"{block}experts.gate_up_proj_bias", Constant((n, 2 * inner), 0.0)
        yield f"{block}experts.down_proj", Normal((n, inner, h), std)
        yield f"{block}experts.down_proj_bias", Constant((n, h), 0.0)
    elif kind == "granitemoe":
        yield f"{block}input_linear.weight", Normal((n, 2 * inner, h), std)
        yield f"{block}output_linear.weight", Normal((n, h, inner), std)
    else:
        gate, up, down = family.single
        for e in range(n):
            yield from _mlp(f"{block}experts.{e}.", h, inner, std, (gate, up, down))
    if kind == "qwen2_moe":
        yield from _mlp(f"{block}shared_expert.", h, config["shared_expert_intermediate_size"], std, usual)
        yield f"{block}shared_expert_gate.weight", Normal((1, h), std)
    elif config.get("n_shared_experts"):
        yield from _mlp(f"{block}shared_experts.", h, inner * config["n_shared_experts"], std, usual)


def _router(config: Mapping[str, Any], n: int) -> Iterator[tuple[str, Source]]:
    kind, h, std = config["model_type"].removeprefix(COE), config["hidden_size"], config["initializer_range"]
    # The paper's code leaves its routers as torch draws a linear layer: U(-1/sqrt(H), 1/sqrt(H)).
    yield "weight", Uniform((n, h), 1 / sqrt(h)) if config.get("coe_route") == "paper" else Normal((n, h), std)
    if kind == "gpt_oss":
        yield "bias", Normal((n,), std)
    if kind == "deepseek_v3":
        yield "e_score_correction_bias", Constant((n,), 0.0)
