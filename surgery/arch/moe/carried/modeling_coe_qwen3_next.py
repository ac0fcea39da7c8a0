"""Chain-of-Experts on `qwen3_next`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM, Qwen3NextSparseMoeBlock

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEQwen3NextConfig

share_conversions(CoEQwen3NextConfig.model_type, "qwen3_next")


class CoEQwen3NextSparseMoeBlock(CoEBlock, Qwen3NextSparseMoeBlock):
    """The chain in the block of `qwen3_next`."""


class CoEQwen3NextForCausalLM(CoEForCausalLM, Qwen3NextForCausalLM):
    config: CoEQwen3NextConfig
    config_class = CoEQwen3NextConfig
    coe_block = CoEQwen3NextSparseMoeBlock
    _keep_in_fp32_modules_strict = [
        *(getattr(Qwen3NextForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
