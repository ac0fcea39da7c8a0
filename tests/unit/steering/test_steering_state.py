"""Nothing is left behind and nothing leaks: exceptions, threads, two models, nesting; no block does nothing unseen."""

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from tiny_vlms import tiny_vlm

from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.steering.attention import _IN_USE, _STACK
from surgery.steering.generate import Policy, confidences, image_mask, steered_rows
from surgery.steering.patch import Patch, patch_from, read_patches
from surgery.steering.session import generate, steer

torch.set_num_threads(1)


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_exception_inside_the_block_restores_everything() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    before = logits(tiny.model, inputs)
    count = hooks(tiny.model)  # transformers' own
    with pytest.raises(ZeroDivisionError), steer(tiny.model, alpha=0.5, inputs=inputs):
        logits(tiny.model, inputs)
        raise ZeroDivisionError
    assert tiny.model.config.text_config._attn_implementation == "sdpa" and hooks(tiny.model) == count
    assert _STACK.get() == () and _IN_USE == {} and torch.equal(before, logits(tiny.model, inputs))

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    watch = tiny.model.lm_head.register_forward_hook(broken)
    with pytest.raises(ZeroDivisionError):
        generate(tiny.model, inputs, Policy(0.5, 1.5, 0.4), max_new_tokens=2)
    watch.remove()
    assert tiny.model.config.text_config._attn_implementation == "sdpa" and hooks(tiny.model) == count


def test_of_two_models_one_is_steered() -> None:
    tiny = tiny_vlm("llava")
    other = copy.deepcopy(tiny.model)
    inputs = tiny.prompt()
    before = logits(other, inputs)
    with steer(tiny.model, alpha=0.5, inputs=inputs) as run:
        assert not torch.equal(before, logits(tiny.model, inputs))
        assert torch.equal(before, logits(other, inputs))
        other.set_attn_implementation({"text_config": tiny.model.config.text_config._attn_implementation})
        assert torch.equal(before, logits(other, inputs))
    assert run.calls == 3


