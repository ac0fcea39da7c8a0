"""Small random mixture-of-experts models of every family, made from the real classes."""

from pathlib import Path
from typing import Any

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 4}
FIELDS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**_MOE, "num_experts": 8, "shared_expert_intermediate_size": 24, "norm_topk_prob": False},
    "qwen3_moe": {**_MOE, "num_experts": 8, "head_dim": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 16},
    "deepseek_v2": {**_MLA, **_MOE, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, **_MOE, "n_group": 2, "topk_group": 2, "q_lora_rank": 16},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8, "intermediate_size": 16},
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "intermediate_size": 16,
        "residual_multiplier": 0.7,
    },
    "glm4_moe": {
        **_MOE,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "num_hidden_layers": 3,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_next": {
        **_MOE,
        "num_experts": 8,
        "shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_hidden_layers": 4,
    },
}


def moe_config(kind: str, **fields: Any) -> Any:
    """A small configuration of the family; `fields` replace its values."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**{**_SMALL, **FIELDS[kind], **fields})


def moe_model(kind: str, *, seed: int = 0, dtype: Any = None, **fields: Any) -> Any:
    """A model whose routers and experts matter: at the usual 0.02 a layer hardly changes what passes through it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(moe_config(kind, **fields))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() >= 2 and "embed" not in name:
                tensor.mul_(6)
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.01)
    return model.to(dtype or torch.float32).eval()


def save_moe(folder: Path, kind: str, *, fused: bool = False, shard: str = "5GB", **options: Any) -> Path:
    """The model in a folder; `fused` writes the names of the module, not those of the family's checkpoints."""
    moe_model(kind, **options).save_pretrained(folder, save_original_format=not fused, max_shard_size=shard)
    return folder


def chained(native: Any, **knobs: Any) -> Any:
    """The Chain-of-Experts model around the tensors of a native one, routers copied: what a conversion makes, without a
    folder in between."""
    from surgery.arch.moe.build import model_class
    from surgery.arch.moe.families import FAMILIES

    kind = model_class(FAMILIES[native.config.model_type])
    plain = {k: v for k, v in native.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    model = kind(kind.config_class(**plain, **{"coe_" + k: v for k, v in knobs.items()}))
    lacking = model.load_state_dict(native.state_dict(), strict=False)
    assert not lacking.unexpected_keys and all(".coe_" in n for n in lacking.missing_keys)
    for block in blocks(model):
        router = getattr(block, block.coe_router)
        for gate in getattr(block, "coe_gates", ()):
            gate.load_state_dict(router.state_dict())
    return model.to(native.dtype).eval()


def blocks(model: Any) -> list[Any]:
    """The blocks of experts of a Chain-of-Experts model."""
    return [m for m in model.modules() if hasattr(m, "coe_count")]


SPLIT = {"route": "split", "reselect": "forbid", "shared": "first"}
