"""`surgery lora`: a difference becomes an adapter that PEFT loads, and comes back."""

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
