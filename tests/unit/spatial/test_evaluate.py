"""Asking a model: every method against plain definitions, records that resume, settings that belong together."""

import json
from pathlib import Path

import pytest
import torch

from surgery.arch.language.load import Loaded
from surgery.data.spatial.items import Item
from surgery.errors import UsageError
from surgery.evals.spatial.contrast import dola_layers, dola_logits, noisy, plausible, vcd_logits
from surgery.evals.spatial.evaluate import Asking, ask, encode_items, evaluate, local, rms_norm_eps
from surgery.evals.spatial.report import report
from surgery.steering.generate import Policy

EVERY = ("base", "scaling", "adapt", "vcd", "dola")
POLICY = Policy(0.5, 1.5, 0.9)


def test_plain_answers_are_those_of_generate(llava_scenes: Loaded, scenes: list[Item]) -> None:
    rows = ask(llava_scenes, scenes, Asking(batch=20))
    inputs = encode_items(llava_scenes, scenes)
    out = llava_scenes.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    texts = llava_scenes.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [r["answers"]["base"]["text"] for r in rows] == [t.strip() for t in texts]
    confidence = torch.softmax(llava_scenes.model(**inputs).logits[:, -1], -1).amax(-1)
    assert [r["confidence"] for r in rows] == pytest.approx(confidence.tolist(), abs=1e-5)


def test_adapt_is_scaling_by_the_alpha_of_each_confidence(llava_scenes: Loaded, scenes: list[Item]) -> None:
    rows = ask(llava_scenes, scenes, Asking(EVERY[:3], alpha=1.5, policy=POLICY, batch=20))
    low = ask(llava_scenes, scenes, Asking(("scaling",), alpha=0.5, batch=20))
    assert {r["confidence"] < POLICY.beta for r in rows} == {True, False}
    for row, other in zip(rows, low, strict=True):
        source = other if row["confidence"] < POLICY.beta else row
        assert row["answers"]["adapt"]["text"] == source["answers"]["scaling"]["text"]
        assert row["answers"]["adapt"]["alpha"] == source["answers"]["scaling"]["alpha"]


@pytest.mark.parametrize("method", ["vcd", "dola"])
def test_contrasts_equal_a_loop_without_a_cache(llava_scenes: Loaded, scenes: list[Item], method: str) -> None:
    few = scenes[:4]
    rows = ask(llava_scenes, few, Asking((method,), max_new_tokens=2, seed=3))
    model = llava_scenes.model
    for i, item in enumerate(few):
        inputs = encode_items(llava_scenes, few)
        inputs = {k: v[i : i + 1] for k, v in inputs.items()}
        pixels = noisy(encode_items(llava_scenes, few), seed=3)["pixel_values"][i : i + 1]
        said = []
        for _ in range(2):
            with torch.no_grad():
                out = model(**inputs, output_hidden_states=True)
                plain = out.logits[:, -1].float()
                if method == "vcd":
                    logits = 2 * plain - model(**inputs | {"pixel_values": pixels}).logits[:, -1].float()
                else:
                    early = model.lm_head(out.hidden_states[2][:, -1]).float()
                    logits = torch.log_softmax(plain, -1) - torch.log_softmax(early, -1)
            p = torch.softmax(plain, -1)
            token = logits.masked_fill(p < 0.1 * p.max(), -torch.inf).argmax(-1)
            if int(token) == model.generation_config.eos_token_id:
                break
            said.append(int(token))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None]], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert rows[i]["answers"][method]["text"] == llava_scenes.tokenizer.decode(said), item


def test_the_early_layer_is_the_furthest_in_jensen_shannon_divergence() -> None:
    torch.manual_seed(0)
    final, early = torch.randn(3, 7), [torch.randn(3, 7), torch.randn(3, 7), torch.zeros(3, 7)]
    out = dola_logits(final, early)
    for b in range(3):
        p = torch.softmax(final[b], -1)
        scores = []
        for e in early:
            q = torch.softmax(e[b], -1)
            m = (p + q) / 2
            scores.append(float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()))
        best = early[scores.index(max(scores))][b]
        torch.testing.assert_close(out[b], torch.log_softmax(final[b], -1) - torch.log_softmax(best, -1))
    assert dola_layers(32) == list(range(16, 32, 2)) and dola_layers(3) == [2] and dola_layers(2) == [1]


