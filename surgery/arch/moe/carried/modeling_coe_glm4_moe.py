"""Chain-of-Experts on `glm4_moe`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM, Glm4MoeMoE

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEGlm4MoeConfig

share_conversions(CoEGlm4MoeConfig.model_type, "glm4_moe")


class CoEGlm4MoeMoE(CoEBlock, Glm4MoeMoE):
    coe_scores = "sigmoid"


class CoEGlm4MoeForCausalLM(CoEForCausalLM, Glm4MoeForCausalLM):
    config: CoEGlm4MoeConfig
    config_class = CoEGlm4MoeConfig
    coe_block = CoEGlm4MoeMoE
    _keep_in_fp32_modules_strict = [
        *(getattr(Glm4MoeForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
