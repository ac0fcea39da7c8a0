"""Small random language models as folders, made from the real classes with a tokenizer and processor beside them."""

from pathlib import Path
from typing import Any

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz +-*=?.,:()'\\{}\nABCDEFGHIJKLMNOPQRSTUVWXYZ"
LAYERS = 4


def text_config(vocab: int, **fields: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rest = {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False}
    return LlamaConfig(vocab_size=vocab, **{**sizes, **special, **rest, **fields})


def save_llama(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """A LlamaForCausalLM of four layers with a character tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    from surgery.arch.language.characters import character_tokenizer

    tokenizer = character_tokenizer(ALPHABET)
    torch.manual_seed(seed)
    _enliven(LlamaForCausalLM(text_config(len(tokenizer), **fields))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_llava(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """A LlavaForConditionalGeneration around the same kind of tower, for images of 8x8 pixels."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from surgery.arch.language.characters import IMAGE_ID, llava_processor

    processor = llava_processor(ALPHABET, height=8, width=8, patch=4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(len(processor.tokenizer), **fields),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(seed)
    _enliven(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_relative(folder: Path, vlm: Path, *, noise: float = 0.03) -> Path:
    """A LlamaForCausalLM with the tower of `vlm` and noise on every weight: what a donor from the same base is like."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

    host = LlavaForConditionalGeneration.from_pretrained(vlm)
    model = LlamaForCausalLM(host.config.text_config)
    model.model.load_state_dict(host.model.language_model.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(vlm).save_pretrained(folder)
    return folder


def _enliven(model: Any) -> Any:
    """Widen the matrices: at the initial 0.02 a layer hardly changes what passes through it."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 2 and ".layers." in name:
                tensor.mul_(8)
    return model
