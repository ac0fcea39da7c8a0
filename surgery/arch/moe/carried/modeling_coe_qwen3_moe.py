"""Chain-of-Experts on `qwen3_moe`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEQwen3MoeConfig

share_conversions(CoEQwen3MoeConfig.model_type, "qwen3_moe")


class CoEQwen3MoeSparseMoeBlock(CoEBlock, Qwen3MoeSparseMoeBlock):
    """The chain in the block of `qwen3_moe`."""


class CoEQwen3MoeForCausalLM(CoEForCausalLM, Qwen3MoeForCausalLM):
    config: CoEQwen3MoeConfig
    config_class = CoEQwen3MoeConfig
    coe_block = CoEQwen3MoeSparseMoeBlock
    _keep_in_fp32_modules_strict = [
        *(getattr(Qwen3MoeForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
