"""Paper mode against the published equations written naively (section 1.2), and the balance losses."""

import itertools
from typing import Any

import pytest
import torch
from tiny_moe import SPLIT, blocks, chained, moe_model

IDS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(1))
PAPER = {"route": "paper", "reselect": "allow", "gate": "none", "shared": "every", "aux": "none"}


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def one_pass(block: Any, t: int, h_TH: torch.Tensor, *, share: bool, k: int, normalise: bool) -> torch.Tensor:
    """MoE_t(h) token by token, expert by expert, in float64."""
    router = block.gate if t == 0 or share else block.coe_gates[t - 1]
    scores = torch.softmax(h_TH.double() @ router.weight.double().T, -1)
    out = torch.zeros_like(h_TH, dtype=torch.float64)
    for token, row in enumerate(scores):
        best = sorted(range(len(row)), key=lambda e: -row[e].item())[:k]
        weights = {e: row[e] for e in best}
        if normalise and k > 1:
            total = sum(weights.values()) + 1e-20
            weights = {e: w / total for e, w in weights.items()}
        else:
            weights = {e: w * block.gate.routed_scaling_factor for e, w in weights.items()}
        x = h_TH[token].double()
        for e, w in weights.items():
            gate, up = (block.experts.gate_up_proj[e].double() @ x).chunk(2)
            out[token] += w * (block.experts.down_proj[e].double() @ (silu(gate) * up))
    if block.shared_experts is not None:
        s, x = block.shared_experts, h_TH.double()
        hidden = silu(x @ s.gate_proj.weight.double().T) * (x @ s.up_proj.weight.double().T)
        out += hidden @ s.down_proj.weight.double().T
    return out


CASES = list(itertools.product((True, False), (True, False), (True, False), (1, 2, 3), (True, False), (0, 1)))


@pytest.fixture(scope="module")
def bases() -> dict[tuple[bool, int], Any]:
    """DeepSeek-V2 models by (norm_topk_prob, n_shared_experts)."""
    options = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.5}
    return {
        (norm, shared): moe_model("deepseek_v2", norm_topk_prob=norm, n_shared_experts=max(1, shared), **options)
        for norm in (True, False)
        for shared in (0, 1)
    }


@pytest.mark.parametrize(("inner", "outer", "share", "count", "normalise", "shared"), CASES)
def test_layers_compute_the_published_equations(
    inner: bool, outer: bool, share: bool, count: int, normalise: bool, shared: int, bases: Any
) -> None:
    base = bases[normalise, shared]
    knobs = {**PAPER, "inner_residual": inner, "outer_residual": outer, "iterations": count, "topk": [2] * count}
    model = chained(base, routers="share" if share else "own", **knobs)
    block, layer = blocks(model)[0], model.model.layers[0]
    if not shared:
        block.shared_experts = None
    with torch.no_grad():
        for number, gate in enumerate(getattr(block, "coe_gates", ())):
            gate.weight.add_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(number)))
    seen: dict[str, torch.Tensor] = {}
    layer.post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.update(r=a[0], n=out))
    layer.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad():
        model(IDS)
    h = seen["n"].reshape(-1, 32).double()
    for t in range(count):
        o = one_pass(block, t, h.float(), share=share, k=2, normalise=normalise)
        h = h + o if inner else o
    wanted = h + seen["r"].reshape(-1, 32).double() if outer else h
    assert (seen["out"].reshape(-1, 32) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_one_pass_with_the_outer_residual_is_the_native_model() -> None:
    base = moe_model("deepseek_v2")
    model = chained(base, **PAPER, iterations=1, inner_residual=False, outer_residual=True)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_every_family_leaves_out_the_residual(kind: str) -> None:
    """The layer's output is its block's (times the family's multiplier), also with gradient checkpointing."""
    model = chained(moe_model(kind), **PAPER, iterations=2, inner_residual=True, outer_residual=False)
    layer, seen = model.model.layers[-1], {}
    block = blocks(model)[-1]
    block.register_forward_hook(lambda m, a, out: seen.update(block=out[0] if isinstance(out, tuple) else out))
    layer.register_forward_hook(lambda m, a, out: seen.update(layer=out))
    plain = model(IDS, labels=IDS)
    assert torch.equal(seen["layer"], seen["block"] * getattr(layer, "residual_multiplier", 1.0))
    plain.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(torch.allclose(p.grad, grads[n], atol=1e-6) for n, p in model.named_parameters() if n in grads)


def naive_loss(scores_BSN: torch.Tensor, index_BSk: torch.Tensor, *, per_sequence: bool) -> float:
    batch, length, experts = scores_BSN.shape
    k = index_BSk.shape[2]
    if per_sequence:
        total = 0.0
        for b in range(batch):
            for e in range(experts):
                ce = experts / (length * k) * int((index_BSk[b] == e).sum())
                total += ce * float(scores_BSN[b, :, e].mean())
        return total / batch
    share = [int((index_BSk == e).sum()) / index_BSk.numel() for e in range(experts)]
    return sum(experts * f * float(scores_BSN[..., e].mean()) for e, f in enumerate(share))


@pytest.mark.parametrize("per_sequence", [True, False])
def test_the_balance_loss_is_the_definition_and_one_at_balance(per_sequence: bool) -> None:
    from surgery.arch.moe.carried.coe_chain import balance_loss

    scores = torch.rand(3, 7, 8).softmax(-1)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(21)])
    found = balance_loss(scores.view(21, 8), index, 3, per_sequence=per_sequence)
    assert float(found) == pytest.approx(naive_loss(scores, index.view(3, 7, 3), per_sequence=per_sequence), rel=1e-5)
    even = torch.arange(8).repeat(2).view(8, 2)
    assert float(balance_loss(torch.full((8, 8), 1 / 8), even, 1, per_sequence=per_sequence)) == pytest.approx(1)


