"""A llama of one layer as a GGUF file, with a byte-level tokenizer and a chat template inside it."""

from pathlib import Path

HIDDEN = 32
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


def _pieces() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE, as GPT-2's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["h e", "l l", "he ll", "hell o"]
    return [*letters, *(m.replace(" ", "") for m in merges), "<|im_start|>", "<|im_end|>"], merges


def save_gguf(path: Path, *, tokenizer: bool = True, template: str = TEMPLATE, context: int = 128) -> Path:
    """The same tensors whatever is said beside them."""
    import numpy as np
    from gguf import GGUFWriter

    tokens, merges = _pieces()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(context)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
        writer.add_bos_token_id(len(tokens) - 2)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_chat_template(template)
    g = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN), "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_gate": (48, HIDDEN), "blk.0.ffn_up": (48, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 48), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", g.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
