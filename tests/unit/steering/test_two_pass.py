"""Adaptive generation: the cheap second pass, its exact fallbacks, and every way to generate."""

from typing import Any

import pytest
import torch
from tiny_vlms import FAMILIES, tiny_vlm
from transformers import DynamicCache

from surgery.errors import UsageError
from surgery.steering.generate import Policy
from surgery.steering.patch import Patch
from surgery.steering.prefill import Prefill
from surgery.steering.session import generate, steer

torch.set_num_threads(1)
PREFIX_LM = {"paligemma"}
EVERY = pytest.mark.parametrize("family", FAMILIES)
HOW = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
LOW, HIGH = Policy(0.5, 1.5, beta=2.0), Policy(0.5, 1.5, beta=0.0)  # always alpha1, always alpha2


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def keys_and_values(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@EVERY
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_running_the_last_position_again_equals_a_steered_prompt(family: str, backend: str) -> None:
    """Logits of every step and every layer's cache; prefix-LM families take the long way, and say so."""
    tiny = tiny_vlm(family)
    tiny.model.set_attn_implementation(backend)
    try:
        inputs = tiny.prompt()
        cheap, outcome = generate(tiny.model, inputs, LOW, **HOW)
        with steer(tiny.model, alpha=0.5, inputs=inputs):
            whole = tiny.model.generate(**inputs, **HOW)
        assert outcome.passes == ("full" if family in PREFIX_LM else "cheap") and outcome.alpha == [0.5]
        for a, b in zip(cheap.logits, whole.logits, strict=True):
            close(a, b)
        pairs = zip(keys_and_values(cheap.past_key_values), keys_and_values(whole.past_key_values), strict=True)
        for a, b in pairs:
            close(a, b)
    finally:
        tiny.model.set_attn_implementation("sdpa")


@EVERY
def test_later_tokens_equal_a_loop_without_a_cache(family: str) -> None:
    """Tokens 2 to n after a steered first one, against recomputing everything at every step."""
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    for steps in ("first", "all"):
        with steer(tiny.model, Patch(steps=steps), alpha=0.4, inputs=inputs):
            cached = tiny.model.generate(**inputs, **HOW)
        with steer(tiny.model, Patch(steps=steps), alpha=0.4, inputs=inputs):
            again = tiny.model.generate(**inputs, **HOW, use_cache=False)
        for a, b in zip(cached.logits, again.logits, strict=True):
            close(a, b)
        assert torch.equal(cached.sequences, again.sequences)


def test_steering_every_step_differs_from_steering_the_first() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    found = {}
    for steps in ("first", "all"):
        with steer(tiny.model, Patch(steps=steps), alpha=0.2, inputs=inputs) as run:
            found[steps] = tiny.model.generate(**inputs, **HOW).logits
        assert run.calls == {"first": 3, "all": 3 * 4}[steps]
    assert torch.equal(found["first"][0], found["all"][0]) and not torch.equal(found["first"][1], found["all"][1])


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_adaptive_runs_without_a_cache_are_steered_at_every_step(family: str) -> None:
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    cached, _ = generate(tiny.model, inputs, LOW, **HOW)
    again, outcome = generate(tiny.model, inputs, LOW, **HOW, use_cache=False)
    assert outcome.passes == "full"
    for a, b in zip(cached.logits, again.logits, strict=True):
        close(a, b)


@EVERY
def test_when_all_alphas_are_1_every_score_is_that_of_plain_generation(family: str) -> None:
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    plain = tiny.model.generate(**inputs, **HOW)
    adaptive, outcome = generate(tiny.model, inputs, Policy(1.0, 1.5, beta=2.0), **HOW)
    assert outcome.passes == "none"
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, adaptive.logits, strict=True))


def test_each_sample_of_a_batch_gets_its_own_alpha() -> None:
    tiny = tiny_vlm("llava")
    rows = [tiny.prompt(seed=s) for s in range(4)]
    batch = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    _, probe = generate(tiny.model, batch, HIGH, **HOW)
    middle = sorted(probe.confidence)[2]
    policy = Policy(0.5, 2.0, beta=middle)
    together, outcome = generate(tiny.model, batch, policy, **HOW)
    assert outcome.alpha == [0.5 if c < middle else 2.0 for c in outcome.confidence] and len(set(outcome.alpha)) == 2
    for i, row in enumerate(rows):
        alone, single = generate(tiny.model, row, policy, **HOW)
        assert single.alpha == [outcome.alpha[i]]
        close(together.logits[0][i], alone.logits[0][0])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_a_static_cache_is_never_steered_in_silence(family: str) -> None:
    """Its length is that of the buffer: steering that compared lengths would never fire. The prompt is run again."""
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    wanted, _ = generate(tiny.model, inputs, LOW, **HOW)
    found, outcome = generate(tiny.model, inputs, LOW, **HOW, cache_implementation="static")
    assert outcome.passes == "full"
    for a, b in zip(found.logits, wanted.logits, strict=True):
        close(a, b)
    with steer(tiny.model, alpha=0.5, inputs=inputs):
        fixed = tiny.model.generate(**inputs, **HOW, cache_implementation="static")
    close(fixed.logits[0], wanted.logits[0])


