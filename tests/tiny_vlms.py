"""Tiny random image-text-to-text models of the real classes, one per family, with prompts that hold their image tokens.

Every text model has three layers, four heads over two key heads, and weights large enough that attention matters.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

VOCAB = 160
IMAGE, VIDEO, START, END = 150, 151, 152, 153
TEXT: Mapping[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    initializer_range=0.2,
)
CLIP: Mapping[str, Any] = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    projection_dim=16,
)
SIGLIP: Mapping[str, Any] = {k: v for k, v in CLIP.items() if k not in ("projection_dim", "model_type")} | {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
}
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


class Tiny(NamedTuple):
    """A model in evaluation mode and what it takes to prompt it."""

    family: str
    model: Any
    prompt: Callable[..., dict[str, torch.Tensor]]
    image_tokens: int


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, **more}


def _qwen(kind: str, **vision: Any) -> dict[str, Any]:
    return dict(
        text_config=_text(f"{kind}_text", rope_parameters=MROPE, rope_scaling=MROPE, head_dim=8),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=32,
            num_heads=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=1,
            in_channels=3,
            **vision,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


# family -> (class, config class, config, image tokens, shape of one image's pixels, further inputs of one image)
FAMILIES: Mapping[str, tuple[str, str, Callable[[], dict[str, Any]], int, tuple[int, ...], Mapping[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        lambda: dict(text_config=_text("llama"), vision_config=dict(CLIP), image_token_index=IMAGE),
        16,
        (3, 16, 16),
        {},
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        lambda: dict(
            text_config=_text("llama"),
            vision_config=dict(CLIP),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
        ),
        16 + 16 + 4,  # base view, one tile, a newline key a row
        (2, 3, 16, 16),
        {"image_sizes": [16, 16]},
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        lambda: dict(
            text_config=_text("qwen2"),
            vision_config=dict(SIGLIP),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
            vision_feature_layer=-1,
        ),
        16 + 16 + 4,
        (2, 3, 16, 16),
        {"image_sizes": [16, 16]},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        lambda: _qwen("qwen2_vl") | {"vision_config": _qwen("qwen2_vl")["vision_config"] | dict(
            embed_dim=16, hidden_size=32, mlp_ratio=2)},
        4,
        (16, 48),
        {"image_grid_thw": [1, 4, 4]},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        lambda: _qwen("qwen2_5_vl", window_size=16, fullatt_block_indexes=[1]),
        4,
        (16, 48),
        {"image_grid_thw": [1, 4, 4]},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        lambda: _qwen("qwen3_vl", num_position_embeddings=16, deepstack_visual_indexes=[0]),
        4,
        (16, 48),
        {"image_grid_thw": [1, 4, 4]},
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        lambda: _qwen("glm4v", image_size=16) | dict(
            image_start_token_id=START, image_end_token_id=END, video_start_token_id=154, video_end_token_id=155
        ),
        4,
        (16, 48),
        {"image_grid_thw": [1, 4, 4]},
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        lambda: dict(
            text_config=_text("llama"),
            vision_config={k: v for k, v in SIGLIP.items() if k != "model_type"} | {"model_type": "smolvlm_vision"},
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        4,
        (1, 3, 16, 16),
        {},
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        lambda: dict(
            text_config=_text("llama"),
            vision_config={k: v for k, v in SIGLIP.items() if k != "model_type"} | {"model_type": "idefics3_vision"},
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        4,
        (1, 3, 16, 16),
        {},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        lambda: dict(
            text_config=_text("qwen2"),
            vision_config=dict(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                image_size=[16, 16], patch_size=[4, 4],
            ),
            image_token_id=IMAGE,
            downsample_ratio=0.5,
        ),
        4,
        (3, 16, 16),
        {},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        lambda: dict(
            text_config=_text(
                "gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            vision_config=dict(SIGLIP),
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        4,
        (3, 16, 16),
        {},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        lambda: dict(
            text_config=_text("gemma", head_dim=8),
            vision_config=dict(SIGLIP, projection_dim=32),
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
        ),
        16,
        (3, 16, 16),
        {},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        lambda: dict(
            text_config=_text("mistral", head_dim=8, sliding_window=None),
            vision_config=dict(
                model_type="pixtral", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, image_size=16, patch_size=4, head_dim=8,
            ),
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        4,
        (3, 16, 16),
        {"image_sizes": [16, 16]},
    ),
    "aya_vision": (
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        lambda: dict(
            text_config=_text(
                "cohere2", head_dim=8, sliding_window=8, sliding_window_pattern=2,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            vision_config=dict(SIGLIP),
            image_token_index=IMAGE,
            downsample_factor=2,
            vision_feature_layer=-1,
        ),
        4,
        (3, 16, 16),
        {},
    ),
}  # fmt: skip


@cache
def tiny_vlm(family: str) -> Tiny:
    """The model of a family with seeded random weights; made once, read only."""
    import transformers

    kind, config_kind, settings, tokens, pixels, more = FAMILIES[family]
    config = getattr(transformers, config_kind)(**settings())
    torch.manual_seed(7)
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("q_proj" in name or "k_proj" in name):
                parameter.normal_(0.0, 0.35, generator=generator)
            if torch.isnan(parameter).any() or parameter.abs().sum() == 0 and parameter.ndim > 1:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def prompt(*, before: int = 2, after: int = 6, seed: int = 0, images: int = 1, pad: int = 0) -> dict[str, Any]:
        """`before` text tokens, the images, `after` text tokens; `pad` padding tokens on the left."""
        draw = torch.Generator().manual_seed(100 + seed)
        words = torch.randint(10, 140, (before + after,), generator=draw).tolist()
        shown = [IMAGE] * tokens
        if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"):
            shown = [START, *shown, END]
        ids = torch.tensor([[0] * pad + words[:before] + shown * images + words[before:]])
        values = torch.randn((images, *pixels), generator=draw)
        if len(pixels) == 2:
            values = values.flatten(0, 1)
        elif family in ("smolvlm", "idefics3"):
            values = values.transpose(0, 1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        if images:
            inputs["pixel_values"] = values
            inputs |= {k: torch.tensor([v] * images) for k, v in more.items()}
        kinds = (ids == IMAGE).long()
        if len(pixels) == 2:
            inputs["mm_token_type_ids"] = kinds
        if family == "gemma3":
            inputs["token_type_ids"] = kinds
        if family == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return inputs

    return Tiny(family, model, prompt, tokens)
