"""From tensors to kernel launches: strides, grids, tiles. Nothing here waits for the device or reads from it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .experts import Experts
from .plan import Plan
from .tiles import Tiles, architecture, tiles


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Recording:
    """Launches of one architecture, made by running the host's code on tensors without memory."""

    arch: str
    launches: list[Launch]


_recording: Recording | None = None


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, so that what is compiled ahead of time is what would be launched."""
    global _recording
    before, _recording = _recording, Recording(arch, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch a kernel on the device of its tensors, or write the launch down; an empty grid launches nothing."""
    if 0 in grid:
        return
    meta["enable_fp_fusion"] = True  # said, because triton 3.10 changes what is meant by nothing
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, meta))
        return
    first = next(a for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*args, **meta)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU. Triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def tiles_for(weight: torch.Tensor, pairs: int, num_experts: int) -> Tiles:
    """The tiles of the device that `weight` lies on (or that is recorded, or of the interpreter)."""
    if _recording is not None:
        arch = _recording.arch
    elif interpreting():
        arch = "interpreter"
    else:
        arch = architecture(torch.cuda.get_device_capability(weight.device))
    return tiles(arch, weight.dtype, pairs, num_experts)


def _numeric(dtype: torch.dtype) -> dict[str, Any]:
    """How products are formed: fp32 exactly unless torch itself was told to use TF32."""
    fast = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if fast else "ieee", "UPCAST": interpreting() and _recording is None}


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The first power of two that is no less than `n` and `least`: what a block of a kernel can be."""
    return max(least, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Strides:
    """Where W[e, out, in] lies; `partner` leads from a gate column to its up column, in the weight and in the bias."""

    expert: int
    out: int
    inner: int
    partner: int


def up_strides(w: torch.Tensor, experts: Experts) -> Strides:
    """Strides of a tensor laid out as `gate_up_proj`, per gate column."""
    out, inner = (w.stride(2), w.stride(1)) if experts.is_transposed else (w.stride(1), w.stride(2))
    if experts.is_concatenated:
        return Strides(w.stride(0), out, inner, experts.width * out)
    return Strides(w.stride(0), 2 * out, inner, out)


def down_strides(w: torch.Tensor, experts: Experts) -> Strides:
    """Strides of a tensor laid out as `down_proj`: out is a channel, inner a column of the expert's width."""
    out, inner = (w.stride(2), w.stride(1)) if experts.is_transposed else (w.stride(1), w.stride(2))
    return Strides(w.stride(0), out, inner, 0)


def _up_bias(experts: Experts) -> tuple[int, int, int]:
    bias = experts.gate_up_bias
    if bias is None:
        return 0, 0, 0
    step = bias.stride(1)
    return (bias.stride(0), step, experts.width * step) if experts.is_concatenated else (bias.stride(0), 2 * step, step)


def up(
    x: torch.Tensor, experts: Experts, plan: Plan, act: torch.Tensor, pre: torch.Tensor | None, chosen: Tiles
) -> None:
    """act [P, I] and, if given, pre [P, 2I] (halves) of the rows of a plan."""
    from .device.forward import up_swiglu

    w, bias = experts.gate_up_proj, experts.gate_up_bias
    # Columns that alternate are read one by one, and their addresses take registers that a larger tile needs.
    config = chosen.of("up_swiglu" if experts.is_concatenated else "up_swiglu_interleaved")
    s = up_strides(w, experts)
    grid = plan.tile_expert.numel() * ceil_div(experts.width, config["BN"])
    run(
        up_swiglu, (grid,),
        x, w, w if bias is None else bias, act, act if pre is None else pre,
        plan.token_of_row, plan.expert_start, plan.tile_expert, plan.tile_row,
        experts.hidden, experts.width, x.stride(0), s.expert, s.out, s.inner, s.partner, *_up_bias(experts),
        experts.slope, experts.limit,
        BM=plan.block_m, EVEN_K=experts.hidden % config["BK"] == 0, CLAMPED=experts.clamped, HAS_BIAS=bias is not None,
        STORE_PRE=pre is not None, **_numeric(w.dtype), **config,
    )  # fmt: skip


