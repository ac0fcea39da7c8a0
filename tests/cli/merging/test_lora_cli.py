"""`surgery lora`: a difference becomes an adapter that PEFT loads, and comes back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from safetensors.torch import load_file

from surgery.arch.merging.adapters import factorise


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> vlm_pairs.Pair:
    return vlm_pairs.make_pair(tmp_path_factory.mktemp("pair"), "llava", dtype="float32")


def test_an_adapter_of_full_rank_gives_the_model_back(
    pair: vlm_pairs.Pair, command: Callable[..., Any], tmp_path: Path
) -> None:
    ended = command("lora", "extract", pair.donor, pair.base, "--rank", "32", "-o", "lora")
    assert ended.code == 0, ended.stderr
    ended = command("lora", "apply", pair.base, "lora", "-o", "back")
    assert ended.code == 0, ended.stderr
    base, donor, back = (load_file(p / "model.safetensors") for p in (pair.base, pair.donor, tmp_path / "back"))
    for name, tensor in back.items():
        matrix = ".layers." in name and tensor.ndim == 2
        assert (tensor - (donor if matrix else base)[name]).abs().max() < 1e-6, name
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.base), tmp_path / "lora")
    merged = model.merge_and_unload().state_dict()
    assert all((merged[n] - t).abs().max() < 1e-6 for n, t in back.items())


def noisy(model: Any, folder: Path) -> None:
    """The model with other matrices in its layers, saved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part.isdigit() for part in name.split(".")) and "embed" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llava"])
def test_peft_loads_what_is_extracted_where_names_or_shapes_are_others(
    kind: str, pair: vlm_pairs.Pair, command: Callable[..., Any], tmp_path: Path
) -> None:
    """GPT-2 stores matrices as [in, out]; the names on disk of a vision-language model are not those in memory."""
    import transformers as tr
    from peft import PeftModel

    cls: Any = tr.AutoModelForImageTextToText if kind == "llava" else tr.AutoModelForCausalLM
    torch.manual_seed(0)
    if kind == "gpt2":
        # Token ids inside the vocabulary: a warning about them would go to the stderr that is looked at below.
        config = tr.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0)
        tr.GPT2LMHeadModel(config).save_pretrained("base")
    base = pair.host if kind == "llava" else Path("base")
    noisy(cls.from_pretrained(base), Path("model"))
    ended = command("lora", "extract", "model", base, "--rank", "96", "-o", "lora")
    assert ended.code == 0 and "warning" not in ended.stderr, ended.stderr
    wanted = cls.from_pretrained("model").state_dict()
    merged = PeftModel.from_pretrained(cls.from_pretrained(base), "lora").merge_and_unload().state_dict()
    assert max(float((merged[n] - t).abs().max()) for n, t in wanted.items()) < 1e-6
    assert command("lora", "apply", base, "lora", "-o", "back", "-q").code == 0
    back, model = (load_file(tmp_path / d / "model.safetensors") for d in ("back", "model"))
    assert set(back) == set(model) and max(float((back[n] - t).abs().max()) for n, t in model.items()) < 1e-6


def test_an_adapter_trained_on_a_vision_language_model_is_applied(
    pair: vlm_pairs.Pair, command: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(pair.host)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 2})
    lora = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    lora.save_pretrained("lora")
    lora.merge_and_unload().save_pretrained("wanted")
    ended = command("lora", "apply", pair.host, "lora", "-o", "out", "-q")
    assert ended.code == 0, ended.stderr
    out, wanted = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "wanted"))
    assert set(out) == set(wanted) and max(float((out[n] - t).abs().max()) for n, t in wanted.items()) < 1e-6


def test_what_an_adapter_leaves_out_is_said(pair: vlm_pairs.Pair, command: Callable[..., Any]) -> None:
    ended = command("lora", "extract", pair.donor, pair.base, "-r", "4", "-o", "lora")
    assert ended.code == 0 and "'lm_head.weight' and 10 more tensors differ too" in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lora_alpha", "x", "lora_alpha is 'x'"),
        ("alpha_pattern", {"(": 2}, "alpha_pattern '(' is no pattern"),
        ("alpha_pattern", [1], "no mapping"),
        ("peft_type", "IA3", "an adapter of kind IA3"),
        ("use_dora", True, "an adapter of kind DoRA"),
    ],
)
def test_a_broken_adapter_is_one_line(
    key: str, value: Any, says: str, pair: vlm_pairs.Pair, command: Callable[..., Any]
) -> None:
    assert command("lora", "extract", pair.donor, pair.base, "-r", "2", "-o", "lora", "-q").code == 0
    config = json.loads(Path("lora/adapter_config.json").read_text()) | {key: value}
    Path("lora/adapter_config.json").write_text(json.dumps(config))
    ended = command("lora", "apply", pair.base, "lora", "-o", "out")
    assert ended.code == 3 and says in ended.stderr and not Path("out").exists(), ended.stderr


def test_a_low_rank_is_the_best_there_is(pair: vlm_pairs.Pair, command: Callable[..., Any]) -> None:
    ended = command("lora", "extract", pair.donor, pair.base, "-r", "3", "--only", "*up_proj*", "-o", "lora")
    assert ended.code == 0, ended.stderr
    factors = load_file("lora/adapter_model.safetensors")
    base, donor = (load_file(p / "model.safetensors") for p in (pair.base, pair.donor))
    assert len(factors) == 2 * vlm_pairs.LAYERS
    name = "model.layers.1.mlp.up_proj"
    delta = (donor[f"{name}.weight"] - base[f"{name}.weight"]).double()
    made = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    best = torch.linalg.svdvals(delta)[3:].square().sum().sqrt()
    assert (delta - made.double()).norm() == pytest.approx(float(best), rel=1e-4)


def test_large_matrices_are_cut_nearly_as_well() -> None:
    torch.manual_seed(0)
    delta = torch.randn(1100, 8) @ torch.randn(8, 1200) + 0.01 * torch.randn(1100, 1200)
    a, b = factorise(delta, 8, seed=0)
    best = torch.linalg.svdvals(delta)[8:].square().sum().sqrt()
    assert float((delta - b @ a).norm()) < 1.001 * float(best)


def test_what_is_no_adapter_is_one_line(pair: vlm_pairs.Pair, command: Callable[..., Any]) -> None:
    ended = command("lora", "apply", pair.base, pair.donor, "-o", "out")
    assert ended.code == 3 and "adapter_config.json" in ended.stderr
    assert command("lora", "extract", pair.base, pair.base, "-o", "out").code == 3
    assert command("lora", "extract", pair.donor, pair.base, "-r", "0", "-o", "out").code == 2
