"""Checks of the kernels in Triton's interpreter, run as a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so it is set by whoever starts this. Prints one JSON object: the
name of each check and what went wrong.

Every kernel runs forward and backward, on shapes that no block size divides, against the definition (`loop`) in fp64
and torch's own derivatives of it.
"""

import json
import sys
import traceback

import torch
from surgery.kernels import moe
from surgery.kernels.moe import function, launch
from surgery.kernels.moe.experts import Experts
from surgery.kernels.moe.plan import Plan
from surgery.kernels.moe.plan_kernels import kernel_plan
from torch import Tensor

FP32 = 2e-5


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} for {tuple(wanted.shape)}"
    if wanted.numel():
        error = (got.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{what}: off by {error:.2e} of the largest value"


def against_definition(
    index: Tensor, h: int, i: int, n: int, *, dtype: torch.dtype = torch.float32, tolerance: float = FP32,
    bias: bool = False, **layout: object,
) -> None:  # fmt: skip
    """Output and gradients of the kernels, and those of `loop` on the same numbers in fp64; twice, the same bits."""
    t, k = index.shape
    up, down = draw(n, 2 * i, h) / h**0.5, draw(n, h, i) / i**0.5
    if layout.get("is_transposed"):
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    tensors = [draw(t, h), torch.rand(t, k), up, down] + ([draw(n, 2 * i) * 4, draw(n, h)] if bias else [])
    tensors = [a.to(dtype) for a in tensors]
    found = {}
    for backend, kind in (("loop", torch.float64), ("triton", dtype), ("again", dtype)):
        x, w, *weights = leaves = [a.detach().to(kind).requires_grad_() for a in tensors]
        biases = dict(zip(("gate_up_bias", "down_bias"), weights[2:], strict=False))
        name = "triton" if backend == "again" else backend
        out = moe.routed_experts(x, index, w, *weights[:2], backend=name, **biases, **layout)
        assert out.dtype == kind
        found[backend] = [out, *torch.autograd.grad(out, leaves, draw(t, h, seed=3).to(kind))]
    for at, (wanted, got, again) in enumerate(zip(*found.values(), strict=True)):
        name = ("out", "hidden", "weights", "gate_up", "down", "gate_up_bias", "down_bias")[at]
        close(got, wanted, tolerance * (4 if at else 1), name)
        assert torch.equal(got, again), f"{name}: other bits on repeat"
    with torch.no_grad():
        x, w, *weights = tensors
        biases = dict(zip(("gate_up_bias", "down_bias"), weights[2:], strict=False))
        out = moe.routed_experts(x, index, w, *weights[:2], backend="triton", **biases, **layout)
        close(out, found["loop"][0], tolerance, "without gradients")


def choice(t: int, k: int, n: int) -> Tensor:
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s))[:k] for s in range(t)])


def check_awkward_sizes() -> None:
    against_definition(choice(23, 3, 5), 37, 21, 5)


def check_no_tokens() -> None:
    against_definition(torch.zeros(0, 2, dtype=torch.int64), 24, 20, 3)


def check_one_expert_takes_all() -> None:
    against_definition(torch.full((35, 1), 2), 20, 12, 4)


def check_every_expert_is_chosen() -> None:
    against_definition(choice(18, 4, 4), 16, 24, 4)


def check_the_same_expert_twice() -> None:
    against_definition(torch.tensor([[1, 1], [0, 1]] * 10), 20, 12, 3)


def check_pairs_without_an_expert() -> None:
    index = choice(22, 3, 6)
    index[::3, 1], index[1::4, 0] = 6, -1
    against_definition(index.to(torch.int32), 24, 20, 6)


def check_one_token() -> None:
    against_definition(choice(1, 2, 3), 24, 20, 3)


def check_interleaved_transposed_clamped_with_biases() -> None:
    layout = {"activation": "swiglu_oai", "is_transposed": True, "is_concatenated": False}
    against_definition(choice(24, 3, 5), 40, 24, 5, bias=True, **layout)


def check_interleaved_and_biases_apart() -> None:
    against_definition(choice(22, 3, 3), 20, 12, 3, bias=True, is_concatenated=False)


def check_bf16() -> None:
    against_definition(choice(22, 3, 3), 24, 20, 3, dtype=torch.bfloat16, tolerance=2e-2)


def check_fp16() -> None:
    against_definition(choice(22, 3, 3), 24, 20, 3, dtype=torch.float16, tolerance=3e-3)


