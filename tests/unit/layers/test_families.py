"""Every family that merges know can be probed: its tower is found, zero takes a module out, the cache is exact."""

import copy
from typing import Any

import pytest
import torch
from tiny_language import ALPHABET
from tiny_vlms import FAMILIES as IMAGES
from tiny_vlms import tiny_vlm
from vlm_pairs import CONFIGS, VOCAB, build

from surgery.arch.language.characters import character_tokenizer
from surgery.arch.language.load import Loaded
from surgery.evals.layers.measures import Likelihood, scored
from surgery.evals.layers.weights import ablation, tower_of
from surgery.evals.vqa.generate import Scored
from surgery.evals.vqa.prompts import render
from surgery.evals.vqa.rows import Item


def lively(family: str) -> Loaded:
    model = build(family).float().eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 2 and ".layers." in name:
                tensor.normal_(0, 0.25)
    tokenizer = character_tokenizer(ALPHABET)
    assert len(tokenizer) < VOCAB - 6  # ids of image tokens begin there
    return Loaded(model, tokenizer)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_probe_of_this_family_is_exact(family: str, texts: list[Item]) -> None:
    loaded = lively(family)
    prompts = [render(loaded.processor, item, "bare") for item in texts]
    batches = scored(loaded, texts, prompts, 4)
    cached, plain = (Likelihood(loaded, batches, cached=c) for c in (True, False))
    tower, intact = tower_of(loaded.model), plain.values()
    before = [p.detach().clone() for p in loaded.model.parameters()]
    for layer in range(len(tower.layers)):
        cached.start(layer)
        for module in ("attn", "mlp"):
            hook = hooked_out(tower.layers[layer], module)
            wanted = plain.values()
            hook.remove()
            with ablation(tower, layer, module, "zero").applied():
                assert plain.values() == pytest.approx(wanted, rel=1e-6)
                assert cached.values() == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters(), strict=True))
    cached.start(0)
    assert cached.values() == pytest.approx(intact, rel=1e-5)


@pytest.mark.parametrize("family", IMAGES)
def test_with_images_the_cache_is_exact_or_noticed(family: str) -> None:
    tiny = tiny_vlm(family)
    model = copy.deepcopy(tiny.model)
    batches = []
    for place in range(2):
        inputs = tiny.prompt(seed=place)
        at = inputs["input_ids"].shape[1]
        targets = inputs["input_ids"][0, -2:]  # the last two words, as if they were the answer
        rows, columns = torch.zeros(2, dtype=torch.long), torch.tensor([at - 3, at - 2])
        batches.append(([place], Scored(inputs, rows, columns, targets, 1)))
    cached, plain = (Likelihood(Loaded(model, None), batches, cached=c) for c in (True, False))
    # Qwen3-VL adds features of the image between its first layers, which is noticed.
    assert cached.cached == (family != "qwen3_vl")
    for layer in range(3):
        cached.start(layer)
        with ablation(tower_of(model), layer, "block", "zero").applied():
            assert cached.values() == pytest.approx(plain.values(), rel=1e-5)


def hooked_out(block: Any, module: str) -> Any:
    names = {"attn": ("self_attn", "cross_attn", "conv"), "mlp": ("mlp", "feed_forward")}[module]
    part = next(getattr(block, n) for n in names if getattr(block, n, None) is not None)

    def zeros(_: Any, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    return part.register_forward_hook(zeros)
