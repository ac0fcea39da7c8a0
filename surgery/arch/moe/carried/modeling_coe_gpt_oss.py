"""Chain-of-Experts on `gpt_oss`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM, GptOssMLP

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEGptOssConfig

share_conversions(CoEGptOssConfig.model_type, "gpt_oss")


class CoEGptOssMLP(CoEBlock, GptOssMLP):
    coe_router = "router"
    coe_pair = True


class CoEGptOssForCausalLM(CoEForCausalLM, GptOssForCausalLM):
    config: CoEGptOssConfig
    config_class = CoEGptOssConfig
    coe_block = CoEGptOssMLP
    _keep_in_fp32_modules_strict = [
        *(getattr(GptOssForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
