"""The steered backend against a definition written out in plain torch, for every family and both backends."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_vlms import FAMILIES, Tiny, tiny_vlm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from surgery.steering.patch import Patch
from surgery.steering.session import steer

torch.set_num_threads(1)
ALPHAS = (0.0, 0.25, 0.5, 0.8, 1.0, 1.2, 2.0, 3.0)
PREFIX_LM = {"paligemma"}
EVERY = pytest.mark.parametrize("family", FAMILIES)
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "eager"])


class Naive:
    """Scores, image columns of the last row times alpha, mask, softmax in float32, values: the definition."""

    alpha = 1.0
    keys: torch.Tensor
    layers: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def attention(cls, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(2, 3)).float() * scaling
        if module.layer_idx in cls.layers:
            scores[:, :, -1] = torch.where(cls.keys[:, None], cls.alpha * scores[:, :, -1], scores[:, :, -1])
        weights = torch.softmax(scores + mask.float(), dim=-1).to(q.dtype)
        return (weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive_definition", Naive.attention)
AttentionMaskInterface.register("naive_definition", eager_mask)


@contextmanager
def on(model: Any, backend: str) -> Iterator[Any]:
    """`model` with another backend of its text model."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": backend})
    try:
        yield model
    finally:
        model.set_attn_implementation({"text_config": before})


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def steered(model: Any, inputs: dict[str, Any], alpha: float, **patch: Any) -> torch.Tensor:
    with steer(model, Patch(**patch), alpha=alpha, inputs=inputs):
        return logits(model, inputs)


def defined(tiny: Tiny, inputs: dict[str, Any], alpha: float, layers: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
    Naive.alpha, Naive.layers, Naive.keys = alpha, layers, inputs["input_ids"] == tiny.model.config.image_token_id
    with on(tiny.model, "naive_definition"):
        return logits(tiny.model, inputs)


@EVERY
@BACKENDS
def test_logits_are_those_of_the_definition(family: str, backend: str) -> None:
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    with on(tiny.model, backend):
        for alpha in ALPHAS:
            found = steered(tiny.model, inputs, alpha)
            torch.testing.assert_close(found, defined(tiny, inputs, alpha), atol=2e-5, rtol=0)


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_1_is_the_model_itself(family: str, backend: str, dtype: torch.dtype) -> None:
    """Bit for bit: logits of all rows, generated scores, and everything after leaving the block."""
    tiny = tiny_vlm(family)
    model = tiny.model if dtype == torch.float32 else copy.deepcopy(tiny.model).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.prompt().items()}
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with on(model, backend):
        before, scores = logits(model, inputs), model.generate(**inputs, **how)
        with steer(model, alpha=1.0, inputs=inputs) as run:
            inside, again = logits(model, inputs), model.generate(**inputs, **how)
        assert run.layers == (0, 1, 2)
        assert torch.equal(before, inside) and torch.equal(before, logits(model, inputs))
        assert torch.equal(scores.sequences, again.sequences)
        assert all(torch.equal(a, b) for a, b in zip(scores.logits, again.logits, strict=True))


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_keep_their_bits(family: str, backend: str, dtype: torch.dtype) -> None:
    tiny = tiny_vlm(family)
    model = tiny.model if dtype == torch.float32 else copy.deepcopy(tiny.model).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.prompt().items()}
    with on(model, backend):
        before, after = logits(model, inputs), steered(model, inputs, 0.25)
    assert not torch.equal(before[:, -1], after[:, -1])
    if family in PREFIX_LM:  # rows of the prefix see the last one: from the second layer on they all change
        assert not torch.equal(before[:, :-1], after[:, :-1])
    else:
        assert torch.equal(before[:, :-1], after[:, :-1])


@EVERY
def test_steering_acts_on_the_image_columns_of_every_text_layer_alone(family: str) -> None:
    """The vision tower is never steered, and exactly the image's keys are."""
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    with steer(tiny.model, alpha=0.5, inputs=inputs, trace=True) as run:
        logits(tiny.model, inputs)
    assert run.calls == 3
    for row in run.trace:
        total = inputs["input_ids"].shape[1]
        seen = (inputs["input_ids"][:, row.first_key : total] == 150).sum(-1)
        if getattr(tiny.model.config.text_config, "layer_types", ["full_attention"] * 3)[row.layer] == "full_attention":
            assert row.columns.tolist() == seen.tolist() == [tiny.image_tokens]
        assert row.rows == (total - 1,) and row.columns.item() <= tiny.image_tokens
        torch.testing.assert_close(row.weights.sum(-1), torch.ones(row.weights.shape[:3]))


