"""Chain-of-Experts on `granitemoe`: the library's model with `coe_chain`'s block in place of its own."""

from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeForCausalLM, GraniteMoeMoE

from .coe_chain import CoEBlock, CoEForCausalLM, share_conversions
from .configuration_coe import CoEGraniteMoeConfig

share_conversions(CoEGraniteMoeConfig.model_type, "granitemoe")


class CoEGraniteMoeMoE(CoEBlock, GraniteMoeMoE):
    coe_router = "router"


class CoEGraniteMoeForCausalLM(CoEForCausalLM, GraniteMoeForCausalLM):
    config: CoEGraniteMoeConfig
    config_class = CoEGraniteMoeConfig
    coe_block = CoEGraniteMoeMoE
    coe_attribute = "block_sparse_moe"
    _keep_in_fp32_modules_strict = [
        *(getattr(GraniteMoeForCausalLM, "_keep_in_fp32_modules_strict", None) or ()),
        "coe_alpha",
        "coe_beta",
    ]
