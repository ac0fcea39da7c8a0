"""Generation and likelihood on a real small LLaVA, against the naive way: one item at a time."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import surgery
from surgery.arch.language.load import Loaded, load
from surgery.evals.vqa.generate import answer_nll, batches, encode, generate, with_answers
from surgery.evals.vqa.prompts import render
from surgery.evals.vqa.rows import Item, Picture


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> Loaded:
    loaded = load(surgery.open(tiny_llava))
    with torch.no_grad():  # a placeholder in the answer would ask for one more image
        loaded.model.lm_head.weight[4] = -loaded.model.lm_head.weight[5:].mean(0)
    return loaded


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    root = tmp_path_factory.mktemp("pictures")
    out = []
    for i, (question, answer, count) in enumerate(
        [("sum?", "12", 2), ("read", "7", 1), ("3+4=", "7", 0), ("what do you see", "cat", 1), ("a", "xyz", 0)]
    ):
        paths = []
        for n in range(count):
            paths.append(root / f"{i}{n}.png")
            Image.new("L", (8, 8), 40 * i + 20 * n).save(paths[-1])
        out.append(Item(str(i), question, answer, tuple(Picture("row", p) for p in paths)))
    return out


def test_batches_hold_every_item_once_and_never_mix_images_with_none(items: list[Item]) -> None:
    made = list(batches(items, [i.question for i in items], 2))
    assert sorted(i for batch in made for i in batch) == list(range(5))
    assert all(len(b) <= 2 and len({bool(items[i].images) for i in b}) == 1 for b in made)


def test_a_batch_answers_as_one_at_a_time_does(vlm: Loaded, items: list[Item]) -> None:
    prompts = [render(vlm.processor, item, "bare") for item in items]
    for chosen in batches(items, prompts, 3):
        together = generate(vlm, [prompts[i] for i in chosen], [items[i] for i in chosen], max_new_tokens=6)
        for place, answer in zip(chosen, together, strict=True):
            inputs = encode(vlm, [prompts[place]], [items[place]])
            tokens = inputs["input_ids"]
            for _ in range(6):  # greedy by hand, without a cache
                full = inputs | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                with torch.no_grad():
                    tokens = torch.cat([tokens, vlm.model(**full).logits[:, -1:].argmax(-1)], dim=1)
            made = tokens[0, inputs["input_ids"].shape[1] :].tolist()
            kept = made[: made.index(2)] if 2 in made else made
            assert answer.text == vlm.tokenizer.decode(kept, skip_special_tokens=True).strip()
            assert (answer.tokens, answer.ended) == (len(kept), 2 in made)


def test_the_likelihood_is_that_of_token_after_token(vlm: Loaded, items: list[Item]) -> None:
    prompts = [render(vlm.processor, item, "bare") for item in items]
    for chosen in batches(items, prompts, 3):
        batch = with_answers(vlm, [prompts[i] for i in chosen], [items[i] for i in chosen])
        for place, found in zip(chosen, answer_nll(vlm, batch), strict=True):
            inputs = encode(vlm, [prompts[place]], [items[place]])
            tokens, total = inputs["input_ids"], 0.0
            for target in vlm.tokenizer(items[place].answer)["input_ids"]:
                full = inputs | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                with torch.no_grad():
                    total -= float(vlm.model(**full).logits[0, -1].log_softmax(-1)[target])
                tokens = torch.cat([tokens, torch.tensor([[target]])], dim=1)
            assert found == pytest.approx(total, rel=1e-4)


def test_sampling_settings_of_the_folder_do_not_bend_the_answers(vlm: Loaded, items: list[Item]) -> None:
    prompts, asked = [render(vlm.processor, items[2], "bare")], [items[2]]
    before = generate(vlm, prompts, asked, max_new_tokens=8)
    config = vlm.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = True, 5.0, 3.0, 3
    try:
        assert generate(vlm, prompts, asked, max_new_tokens=8) == before
    finally:
        config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = False, 1.0, 1.0, 1