def test_implausible_tokens_are_those_below_a_tenth_of_the_best() -> None:
    p = torch.tensor([[0.6, 0.061, 0.059, 0.28]])
    assert plausible(p.log()).tolist() == [[True, True, False, True]]
    assert torch.equal(vcd_logits(p, p), p)


def test_noise_is_seeded_and_has_the_variance_of_the_schedule() -> None:
    inputs = {"pixel_values": torch.zeros(2, 3, 64, 64), "input_ids": torch.ones(2, 4)}
    out = noisy(inputs, seed=1)
    assert torch.equal(out["pixel_values"], noisy(inputs, seed=1)["pixel_values"])
    assert out["input_ids"] is inputs["input_ids"]
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.005 - 1e-5) + 1e-5
    assert float(out["pixel_values"].var()) == pytest.approx(1 - float((1 - beta[:501]).prod()), rel=0.05)
    with pytest.raises(UsageError):
        noisy({"input_ids": torch.ones(1)}, seed=0)


def test_closed_set_takes_the_likeliest_option(llava_scenes: Loaded, scenes: list[Item]) -> None:
    rows = ask(llava_scenes, scenes, Asking(EVERY, alpha=1.2, policy=POLICY, answer="closed-set", batch=20))
    logits = llava_scenes.model(**encode_items(llava_scenes, scenes)).logits[:, -1]
    for row, line, item in zip(rows, logits, scenes, strict=True):
        ids = [llava_scenes.tokenizer(o)["input_ids"][0] for o in item.options]
        assert row["answers"]["base"]["said"] == item.options[int(line[ids].argmax())]
        assert all(a["said"] in item.options for a in row["answers"].values())


def test_records_go_on_where_they_stopped(llava_scenes: Loaded, scenes: list[Item], tmp_path: Path) -> None:
    asking = Asking(batch=4)
    path = tmp_path / "r.jsonl"
    answer = local(llava_scenes, asking)

    def breaks(items: list[Item]):
        for count, row in enumerate(answer(items)):
            if count == 6:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        evaluate(breaks, scenes, asking, out=path)
    asked: list[int] = []

    def counts(items: list[Item]):
        asked.append(len(items))
        return answer(items)

    rows = evaluate(counts, scenes, asking, out=path, resume=True)
    assert asked == [len(scenes) - 6] and [r["id"] for r in rows] == [i.id for i in scenes]
    assert len(path.read_text().splitlines()) == 1 + len(scenes)
    with pytest.raises(UsageError, match="other settings"):
        evaluate(answer, scenes, Asking(max_new_tokens=3), out=path, resume=True)
    assert report(rows)["methods"]["base"]["n"] == len(scenes)


def test_a_report_pairs_every_method_with_the_plain_one(llava_scenes: Loaded, scenes: list[Item]) -> None:
    rows = ask(llava_scenes, scenes, Asking(EVERY[:3], alpha=4.0, policy=POLICY, batch=20))
    out = report(rows, beta=POLICY.beta)
    base, scaled = (out["methods"][m] for m in ("base", "scaling"))
    assert "gain" not in base and json.loads(json.dumps(out)) == out
    flips = [(r["answers"]["base"]["right"], r["answers"]["scaling"]["right"]) for r in rows]
    assert scaled["gain"]["lost"] == flips.count((True, False))
    assert scaled["gain"]["difference"] == pytest.approx(scaled["accuracy"] - base["accuracy"])
    assert base["low"] == sum(r["confidence"] < POLICY.beta for r in rows) / len(rows)


def test_norms_have_another_epsilon_inside_the_block_alone(llava_scenes: Loaded, scenes: list[Item]) -> None:
    inputs = encode_items(llava_scenes, scenes[:1])
    before = llava_scenes.model(**inputs).logits
    with rms_norm_eps(llava_scenes.model, 1e-2):
        assert not torch.equal(llava_scenes.model(**inputs).logits, before)
    assert torch.equal(llava_scenes.model(**inputs).logits, before)
    with pytest.raises(UsageError), rms_norm_eps(llava_scenes.model, -1.0):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": ("bas",)},
        {"methods": ("base", "base")},
        {"methods": ()},
        {"methods": ("scaling",)},
        {"methods": ("adapt",)},
        {"answer": "guess"},
        {"batch": 0},
    ],
)
def test_settings_that_do_not_belong_together_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError) as caught:
        Asking(**wrong)
    assert caught.value.hint