@pytest.mark.parametrize("aux", ["seq", "batch"])
def test_the_balance_loss_reaches_routers_and_never_shows_in_the_loss(aux: str) -> None:
    base = moe_model("qwen3_moe")
    plain = chained(base, iterations=2, topk=[2, 2], **SPLIT, aux="none").train()
    weighed = chained(base, iterations=2, topk=[2, 2], **SPLIT, aux=aux, aux_alpha=0.1).train()
    losses = [m(IDS, labels=IDS).loss for m in (plain, weighed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    # Its gradient is exactly that of alpha · the loss of both passes, added up over layers.
    total = torch.zeros(())
    from surgery.arch.moe.carried.coe_chain import balance_loss

    probe = chained(base, iterations=2, topk=[2, 2], **SPLIT, aux="none").train()
    chosen: list[torch.Tensor] = []
    for block in blocks(probe):
        inner = block.choose

        def spy(t: int, z: Any, taken: Any, batch: int, block: Any = block, inner: Any = inner) -> Any:
            nonlocal total
            weights, index = inner(t, z, taken, batch)
            router = block.gate if t == 0 else block.coe_gates[0]
            scores = torch.softmax(z @ router.weight.T, -1)
            total = total + balance_loss(scores, index, batch, per_sequence=aux == "seq")
            chosen.append(index)
            return weights, index

        block.choose = spy
    loss = probe(IDS, labels=IDS).loss
    (loss + 0.1 * total).backward()
    for (name, p), q in zip(probe.named_parameters(), weighed.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name
    assert not torch.allclose(blocks(plain)[0].gate.weight.grad, blocks(weighed)[0].gate.weight.grad, atol=1e-6)
    weighed.eval()
    with torch.no_grad():
        weighed(IDS)  # no balance loss where nothing is trained


def test_a_model_made_by_name_trains_from_scratch() -> None:
    """The small paper model learns a repeated sequence; every added router moves."""
    from surgery.arch.moe.build import model_class
    from surgery.arch.moe.families import FAMILIES
    from surgery.arch.moe.layouts import MODELS

    kind = model_class(FAMILIES["deepseek_v2"])
    fields = {k: v for k, v in MODELS["coe-tiny"].items() if k not in ("model_type", "architectures", "auto_map")}
    torch.manual_seed(0)
    model = kind(kind.config_class(**fields)).train()
    before = [b.coe_gates[0].weight.clone() for b in blocks(model)]
    assert all(abs(float(w.detach().std()) - 1 / (3 * 64) ** 0.5) < 0.01 for w in before)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(40).repeat(2, 1)
    first = None
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        first = first or float(loss)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss) < 0.7 * first
    assert all(not torch.equal(b.coe_gates[0].weight, w) for b, w in zip(blocks(model), before, strict=True))
