"""Vision-language families as data: where each keeps its language tower on disk, and which text model fits it.

A class writes its historic layout and reads at least that one and its in-memory layout, so a prefix is never assumed:
`towers` finds it, and this table explains what was found. transformers is not imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """`towers` are the prefixes of the decoder on disk, that of a default save first; `heads` the names of the head in
    the same order; `beside` starts the names of vision encoder and projector. `tied`: saved without a head by default.
    `cross_attention`: some layers have `cross_attn` and no counterpart in a text model."""

    name: str
    model_types: tuple[str, ...]
    host: str
    donor: str
    towers: tuple[str, ...]
    heads: tuple[str, ...]
    beside: tuple[str, ...]
    tied: bool = False
    norm: str = "norm.weight"
    cross_attention: bool = False


_HISTORIC = ("language_model.model.", "model.language_model.")
_HISTORIC_HEADS = ("language_model.lm_head.weight", "lm_head.weight")
_JOINED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_TEXT_MODEL = ("model.text_model.",)
_CONNECTED = ("model.vision_model.", "model.connector.")

FAMILIES: tuple[Family, ...] = (
    Family(
        "Llava", ("llava",), "LlavaForConditionalGeneration", "LlamaForCausalLM", _HISTORIC, _HISTORIC_HEADS, _JOINED
    ),
    Family(
        "LLaVA-NeXT",
        ("llava_next",),
        "LlavaNextForConditionalGeneration",
        "LlamaForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        (*_JOINED, "image_newline", "model.image_newline"),
    ),
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        "LlavaOnevisionForConditionalGeneration",
        "Qwen2ForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        (*_JOINED, "image_newline", "model.image_newline"),
    ),
    Family(
        "InternVL",
        ("internvl", "internvl_chat"),
        "InternVLForConditionalGeneration",
        "Qwen2ForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        (*_JOINED, "vision_model.", "mlp1."),
        tied=True,
    ),
    Family(
        "Mistral3",
        ("mistral3",),
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        _JOINED,
        tied=True,
    ),
    Family(
        "Gemma3",
        ("gemma3",),
        "Gemma3ForConditionalGeneration",
        "Gemma3ForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        _JOINED,
        tied=True,
    ),
    Family(
        "PaliGemma",
        ("paligemma",),
        "PaliGemmaForConditionalGeneration",
        "GemmaForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        _JOINED,
        tied=True,
    ),
    Family(
        "Qwen2-VL",
        ("qwen2_vl",),
        "Qwen2VLForConditionalGeneration",
        "Qwen2ForCausalLM",
        ("model.", "model.language_model."),
        ("lm_head.weight",),
        ("visual.", "model.visual."),
    ),
    Family(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2ForCausalLM",
        ("model.", "model.language_model."),
        ("lm_head.weight",),
        ("visual.", "model.visual."),
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl",),
        "Qwen3VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        ("model.language_model.",),
        ("lm_head.weight",),
        ("model.visual.",),
    ),
    Family(
        "GLM-4V",
        ("glm4v",),
        "Glm4vForConditionalGeneration",
        "Glm4ForCausalLM",
        ("model.language_model.", "model."),
        ("lm_head.weight",),
        ("model.visual.", "visual."),
    ),
    Family(
        "LFM2-VL",
        ("lfm2_vl", "lfm2-vl"),
        "Lfm2VlForConditionalGeneration",
        "Lfm2ForCausalLM",
        ("model.language_model.",),
        ("lm_head.weight",),
        ("model.vision_tower.", "model.multi_modal_projector."),
        tied=True,
        norm="embedding_norm.weight",
    ),
    Family(
        "Idefics2",
        ("idefics2",),
        "Idefics2ForConditionalGeneration",
        "MistralForCausalLM",
        _TEXT_MODEL,
        ("lm_head.weight",),
        _CONNECTED,
    ),
    Family(
        "Idefics3",
        ("idefics3",),
        "Idefics3ForConditionalGeneration",
        "LlamaForCausalLM",
        _TEXT_MODEL,
        ("lm_head.weight",),
        _CONNECTED,
    ),
    Family(
        "SmolVLM",
        ("smolvlm",),
        "SmolVLMForConditionalGeneration",
        "LlamaForCausalLM",
        _TEXT_MODEL,
        ("lm_head.weight",),
        _CONNECTED,
    ),
    Family(
        "Mllama",
        ("mllama",),
        "MllamaForConditionalGeneration",
        "LlamaForCausalLM",
        _HISTORIC,
        _HISTORIC_HEADS,
        ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector."),
        cross_attention=True,
    ),
)

# What a text class takes for a key that its config leaves out: many files hold only what differs from these. By the
# model_type of the text config; a test holds them against the installed transformers.
_OF_CLASSES: Mapping[str, tuple[int, int, int | None, str | None, float, Any]] = {
    # heads, key heads, size of a head (None: hidden size / heads), activation, epsilon of the norms, rope theta
    "llama": (32, 32, None, "silu", 1e-6, 10000.0),
    "mistral": (32, 8, None, "silu", 1e-6, 10000.0),
    "qwen2": (32, 32, None, "silu", 1e-6, 10000.0),
    "qwen3": (32, 32, 128, "silu", 1e-6, 10000.0),
    "gemma": (16, 16, 256, "gelu_pytorch_tanh", 1e-6, 10000.0),
    "gemma3_text": (8, 4, 256, "gelu_pytorch_tanh", 1e-6, None),
    "glm4": (32, 2, 128, "silu", 1.5625e-07, 10000.0),
    "glm4v_text": (32, 2, None, "silu", 1e-5, 10000.0),
    "lfm2": (32, 8, None, None, 1e-5, 1000000.0),
    "mllama_text_model": (32, 8, None, "silu", 1e-5, 500000.0),
    "qwen2_vl_text": (64, 8, None, "silu", 1e-5, 1000000.0),
    "qwen2_5_vl_text": (64, 8, None, "silu", 1e-5, 1000000.0),
    "qwen3_vl_text": (32, 32, 128, "silu", 1e-6, 500000.0),
}
_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta")
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    kind: {key: value for key, value in zip(_KEYS, values, strict=True) if value is not None}
    for kind, values in _OF_CLASSES.items()
}


def family_of(config: Mapping[str, Any] | None) -> Family | None:
    """The family that a config names by its `model_type`, if it is one of the table."""
    kind = str((config or {}).get("model_type", ""))
    return next((f for f in FAMILIES if kind in f.model_types), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language tower: its own object, or the config itself."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return inner
    return config