def down(act: torch.Tensor, experts: Experts, plan: Plan, y: torch.Tensor, chosen: Tiles) -> None:
    """y [P, H] = act @ W_down^T (+ bias)."""
    w, bias = experts.down_proj, experts.down_bias
    s = down_strides(w, experts)
    by_bias = (0, 0) if bias is None else bias.stride()
    _rows(act, w, bias, y, plan, experts.width, (s.expert, s.out, s.inner), (0, 0), by_bias, chosen)


def up_backward(grad_pre: torch.Tensor, experts: Experts, plan: Plan, rows: torch.Tensor, chosen: Tiles) -> None:
    """rows [P, H] = grad_pre @ W_gate_up: the gradient of each row's input."""
    w = experts.gate_up_proj
    s = up_strides(w, experts)
    second = (experts.width, s.partner)
    _rows(
        grad_pre, w, None, rows, plan, experts.width, (s.expert, s.inner, s.out), second, (0, 0), chosen
    )  # fmt: skip


def _rows(a, w, bias, out, plan, width_in, strides, second, by_bias, chosen: Tiles) -> None:
    from .device.forward import rows_times_expert

    two = second != (0, 0)
    config = chosen.of("rows_times_expert_two" if two else "rows_times_expert")
    grid = plan.tile_expert.numel() * ceil_div(out.shape[1], config["BN"])
    run(
        rows_times_expert, (grid,),
        a, w, w if bias is None else bias, out, plan.expert_start, plan.tile_expert, plan.tile_row,
        width_in, out.shape[1], a.stride(0), *strides, *second, *by_bias,
        BM=plan.block_m, EVEN_K=width_in % config["BK"] == 0, TWO=two, HAS_BIAS=bias is not None,
        **_numeric(w.dtype), **config,
    )  # fmt: skip