def test_a_prompt_in_chunks_is_steered_at_its_last_position() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt(after=9)
    wanted, _ = generate(tiny.model, inputs, LOW, **HOW)
    for size in (5, 8, 27):
        found, outcome = generate(tiny.model, inputs, LOW, **HOW, prefill_chunk_size=size)
        assert outcome.passes == "cheap"
        for a, b in zip(found.logits, wanted.logits, strict=True):
            close(a, b)
    with pytest.raises(UsageError, match="cannot be run again") as caught:
        generate(tiny.model, inputs, LOW, **HOW, prefill_chunk_size=8, cache_implementation="static")
    assert "prefill_chunk_size" in caught.value.hint


def test_beams_sampling_and_streamers_start_from_the_same_scores() -> None:
    from transformers import TextStreamer

    class Quiet(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            pass

    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    greedy, _ = generate(tiny.model, inputs, LOW, **HOW)
    beams, outcome = generate(tiny.model, inputs, LOW, **{**HOW, "num_beams": 3, "num_return_sequences": 2})
    assert len(outcome.confidence) == 1
    close(beams.logits[0][0], greedy.logits[0][0])
    torch.manual_seed(5)
    drawn, _ = generate(tiny.model, inputs, LOW, **{**HOW, "do_sample": True, "temperature": 1.0, "top_k": 0})
    close(drawn.logits[0], greedy.logits[0])
    streamer = Quiet()
    streamed, _ = generate(tiny.model, inputs, LOW, **HOW, streamer=streamer)
    assert streamer.seen == streamed.sequences[0].tolist() == greedy.sequences[0].tolist()


def test_a_prompt_may_go_on_from_an_earlier_cache() -> None:
    """A prefix that is cached already (another question about one image): the steered positions are absolute."""
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    wanted, _ = generate(tiny.model, inputs, LOW, **HOW)
    cache = DynamicCache(config=tiny.model.config.text_config)
    cut = inputs["input_ids"].shape[1] - 4
    with torch.no_grad():
        head = {"input_ids": inputs["input_ids"][:, :cut], "pixel_values": inputs["pixel_values"]}
        tiny.model(**head, past_key_values=cache, use_cache=True)
    rest = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    found, outcome = generate(tiny.model, rest, LOW, **HOW, past_key_values=cache)
    assert outcome.passes == "cheap"
    for a, b in zip(found.logits, wanted.logits, strict=True):
        close(a, b)


def test_hidden_states_that_are_asked_for_are_the_steered_ones() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    more = {**HOW, "output_hidden_states": True}
    found, _ = generate(tiny.model, inputs, LOW, **more)
    with steer(tiny.model, alpha=0.5, inputs=inputs):
        whole = tiny.model.generate(**inputs, **more)
    for a, b in zip(found.hidden_states[0], whole.hidden_states[0], strict=True):
        assert a.shape == b.shape
        close(a, b)


@pytest.mark.slow
def test_flex_attention_is_steered_too() -> None:
    """Compiled for the CPU, which takes a while; its block masks are asked for the rows that are recomputed."""
    tiny = tiny_vlm("llava")
    rows = [tiny.prompt(after=9), tiny.prompt(after=5, seed=1, pad=4)]
    batch = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    with torch.no_grad(), steer(tiny.model, alpha=[0.5, 2.0], inputs=batch):
        wanted = tiny.model(**batch).logits[:, -1]
    tiny.model.set_attn_implementation({"text_config": "flex_attention"})
    try:
        with torch.no_grad():
            plain = tiny.model(**batch).logits
            with steer(tiny.model, alpha=[0.5, 2.0], inputs=batch):
                found = tiny.model(**batch).logits
            with steer(tiny.model, alpha=1.0, inputs=batch):
                assert torch.equal(tiny.model(**batch).logits, plain)
        close(found[:, -1], wanted)
        adaptive, outcome = generate(tiny.model, rows[0], LOW, **HOW)
        assert outcome.passes == "cheap"
    finally:
        tiny.model.set_attn_implementation({"text_config": "sdpa"})
    again, _ = generate(tiny.model, rows[0], LOW, **HOW)
    close(adaptive.logits[0], again.logits[0])


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("rows", ["last:3", "after-image"])
def test_several_steered_rows_are_run_again_together(family: str, rows: str) -> None:
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    found, outcome = generate(tiny.model, inputs, HIGH, Patch(rows=rows), **HOW)
    with steer(tiny.model, Patch(rows=rows), alpha=1.5, inputs=inputs):
        wanted = tiny.model.generate(**inputs, **HOW)
    assert outcome.passes == "cheap"
    for a, b in zip(found.logits, wanted.logits, strict=True):
        close(a, b)


def test_the_cheap_way_cannot_be_forced_where_it_is_not_exact() -> None:
    tiny = tiny_vlm("paligemma")
    with pytest.raises(UsageError, match="prompt rows see the last one"):
        generate(tiny.model, tiny.prompt(), LOW, force="cheap", **HOW)


def test_the_image_is_encoded_once() -> None:
    for family in ("llava", "qwen2_vl", "paligemma"):
        tiny = tiny_vlm(family)
        calls: list[int] = []
        tower = getattr(tiny.model.model, "vision_tower", None) or tiny.model.model.visual
        watch = tower.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        generate(tiny.model, tiny.prompt(), LOW, **HOW)
        watch.remove()
        assert calls == [1], family


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "paged"}, "continuous batching"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_ways_to_generate_that_cannot_be_steered_are_refused(arguments: dict[str, Any], message: str) -> None:
    tiny = tiny_vlm("llava")
    with pytest.raises(UsageError, match=message):
        generate(tiny.model, tiny.prompt(), LOW, **HOW, **arguments)


