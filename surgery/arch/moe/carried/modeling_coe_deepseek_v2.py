"""Chain-of-Experts on `deepseek_v2`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV2Moe

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEDeepseekV2Config

share_conversions(CoEDeepseekV2Config.model_type, "deepseek_v2")


class CoEDeepseekV2Moe(CoEBlock, DeepseekV2Moe):
    """The chain in the block of `deepseek_v2`."""


class CoEDeepseekV2ForCausalLM(CoEForCausalLM, DeepseekV2ForCausalLM):
    config: CoEDeepseekV2Config
    config_class = CoEDeepseekV2Config
    coe_block = CoEDeepseekV2Moe
    _keep_in_fp32_modules_strict = [
        *(getattr(DeepseekV2ForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
