"""Chain-of-Experts on `qwen2_moe`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM, Qwen2MoeSparseMoeBlock

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEQwen2MoeConfig

share_conversions(CoEQwen2MoeConfig.model_type, "qwen2_moe")


class CoEQwen2MoeSparseMoeBlock(CoEBlock, Qwen2MoeSparseMoeBlock):
    """The chain in the block of `qwen2_moe`."""


class CoEQwen2MoeForCausalLM(CoEForCausalLM, Qwen2MoeForCausalLM):
    config: CoEQwen2MoeConfig
    config_class = CoEQwen2MoeConfig
    coe_block = CoEQwen2MoeSparseMoeBlock
    _keep_in_fp32_modules_strict = [
        *(getattr(Qwen2MoeForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