def test_threads_do_not_see_each_other() -> None:
    """One model, a thread an alpha, one without; each gets what it would get alone."""
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    wanted: dict[float, torch.Tensor] = {0.0: logits(tiny.model, inputs)}
    for alpha in (0.5, 2.0):
        with steer(tiny.model, alpha=alpha, inputs=inputs):
            wanted[alpha] = logits(tiny.model, inputs)
    count = hooks(tiny.model)
    found: dict[float, list[torch.Tensor]] = {a: [] for a in wanted}
    start = threading.Barrier(3)
    failures: list[BaseException] = []

    def work(alpha: float) -> None:
        try:
            start.wait()
            for _ in range(12):
                if alpha == 0.0:
                    found[alpha].append(logits(tiny.model, inputs))
                    continue
                with steer(tiny.model, alpha=alpha, inputs=inputs):
                    found[alpha].append(logits(tiny.model, inputs))
        except BaseException as err:  # a thread's error must fail the test
            failures.append(err)

    threads = [threading.Thread(target=work, args=(a,)) for a in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(torch.equal(f, wanted[a]) for a, many in found.items() for f in many)
    assert tiny.model.config.text_config._attn_implementation == "sdpa" and _IN_USE == {} and hooks(tiny.model) == count


def test_adaptive_answers_in_several_threads_do_not_mix() -> None:
    """Hooks on a model see every thread's forwards; prompts of other lengths and thresholds must not meet."""
    tiny = tiny_vlm("llava")
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    work = [(tiny.prompt(after=6), Policy(0.5, 1.5, 2.0)), (tiny.prompt(after=6, seed=1), Policy(0.5, 3.0, 0.0))]
    wanted = [generate(tiny.model, *w, **how) for w in work]
    wanted.append((tiny.model.generate(**work[0][0], **how), None))
    found: list[list[Any]] = [[], [], []]
    start = threading.Barrier(3)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait()
            for _ in range(6):
                if number == 2:
                    found[2].append((tiny.model.generate(**work[0][0], **how), None))
                else:
                    found[number].append(generate(tiny.model, *work[number], **how))
        except BaseException as err:  # a thread's error must fail the test
            failures.append(err)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for answers, (first, outcome) in zip(found, wanted, strict=True):
        assert len(answers) == 6
        for out, decided in answers:
            assert all(torch.equal(a, b) for a, b in zip(out.logits, first.logits, strict=True))
            assert decided == outcome


def test_a_block_in_which_nothing_ran_is_an_error() -> None:
    tiny = tiny_vlm("llava")
    with pytest.raises(UsageError, match="were not steered"), steer(tiny.model, alpha=0.5, inputs=tiny.prompt()):
        pass
    longer = tiny.prompt(after=9)
    with pytest.raises(UsageError, match="were not steered"), steer(tiny.model, alpha=0.5, inputs=longer):
        logits(tiny.model, tiny.prompt(after=6))  # never reaches the steered position


def test_training_mode_is_refused() -> None:
    tiny = tiny_vlm("llava")
    model = copy.deepcopy(tiny.model).train()
    with pytest.raises(UsageError, match="training mode"), steer(model, alpha=0.5, inputs=tiny.prompt()):
        logits(model, tiny.prompt())


def test_attention_weights_that_are_asked_for_are_those_that_were_used() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad(), steer(tiny.model, alpha=0.5, inputs=inputs, trace=True) as run:
        shown = tiny.model(**inputs, output_attentions=True).attentions
    tiny.model.set_attn_implementation("sdpa")
    for layer in range(3):
        torch.testing.assert_close(shown[layer][:, :, -1], run.attention(layer), atol=1e-6, rtol=0)
        assert not torch.allclose(shown[layer][:, :, -1], run.attention(layer, plain=True), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image_mask": torch.zeros(1, 5, dtype=torch.bool)}, UsageError, "no image token"),
        ({"inputs": {"input_ids": torch.tensor([[5, 6, 7]])}}, UsageError, "no image token"),
        ({"inputs": {}}, UsageError, "positions are unknown"),
        ({"alpha": float("nan")}, UsageError, "not a number"),
        ({"alpha": float("inf")}, UsageError, "not a number"),
        ({"alpha": -0.5}, UsageError, "not a number"),
        ({"alpha": [0.5, 0.5]}, UsageError, "2 alphas for 1 samples"),
        ({"patch": Patch(layers="2-3")}, UsageError, "valid: 0-2"),
        ({"patch": Patch(heads="1:7")}, UsageError, "valid: 0-3"),
        ({"patch": Patch(heads="5:0")}, UsageError, "valid: 0-2"),
        ({"patch": Patch(heads="5")}, UsageError, "LAYER:HEADS"),
        ({"patch": Patch(layers="")}, UsageError, "nothing"),
        ({"patch": Patch(mode="bias"), "alpha": 0.0}, UsageError, "logarithm"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, str) else "",
)
def test_bad_requests_are_named(change: dict[str, Any], error: type[SurgeryError], words: str) -> None:
    tiny = tiny_vlm("llava")
    arguments = {"alpha": 0.5, **change}
    if not {"inputs", "image_mask"} & set(change):
        arguments["inputs"] = tiny.prompt()
    with pytest.raises(error) as caught, steer(tiny.model, **arguments):
        pass
    assert words in str(caught.value) and caught.value.hint


def test_an_image_token_that_was_not_expanded_is_named() -> None:
    tiny = tiny_vlm("llava")
    inputs = {**tiny.prompt(), "input_ids": torch.tensor([[5, 150, 6, 7]]), "attention_mask": torch.ones(1, 4)}
    with pytest.raises(UsageError, match="one token an image") as caught, steer(tiny.model, alpha=0.5, inputs=inputs):
        pass
    assert "patch_size" in caught.value.hint


def test_models_with_adapters_are_steered() -> None:
    from peft import LoraConfig, get_peft_model

    from surgery.steering.prefill import Prefill

    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2)
    torch.manual_seed(1)
    wrapped = get_peft_model(copy.deepcopy(tiny.model), config).eval()
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found, outcome = generate(wrapped, inputs, Policy(0.3, 1.5, 2.0), **how)
    assert outcome.passes == "cheap" and outcome.alpha == [0.3]
    with steer(wrapped, alpha=0.3, inputs=inputs):
        whole = wrapped.generate(**inputs, **how)
    torch.testing.assert_close(found.logits[0], whole.logits[0], atol=2e-5, rtol=0)
    with Prefill(wrapped, inputs) as run:
        torch.testing.assert_close(run.steered(0.3), whole.logits[0], atol=2e-5, rtol=0)
    plain, _ = generate(tiny.model, inputs, Policy(0.3, 1.5, 2.0), **how)
    assert not torch.allclose(plain.logits[0], found.logits[0], atol=1e-3)


def test_a_right_padded_batch_is_refused() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    inputs["attention_mask"][:, -2:] = 0
    with pytest.raises(UsageError, match="padded on the right"), steer(tiny.model, alpha=0.5, inputs=inputs):
        pass


def test_models_without_image_keys_are_refused() -> None:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MllamaConfig,
        MllamaForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=2, **small)).eval()
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    with pytest.raises(CheckpointError, match="no image token id"), steer(llama, alpha=0.5, inputs=ids):
        pass
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with (
        pytest.raises(CheckpointError, match="cross-attention"),
        steer(t5.eval(), alpha=0.5, image_mask=torch.ones(1, 3)),
    ):
        pass
    text = {**small, "vocab_size": 20, "cross_attention_layers": [1], "num_key_value_heads": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
              "attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}  # fmt: skip
    mllama = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=19))
    with pytest.raises(CheckpointError, match="cross-attention"), steer(mllama.eval(), alpha=0.5, inputs=ids):
        pass


