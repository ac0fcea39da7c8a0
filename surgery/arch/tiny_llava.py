"""The small LLaVA that scenes are learnt with: configuration, tensor names and the files of its processor.

Real classes throughout: a CLIP tower, a two-layer projector and a Llama, 36 image tokens a picture. Names of tensors
are those of published LLaVA checkpoints. The tokenizer knows the words of the scenes and nothing else; its normaliser
drops punctuation, so that a prompt ends with the thing that is asked about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.graph.op import json_bytes

SPECIAL = ("<pad>", "<unk>", "</s>", "<image>")
PAD, UNKNOWN, END, IMAGE = range(4)
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% if not loop.last %} {% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class TinyLlava:
    """What fixes the shape: words of the vocabulary beside the special ones, picture and patch side in pixels, widths
    and depths of the tower and of the text model."""

    words: tuple[str, ...]
    image: int = 96
    patch: int = 16
    tower_width: int = 48
    tower_layers: int = 1
    width: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image // self.patch

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All tokens by id."""
        return SPECIAL + self.words

    def config(self) -> dict[str, Any]:
        """The content of `config.json`, as transformers reads it."""
        head_dim = self.width // self.heads
        text = {
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": END,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.1,
            "intermediate_size": 2 * self.width,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": PAD,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": len(self.vocabulary),
        }
        vision = {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": self.tower_width,
            "image_size": self.image,
            "intermediate_size": 2 * self.tower_width,
            "layer_norm_eps": 1e-5,
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": self.tower_layers,
            "patch_size": self.patch,
            "projection_dim": self.tower_width,
        }
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "dtype": "float32",
            "image_seq_length": self.grid**2,
            "image_token_index": IMAGE,
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "text_config": text,
            "tie_word_embeddings": True,
            "vision_config": vision,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint with its shape."""
        w, t, kv = self.width, self.tower_width, self.kv_heads * self.width // self.heads
        found: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (len(self.vocabulary), w)}
        for i in range(self.layers):
            lead = f"language_model.model.layers.{i}."
            found |= {
                f"{lead}self_attn.q_proj.weight": (w, w),
                f"{lead}self_attn.k_proj.weight": (kv, w),
                f"{lead}self_attn.v_proj.weight": (kv, w),
                f"{lead}self_attn.o_proj.weight": (w, w),
                f"{lead}mlp.gate_proj.weight": (2 * w, w),
                f"{lead}mlp.up_proj.weight": (2 * w, w),
                f"{lead}mlp.down_proj.weight": (w, 2 * w),
                f"{lead}input_layernorm.weight": (w,),
                f"{lead}post_attention_layernorm.weight": (w,),
            }
        found["language_model.model.norm.weight"] = (w,)
        lead = "multi_modal_projector.linear_"
        found |= {f"{lead}1.weight": (w, t), f"{lead}1.bias": (w,), f"{lead}2.weight": (w, w), f"{lead}2.bias": (w,)}
        tower = "vision_tower.vision_model."
        found |= {
            f"{tower}embeddings.class_embedding": (t,),
            f"{tower}embeddings.patch_embedding.weight": (t, 3, self.patch, self.patch),
            f"{tower}embeddings.position_embedding.weight": (self.grid**2 + 1, t),
        }
        norms = ["pre_layrnorm", "post_layernorm"]
        for i in range(self.tower_layers):
            lead = f"encoder.layers.{i}."
            norms += [f"{lead}layer_norm1", f"{lead}layer_norm2"]
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= {f"{tower}{lead}self_attn.{name}.weight": (t, t), f"{tower}{lead}self_attn.{name}.bias": (t,)}
            found |= {f"{tower}{lead}mlp.fc1.weight": (2 * t, t), f"{tower}{lead}mlp.fc1.bias": (2 * t,)}
            found |= {f"{tower}{lead}mlp.fc2.weight": (t, 2 * t), f"{tower}{lead}mlp.fc2.bias": (t,)}
        for name in norms:
            found |= {f"{tower}{name}.weight": (t,), f"{tower}{name}.bias": (t,)}
        return found

    def files(self) -> Mapping[str, bytes]:
        """The files beside the weights: configuration, tokenizer, processor, chat template."""
        image_processor = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.image},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": self.image, "width": self.image},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(_MEAN),
            "image_std": list(_STD),
            "do_convert_rgb": True,
        }
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": self.patch,
            "vision_feature_select_strategy": "default",
        }
        tokenizer = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<image>"},
            "padding_side": "left",
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
        }
        generation = {"eos_token_id": END, "pad_token_id": PAD, "do_sample": False}
        return {
            "config.json": json_bytes(self.config()),
            "generation_config.json": json_bytes(generation),
            "preprocessor_config.json": json_bytes(image_processor),
            "processor_config.json": json_bytes(processor),
            "tokenizer.json": json_bytes(self._tokenizer()),
            "tokenizer_config.json": json_bytes(tokenizer),
            "chat_template.jinja": (CHAT_TEMPLATE + "\n").encode(),
        }

    def _tokenizer(self) -> dict[str, Any]:
        added = [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for i, t in enumerate(SPECIAL)
        ]
        punctuation = {"type": "Replace", "pattern": {"Regex": "[^a-z0-9]+"}, "content": " "}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, punctuation]},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {token: i for i, token in enumerate(self.vocabulary)},
                "unk_token": "<unk>",
            },
        }


def normalise(pixels: Any) -> Any:
    """Float pixels [..., H, W, 3] of 0 to 255 as the model takes them: [..., 3, H, W], the tower's mean and deviation
    removed. Any array type of torch."""
    mean, std = pixels.new_tensor(_MEAN), pixels.new_tensor(_STD)
    return ((pixels / 255 - mean) / std).movedim(-1, -3)
