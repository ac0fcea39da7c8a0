"""Routed experts in plain torch: the definition against one written here, and the grouped product against that."""

import pytest
import torch
from surgery.kernels import moe
from surgery.kernels.moe import reference
from surgery.kernels.moe.experts import Experts
from surgery.kernels.moe.routed import choose, why_not


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def naive(x, index, weights, up, down, up_bias=None, down_bias=None, oai=False) -> torch.Tensor:
    """One token and one expert at a time, in fp64, from halves and untransposed matrices."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for slot in range(index.shape[1]):
            e = int(index[t, slot])
            if not 0 <= e < up.shape[0]:
                continue
            both = up[e].double() @ x[t].double() + (0 if up_bias is None else up_bias[e].double())
            g, u = both.chunk(2)
            if oai:
                g, u = g.clamp(max=7), u.clamp(-7, 7)
                act = g / (1 + torch.exp(-1.702 * g)) * (u + 1)
            else:
                act = g / (1 + torch.exp(-g)) * u
            y = down[e].double() @ act + (0 if down_bias is None else down_bias[e].double())
            out[t] += weights[t, slot].double() * y
    return out


INDEX = torch.tensor([[0, 2], [2, 2], [3, 1], [4, 0], [-1, 9], [2, 0]])


def case() -> tuple[torch.Tensor, ...]:
    return draw(6, 8), INDEX, draw(6, 2).abs(), draw(4, 32, 8), draw(4, 8, 16), draw(4, 32) * 5, draw(4, 8)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("layout", ["plain", "oai"])
def test_every_backend_computes_the_formula(backend: str, layout: str) -> None:
    x, index, weights, up, down, up_bias, down_bias = case()
    wanted = naive(x, index, weights, up, down, up_bias, down_bias, oai=layout == "oai")
    if layout == "oai":
        up = up.view(4, 2, 16, 8).transpose(1, 2).reshape(4, 32, 8).transpose(1, 2).contiguous()
        up_bias = up_bias.view(4, 2, 16).transpose(1, 2).reshape(4, 32)
        pool = Experts(up, down.transpose(1, 2).contiguous(), up_bias, down_bias, "swiglu_oai", True, False)
    else:
        pool = Experts(up, down, up_bias, down_bias)
    got = getattr(reference, backend)(x, index, weights, pool)
    assert (got.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_gradients_of_the_grouped_product_are_those_of_the_definition() -> None:
    x, index, weights, up, down, up_bias, down_bias = case()
    found = []
    for backend, kind in (("loop", torch.float64), ("grouped_mm", torch.float32)):
        leaves = [t.to(kind).requires_grad_() for t in (x, weights, up, down, up_bias, down_bias)]
        out = moe.routed_experts(
            leaves[0], index, *leaves[1:4], gate_up_bias=leaves[4], down_bias=leaves[5], backend=backend
        )
        found.append(torch.autograd.grad(out, leaves, draw(6, 8, seed=2).to(kind)))
    for wanted, got in zip(*found, strict=True):
        assert (got.double() - wanted).abs().max() <= 8e-5 * wanted.abs().max()
    assert (
        found[0][1][4, 0] == 0 and found[1][1][4].abs().sum() == 0
    )  # pairs without an expert teach the router nothing


def test_bf16_is_summed_in_fp32() -> None:
    x, index, weights, up, down = (t.bfloat16() if t.is_floating_point() else t for t in case()[:5])
    exact = naive(x, index, weights, up, down)
    for backend, tolerance in (("loop", 4e-3), ("grouped_mm", 2e-2)):
        got = moe.routed_experts(x, index, weights, up, down, backend=backend)
        assert got.dtype == torch.bfloat16 and (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_no_tokens_give_zero_gradients(backend: str) -> None:
    up, down = draw(4, 24, 8).requires_grad_(), draw(4, 8, 12).requires_grad_()
    args = torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    grads = torch.autograd.grad(moe.routed_experts(*args, up, down, backend=backend).sum(), (up, down))
    assert all(g.abs().sum() == 0 for g in grads)


def test_auto_goes_around_rows_that_grouped_mm_refuses() -> None:
    """torch's product raises for rows of less than 16 bytes; whoever asks for it by name is told so."""
    x, index, weights = draw(5, 6), INDEX[:5], draw(5, 2)
    pool = Experts(draw(4, 20, 6), draw(4, 6, 10))
    assert choose("auto", x, pool) == "loop" and choose("auto", case()[0], Experts(*case()[3:5])) == "grouped_mm"
    got = moe.routed_experts(x, index, weights, pool.gate_up_proj, pool.down_proj)
    wanted = naive(x, index, weights, pool.gate_up_proj, pool.down_proj)
    assert (got.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    with pytest.raises(ValueError, match=r"H 6, I 10 is no multiple of 4.*\(4, 20, 6\)"):
        moe.routed_experts(x, index, weights, pool.gate_up_proj, pool.down_proj, backend="grouped_mm")
    gaps = Experts(draw(4, 24, 16)[:, :, ::2], draw(4, 8, 12))
    assert "contiguous" in why_not("grouped_mm", gaps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": draw(6, 9)}, r"hidden must be \[tokens, 8\], got \(6, 9\)"),
        ({"top_k_index": INDEX[:4]}, r"top_k_index \(4, 2\)"),
        ({"top_k_index": INDEX.float()}, "int32 or int64, got torch.float32"),
        ({"top_k_weights": draw(6, 3)}, r"top_k_weights \(6, 3\)"),
        ({"down_proj": draw(4, 8, 11)}, r"gate_up_proj \(4, 32, 8\) does not fit down_proj \(4, 8, 11\)"),
        ({"down_proj": draw(4, 8, 16).bfloat16()}, "one dtype"),
        ({"down_bias": draw(4, 9)}, r"down_bias \(4, 9\) must be \(4, 8\)"),
        ({"activation": "gelu"}, "'gelu' is none of swiglu, swiglu_oai"),
        ({"backend": "cutlass"}, "'cutlass' is none of auto, loop, grouped_mm, triton"),
    ],
)
def test_what_does_not_fit_is_named_with_its_shape(change: dict, message: str) -> None:
    x, index, weights, up, down = case()[:5]
    good = {"hidden": x, "top_k_index": index, "top_k_weights": weights, "gate_up_proj": up, "down_proj": down}
    with pytest.raises(ValueError, match=message):
        moe.routed_experts(**{**good, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_kernels_are_refused_without_a_gpu() -> None:
    assert moe.backends() == {"loop", "grouped_mm"}
    with pytest.raises(ValueError, match="there is no CUDA device"):
        moe.routed_experts(*case()[:5], backend="triton")
