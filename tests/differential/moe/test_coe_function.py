"""What a conversion keeps: logits against the native models of every family, gradients, and perturbed tensors."""

import copy
from typing import Any

import pytest
import torch
from tiny_moe import FIELDS, SPLIT, blocks, chained, moe_model

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=list(FIELDS))
def native(request: pytest.FixtureRequest) -> Any:
    """A small random model of each family."""
    return moe_model(request.param)


def logits(model: Any) -> torch.Tensor:
    """With gradients on, so that no pass is left out."""
    return model(IDS).logits.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_identity_and_append_are_equal_to_the_bit(native: Any, experts: str, dtype: torch.dtype) -> None:
    base = copy.deepcopy(native).to(dtype)
    base.set_experts_implementation(experts)
    expected = logits(base)
    assert expected.abs().max() > 1
    for count in (1, 2, 3):
        chain = chained(base, iterations=count)
        chain.set_experts_implementation(experts)
        assert torch.equal(logits(chain), expected), count


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_split_differs_by_rounding_only(native: Any, experts: str) -> None:
    native.set_experts_implementation(experts)
    expected = logits(native)
    # Four layers with linear attention re-amplify what the first rounds.
    limit = 2e-6 if native.config.model_type != "qwen3_next" else 1e-5 * float(expected.abs().max())
    for topk in ([2, 2], [2, 1, 1], [1, 1, 1, 1], [3, 1]):
        chain = chained(native, iterations=len(topk), topk=topk, **SPLIT)
        chain.set_experts_implementation(experts)
        assert (logits(chain) - expected).abs().max() < limit


def test_split_stays_finite_and_never_short_when_routers_drift_apart(native: Any) -> None:
    chain = chained(native, iterations=3, topk=[2, 1, 1], **SPLIT)
    with torch.no_grad():
        for block in blocks(chain):
            for gate in block.coe_gates:
                gate.weight.normal_()
            block.coe_alpha.fill_(0.5)
    chosen: list[list[torch.Tensor]] = []
    for block in blocks(chain):
        inner = block.choose

        def spy(t: int, z: Any, taken: Any, batch: int, inner: Any = inner) -> Any:
            weights, index = inner(t, z, taken, batch)
            assert torch.isfinite(weights).all()
            chosen.append([*taken, index])
            return weights, index

        block.choose = spy
    assert torch.isfinite(logits(chain)).all()
    for passes in chosen:
        everything = torch.cat(passes, 1)
        assert all(len(set(row.tolist())) == len(row) for row in everything)  # no expert twice for a token


def test_without_exclusion_both_passes_would_take_the_same_experts(native: Any) -> None:
    expected = logits(native)
    naive = chained(native, iterations=2, topk=[2, 2], route="split", reselect="allow", shared="first")
    assert (logits(naive) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["append", "split"])
def test_gradients_at_the_start(native: Any, mode: str) -> None:
    """append: only beta moves at first; split: routers, gates and experts do."""
    knobs = {"topk": [2, 2], **SPLIT} if mode == "split" else {}
    chain = chained(native, iterations=2, **knobs)
    chain(IDS, labels=IDS).loss.backward()
    for block in blocks(chain):
        added = block.coe_gates[0].weight.grad
        assert block.coe_beta.grad[1].abs().max() > 0
        if mode == "append":
            assert not added.any() and not block.coe_alpha.grad.any()
        else:
            assert added.abs().max() > 0
            assert block.experts.down_proj.grad.abs().max() > 0
    if mode == "split":
        assert blocks(chain)[0].coe_alpha.grad.abs().max() > 0


def test_every_added_tensor_matters_and_learns_once_it_is_off_its_start(native: Any) -> None:
    chain = chained(native, iterations=2, topk=[2, 2], **SPLIT)
    with torch.no_grad():
        for block in blocks(chain):
            block.coe_alpha.uniform_(0.1, 0.3)
            block.coe_beta.uniform_(0.5, 1.5)
            for gate in block.coe_gates:
                gate.weight.add_(0.1 * torch.randn_like(gate.weight))
    before = logits(chain)
    chain(IDS, labels=IDS).loss.backward()
    added = [(n, p) for n, p in chain.named_parameters() if ".coe_" in n]
    assert len(added) == len(blocks(chain)) * (len(list(blocks(chain)[0].coe_gates[0].parameters())) + 2)
    for name, tensor in added:
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().max() > 0, name
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
            assert not torch.equal(logits(chain), before), name
            tensor.copy_(kept)


def test_a_pass_that_nothing_reads_is_left_out_only_without_gradients() -> None:
    chain = chained(moe_model("qwen3_moe"), iterations=2)
    calls: list[int] = []
    blocks(chain)[0].experts.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        left_out = chain(IDS).logits
    assert len(calls) == 1
    assert torch.equal(left_out, logits(chain)) and len(calls) == 3
    with torch.no_grad():
        chain.model.layers[0].mlp.coe_beta[1, 0] = 1e-3
        chain(IDS)
    assert len(calls) == 5


def test_every_router_is_recorded() -> None:
    chain = chained(moe_model("qwen3_moe"), iterations=2)
    with torch.no_grad():
        assert len(chain(IDS, output_router_logits=True).router_logits) == 4
        assert len(chain(IDS, output_router_logits=True).router_logits) == 4  # the second call leaves none out either


def test_rows_that_grouped_mm_cannot_take_go_through_the_loop() -> None:
    chain = chained(moe_model("qwen3_moe", moe_intermediate_size=10), iterations=2)
    assert chain.config._experts_implementation == "eager"
    assert torch.isfinite(logits(chain)).all()


def test_jitter_leaves_the_input_alone() -> None:
    chain = chained(moe_model("mixtral", router_jitter_noise=0.1), iterations=2).train()
    z = torch.randn(1, 4, 32)
    before = z.clone()
    blocks(chain)[0](z)
    assert torch.equal(z, before)


def test_a_penalty_lies_between_forbid_and_allow() -> None:
    native = moe_model("qwen3_moe")
    results = [
        logits(chained(native, iterations=2, topk=[2, 2], route="split", reselect=how, shared="first"))
        for how in ("forbid", "penalty:1000", "penalty:0")
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_a_fresh_split_costs_one_pass_through_the_experts() -> None:
    native = moe_model("qwen3_moe")
    chain = chained(native, iterations=2, topk=[2, 2], **SPLIT)
    calls: list[int] = []
    blocks(chain)[0].experts.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(chain(IDS).logits, native(IDS).logits) and len(calls) == 1
        chain.model.layers[0].mlp.coe_gates[0].weight.add_(0.1)  # another list, still of the same input
        together = chain(IDS).logits
    assert len(calls) == 2
    assert torch.allclose(logits(chain), together, atol=1e-5) and len(calls) == 4
    with torch.no_grad():
        chain.model.layers[0].mlp.coe_alpha[0, 0] = 1e-3
        chain(IDS)
    assert len(calls) == 6
