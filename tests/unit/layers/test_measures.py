"""Likelihoods from cached hidden states are those of whole forward passes, in every family tried."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import ALPHABET

from surgery.arch.language.characters import character_tokenizer
from surgery.arch.language.load import Loaded
from surgery.errors import UsageError
from surgery.evals.layers.measures import Likelihood, measure, scored
from surgery.evals.layers.profile import probe_layers
from surgery.evals.layers.weights import ablation, tower_of
from surgery.evals.vqa.prompts import render
from surgery.evals.vqa.rows import Item


def both(loaded: Loaded, items: list[Item]) -> tuple[Likelihood, Likelihood]:
    prompts = [render(loaded.processor, item, "bare") for item in items]
    batches = scored(loaded, items, prompts, 4)
    return Likelihood(loaded, batches), Likelihood(loaded, batches, cached=False)


def check_every_layer(loaded: Loaded, items: list[Item], how: str = "zero") -> None:
    cached, plain = both(loaded, items)
    assert cached.cached and not plain.cached
    tower = tower_of(loaded.model)
    intact = plain.values()
    assert cached.values() == pytest.approx(intact, rel=1e-5)
    for layer in range(len(tower.layers)):
        cached.start(layer)
        for module in ("attn", "mlp", "block"):
            with ablation(tower, layer, module, how).applied():
                wanted = plain.values()
                assert cached.values() == pytest.approx(wanted, rel=1e-5)
            assert wanted != pytest.approx(intact, rel=1e-4)
    cached.start(0)
    assert cached.values() == pytest.approx(intact, rel=1e-5)


@pytest.mark.parametrize("how", ["zero", "uniform"])
def test_cached_states_give_the_numbers_of_whole_passes(vlm: Loaded, questions: list[Item], how: str) -> None:
    check_every_layer(vlm, questions, how)


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {"head_dim": 8, "sliding_window": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Gemma2, softcapped": ("Gemma2", {**WINDOWED, "final_logit_softcapping": 1.0}),
    "Gemma3, two ropes": ("Gemma3Text", {**WINDOWED, "layer_types": LAYER_TYPES}),
    "Mixtral, experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def text_model(family: str) -> Loaded:
    import transformers

    kind, extra = FAMILIES[family]
    tokenizer = character_tokenizer(ALPHABET)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **{**SIZES, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and ".layers." in name:
                p.normal_(0, 0.25)
    return Loaded(model, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_measure_the_same_with_and_without_the_cache(family: str, texts: list[Item]) -> None:
    loaded = text_model(family)
    cached, plain = both(loaded, texts)
    tower = tower_of(loaded.model)
    # A softcap on the logits is not part of the layers: such a model is noticed and measured by whole passes.
    assert cached.cached == (family != "Gemma2, softcapped")
    for layer in range(len(tower.layers)):
        cached.start(layer)
        for how in ("zero", "uniform"):
            with ablation(tower, layer, "block", how).applied():
                assert cached.values() == pytest.approx(plain.values(), rel=1e-5)


def test_a_model_that_works_between_its_layers_is_noticed(
    vlm: Loaded, questions: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = tower_of(vlm.model).layers[2]
    # As DeepStack does: something is added to what leaves one layer before it enters the next.
    block.register_forward_pre_hook(lambda _, args: (args[0] + 0.5, *args[1:]) if not halted else None)
    halted: list[bool] = []
    said: list[str] = []
    prompts = [render(vlm.processor, item, "bare") for item in questions]
    original: Callable[..., Any] = Likelihood._layer

    def without_hooks(self: Likelihood, *args: Any) -> Any:
        halted.append(True)
        try:
            return original(self, *args)
        finally:
            halted.clear()

    monkeypatch.setattr(Likelihood, "_layer", without_hooks)
    batches = scored(vlm, questions, prompts, 4)
    found = Likelihood(vlm, batches, note=said.append)
    assert not found.cached and len(said) == 1
    assert found.values() == Likelihood(vlm, batches, cached=False).values()


def test_the_batch_does_not_matter_beyond_rounding(vlm: Loaded, questions: list[Item]) -> None:
    prompts = [render(vlm.processor, item, "bare") for item in questions]
    one, many = (Likelihood(vlm, scored(vlm, questions, prompts, size)).values() for size in (1, 12))
    assert one == pytest.approx(many, rel=1e-4)


def test_accuracy_is_that_of_the_answers(vlm: Loaded, questions: list[Item]) -> None:
    found = measure(vlm, questions, "acc", prompt="bare", max_new_tokens=2)
    values = found.values()
    assert set(values) <= {0.0, 1.0} and len(values) == 12
    with pytest.raises(UsageError, match="no metric"):
        measure(vlm, questions, "bleu")


def test_a_probe_leaves_the_model_as_it_was(vlm: Loaded, questions: list[Item], tmp_path: Path) -> None:
    before = {n: t.clone() for n, t in vlm.model.state_dict().items()}
    measured = measure(vlm, questions, "nll", prompt="bare")
    profile = probe_layers(vlm, measured, "nll", [0, 1, 2, 3])
    assert list(profile.layers) == [0, 1, 2, 3] and all(len(v) == 12 for v in profile.layers.values())
    after = vlm.model.state_dict()
    assert all(before[n].view(torch.uint8).equal(after[n].view(torch.uint8)) for n in before)
    assert list(tmp_path.iterdir()) == []
    measured.start(0)
    assert measured.values() == pytest.approx(profile.intact, rel=1e-6)
    with pytest.raises(UsageError, match="needs another checkpoint"):
        probe_layers(vlm, measured, "nll", [0], ablate="donor")
