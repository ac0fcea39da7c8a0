"""The kernels on a GPU against the definition. Where there is none they are only interpreted and compiled."""

import pytest
import torch
from surgery.kernels import moe
from surgery.kernels.moe.experts import Experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot be run here"),
]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# tokens, hidden, width, experts, k: large, medium and small tiles, decoding, one expert, every expert, odd sizes
SHAPES = [
    (4096, 512, 256, 16, 4),
    (257, 260, 132, 8, 3),
    (64, 1024, 704, 63, 8),
    (1, 512, 256, 16, 4),
    (129, 96, 80, 4, 4),
]


def draw(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= tolerance, f"{what}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "h", "i", "n", "k"), SHAPES)
def test_kernels_match_the_definition(t: int, h: int, i: int, n: int, k: int, dtype: torch.dtype) -> None:
    tensors = [draw(t, h), torch.rand(t, k), draw(n, 2 * i, h) / h**0.5, draw(n, h, i) / i**0.5]
    tensors = [a.to("cuda", dtype) for a in tensors]
    index = torch.stack([torch.randperm(n)[:k] for _ in range(t)]).cuda()
    found = {}
    for backend, kind in (("loop", torch.float64), ("triton", dtype), ("again", dtype)):
        leaves = [a.to(kind).requires_grad_() for a in tensors]
        name = "triton" if backend == "again" else backend
        out = moe.routed_experts(leaves[0], index, *leaves[1:], backend=name)
        found[backend] = [out, *torch.autograd.grad(out, leaves, draw(t, h).to("cuda", kind))]
    for at, (wanted, got, again) in enumerate(zip(*found.values(), strict=True)):
        close(got, wanted, TOLERANCE[dtype] * (4 if at else 1), f"tensor {at}")
        assert torch.equal(got, again)
    with torch.no_grad():
        close(moe.routed_experts(tensors[0], index, *tensors[1:]), found["loop"][0], TOLERANCE[dtype], "inference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_matches_the_definition(dtype: torch.dtype) -> None:
    t, h, i, n = 700, 256, 128, 16
    tensors = [draw(t, h), draw(n, 2 * i, h) / h**0.5, draw(n, h, i) / i**0.5, draw(1, h) / 4, draw(2, h)]
    tensors = [a.to("cuda", dtype) for a in tensors]
    routers = [draw(n, h).to("cuda", dtype).contiguous() for _ in range(2)]
    cfg = moe.Chain((2, 2), base_k=4, normalize=True, reselect="forbid")
    found = {}
    for backend in ("loop", "triton"):
        leaves = [a.clone().requires_grad_() for a in tensors]
        pool = Experts(leaves[1], leaves[2])
        out = moe.coe_layer(leaves[0], [moe.Router(r) for r in routers], pool, *leaves[3:], cfg, backend=backend)
        found[backend] = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    if dtype == torch.float32:  # in bf16 a rounded state may choose another expert
        for at, (wanted, got) in enumerate(zip(*found.values(), strict=True)):
            close(got, wanted, 1e-4, f"tensor {at}")
    assert all(torch.isfinite(a).all() for a in found["triton"])


def test_interleaved_transposed_clamped_with_biases() -> None:
    t, h, i, n, k = 300, 128, 96, 8, 3
    up, down, up_bias, down_bias = (
        a.cuda() for a in (draw(n, h, 2 * i) / 9, draw(n, i, h) / 9, draw(n, 2 * i), draw(n, h))
    )
    index = torch.stack([torch.randperm(n)[:k] for _ in range(t)]).cuda()
    layout = {"activation": "swiglu_oai", "is_transposed": True, "is_concatenated": False}
    args = (draw(t, h).cuda(), index, torch.rand(t, k).cuda(), up, down)
    more = {"gate_up_bias": up_bias, "down_bias": down_bias, **layout}
    close(moe.routed_experts(*args, **more), moe.routed_experts(*args, **more, backend="loop"), 2e-5, "gpt-oss")


def test_nothing_waits_and_the_layer_fits_a_graph() -> None:
    """A captured layer replays with new input; capture itself fails on any synchronisation."""
    h, i, n = 256, 128, 16
    pool = Experts((draw(n, 2 * i, h) / 16).cuda(), (draw(n, h, i) / 11).cuda())
    routers = [moe.Router(draw(n, h).cuda()) for _ in range(2)]
    args = (routers, pool, torch.ones(1, h).cuda(), torch.ones(2, h).cuda(), moe.Chain((2, 2)))
    for tokens in (8, 512):
        x = draw(tokens, h).cuda()
        with torch.no_grad():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                moe.coe_layer(x, *args, backend="triton")
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = moe.coe_layer(x, *args, backend="triton")
            x.copy_(draw(tokens, h).cuda() * 2)
            graph.replay()
            close(out, moe.coe_layer(x, *args, backend="loop"), 1e-4, f"{tokens} tokens")


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """T * K * 2I passes 2^31: needs about 20 GiB."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    t, k, i, h, n = 270_000, 8, 512, 64, 8
    up, down = (draw(n, 2 * i, h) / 8).cuda().bfloat16(), (draw(n, h, i) / 22).cuda().bfloat16().requires_grad_()
    index = torch.arange(k).expand(t, k).cuda()
    out = moe.routed_experts(draw(t, h).cuda().bfloat16(), index, torch.ones(t, k).cuda() / k, up, down)
    tail = moe.routed_experts(draw(t, h).cuda().bfloat16()[-9:], index[-9:], torch.ones(9, k).cuda() / k, up, down)
    close(out[-9:], tail, 2e-2, "the last rows")
