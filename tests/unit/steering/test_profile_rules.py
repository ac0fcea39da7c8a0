"""Which heads matter: profiles against steering each head by itself, and the patches that come out of them."""

import pytest
import torch
from tiny_vlms import tiny_vlm

from surgery.errors import UsageError
from surgery.steering.patch import Patch
from surgery.steering.prefill import Prefill
from surgery.steering.profile import profile
from surgery.steering.session import steer

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_a_profile_is_what_steering_each_head_alone_does(family: str) -> None:
    tiny = tiny_vlm(family)
    prompts = [tiny.prompt(seed=s) for s in (0, 1)]
    found = profile(tiny.model, prompts, alpha=0.0)
    wanted = torch.zeros(3, 4)
    for inputs in prompts:
        with torch.no_grad():
            plain = torch.softmax(tiny.model(**inputs).logits[0, -1], -1)
        for layer in range(3):
            for head in range(4):
                with torch.no_grad(), steer(tiny.model, Patch(heads=f"{layer}:{head}"), alpha=0.0, inputs=inputs):
                    after = torch.softmax(tiny.model(**inputs).logits[0, -1], -1)
                wanted[layer, head] += (after - plain)[plain.argmax()].abs() / 2
    torch.testing.assert_close(torch.tensor(found.size), wanted, atol=1e-5, rtol=0)
    assert found.n == 2 and max(r[2] for r in found.ranked()) == found.ranked()[0][2]


def test_a_profile_by_layer_and_with_given_answers() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    found = profile(tiny.model, [inputs], by="layer", alpha=3.0, targets=[[17]])
    with torch.no_grad():
        before = torch.softmax(tiny.model(**inputs).logits[0, -1], -1)[17]
        with steer(tiny.model, Patch(layers="1"), alpha=3.0, inputs=inputs):
            after = torch.softmax(tiny.model(**inputs).logits[0, -1], -1)[17]
    assert found.change[1][0] == pytest.approx(float(after - before), abs=1e-6)
    assert found.best(2).layers is not None and found.best(2).alpha == 3.0


def test_the_best_heads_become_a_patch() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    found = profile(tiny.model, [inputs], patch=Patch(mode="knock-out"), alpha=1.0)
    top = found.ranked()[:3]
    patch = found.best(3)
    assert patch.mode == "knock-out"
    assert patch.chosen_heads(3, 4) == {
        n: tuple(sorted(h for layer, h, _, _ in top if layer == n)) for n in {row[0] for row in top}
    }
    raising = found.best(12, sign=1).chosen_heads(3, 4)
    assert raising and all(found.change[n][h] > 0 for n, row in raising.items() for h in row)
    for arguments, words in (
        ({"prompts": []}, "no prompts"),
        ({"by": "row"}, "unknown"),
        ({"patch": Patch(layers="1")}, "by itself"),
    ):
        with pytest.raises(UsageError, match=words):
            profile(tiny.model, **{"prompts": [inputs], **arguments})


def test_rules_with_other_rows_share_one_run_of_the_prompt() -> None:
    """Knock-out over windows of layers, several rows, alphas of their own: one prompt, a step each."""
    for family in ("llava", "gemma3"):
        tiny = tiny_vlm(family)
        inputs = tiny.prompt()
        rules = [
            Patch(mode="knock-out", layers="0-1", rows="after-image"),
            Patch(alpha=0.5),
            Patch(rows="last:2", alpha=2.0),
            Patch(mode="knock-out", layers="2", rows="after-image"),
        ]
        with Prefill(tiny.model, inputs) as run:
            found = [run.steered(None, rule) for rule in (*rules, rules[0])]
            assert run.passes == {"prompt": 1, "cheap": 5, "full": 0, "tokens": 0}
        assert torch.equal(found[0], found[-1])
        for rule, logits in zip(rules, found, strict=False):
            with torch.no_grad(), steer(tiny.model, rule, inputs=inputs):
                whole = tiny.model(**inputs).logits[:, -1]
            torch.testing.assert_close(logits, whole, atol=2e-5, rtol=0)