def test_flash_attention_is_refused_with_what_to_do() -> None:
    from surgery.steering.attention import SteeringError, backend

    with pytest.raises(SteeringError, match="attn_implementation='sdpa'"):
        backend("flash_attention_2")
    assert backend("sdpa").endswith("_sdpa") and backend(backend("sdpa")) == backend("sdpa")


def test_importing_rules_needs_no_torch() -> None:
    code = "import sys; import surgery.steering.patch; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- positions and confidences ----------------------------------------------------------------------------------------


def test_keys_by_id_by_span_and_with_video() -> None:
    config = tiny_vlm("qwen2_vl").model.config
    ids = torch.tensor([[5, 150, 150, 6, 150, 7, 151, 8], [5, 6, 7, 8, 9, 10, 11, 12]])
    assert image_mask(config, ids)[0].nonzero()[:, 0].tolist() == [1, 2, 4]
    assert image_mask(config, ids, "span")[0].nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    assert image_mask(config, ids, "id+video")[0].nonzero()[:, 0].tolist() == [1, 2, 4, 6]
    assert not image_mask(config, ids)[1].any() and not image_mask(config, ids, "span")[1].any()


def test_rows_last_after_the_image_and_all() -> None:
    keys = torch.tensor([[False, True, True, False, False], [False, False, False, False, False]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert steered_rows("last", keys).sum(1).tolist() == [1, 1]
    assert steered_rows("last:4", keys, attention).tolist() == [[False] + [True] * 4, [False] * 2 + [True] * 3]
    assert steered_rows("after-image", keys)[0].tolist() == [False, False, False, True, True]
    assert not steered_rows("after-image", keys)[1].any() and steered_rows("all", keys).all()


def test_confidences_are_those_of_their_definitions() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    logits = p.log() + 3.0
    found = {
        c: confidences(logits, Policy(0.5, 1.5, 0.4, confidence=c, options=(1, 2))) for c in ("option-prob", "margin")
    }
    assert confidences(logits, Policy(0.5, 1.5, 0.4)) == pytest.approx([0.5, 0.25])
    assert found["option-prob"] == pytest.approx([2 / 3, 0.5]) and found["margin"] == pytest.approx(
        [1 / 3, 0.0], abs=1e-6
    )
    entropy = confidences(logits, Policy(0.5, 1.5, 0.4, confidence="entropy"))
    h = -sum(v * torch.tensor(v).log().item() for v in (0.5, 0.3, 0.15, 0.05))
    assert entropy == pytest.approx([1 - h / torch.tensor(4.0).log().item(), 0.0], abs=1e-6)
    assert confidences(torch.tensor([[0.396, 0.604]]).log(), Policy(0.5, 1.5, 0.4, decimals=1)) == [0.6]


def test_the_threshold_itself_goes_to_alpha2_and_tau_blends() -> None:
    hard = Policy(0.5, 1.5, 0.4)
    assert (hard.alpha(0.39), hard.alpha(0.4), hard.alpha(0.41)) == (0.5, 1.5, 1.5)
    soft = Policy(0.5, 1.5, 0.4, tau=0.1)
    assert soft.alpha(0.4) == pytest.approx(1.0) and 0.5 < soft.alpha(0.3) < 1.0 < soft.alpha(0.5) < 1.5
    sharp = Policy(0.5, 1.5, 0.4, tau=1e-6)
    assert sharp.alpha(0.39) == pytest.approx(0.5) and sharp.alpha(0.41) == pytest.approx(1.5)


# --- rules as data ----------------------------------------------------------------------------------------------------


def test_patches_are_read_from_json(tmp_path: Any) -> None:
    file = tmp_path / "rules.json"
    file.write_text('[{"preset": "scalingvis", "alpha": 0.8}, {"mode": "abs", "heads": "0:1,3", "alpha": 1.5}]')
    first, second = read_patches(file)
    assert first == Patch(alpha=0.8) and second.as_json() == {"mode": "abs", "heads": "0:1,3", "alpha": 1.5}
    assert patch_from(second.as_json()) == second


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "neither a patch"),
        ("{", "not JSON"),
        ('{"alpa": 1}', "did you mean 'alpha'"),
        ('{"preset": "scaling"}', "scalingvis"),
        ('{"mode": "double"}', "mass-preserving"),
        ('{"rows": "first"}', "last:3"),
        ('{"keys": "text"}', "phrases"),
        ('{"alpha": -1}', "not a number"),
        ('{"table": {"0": {"1": -2}}}', "not a number"),
    ],
)
def test_bad_rules_are_named(tmp_path: Any, text: str, words: str) -> None:
    file = tmp_path / "rules.json"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_patches(file)
    assert words in str(caught.value)
