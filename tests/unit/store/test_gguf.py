"""GGUF files are read like any checkpoint: names, values, config; damaged ones are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

import surgery
from surgery.errors import CheckpointError
from surgery.store.checkpoint import open_checkpoint

HIDDEN, HEADS, SHARED = 64, 4, 2


def weights() -> dict[str, np.ndarray]:
    """A llama of one layer, as transformers names and lays it out."""
    g = np.random.default_rng(0)
    at = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (96, HIDDEN), "model.norm.weight": (HIDDEN,),
        f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN), f"{at}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{at}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN), f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{at}.mlp.gate_proj.weight": (96, HIDDEN), f"{at}.mlp.up_proj.weight": (96, HIDDEN),
        f"{at}.mlp.down_proj.weight": (HIDDEN, 96), f"{at}.input_layernorm.weight": (HIDDEN,),
        f"{at}.post_attention_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    return {n: g.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


OWN = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter writes queries and keys."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(128)
    writer.add_token_list([f"w{i}" for i in range(96)])
    for name, tensor in weights().items():
        stem = name.removesuffix(".weight")
        own = f"blk.0.{OWN[stem.removeprefix('model.layers.0.')]}" if ".layers." in stem else OWN[stem]
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, HEADS if "q_proj" in name else SHARED)
        if tensor.ndim == 1:
            writer.add_tensor(f"{own}.weight", tensor)
        elif "v_proj" in name:
            writer.add_tensor(f"{own}.weight", tensor.astype(np.float16))
        else:
            kind = GGMLQuantizationType.Q4_1 if "mlp" in name else GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{own}.weight", quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected(name: str, tensor: np.ndarray) -> torch.Tensor:
    if tensor.ndim == 1:
        return torch.from_numpy(tensor)
    if "v_proj" in name:
        return torch.from_numpy(tensor).half()
    kind = GGMLQuantizationType.Q4_1 if "mlp" in name else GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(tensor, kind), kind))


def test_names_values_and_config_are_those_of_the_model(file: Path) -> None:
    base = open_checkpoint(file)
    assert base.layout == "gguf" and set(base.tensors) == set(weights())
    for name, tensor in weights().items():
        assert torch.equal(base.read(name), expected(name, tensor)), name
    assert base.tensors["model.norm.weight"].offset > 0 > base.tensors["model.embed_tokens.weight"].offset
    config = base.config
    assert (config["num_key_value_heads"], config["rms_norm_eps"], config["vocab_size"]) == (SHARED, 1e-05, 96)
    assert config["tie_word_embeddings"] is True


def test_it_is_inspected_cast_and_merged(file: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    assert "gguf" in command("inspect", file).stdout
    assert command("cast", file, "--dtype", "bf16", "-o", "half", "-q").code == 0
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and model.dtype == torch.bfloat16
    ended = command("merge", tmp_path / "half", file, "--alpha", "0.5", "-o", "out", "-q")
    assert ended.code == 0, ended.stderr
    half, out = (open_checkpoint(tmp_path / n) for n in ("half", "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    want = half.read(name).float() * 0.5 + expected(name, weights()[name]).float() * 0.5
    assert torch.equal(out.read(name), want.bfloat16())
    assert surgery.apply("merge", file, tmp_path / "half", out=tmp_path / "other").path.is_dir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: b"GGML" + b[4:], "does not start with GGUF"),
        (lambda b: b[:4] + b"\x09" + b[5:], "version 9"),
        (lambda b: b[:-100], "past the end"),
        (lambda b: b[:200], "ends early"),
        (lambda b: b[:8] + b"\xff" * 8 + b[16:], "more tensors"),
        (lambda b: b.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"), "no counterpart"),
        (lambda b: b.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"), "stands twice"),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], says: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path / "bad.gguf")
    assert says in raised.value.message, raised.value.message


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads() -> None:
    from transformers import AutoModelForCausalLM

    base = surgery.open("smollm2")
    want = AutoModelForCausalLM.from_pretrained(base.path.parent, gguf_file=base.path.name, dtype=torch.float32)
    state = {n: t for n, t in want.state_dict().items() if n != "lm_head.weight"}
    assert set(state) == set(base.tensors)
    for name, tensor in state.items():
        assert torch.allclose(base.read(name), tensor, atol=1e-6, rtol=1e-5), name
