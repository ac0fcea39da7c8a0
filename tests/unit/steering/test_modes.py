"""What each mode does to a row, in the numbers of its definition; rules put together; phrases, knock-out, profiles."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_vlms import tiny_vlm

from surgery.errors import UsageError
from surgery.steering.attention import Applied, Rule, Steering, _override
from surgery.steering.patch import PRESETS, Patch
from surgery.steering.session import steer

torch.set_num_threads(1)
POSITIVE, NEGATIVE, TEXT = [2.0, 1.0, -3.0], [-1.0, -2.0, -4.0], [0.5, 0.0]


def row(image: list[float], text: list[float], alpha: float, mode: str = "logit", shift: float = 0.0) -> torch.Tensor:
    """Weights of a row with given logits: image keys first. Keys are unit vectors, the query holds the logits."""
    logits = torch.tensor(image + text) + shift
    n = len(logits)
    keys = torch.zeros(1, n, dtype=torch.bool)
    keys[:, : len(image)] = True
    state = Steering(None, [Applied(Rule(mode=mode), (alpha,), keys, torch.ones(1, n, dtype=torch.bool))], trace=True)
    state.begin(n - 1, 1, 1)
    acting = [(state, *pair) for pair in state.acting(0)]
    unit = torch.eye(n)[None, None]
    q = logits[None, None, None]
    _override(
        "eager",
        SimpleNamespace(layer_idx=0),
        q,
        unit,
        unit,
        None,
        (torch.zeros(1, 1, 1, n), None),
        acting,
        {"scaling": 1.0},
    )
    assert state.trace is not None
    return state.trace[0].weights[0, 0, 0]


def mass(*args: Any, **kwargs: Any) -> float:
    return float(row(*args, **kwargs)[:3].sum())


@pytest.mark.parametrize(
    ("image", "masses"),
    [
        (POSITIVE, [0.531094, 0.634097, 0.732938, 0.793163, 0.844370, 0.902717, 0.959022]),
        (NEGATIVE, [0.531094, 0.295265, 0.207138, 0.164508, 0.131243, 0.094181, 0.054942]),
    ],
)
def test_mass_on_the_image_follows_the_sign_of_its_logits(image: list[float], masses: list[float]) -> None:
    """With negative logits alpha above 1 takes mass away from the image: sharpening is not looking more."""
    found = [mass(image, TEXT, a) for a in (0, 0.5, 0.8, 1, 1.2, 1.5, 2)]
    assert found == pytest.approx(masses, abs=1e-6)


def test_a_constant_on_all_logits_changes_what_alpha_does_in_logit_mode_alone() -> None:
    for shift, wanted in ((0.0, 0.959022), (3.0, 0.997877), (-3.0, 0.538148)):
        assert mass(POSITIVE, TEXT, 2.0, shift=shift) == pytest.approx(wanted, abs=1e-6)
        assert mass(POSITIVE, TEXT, 1.0, shift=shift) == pytest.approx(0.793163, abs=1e-6)
        kept = row(POSITIVE, TEXT, 2.0, "mass-preserving", shift)
        torch.testing.assert_close(kept, row(POSITIVE, TEXT, 2.0, "mass-preserving"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0, 5.0])
def test_mass_preserving_is_a_temperature_and_nothing_else(alpha: float) -> None:
    found, before = row(POSITIVE, TEXT, alpha, "mass-preserving"), row(POSITIVE, TEXT, 1.0)
    assert float(found[:3].sum()) == pytest.approx(float(before[:3].sum()), abs=1e-6)
    torch.testing.assert_close(found[3:], before[3:], atol=1e-6, rtol=0)
    wanted = torch.softmax(alpha * torch.tensor(POSITIVE), 0)
    torch.testing.assert_close(found[:3] / found[:3].sum(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_bias_multiplies_the_odds_of_the_image(alpha: float) -> None:
    before, after = mass(POSITIVE, TEXT, 1.0), mass(POSITIVE, TEXT, alpha, "bias")
    assert after / (1 - after) == pytest.approx(alpha * before / (1 - before), rel=1e-5)
    shape = row(POSITIVE, TEXT, alpha, "bias")[:3]
    torch.testing.assert_close(shape / shape.sum(), torch.softmax(torch.tensor(POSITIVE), 0), atol=1e-6, rtol=0)


def test_abs_amplifies_whatever_the_sign() -> None:
    assert mass(NEGATIVE, TEXT, 2.0, "abs") > mass(NEGATIVE, TEXT, 1.0) > mass(NEGATIVE, TEXT, 2.0)
    positive = [2.0, 1.0, 3.0]
    torch.testing.assert_close(row(positive, TEXT, 1.7, "abs"), row(positive, TEXT, 1.7))


def test_knock_out_is_not_alpha_0() -> None:
    """At alpha 0 every image key still weighs exp(0)."""
    assert mass(POSITIVE, TEXT, 1.0, "knock-out") == 0.0
    assert mass(POSITIVE, TEXT, 0.0) == pytest.approx(3 / (3 + math.exp(0.5) + 1), abs=1e-6)
    rest = row(POSITIVE, TEXT, 1.0, "knock-out")[3:]
    torch.testing.assert_close(rest, torch.softmax(torch.tensor(TEXT), 0))


# --- in models --------------------------------------------------------------------------------------------------------


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_in_a_model_mass_stays_in_the_first_steered_layer() -> None:
    for family in ("llava", "qwen2_vl", "gemma3"):
        tiny = tiny_vlm(family)
        inputs = tiny.prompt()
        image = inputs["input_ids"][0] == 150
        with steer(tiny.model, Patch(mode="mass-preserving"), alpha=0.3, inputs=inputs, trace=True) as run:
            logits(tiny.model, inputs)
        after, before = run.attention(0), run.attention(0, plain=True)
        torch.testing.assert_close(after[..., image].sum(-1), before[..., image].sum(-1), atol=1e-6, rtol=0)
        assert not torch.allclose(after, before, atol=1e-4)


def test_g_after_one_over_g_is_the_model_itself() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    before = logits(tiny.model, inputs)
    for g in (3.0, 0.7, 49.0):
        with steer(tiny.model, (Patch(alpha=g), Patch(alpha=1 / g)), inputs=inputs):
            assert torch.equal(logits(tiny.model, inputs), before)
    with steer(tiny.model, Patch(alpha=2.0), inputs=inputs), steer(tiny.model, Patch(alpha=0.3), inputs=inputs):
        nested = logits(tiny.model, inputs)
    with steer(tiny.model, alpha=0.6, inputs=inputs):
        torch.testing.assert_close(nested, logits(tiny.model, inputs), atol=2e-5, rtol=0)


def test_patches_follow_one_another_on_their_own_layers() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    with steer(
        tiny.model, (Patch(layers="0", alpha=0.5), Patch(layers="2", alpha=2.0)), inputs=inputs, trace=True
    ) as run:
        logits(tiny.model, inputs)
    assert run.layers == (0, 2) and {t.layer for t in run.trace} == {0, 2}


def test_knocking_the_image_out_hides_it() -> None:
    """With no row after the image seeing it, another image gives the same answer."""
    tiny = tiny_vlm("llava")
    one, other = tiny.prompt(seed=0), tiny.prompt(seed=0)
    other["pixel_values"] = -one["pixel_values"]
    assert not torch.allclose(logits(tiny.model, one)[:, -1], logits(tiny.model, other)[:, -1], atol=1e-3)
    found = []
    for inputs in (one, other):
        with steer(tiny.model, PRESETS["knock-out"], inputs=inputs):
            found.append(logits(tiny.model, inputs)[:, -1])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_a_profile_gives_each_head_an_alpha_of_its_own() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    table = {"0": {"1": 0.5}, "2": {"0": 2.0, "3": 0.0}}
    with steer(tiny.model, Patch(table=table), inputs=inputs, trace=True) as run:
        found = logits(tiny.model, inputs)
    parts = (Patch(heads="0:1", alpha=0.5), Patch(heads="2:0", alpha=2.0), Patch(heads="2:3", alpha=0.0))
    with steer(tiny.model, parts, inputs=inputs):
        torch.testing.assert_close(found, logits(tiny.model, inputs), atol=1e-6, rtol=0)
    assert run.layers == (0, 2)


class Words:
    """A stand-in for a tokenizer: token i is written " wi", as byte-level vocabularies mark spaces."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"Ġw{i}" for i in ids]


