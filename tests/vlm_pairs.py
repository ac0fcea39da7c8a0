"""Tiny random models of transformers' real classes: every family that merges know, and the text model that fits each.

Hidden size 32, four decoder layers, two vision layers: a tenth of a second each. `host` and `donor` of a family come
from one base, as real pairs do: the donor is the host's tower plus noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, VOCAB = 4, 32, 96
_SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "num_channels": 3, "projection_dim": 16,
}  # fmt: skip


def _clip() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**_CLIP)


def _siglip() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**{k: v for k, v in _CLIP.items() if k != "projection_dim"})


def _llama(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_SIZES | more)


def _mistral(**more: Any) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_SIZES | {"head_dim": 8} | more)


def _qwen2(**more: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_SIZES | more)


def _llava() -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(vision_config=_clip(), text_config=_llama(), image_token_index=90, vision_feature_layer=-1)


def _llava_next() -> Any:
    from transformers import LlavaNextConfig

    pinpoints = [[16, 16]]
    return LlavaNextConfig(
        vision_config=_clip(), text_config=_llama(), image_token_index=90, image_grid_pinpoints=pinpoints
    )


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    pinpoints = [[16, 16]]
    return LlavaOnevisionConfig(
        vision_config=_siglip(), text_config=_qwen2(), image_token_index=90, video_token_index=91,
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip


def _internvl() -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=[16, 16],
        patch_size=[8, 8],
    )  # fmt: skip
    return InternVLConfig(vision_config=vision, text_config=_qwen2(), image_token_id=90, tie_word_embeddings=False)


def _mistral3() -> Any:
    from transformers import Mistral3Config, PixtralVisionConfig

    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        head_dim=8,
    )  # fmt: skip
    return Mistral3Config(
        vision_config=vision, text_config=_mistral(), image_token_index=90, spatial_merge_size=1,
        tie_word_embeddings=False,
    )  # fmt: skip


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig

    text = Gemma3TextConfig(**_SIZES | {"head_dim": 8, "sliding_window": 64})
    return Gemma3Config(text_config=text, vision_config=_siglip().to_dict(), mm_tokens_per_image=4, image_token_id=90)


def _paligemma() -> Any:
    from transformers import GemmaConfig, PaliGemmaConfig

    text = GemmaConfig(**_SIZES | {"head_dim": 8})
    vision = _siglip()
    vision.projection_dim = HIDDEN
    return PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=90, projection_dim=HIDDEN)


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = _SIZES | {"rope_parameters": rope}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_VISION_IDS)


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4,
        "intermediate_size": 24, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = _SIZES | {"rope_parameters": rope}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_VISION_IDS)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4,
        "intermediate_size": 24, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = _SIZES | {"rope_parameters": rope, "head_dim": 8}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_VISION_IDS)


def _glm4v() -> Any:
    from transformers import Glm4vConfig

    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4,
        "intermediate_size": 24, "image_size": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 0, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    text = _SIZES | {"rope_parameters": rope}
    return Glm4vConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=90, video_token_id=91,
        image_start_token_id=92, image_end_token_id=93, video_start_token_id=94, video_end_token_id=95,
    )  # fmt: skip


def _lfm2_vl() -> Any:
    from transformers import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig

    text = Lfm2Config(
        **_SIZES | {"layer_types": ["conv", "full_attention"] * (LAYERS // 2), "block_auto_adjust_ff_dim": False}
    )
    vision = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=4
    )
    return Lfm2VlConfig(text_config=text, vision_config=vision, image_token_id=90, projector_hidden_size=24)


def _idefics2() -> Any:
    from transformers import Idefics2Config

    perceiver = {
        "hidden_size": HIDDEN, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
        "resampler_head_dim": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    return Idefics2Config(
        text_config=_mistral(), vision_config=vision, perceiver_config=perceiver, image_token_id=90,
        tie_word_embeddings=False,
    )  # fmt: skip


def _idefics3() -> Any:
    from transformers import Idefics3Config

    vision = {k: v for k, v in _CLIP.items() if k not in ("projection_dim", "num_channels")}
    return Idefics3Config(
        text_config=_llama(), vision_config=vision, image_token_id=90, scale_factor=2, tie_word_embeddings=False
    )


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig

    vision = {k: v for k, v in _CLIP.items() if k not in ("projection_dim", "num_channels")}
    return SmolVLMConfig(
        text_config=_llama(), vision_config=vision, image_token_id=90, scale_factor=2, tie_word_embeddings=False
    )


def _mllama() -> Any:
    from transformers import MllamaConfig
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    text = MllamaTextConfig(
        **_SIZES | {"num_hidden_layers": LAYERS + 2, "cross_attention_layers": [1, 4]},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    vision = MllamaVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        image_size=16, patch_size=8, vision_output_dim=32, intermediate_layers_indices=[0], max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=90)


_VISION_IDS = {
    "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llava": ("LlavaForConditionalGeneration", _llava),
    "llava_next": ("LlavaNextForConditionalGeneration", _llava_next),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", _llava_onevision),
    "internvl": ("InternVLForConditionalGeneration", _internvl),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "paligemma": ("PaliGemmaForConditionalGeneration", _paligemma),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", _qwen2_vl),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "glm4v": ("Glm4vForConditionalGeneration", _glm4v),
    "lfm2_vl": ("Lfm2VlForConditionalGeneration", _lfm2_vl),
    "idefics2": ("Idefics2ForConditionalGeneration", _idefics2),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics3),
    "smolvlm": ("SmolVLMForConditionalGeneration", _smolvlm),
    "mllama": ("MllamaForConditionalGeneration", _mllama),
}


def build(family: str, *, seed: int = 0) -> Any:
    """The random model of a family, in float32."""
    import torch
    import transformers

    name, config = CONFIGS[family]
    torch.manual_seed(seed)
    return getattr(transformers, name)(config()).eval()


@dataclass(frozen=True)
class Pair:
    """Folders of a host, a donor and their base."""

    host: Path
    donor: Path
    base: Path


def donor_config(family: str, text: Any) -> Any:
    """The config of the text model that fits a family's tower."""
    import transformers

    kind = DONORS[family]
    keys = [*_SIZES, "head_dim", "rms_norm_eps", "norm_eps", "layer_types", "hidden_act", "hidden_activation",
            "sliding_window", "block_auto_adjust_ff_dim"]  # fmt: skip
    values = {k: getattr(text, k) for k in keys if getattr(text, k, None) is not None}
    if family == "glm4v":
        values["head_dim"] = HIDDEN // 4  # its class has a default of its own
    if family == "mllama":
        values["num_hidden_layers"] = LAYERS
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        values.pop("layer_types", None)
    theta = (text.rope_parameters or {}).get("rope_theta")
    if theta is not None:
        partial = text.rope_parameters.get("partial_rotary_factor")
        more = {} if partial is None else {"partial_rotary_factor": partial}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **more}
    tied = family in ("gemma3", "paligemma", "lfm2_vl")
    return getattr(transformers, f"{kind}Config")(**values, tie_word_embeddings=tied)


