"""Configurations of Chain-of-Experts models: those of the mixture-of-experts models they come from, and a few knobs.

This file lies beside the weights, and Transformers reads it with `trust_remote_code=True`.
"""

from dataclasses import dataclass

from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.granitemoe.configuration_granitemoe import GraniteMoeConfig
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig


@dataclass(kw_only=True)
class CoEKnobs:
    """How often and how the experts of a layer are run.

    coe_iterations      C, passes through the same experts in one layer
    coe_topk            experts of each pass; None: the model's own number in every pass
    coe_route           "append": each pass has its own list; "split": the passes share out one list; "paper": the
                        published equations (arXiv 2506.18945), which replace the layer's residual
    coe_reselect        "forbid", "allow", or "penalty:L": whether a pass may take an expert that an earlier one took
    coe_routers         "own": a router for each pass; "share": one for all
    coe_gate            "vector" or "scalar" gates alpha and beta; "none" in paper mode
    coe_shared          shared experts in the "first" pass, in "every" one, or "split" in equal parts
    coe_layers          indices of the converted layers; None: all that have experts
    coe_inner_residual, coe_outer_residual     paper mode only
    coe_aux, coe_aux_alpha    balance loss of each pass in training: "seq", "batch", "native" (the model's own), "none"
    """

    coe_iterations: int = 1
    coe_topk: list[int] | None = None
    coe_route: str = "append"
    coe_reselect: str = "allow"
    coe_routers: str = "own"
    coe_gate: str = "vector"
    coe_shared: str = "every"
    coe_layers: list[int] | None = None
    coe_inner_residual: bool = True
    coe_outer_residual: bool = True
    coe_aux: str = "native"
    coe_aux_alpha: float = 0.001


class CoEQwen2MoeConfig(CoEKnobs, Qwen2MoeConfig):
    model_type = "coe_qwen2_moe"


class CoEQwen3MoeConfig(CoEKnobs, Qwen3MoeConfig):
    model_type = "coe_qwen3_moe"


class CoEMixtralConfig(CoEKnobs, MixtralConfig):
    model_type = "coe_mixtral"


class CoEOlmoeConfig(CoEKnobs, OlmoeConfig):
    model_type = "coe_olmoe"


class CoEDeepseekV2Config(CoEKnobs, DeepseekV2Config):
    model_type = "coe_deepseek_v2"


class CoEDeepseekV3Config(CoEKnobs, DeepseekV3Config):
    model_type = "coe_deepseek_v3"


class CoEGlm4MoeConfig(CoEKnobs, Glm4MoeConfig):
    model_type = "coe_glm4_moe"


class CoEGptOssConfig(CoEKnobs, GptOssConfig):
    model_type = "coe_gpt_oss"


class CoEGraniteMoeConfig(CoEKnobs, GraniteMoeConfig):
    model_type = "coe_granitemoe"


class CoEQwen3NextConfig(CoEKnobs, Qwen3NextConfig):
    model_type = "coe_qwen3_next"
