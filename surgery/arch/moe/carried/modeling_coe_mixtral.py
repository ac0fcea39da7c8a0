"""Chain-of-Experts on `mixtral`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEMixtralConfig

share_conversions(CoEMixtralConfig.model_type, "mixtral")


class CoEMixtralSparseMoeBlock(CoEBlock, MixtralSparseMoeBlock):
    """The chain in the block of `mixtral`."""


class CoEMixtralForCausalLM(CoEForCausalLM, MixtralForCausalLM):
    config: CoEMixtralConfig
    config_class = CoEMixtralConfig
    coe_block = CoEMixtralSparseMoeBlock
    _keep_in_fp32_modules_strict = [
        *(getattr(MixtralForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