DONORS = {
    "llava": "Llama", "llava_next": "Llama", "llava_onevision": "Qwen2", "internvl": "Qwen2", "mistral3": "Mistral",
    "gemma3": "Gemma3Text", "paligemma": "Gemma", "qwen2_vl": "Qwen2", "qwen2_5_vl": "Qwen2", "qwen3_vl": "Qwen3",
    "glm4v": "Glm4", "lfm2_vl": "Lfm2", "idefics2": "Mistral", "idefics3": "Llama", "smolvlm": "Llama",
    "mllama": "Llama",
}  # fmt: skip


@cache
def _weights(family: str) -> tuple[Any, dict[str, Any], Any, dict[str, Any], dict[str, Any]]:
    """(host model, its tensors on disk, donor config, donor tensors, base tensors), in float32."""
    import tempfile

    import torch
    from safetensors.torch import load_file
    from transformers.utils import logging

    from surgery.arch.language.towers import language_tower

    logging.disable_progress_bar()
    model = build(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # ones and zeros would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        host = load_file(f"{folder}/model.safetensors")
    tower = language_tower({n: tuple(t.shape) for n, t in host.items()})
    cross = [n for n, layer in tower.layers.items() if any(s.startswith("cross_attn") for s in layer)]
    own = [n for n in tower.layers if n not in cross]
    generator = torch.Generator().manual_seed(1)

    def near(tensor: Any) -> Any:
        return tensor + torch.randn(tensor.shape, generator=generator) * tensor.std().clamp_min(0.02) * 0.15

    config = donor_config(family, model.config.get_text_config())
    base = {
        f"model.layers.{i}.{suffix}": near(host[full])
        for i, n in enumerate(own)
        for suffix, full in tower.layers[n].items()
    }
    norm = "embedding_norm.weight" if family == "lfm2_vl" else "norm.weight"
    base[f"model.{norm}"] = near(host[tower.names["norm.weight"]])
    base["model.embed_tokens.weight"] = near(host[tower.names["embed_tokens.weight"]][:VOCAB])
    if not config.tie_word_embeddings:
        head = host.get(tower.names.get("lm_head.weight", ""), host[tower.names["embed_tokens.weight"]])
        base["lm_head.weight"] = near(head[:VOCAB])
    donor = {name: near(tensor) for name, tensor in base.items()}
    return model, host, config, donor, base


def donor_class(family: str) -> Any:
    """transformers' class of the donor."""
    import transformers

    return getattr(transformers, f"{DONORS[family].removesuffix('Text')}ForCausalLM")


def make_pair(root: Path, family: str, *, dtype: str = "bfloat16", layout: str = "default", shards: int = 1) -> Pair:
    """Write host, donor and base below `root`. `layout` is "default" (as the class saves) or "memory" (the names of
    its modules, which it loads as well)."""
    import torch

    model, host, config, donor, base = _weights(family)
    kind = getattr(torch, dtype)
    if layout == "memory":
        saved = host
        host = {n: t for n, t in model.state_dict().items()}
        shared = {t.data_ptr() for t in saved.values()}
        seen: set[int] = set()
        kept = {}
        for name, tensor in host.items():
            if tensor.data_ptr() not in seen and not (name == "lm_head.weight" and len(host) > len(saved)):
                kept[name] = tensor
                seen.add(tensor.data_ptr())
        host = kept
        assert len(host) == len(saved) and shared
    pair = Pair(root / "host", root / "donor", root / "base")
    host_config = model.config.to_dict()
    _write(pair.host, host, _with_dtype(host_config, dtype), kind, shards)
    (pair.host / "preprocessor_config.json").write_text('{"image_processor_type": "Tiny"}\n')
    (pair.host / "chat_template.jinja").write_text("{{ messages }}\n")
    donor_json = config.to_dict() | {"architectures": [donor_class(family).__name__]}
    for folder, tensors in ((pair.donor, donor), (pair.base, base)):
        _write(folder, tensors, _with_dtype(donor_json, dtype), kind, 1)
    return pair


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    config = {
        k: (_with_dtype(v, dtype) if isinstance(v, dict) and k.endswith("_config") else v) for k, v in config.items()
    }
    return config | {"dtype": dtype}


def _write(folder: Path, tensors: dict[str, Any], config: dict[str, Any], kind: Any, shards: int) -> None:
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    cast = {n: t.detach().to(kind).contiguous() if t.is_floating_point() else t for n, t in tensors.items()}
    if shards == 1:
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(cast)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {n: cast[n] for n in names[number::shards]}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(t.numel() * t.element_size() for t in cast.values())
    document = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=4))
