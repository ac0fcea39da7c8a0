"""Changing layers in memory: what a change means, and that nothing of it stays."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.arch.language.load import Loaded
from surgery.errors import CheckpointError, UsageError
from surgery.evals.layers.weights import OtherTower, ablation, tower_of
from surgery.evals.vqa.generate import encode
from surgery.evals.vqa.prompts import render
from surgery.evals.vqa.rows import Item


def digest(model: torch.nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def inputs_of(vlm: Loaded, questions: list[Item]) -> dict[str, torch.Tensor]:
    chosen = [i for i in questions if i.images]
    return encode(vlm, [render(vlm.processor, i, "bare") for i in chosen], chosen)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


def hooked_out(module: torch.nn.Module) -> Any:
    """Let a module return zeros in the shape of what it returned."""

    def zeros(_: Any, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    return module.register_forward_hook(zeros)


@pytest.mark.parametrize("module", ["attn", "mlp", "block"])
@pytest.mark.parametrize("layer", [0, 2])
def test_zero_is_the_module_hooked_out(vlm: Loaded, questions: list[Item], module: str, layer: int) -> None:
    inputs, tower = inputs_of(vlm, questions), tower_of(vlm.model)
    block = tower.layers[layer]
    parts = {"attn": [block.self_attn], "mlp": [block.mlp], "block": [block.self_attn, block.mlp]}[module]
    hooks = [hooked_out(part) for part in parts]
    wanted = logits(vlm.model, inputs)
    for hook in hooks:
        hook.remove()
    with ablation(tower, layer, module, "zero").applied():
        found = logits(vlm.model, inputs)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, logits(vlm.model, inputs))


def test_uniform_is_one_over_rows_in_every_projection_and_nothing_else(vlm: Loaded) -> None:
    tower = tower_of(vlm.model)
    before = {n: p.clone() for n, p in vlm.model.named_parameters()}
    with ablation(tower, 1, "attn", "uniform").applied():
        changed = {n for n, p in vlm.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {f"model.language_model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}
        attention = tower.layers[1].self_attn
        assert attention.k_proj.weight.unique().tolist() == [1 / 16] and attention.q_proj.weight.unique().tolist() == [
            1 / 32
        ]
    with ablation(tower, 1, "mlp", "uniform").applied():
        assert tower.layers[1].mlp.gate_proj.weight.unique().tolist() == pytest.approx([1 / 48])
        assert tower.layers[1].mlp.down_proj.weight.unique().tolist() == [1 / 32]


@pytest.mark.parametrize("module", ["attn", "mlp", "block"])
def test_donor_is_the_other_models_layer(vlm: Loaded, tiny_llama: Path, module: str) -> None:
    tower, donor = tower_of(vlm.model), surgery.open(tiny_llama)
    before = {n: p.clone() for n, p in vlm.model.named_parameters()}
    with ablation(tower, 2, module, "donor", OtherTower(tower, "vlm", donor)).applied():
        for name, parameter in vlm.model.named_parameters():
            inside = name.startswith("model.language_model.layers.2.")
            part = {"attn": "self_attn", "mlp": ".mlp.", "block": ""}[module]
            wanted = (
                donor.read(name.replace("model.language_model", "model")) if inside and part in name else before[name]
            )
            assert torch.equal(parameter, wanted), name
        assert any(not torch.equal(parameter, before[name]) for name, parameter in vlm.model.named_parameters())


@pytest.mark.parametrize("how", ["zero", "uniform", "donor"])
def test_weights_are_put_back_byte_by_byte_whatever_happens(vlm: Loaded, tiny_llama: Path, how: str) -> None:
    tower = tower_of(vlm.model)
    other = OtherTower(tower, "vlm", surgery.open(tiny_llama)) if how == "donor" else None
    before = digest(vlm.model)
    for module in ("attn", "mlp", "block"):
        with pytest.raises(RuntimeError, match="killed"), ablation(tower, 3, module, how, other).applied():
            assert digest(vlm.model) != before
            raise RuntimeError("killed")
        assert digest(vlm.model) == before


def test_wrong_words_and_towers_are_refused(vlm: Loaded, tmp_path: Path) -> None:
    from tiny_language import save_llama

    tower = tower_of(vlm.model)
    with pytest.raises(UsageError, match="no module"):
        ablation(tower, 0, "norm", "zero")
    with pytest.raises(UsageError, match="no ablation"):
        ablation(tower, 0, "mlp", "noise")
    with pytest.raises(CheckpointError, match="no list of decoder layers"):
        tower_of(torch.nn.Linear(2, 2))
    narrow = surgery.open(save_llama(tmp_path / "narrow", hidden_size=16))
    with pytest.raises(CheckpointError, match="narrow"):
        OtherTower(tower, "vlm", narrow)