def check_rows_with_gaps() -> None:
    """Hidden that is a slice of something wider, weights that are views."""
    wide, up, down = draw(22, 50), draw(3, 24, 40), draw(3, 20, 24)
    index, weights = choice(22, 3, 3), torch.rand(22, 3)
    args = (wide[:, 5:25], index, weights, up.transpose(1, 2)[:, :24, :20], down[:, :, ::2])
    close(moe.routed_experts(*args, backend="triton"), moe.routed_experts(*args, backend="loop"), FP32, "views")


def check_fp32_routing_weights_and_hidden_of_another_dtype() -> None:
    x, up, down = draw(22, 20), draw(3, 24, 20).bfloat16(), draw(3, 20, 12).bfloat16()
    index, weights = choice(22, 3, 3), torch.rand(22, 3, requires_grad=True)
    out = moe.routed_experts(x, index, weights, up, down, backend="triton")
    (by_weights,) = torch.autograd.grad(out.sum(), weights)
    assert out.dtype == torch.float32 and by_weights.dtype == torch.float32
    close(out, moe.routed_experts(x, index, weights, up, down, backend="loop"), 2e-2, "mixed")


def same_plan(got: Plan, wanted: Plan) -> None:
    rows = int(wanted.expert_start[-1])
    for name in ("row_of_pair", "expert_start", "tile_expert", "tile_row", "num_tiles"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for name in ("token_of_row", "pair_of_row"):
        assert torch.equal(getattr(got, name)[:rows], getattr(wanted, name)[:rows]), name


def check_plans() -> None:
    """The kernels' plan is that of a stable sort, bit for bit."""
    for t, k, n, rows, kind in ((37, 3, 5, 16, torch.int64), (1, 1, 1, 16, torch.int32), (300, 1, 7, 32, torch.int64)):
        index = torch.randint(-1, n + 2, (t, k), generator=torch.Generator().manual_seed(t)).to(kind)
        same_plan(kernel_plan(index.view(-1), n, rows, top_k=k), moe.build_plan(index, n, rows))


def check_plans_of_many_blocks_and_tiles() -> None:
    """More tiles for one expert than one store writes, and more blocks than one scan reads."""
    from surgery.kernels.moe.device.plan import scan_counts

    index = torch.full((2100, 1), 1)
    same_plan(kernel_plan(index.view(-1), 2, 16, top_k=1), moe.build_plan(index, 2, 16))
    counts = torch.randint(0, 9, (40, 3), dtype=torch.int32)
    before, totals = torch.empty_like(counts), torch.empty(3, dtype=torch.int32)
    scan_counts[(3,)](counts, before, totals, 40, 3, BB=16)
    assert torch.equal(before, counts.cumsum(0).int() - counts) and torch.equal(totals, counts.sum(0).int())


def chain(
    cfg: moe.Chain, *, t: int = 33, h: int = 24, i: int = 20, n: int = 6, shared: int = 0, bias: bool = False,
    correction: bool = False, function: bool = False,
) -> None:  # fmt: skip
    """A chain's output and gradients, with gradients and without, against the plain loop over iterations in fp64."""
    c = len(cfg.topk)
    tensors = [draw(t, h), draw(n + shared, 2 * i, h) / h**0.5, draw(n + shared, h, i) / i**0.5]
    tensors += [draw(c - 1, h), draw(c, h), draw(h, h) / h**0.5]
    tensors += [draw(n, h, seed=s) / h**0.5 * 2 for s in range(c)]
    tensors += [draw(n, seed=s) / 10 for s in range(c)] if bias else []
    found = {}
    kinds = {"loop": torch.float64, "triton": torch.float32, "infer": torch.float32}
    for name, kind in kinds.items():
        learning = name != "infer"
        leaves = [a.to(kind).requires_grad_(learning) for a in tensors]
        x, up, down, alpha, beta, matrix = leaves[:6]
        fixes = [draw(n, seed=9 + s) / 10 if correction else None for s in range(c)]
        routers = [moe.Router(leaves[6 + s], leaves[6 + c + s] if bias else None, fixes[s]) for s in range(c)]
        more = {"shared": lambda z, m=matrix: torch.tanh(z @ m)} if function else {}
        out = moe.coe_layer(
            x, routers, Experts(up, down, num_shared=shared), alpha, beta, cfg,
            backend="loop" if name == "loop" else "triton", **more,
        )  # fmt: skip
        if not learning:
            assert not out.requires_grad or function
            close(out, found["loop"][0], FP32, "without gradients")
            break
        grads = torch.autograd.grad(out, leaves, draw(t, h, seed=3).to(kind), allow_unused=True)
        found[name] = [out, *grads]
    for at, (wanted, got) in enumerate(zip(*found.values(), strict=True)):
        assert (wanted is None) == (got is None), f"tensor {at}"
        if wanted is not None:
            close(got, wanted, FP32 * (4 if at else 1), f"tensor {at}")


def check_chain_that_splits() -> None:
    chain(moe.Chain((2, 1), base_k=3, normalize=True, scale=1.5, reselect="forbid"))


def check_chain_with_shared_experts_in_the_pool() -> None:
    chain(moe.Chain((2, 2), scoring="sigmoid", normalize=True, sigma=(1.0, 0.5)), shared=1, correction=True)


def check_chain_with_biased_routers_and_a_penalty() -> None:
    cfg = moe.Chain((2, 2, 1), base_k=4, scoring="topk_softmax", reselect=0.2, kappa=1.0, rho=0.5)
    chain(cfg, bias=True, t=33)


def check_chain_with_a_shared_function() -> None:
    chain(moe.Chain((2, 2), sigma=(1.0, 0.5)), function=True)


def check_chain_in_decoding() -> None:
    chain(moe.Chain((2, 2), normalize=True), t=5)


def check_chain_without_tokens() -> None:
    chain(moe.Chain((2, 1)), t=0)


def check_router_fused_with_the_sum() -> None:
    """The fused kernel's choice, weights and counts are those of `route` and of a count, for each way of scoring."""
    t, h, n = 37, 24, 10
    for scoring, normalize, penalty in (("softmax", True, None), ("sigmoid", True, 0.3), ("topk_softmax", False, 0.0)):
        rows = draw(t * 2, h)
        z, alpha, beta = draw(t, h, seed=1), draw(h), draw(h, seed=2)
        weights = torch.rand(t, 2)
        router, fix = draw(n, h), draw(n) / 4
        used = choice(t, 2, n).to(torch.int32)
        z_out, acc = torch.empty(t, h), torch.zeros(t, h)
        following = launch.RouterStep(
            router, None, fix, None if penalty == 0.0 else used, ("softmax", "sigmoid", "topk_softmax").index(scoring),
            normalize, 1.5, 5, 3, penalty,
        )  # fmt: skip
        step = launch.Step(beta=beta, acc=acc, acc_out=acc, z=z, z_out=z_out, alpha=alpha, rho=0.5, first=True)
        chosen = launch.tiles_for(router, 2 * t, n)
        row_of_pair = torch.arange(2 * t, dtype=torch.int32)
        got, index, counts, pairs = launch.combine_route(rows, row_of_pair, weights, t, 2, step, following, chosen)
        m = (rows.view(t, 2, h) * weights[:, :, None]).sum(1)
        close(z_out, 0.5 * z + alpha * m, 1e-5, "state")
        close(acc, beta * m, 1e-5, "sum")
        wanted, ids = moe.route(
            z_out @ router.T, 3, scoring, normalize, 1.5, fix, None, following.used, base_k=5, penalty=penalty
        )
        assert torch.equal(index.long(), ids), scoring
        close(got, wanted, 1e-5, scoring)
        blocks = index.view(-1).split(pairs)
        assert torch.equal(counts, torch.stack([torch.bincount(b, minlength=n) for b in blocks]).int()), scoring
        same_plan(
            kernel_plan(index.view(-1), n, 16, top_k=3, counts=counts, pairs_per_block=pairs),
            moe.build_plan(index, n, 16),
        )


def check_weight_gradients_of_a_chain_are_formed_once() -> None:
    """Two grouped products for all iterations together, whatever their number."""
    made = []
    original = launch.weight_grad
    launch.weight_grad = lambda *a, **k: (made.append(a[0].shape[0]), original(*a, **k))[1]
    try:
        up, down = draw(4, 24, 16).requires_grad_(), draw(4, 16, 12).requires_grad_()
        routers = [moe.Router(draw(4, 16, seed=s)) for s in range(3)]
        cfg = moe.Chain((1, 1, 1))
        out = moe.coe_layer(draw(9, 16), routers, Experts(up, down), draw(2, 16), draw(3, 16), cfg, backend="triton")
        out.sum().backward()
    finally:
        launch.weight_grad = original
    assert made == [27, 27], made


def check_gradients_twice_and_in_part() -> None:
    """A graph kept for a second pass gives the same; one asked for the input alone leaves nothing wrong behind."""
    x, up = draw(9, 16).requires_grad_(), draw(4, 24, 16).requires_grad_()
    routers = [moe.Router(draw(4, 16, seed=s)) for s in range(2)]
    pool = Experts(up, draw(4, 16, 12))
    out = moe.coe_layer(x, routers, pool, draw(1, 16), draw(2, 16), moe.Chain((1, 2)), backend="triton").sum()
    (alone,) = torch.autograd.grad(out, x, retain_graph=True)
    first = torch.autograd.grad(out, (x, up), retain_graph=True)
    second = torch.autograd.grad(out, (x, up))
    assert torch.equal(alone, first[0]) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_offsets_beyond_32_bits() -> None:
    """Experts 2^31 elements apart, rows 2^30 apart: address space is reserved for them, memory is not."""
    n, h, i, apart = 2, 16, 12, 2**31
    far_up, far_down = (torch.empty(apart + 2 * h * i, dtype=torch.float16) for _ in range(2))
    up, down = far_up.as_strided((n, 2 * i, h), (apart, h, 1)), far_down.as_strided((n, h, i), (apart, i, 1))
    near = (draw(n, 2 * i, h) / 4).half(), (draw(n, h, i) / 4).half()
    up.copy_(near[0])
    down.copy_(near[1])
    for tokens in (34, 3):  # by tiles, and decoding
        args = (draw(tokens, h).half(), choice(tokens, 2, n), torch.rand(tokens, 2))
        with torch.no_grad():
            close(
                moe.routed_experts(*args, up, down, backend="triton"), moe.routed_experts(*args, *near, backend="loop"),
                3e-3, f"{tokens} tokens",
            )  # fmt: skip
    rows, wide = 3, 2**30
    act = torch.empty(rows * wide, dtype=torch.float16).as_strided((rows, i), (wide, 1))
    act.copy_(draw(rows, i))
    pool = Experts(*near)
    plan = kernel_plan(torch.zeros(rows, dtype=torch.int64), n, 16, top_k=1)
    y = torch.empty(rows, h, dtype=torch.float16)
    launch.down(act, pool, plan, y, launch.tiles_for(near[1], rows, n))
    close(y, act.double() @ near[1][0].double().T, 3e-3, "rows far apart")


def check_workspace_is_reused() -> None:
    """A second layer allocates nothing new in the workspace, and its result is not overwritten by a third."""
    space = moe.Workspace()
    routers = [moe.Router(draw(4, 16, seed=s)) for s in range(2)]
    pool = Experts(draw(4, 24, 16), draw(4, 16, 12))
    args = (routers, pool, draw(1, 16), draw(2, 16), moe.Chain((1, 2)))
    first = moe.coe_layer(draw(40, 16), *args, backend="triton", workspace=space)
    kept, size = first.clone(), {k: b.data_ptr() for k, b in space.buffers.items()}
    moe.coe_layer(draw(40, 16, seed=1), *args, backend="triton", workspace=space)
    assert torch.equal(first, kept) and size == {k: b.data_ptr() for k, b in space.buffers.items()}


def check_decoding_skips_the_plan() -> None:
    made = []
    original = function.kernel_plan
    function.kernel_plan = lambda *a, **k: (made.append(1), original(*a, **k))[1]
    try:
        up, down = draw(4, 24, 16), draw(4, 16, 12)
        for tokens in (8, function.DECODE_PAIRS):
            moe.routed_experts(
                draw(tokens, 16), choice(tokens, 2, 4), torch.rand(tokens, 2), up, down, backend="triton"
            )
    finally:
        function.kernel_plan = original
    assert made == [1], made


def check_models_of_transformers() -> None:
    """Whole layers through `surgery_triton`: output and gradients are those of the module's own forward."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    moe.register()
    for kind, config in (
        (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=20, moe_intermediate_size=12, num_experts=4)),
        (GptOssExperts, GptOssConfig(hidden_size=20, intermediate_size=12, num_local_experts=4)),
    ):
        module = kind(config)
        for p in module.parameters():
            p.data = draw(*p.shape)
        found = []
        for name in ("eager", "surgery_triton"):
            config._experts_implementation = name
            x, w = draw(34, 20).requires_grad_(), torch.full((34, 2), 0.5, requires_grad=True)
            out = module(x, choice(34, 2, 4), w)
            found.append([out, *torch.autograd.grad(out.sum(), (x, w, *module.parameters()))])
        for at, (wanted, got) in enumerate(zip(*found, strict=True)):
            close(got, wanted, 8e-5, f"{kind.__name__} {at}")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert "triton" in moe.backends()
    found = {}
    for name, check in sorted(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