def test_a_phrase_of_the_prompt_can_be_what_is_steered() -> None:
    """PASTA's rule: in every row all keys but the phrase are weighted down by alpha."""
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    ids = inputs["input_ids"][0].tolist()
    patch = Patch(
        mode="bias", keys="text", text=(f"w{ids[-4]} w{ids[-3]}",), invert=True, rows="all", steps="all", alpha=0.01
    )
    with steer(tiny.model, patch, inputs=inputs, tokenizer=Words(), trace=True) as run:
        logits(tiny.model, inputs)
    after, before = run.attention(0), run.attention(0, plain=True)
    span = torch.zeros(len(ids), dtype=torch.bool)
    span[-4:-2] = True
    wanted = torch.where(span, before, 0.01 * before)
    torch.testing.assert_close(after, wanted / wanted.sum(-1, keepdim=True), atol=1e-5, rtol=0)
    assert len(run.trace[0].rows) == len(ids)
    with (
        pytest.raises(UsageError, match="is not in the prompt"),
        steer(tiny.model, Patch(keys="text", text=("nowhere",)), alpha=2.0, inputs=inputs, tokenizer=Words()),
    ):
        pass


def test_phrases_are_found_as_tokens_and_as_letters() -> None:
    """A byte-level vocabulary: a phrase at the start, inside, cut otherwise, twice, and in other letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from surgery.steering.session import key_mask

    text = "where is the red cup? the red cupboard is left. où est la tasse? the red cup"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=list("abcdefghij")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    model = tiny_vlm("llava").model

    def shown(*phrases: str) -> str:
        mask = key_mask(model, Patch(keys="text", text=phrases), ids, tokenizer)[0]
        return tokenizer.decode(ids[0][mask])

    assert shown("red cup") in (" red cup red cup", " red cup red cupboard red cup")
    assert shown("where") == "where"
    assert shown("où est") == " où est"
    assert "is left" in shown("is left", "tasse") and "tasse" in shown("is left", "tasse")
    with pytest.raises(UsageError, match="'blue' is not in the prompt"):
        shown("blue")


def test_one_of_several_images_can_be_chosen() -> None:
    tiny = tiny_vlm("qwen2_vl")
    inputs = tiny.prompt(images=2)
    with steer(tiny.model, Patch(keys="image:2"), alpha=0.5, inputs=inputs, trace=True) as run:
        logits(tiny.model, inputs)
    after, before = run.attention(0), run.attention(0, plain=True)
    image = (inputs["input_ids"][0] == 150).nonzero()[:, 0]
    first, second = image[:4], image[4:]
    ratio = after / before
    assert torch.allclose(ratio[..., first], ratio[..., -1:].expand(-1, -1, 4), rtol=1e-4)
    assert not torch.allclose(ratio[..., second], ratio[..., -1:].expand(-1, -1, 4), rtol=1e-2)