def decode(
    x: torch.Tensor, index: torch.Tensor, experts: Experts, act: torch.Tensor, y: torch.Tensor, chosen: Tiles
) -> None:
    """y [P, H] for few pairs, in the order of the pairs."""
    from .device.decode import decode_down, decode_up

    w, bias, config = experts.gate_up_proj, experts.gate_up_bias, chosen.of("decode_up")
    s = up_strides(w, experts)
    run(
        decode_up, (index.numel(), ceil_div(experts.width, config["BN"])),
        x, w, w if bias is None else bias, act, index,
        experts.hidden, experts.width, experts.num_experts, x.stride(0), s.expert, s.out, s.inner, s.partner,
        *_up_bias(experts), experts.slope, experts.limit,
        TOP_K=index.shape[1], CLAMPED=experts.clamped, HAS_BIAS=bias is not None, **config,
    )  # fmt: skip
    w, bias, config = experts.down_proj, experts.down_bias, chosen.of("decode_down")
    s = down_strides(w, experts)
    run(
        decode_down, (index.numel(), ceil_div(experts.hidden, config["BN"])),
        act, w, w if bias is None else bias, y, index,
        experts.width, experts.hidden, experts.num_experts, act.stride(0), s.expert, s.out, s.inner,
        *((0, 0) if bias is None else bias.stride()), HAS_BIAS=bias is not None, **config,
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What `combine` does beside the sum. Vectors [H] are fp32 and contiguous; `acc_out` = (first: 0, else `acc`) +
    beta * m, [T, H] fp32, may be `acc` itself."""

    m: torch.Tensor | None = None
    z: torch.Tensor | None = None
    z_out: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    acc: torch.Tensor | None = None
    acc_out: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    rho: float = 1.0
    sigma: float = 1.0
    first: bool = False


def combine(
    y: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, tokens: int, top_k: int, step: Step,
    chosen: Tiles, *, experts_if_pairs: int = 0,
) -> None:  # fmt: skip
    """Sum a token's rows and do the step. `rows` maps pairs to rows, or with `experts_if_pairs` holds expert ids."""
    from .device.combine import combine as kernel

    config = chosen.of("combine")
    width = y.shape[1]

    def there(t: torch.Tensor | None) -> torch.Tensor:
        return y if t is None else t

    run(
        kernel, (ceil_div(tokens, config["BT"]), ceil_div(width, config["BH"])),
        y, rows, there(weights), there(step.shared), there(step.z), there(step.alpha), there(step.beta),
        there(step.m), there(step.z_out), there(step.acc), there(step.acc_out),
        tokens, width, experts_if_pairs, step.rho, step.sigma, there(step.z).stride(0), there(step.shared).stride(0),
        TOP_K=top_k, ROWS_ARE_PAIRS=experts_if_pairs > 0, WEIGHTED=weights is not None,
        HAS_SHARED=step.shared is not None, STORE_M=step.m is not None, STEP=step.z_out is not None,
        HAS_ALPHA=step.alpha is not None, ACC=step.acc_out is not None, FIRST=step.first, **config,
    )  # fmt: skip


@dataclass(frozen=True)
class RouterStep:
    """The next iteration's router, as the fused kernel needs it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    correction: torch.Tensor | None
    used: torch.Tensor | None
    scoring: int
    normalize: bool
    scale: float
    base_k: int
    keep_k: int
    penalty: float | None


def combine_route(
    y: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, tokens: int, top_k: int, step: Step, router: RouterStep,
    chosen: Tiles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:  # fmt: skip
    """`combine` and the next router: (weights fp32 [T, k], ids int32 [T, k], counts for the plan, pairs a block)."""
    from .device.combine import combine_route as kernel

    config = chosen.of("combine_route")
    number, device, r = router.weight.shape[0], y.device, router
    blocks = ceil_div(tokens, config["BT"])
    ids = torch.empty(tokens, r.keep_k, dtype=torch.int32, device=device)
    kept = torch.empty(tokens, r.keep_k, dtype=torch.float32, device=device)
    counts = torch.empty(blocks, number, dtype=torch.int32, device=device)
    used = ids if r.used is None else r.used
    shared = y if step.shared is None else step.shared
    run(
        kernel, (blocks,),
        y, rows, weights, shared, step.z, step.alpha, step.beta, step.z_out, step.acc, step.acc_out,
        r.weight, r.weight if r.bias is None else r.bias, r.weight if r.correction is None else r.correction, used,
        ids, kept, counts,
        tokens, y.shape[1], number, step.rho, step.sigma, step.z.stride(0), shared.stride(0), used.stride(0),
        r.scale, r.penalty or 0.0,
        TOP_K=top_k, BASE_K=r.base_k, KEEP_K=r.keep_k, USED=0 if r.used is None else r.used.shape[1],
        BE=power_of_two(number), SCORING=r.scoring, NORMALIZE=r.normalize, HAS_SHARED=step.shared is not None,
        HAS_BIAS=r.bias is not None, HAS_CORRECTION=r.correction is not None, FORBID=r.penalty is None,
        FIRST=step.first, ROUND=r.weight.dtype != torch.float32, **_numeric(r.weight.dtype), **config,
    )  # fmt: skip
    return kept, ids, counts, config["BT"] * r.keep_k


def step_backward(
    grad_acc: torch.Tensor | None, grad_z: torch.Tensor | None, m: torch.Tensor, alpha: torch.Tensor | None,
    beta: torch.Tensor, grad_m: torch.Tensor, chosen: Tiles,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Fills grad_m [T, H]; returns the gradients of alpha and beta [H] in fp32 (None where nothing flows)."""
    from .device.combine import step_backward as kernel

    config = chosen.of("step_backward")
    tokens, width = m.shape
    blocks = ceil_div(tokens, config["BT"])
    parts = torch.empty(2, blocks, width, dtype=torch.float32, device=m.device)
    run(
        kernel, (blocks, ceil_div(width, config["BH"])),
        m if grad_acc is None else grad_acc, m if grad_z is None else grad_z, m, beta if alpha is None else alpha, beta,
        grad_m, parts[0], parts[1], tokens, width, HAS_Z=grad_z is not None, HAS_ACC=grad_acc is not None, **config,
    )  # fmt: skip
    by_alpha = None if grad_z is None or alpha is None else parts[0].sum(0)
    return by_alpha, None if grad_acc is None else parts[1].sum(0)


def down_backward(
    grad_m: torch.Tensor, experts: Experts, plan: Plan, pre: torch.Tensor, weights: torch.Tensor,
    grad_pre: torch.Tensor, scaled_act: torch.Tensor, chosen: Tiles,
) -> torch.Tensor:  # fmt: skip
    """Fills grad_pre [P, 2I] and scaled_act [P, I]; returns the gradient of the routing weights, flat [P] fp32."""
    from .device.backward import down_backward as kernel

    w, bias, config = experts.down_proj, experts.down_bias, chosen.of("down_backward")
    s = down_strides(w, experts)
    columns = ceil_div(experts.width, config["BN"])
    part = torch.empty(pre.shape[0], columns, dtype=torch.float32, device=pre.device)
    run(
        kernel, (plan.tile_expert.numel() * columns,),
        grad_m, w, w if bias is None else bias, pre, weights, grad_pre, scaled_act, part,
        plan.token_of_row, plan.pair_of_row, plan.expert_start, plan.tile_expert, plan.tile_row,
        experts.hidden, experts.width, grad_m.stride(0), s.expert, s.inner, s.out,
        *((0, 0) if bias is None else bias.stride()), experts.slope, experts.limit,
        BM=plan.block_m, EVEN_K=experts.hidden % config["BK"] == 0, CLAMPED=experts.clamped, HAS_BIAS=bias is not None,
        **_numeric(w.dtype), **config,
    )  # fmt: skip
    of_row = part.sum(1)
    known = plan.row_of_pair >= 0
    return torch.where(known, of_row[plan.row_of_pair.clamp(min=0)], 0.0)


def weight_grad(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, left_row: torch.Tensor, plan: Plan, width: int,
    strides: Strides, chosen: Tiles,
) -> None:  # fmt: skip
    """out[e, l, r] = sum over rows of left * right; with a `partner`, the left side's second half goes there."""
    from .device.backward import expert_weight_grad

    two = strides.partner != 0
    config = chosen.of("expert_weight_grad_two" if two else "expert_weight_grad")
    blocks = ceil_div(width, config["BL"]) * ceil_div(right.shape[1], config["BR"])
    run(
        expert_weight_grad, (plan.num_experts * blocks,),
        left, right, out, left_row, plan.token_of_row, plan.expert_start,
        width, right.shape[1], left.stride(0), right.stride(0), width if two else 0,
        strides.expert, strides.out, strides.inner, strides.partner,
        TWO=two, **_numeric(out.dtype), **config,
    )  # fmt: skip


def bias_grad(
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    row_at: torch.Tensor,
    plan: Plan,
    chosen: Tiles,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, width]: the sum of each expert's (weighted) rows."""
    from .device.backward import expert_bias_grad

    config = chosen.of("expert_bias_grad")
    width = rows.shape[1]
    out = torch.empty(plan.num_experts, width, dtype=dtype, device=rows.device)
    run(
        expert_bias_grad, (plan.num_experts, ceil_div(width, config["BN"])),
        rows, rows if weights is None else weights, out, row_at, plan.pair_of_row, plan.expert_start,
        width, rows.stride(0), out.stride(0), WEIGHTED=weights is not None, **config,
    )  # fmt: skip
    return out