def test_naming_the_whole_model_leaves_the_vision_tower_alone() -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    wanted = steered(tiny.model, inputs, 0.5)
    with steer(tiny.model, alpha=0.5, inputs=inputs) as run:
        name = tiny.model.config.text_config._attn_implementation
        tiny.model.set_attn_implementation(name)
        assert tiny.model.config.vision_config._attn_implementation == name
        found = logits(tiny.model, inputs)
    tiny.model.set_attn_implementation("sdpa")
    assert run.calls == 3 and torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_layers_are_chosen(family: str) -> None:
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    with steer(tiny.model, Patch(layers="1-2"), alpha=0.5, inputs=inputs, trace=True) as run:
        found = logits(tiny.model, inputs)
    assert run.layers == (1, 2)
    torch.testing.assert_close(found, defined(tiny, inputs, 0.5, (1, 2)), atol=2e-5, rtol=0)
    with torch.no_grad():
        before = tiny.model(**inputs, output_hidden_states=True).hidden_states
        with steer(tiny.model, Patch(layers="2"), alpha=0.5, inputs=inputs):
            after = tiny.model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not torch.equal(before[3], after[3])


@BACKENDS
def test_heads_are_chosen_and_the_others_keep_their_bits(backend: str) -> None:
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args: outputs.__setitem__(name, args[0].view(1, -1, 4, 8))

    projection = tiny.model.model.language_model.layers[1].self_attn.o_proj
    with on(tiny.model, backend):
        with projection.register_forward_pre_hook(keep("before")):
            logits(tiny.model, inputs)
        with projection.register_forward_pre_hook(keep("after")):
            steered(tiny.model, inputs, 0.5, layers="1", heads="1:0,2")
    same = [torch.equal(outputs["before"][:, :, h], outputs["after"][:, :, h]) for h in range(4)]
    assert same == [False, True, False, True]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("width", [None, 12])
def test_any_grouping_of_heads(heads: tuple[int, int], width: int | None) -> None:
    """Groups of 1, 2 and 4 heads, odd counts, a head width that is given and one that follows from the others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {} if width is None else {"head_dim": width}
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], initializer_range=0.3, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 60, (2, 9))
    keys = torch.zeros(2, 9, dtype=torch.bool)
    keys[:, 2:6] = True
    Naive.alpha, Naive.keys, Naive.layers = 0.3, keys, (0, 1)
    with steer(model, alpha=0.3, image_mask=keys):
        found = logits(model, {"input_ids": ids})
    model.set_attn_implementation("naive_definition")
    torch.testing.assert_close(found, logits(model, {"input_ids": ids}), atol=2e-5, rtol=0)


@EVERY
@BACKENDS
def test_a_left_padded_batch_equals_its_single_runs(family: str, backend: str) -> None:
    """Unpadded, padded, and a prompt without an image, an alpha each; scores of the first and of later tokens."""
    tiny = tiny_vlm(family)
    single = [
        tiny.prompt(after=9),
        tiny.prompt(after=5, seed=1, pad=4),
        tiny.prompt(before=2, after=7, images=0, seed=2),
    ]
    width = single[0]["input_ids"].shape[1]
    plain = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    batch: dict[str, Any] = {}
    for name in single[0]:
        rows = [s[name] for s in single if name in s]
        if name in plain:
            rows = [torch.nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows]
        batch[name] = torch.cat(rows)
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with on(tiny.model, backend):
        with steer(tiny.model, alpha=[0.5, 2.0, 0.5], inputs=batch):
            together = torch.stack(tiny.model.generate(**batch, **how).logits, dim=1)
        for row, (inputs, alpha) in enumerate(zip(single, (0.5, 2.0, None), strict=True)):
            if alpha is None:
                alone = tiny.model.generate(**inputs, **how).logits
            else:
                with steer(tiny.model, alpha=alpha, inputs=inputs):
                    alone = tiny.model.generate(**inputs, **how).logits
            torch.testing.assert_close(together[row], torch.cat(alone), atol=2e-5, rtol=0)
        unsteered = torch.stack(tiny.model.generate(**batch, **how).logits, dim=1)
    assert torch.equal(together[2], unsteered[2])  # nothing to steer: the same bits


def test_permuting_image_keys_with_their_values_changes_nothing() -> None:
    """Without position codes on keys a row's output does not depend on the order of what it sees."""
    torch.manual_seed(3)
    from types import SimpleNamespace

    from surgery.steering.attention import Applied, Rule, Steering, _override

    q, k, v = (torch.randn(1, h, n, 8) for h, n in ((4, 1), (2, 10), (2, 10)))
    keys = torch.zeros(1, 10, dtype=torch.bool)
    keys[:, 2:7] = True
    state = Steering(None, [Applied(Rule(), (0.4,), keys, torch.ones(1, 10, dtype=torch.bool))])
    state.begin(9, 1, 1)
    order = torch.tensor([0, 1, 5, 2, 6, 3, 4, 7, 8, 9])
    module = SimpleNamespace(layer_idx=0)
    acting = [(state, *pair) for pair in state.acting(0)]
    out = [
        _override("sdpa", module, q, k[:, :, o], v[:, :, o], None, (torch.zeros(1, 1, 4, 8), None), acting, {})[0]
        for o in (torch.arange(10), order)
    ]
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=0)
