"""Chain-of-Experts on `olmoe`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeSparseMoeBlock

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEOlmoeConfig

share_conversions(CoEOlmoeConfig.model_type, "olmoe")


class CoEOlmoeSparseMoeBlock(CoEBlock, OlmoeSparseMoeBlock):
    """The chain in the block of `olmoe`."""


class CoEOlmoeForCausalLM(CoEForCausalLM, OlmoeForCausalLM):
    config: CoEOlmoeConfig
    config_class = CoEOlmoeConfig
    coe_block = CoEOlmoeSparseMoeBlock
    _keep_in_fp32_modules_strict = [
        *(getattr(OlmoeForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
