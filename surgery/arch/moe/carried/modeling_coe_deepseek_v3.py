"""Chain-of-Experts on `deepseek_v3`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3MoE

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEDeepseekV3Config

share_conversions(CoEDeepseekV3Config.model_type, "deepseek_v3")


class CoEDeepseekV3MoE(CoEBlock, DeepseekV3MoE):
    coe_scores = "sigmoid"


class CoEDeepseekV3ForCausalLM(CoEForCausalLM, DeepseekV3ForCausalLM):
    config: CoEDeepseekV3Config
    config_class = CoEDeepseekV3Config
    coe_block = CoEDeepseekV3MoE
    _keep_in_fp32_modules_strict = [
        *(getattr(DeepseekV3ForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