# --- many alphas from one run of the prompt ---------------------------------------------------------------------------


@EVERY
def test_one_run_of_the_prompt_answers_for_every_alpha(family: str) -> None:
    """In any order and repeatedly; answers and option scores are those of runs of their own."""
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    options = [[[5, 6], [7], [8, 9, 10]]]
    with Prefill(tiny.model, inputs) as prefill:
        found = {}
        for alpha in (0.5, 1.0, 2.0, 0.5):
            logits = prefill.steered(alpha)
            row = (logits, prefill.option_scores(logits, options)[0], prefill.answer(logits, tokens=4)[0])
            if alpha in found:
                assert torch.equal(found[alpha][0], logits) and found[alpha][1:] == row[1:]
            found[alpha] = row
        assert prefill.passes["prompt"] == 1
        assert prefill.passes["full" if family in PREFIX_LM else "cheap"] == 3  # alpha 1 is the prompt's own run
    for alpha, (logits, scores, answer) in found.items():
        with steer(tiny.model, alpha=alpha, inputs=inputs):
            whole = tiny.model.generate(**inputs, **HOW)
        close(logits, whole.logits[0])
        assert answer == whole.sequences[0, -4:].tolist()
        for option, score in zip(options[0], scores, strict=True):
            forced = _forced(tiny, inputs, option, alpha)
            assert score == pytest.approx(forced / len(option), abs=2e-5)


def _forced(tiny: Any, inputs: dict[str, Any], option: list[int], alpha: float) -> float:
    """Log-likelihood of an option by letting `generate` say nothing else."""
    start = inputs["input_ids"].shape[1]

    def only(_: int, ids: torch.Tensor) -> list[int]:
        return [option[ids.shape[0] - start]]

    with steer(tiny.model, alpha=alpha, inputs=inputs):
        out = tiny.model.generate(**inputs, **{**HOW, "max_new_tokens": len(option)}, prefix_allowed_tokens_fn=only)
    return sum(float(torch.log_softmax(s[0], -1)[t]) for s, t in zip(out.logits, option, strict=True))


def test_alphas_a_sample_and_stop_tokens() -> None:
    tiny = tiny_vlm("llava")
    rows = [tiny.prompt(seed=s) for s in (0, 1)]
    batch = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    with Prefill(tiny.model, batch) as prefill:
        logits = prefill.steered([0.5, 2.0])
        whole = prefill.answer(logits, tokens=4)
        stopped = prefill.answer(logits, tokens=4, stop=[whole[0][2]])
    for i, (row, alpha) in enumerate(zip(rows, (0.5, 2.0), strict=True)):
        with Prefill(tiny.model, row) as alone:
            close(alone.steered(alpha)[0], logits[i])
    assert stopped[0] == whole[0][:2]
    with pytest.raises(UsageError, match="every sample needs options"):
        prefill.option_scores(logits, [[[1]]])
