"""mergekit's files of several documents, run as they are: equal to mergekit-multi, and to one merge after the other."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery

MULTI = """\
name: first
merge_method: linear
dtype: bfloat16
models:
  - {model: A, parameters: {weight: 0.25}}
  - {model: B, parameters: {weight: 0.75}}
---
merge_method: slerp
dtype: bfloat16
base_model: first
parameters: {t: [0.2, 0.6]}
models: [{model: first}, {model: C}]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llamas of two layers, in bfloat16. Read only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    for index, name in enumerate("ABC"):
        torch.manual_seed(index)
        LlamaForCausalLM(config).bfloat16().save_pretrained(root / name)
    return root


@pytest.fixture
def file(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> Path:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
    path = tmp_path / "multi.yml"
    text = MULTI
    for name in "ABC":
        text = text.replace(f"model: {name}", f"model: {models / name}")
    path.write_text(text)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_several_documents_are_one_merge_after_the_other(
    command: Callable[..., Any], file: Path, tmp_path: Path
) -> None:
    rows = command("plan", file).stdout
    assert "step 'first': merge from" in rows and "step 'merged': merge from first" in rows
    ended = command("run", file, "-o", "out")
    assert (ended.code, ended.stdout) == (0, "out\n"), ended.stderr
    first, second = file.read_text().split("---\n")
    (tmp_path / "1.yml").write_text(first)
    (tmp_path / "2.yml").write_text(second.replace("first", str(tmp_path / "one")))
    assert command("run", "1.yml", "-o", "one").code == command("run", "2.yml", "-o", "two").code == 0
    assert surgery.open(tmp_path / "two").digest == surgery.open(tmp_path / "out").digest
    again = command("run", file, "-o", "out")
    assert "already the result" in again.stderr
    assert command("verify", "out").code == 0


@pytest.mark.slow
def test_mergekit_multi_gives_the_same(command: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    assert command("run", file, "-o", "ours").code == 0
    script = Path(sys.executable).parent / "mergekit-multi"
    words = [script, file, "-I", tmp_path / "middle", "--out-path", tmp_path / "theirs"]
    words += ["--no-copy-tokenizer", "--no-write-model-card"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path)
    assert (tmp_path / "theirs").is_dir(), done.stderr
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Two roundings to bfloat16 in a row: within one step of it each.
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=2**-6, atol=1e-6), name
