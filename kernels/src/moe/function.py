"""The kernels as differentiable functions: routed experts alone, and one step of a chain.

Kept for the backward pass: the input, ids and weights, the plan and the pre-activation; never the down projection's
output. In a chain the weight gradients wait in a `Ledger` until every iteration has been gone through, and are then
formed by one grouped product over the rows of all of them: each gradient is written once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import launch
from .experts import Experts
from .launch import Step
from .plan import Plan
from .plan_kernels import kernel_plan
from .tiles import Tiles

DECODE_PAIRS = 64  # up to so many pairs, reading the weights is all the time there is

Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
Grads = list[torch.Tensor | None]


@dataclass(frozen=True)
class Rows:
    """What a forward pass leaves: products y in row order (or, decoding, in that of the pairs) and how to read them."""

    y: torch.Tensor
    rows: torch.Tensor
    chosen: Tiles
    plan: Plan | None
    pre: torch.Tensor | None

    def combine(self, weights: torch.Tensor, tokens: int, top_k: int, step: Step, experts: Experts) -> None:
        """Sum each token's products, weighed, and do the `step`."""
        number = experts.num_experts if self.plan is None else 0
        launch.combine(self.y, self.rows, weights, tokens, top_k, step, self.chosen, experts_if_pairs=number)


def expert_rows(
    x: torch.Tensor, index: torch.Tensor, experts: Experts, *, training: bool, allocate: Allocate | None = None,
    counts: tuple[torch.Tensor, int] | None = None,
) -> Rows:  # fmt: skip
    """Plan, up and down for every pair. `counts` are those of the fused router, with their pairs a block."""
    pairs, dtype = index.numel(), x.dtype
    chosen = launch.tiles_for(experts.gate_up_proj, pairs, experts.num_experts)
    if allocate is None:

        def allocate(_: str, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device=x.device)

    act = allocate("act", (pairs, experts.width), dtype)
    y = allocate("y", (pairs, experts.hidden), dtype)
    if not training and 0 < pairs <= DECODE_PAIRS:
        launch.decode(x, index, experts, act, y, chosen)
        return Rows(y, index.view(-1), chosen, None, None)
    flat = index.view(-1)
    if counts is None:
        plan = kernel_plan(flat, experts.num_experts, chosen.block_m, top_k=index.shape[1])
    else:
        plan = kernel_plan(
            flat, experts.num_experts, chosen.block_m, top_k=index.shape[1], counts=counts[0], pairs_per_block=counts[1]
        )
    pre = torch.empty(pairs, 2 * experts.width, dtype=dtype, device=x.device) if training else None
    launch.up(x, experts, plan, act, pre, chosen)
    launch.down(act, experts, plan, y, chosen)
    return Rows(y, plan.row_of_pair, chosen, plan, pre)


@dataclass
class Piece:
    """One iteration's part of the weight gradients. Rows are those of its own plan."""

    x: torch.Tensor
    grad_m: torch.Tensor
    grad_pre: torch.Tensor
    scaled_act: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    plan: Plan


@dataclass
class Ledger:
    """Pieces of a chain, by iteration; a second backward pass overwrites those of the first."""

    experts: Experts
    pairs: dict[int, int] = field(default_factory=dict)
    pieces: dict[int, Piece] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, name: str, at: int, sizes: dict[int, int], width: int, like: torch.Tensor) -> torch.Tensor:
        """Iteration `at`'s part of a buffer that holds the rows of all iterations, so that nothing is copied later."""
        if name not in self.buffers:
            self.buffers[name] = like.new_empty(sum(sizes.values()), width)
        start = sum(size for t, size in sizes.items() if t < at)
        return self.buffers[name][start : start + sizes[at]]


def weight_grads(pieces: list[Piece], experts: Experts, buffers: dict[str, torch.Tensor], wanted: list[bool]) -> Grads:
    """Gradients of gate_up_proj, down_proj and their biases (those `wanted`) over the rows of all pieces."""
    first = pieces[0]
    chosen = launch.tiles_for(experts.gate_up_proj, first.index.numel(), experts.num_experts)
    if len(pieces) == 1:
        plan, x, grad_m, grad_pre, scaled = first.plan, first.x, first.grad_m, first.grad_pre, first.scaled_act
        weights = first.weights
        left_row = torch.arange(grad_pre.shape[0], dtype=torch.int32, device=x.device)
    else:
        x = torch.cat([p.x for p in pieces])
        weights = torch.cat([p.weights.reshape(-1) for p in pieces])
        grad_m, grad_pre, scaled = buffers["grad_m"], buffers["grad_pre"], buffers["scaled_act"]
        ids, tokens, rows, token0, row0 = [], [], [], 0, 0
        for p in pieces:
            k, number = p.index.shape[1], p.index.numel()
            ids.append(p.index.reshape(-1).to(torch.int32))
            tokens.append(torch.arange(number, dtype=torch.int32, device=x.device) // max(1, k) + token0)
            rows.append(p.plan.row_of_pair + row0)
            token0, row0 = token0 + p.index.shape[0], row0 + number
        plan = kernel_plan(torch.cat(ids), experts.num_experts, chosen.block_m, token_of_pair=torch.cat(tokens))
        left_row = torch.cat(rows)[plan.pair_of_row]
    grads: Grads = [None] * 4
    if wanted[0]:
        grads[0] = torch.empty_like(experts.gate_up_proj)
        strides = launch.up_strides(grads[0], experts)
        launch.weight_grad(grad_pre, x, grads[0], left_row, plan, experts.width, strides, chosen)
    if wanted[1]:
        grads[1] = torch.empty_like(experts.down_proj)
        s = launch.down_strides(grads[1], experts)
        turned = replace(s, out=s.inner, inner=s.out)
        launch.weight_grad(scaled, grad_m, grads[1], left_row, plan, experts.width, turned, chosen)
    if wanted[2]:
        halves = launch.bias_grad(grad_pre, None, left_row, plan, chosen, experts.gate_up_proj.dtype)
        if not experts.is_concatenated:
            halves = halves.view(-1, 2, experts.width).transpose(1, 2).reshape(-1, 2 * experts.width)
        grads[2] = halves
    if wanted[3]:
        grads[3] = launch.bias_grad(grad_m, weights, plan.token_of_row, plan, chosen, experts.gate_up_proj.dtype)
    return grads


def _pairs_backward(
    grad_m: torch.Tensor, saved: "_Saved", experts: Experts, ledger: Ledger | None, at: int
) -> tuple[torch.Tensor, torch.Tensor, Piece]:
    """(gradients of each row's input, of the routing weights [T, K], what the weight gradients need)."""
    plan, pairs = saved.plan, saved.index.numel()
    if ledger is None:
        grad_pre = torch.empty_like(saved.pre)
        scaled = saved.pre.new_empty(pairs, experts.width)
    else:
        grad_pre = ledger.rows("grad_pre", at, ledger.pairs, 2 * experts.width, saved.pre)
        scaled = ledger.rows("scaled_act", at, ledger.pairs, experts.width, saved.pre)
    by_weights = launch.down_backward(
        grad_m, experts, plan, saved.pre, saved.weights, grad_pre, scaled, saved.chosen
    ).view(saved.index.shape)
    rows = saved.pre.new_empty(pairs, experts.hidden)
    launch.up_backward(grad_pre, experts, plan, rows, saved.chosen)
    return rows, by_weights, Piece(saved.x, grad_m, grad_pre, scaled, saved.index, saved.weights, plan)


@dataclass(frozen=True)
class _Saved:
    x: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    pre: torch.Tensor
    plan: Plan
    chosen: Tiles


def _save(ctx: Any, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, rows: Rows, *more: Any) -> None:
    """Tensors go the way that torch watches (versions, hooks); the plan is ours and nobody else's."""
    ctx.plan, ctx.chosen = rows.plan, rows.chosen
    ctx.save_for_backward(x, weights, index, rows.pre, *more)


def _restore(ctx: Any) -> tuple[_Saved, tuple[Any, ...]]:
    x, weights, index, pre, *more = ctx.saved_tensors
    return _Saved(x, weights, index, pre, ctx.plan, ctx.chosen), tuple(more)


def _sum(rows: Rows, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, experts: Experts) -> torch.Tensor:
    m = torch.empty_like(x)
    rows.combine(weights, x.shape[0], index.shape[1], Step(m=m), experts)
    return m


class _Routed(torch.autograd.Function):
    """m [T, H] of x [T, H] in the dtype of the weights."""

    @staticmethod
    def forward(ctx: Any, x, weights, index, experts: Experts, *tensors):  # noqa: D102
        rows = expert_rows(x, index, experts, training=True)
        ctx.experts, ctx.kind = experts, weights.dtype
        _save(ctx, x, weights, index, rows)
        return _sum(rows, x, weights, index, experts)

    @staticmethod
    def backward(ctx: Any, grad):  # noqa: D102
        saved, _ = _restore(ctx)
        experts = ctx.experts
        rows, by_weights, piece = _pairs_backward(grad.contiguous(), saved, experts, None, 0)
        grad_x = torch.empty_like(saved.x)
        launch.combine(
            rows, saved.plan.row_of_pair, None, *saved.index.shape, Step(m=grad_x), saved.chosen
        )  # fmt: skip
        grads = weight_grads([piece], experts, {}, _wanted(ctx.needs_input_grad[4:], experts))
        return grad_x, by_weights.to(ctx.kind), None, None, *_given(grads, experts)


def _wanted(needs: tuple[bool, ...], experts: Experts) -> list[bool]:
    """Per weight (gate_up, down, and their biases) whether a gradient is asked for; absent biases were not passed."""
    asked = iter(needs)
    there = (True, True, experts.gate_up_bias is not None, experts.down_bias is not None)
    return [next(asked) if t else False for t in there]


def _given(grads: Grads, experts: Experts) -> Grads:
    there = (True, True, experts.gate_up_bias is not None, experts.down_bias is not None)
    return [g for g, t in zip(grads, there, strict=True) if t]


def ready(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts
) -> tuple[torch.Tensor, ...]:
    """Hidden in the dtype of the weights; all three contiguous."""
    return hidden.to(experts.gate_up_proj.dtype).contiguous(), index.contiguous(), weights.contiguous()


def triton_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """The kernels behind `routed_experts`: [T, H] in the dtype of `hidden`, differentiable."""
    x, index, weights = ready(hidden, index, weights, experts)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *experts.tensors())):
        m = _Routed.apply(x, weights, index, experts, *experts.tensors())
    else:
        m = _sum(expert_rows(x, index, experts, training=False), x, weights, index, experts)
    return m.to(hidden.dtype)


class ChainStep(torch.autograd.Function):
    """One iteration of a chain: (z, acc) -> (z', acc'), with its own part of the weight gradients left in the ledger.

    z' = rho z + alpha m, acc' = acc + beta m, m = routed(z) + sigma * shared; z' is None in the last iteration.
    """

    @staticmethod
    def forward(
        ctx: Any, z, acc, weights, shared, alpha, beta, index, experts: Experts, ledger: Ledger, at, rho, *tensors
    ):
        rows = expert_rows(z, index, experts, training=True)
        m = torch.empty_like(z)
        z_out = None if alpha is None else torch.empty_like(z)
        acc_out = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        step = Step(m, z, z_out, alpha, beta, acc, acc_out, shared, rho, first=acc is None)
        rows.combine(weights, z.shape[0], index.shape[1], step, experts)
        ledger.pairs[at] = index.numel()
        ctx.experts, ctx.ledger, ctx.at, ctx.rho, ctx.kind = experts, ledger, at, rho, weights.dtype
        ctx.shared = None if shared is None else shared.dtype
        ctx.has_acc = acc is not None
        ctx.set_materialize_grads(False)
        _save(ctx, z, weights, index, rows, m, alpha, beta)
        return z_out, acc_out

    @staticmethod
    def backward(ctx: Any, grad_z, grad_acc):  # noqa: D102
        saved, (m, alpha, beta) = _restore(ctx)
        experts, ledger, at = ctx.experts, ctx.ledger, ctx.at
        tokens = dict.fromkeys(ledger.pairs, saved.x.shape[0])
        grad_m = ledger.rows("grad_m", at, tokens, experts.hidden, saved.x)
        grad_z = None if grad_z is None else grad_z.contiguous()
        grad_acc = None if grad_acc is None else grad_acc.contiguous()
        by_alpha, by_beta = launch.step_backward(grad_acc, grad_z, m, alpha, beta, grad_m, saved.chosen)
        rows, by_weights, piece = _pairs_backward(grad_m, saved, experts, ledger, at)
        ledger.pieces[at] = piece
        by_input = torch.empty_like(saved.x)
        # The residual's part is added in the same pass: rho * grad_z + the sum over the token's rows.
        step = Step(m=by_input) if grad_z is None else Step(z=grad_z, z_out=by_input, rho=ctx.rho)
        launch.combine(rows, saved.plan.row_of_pair, None, *saved.index.shape, step, saved.chosen)
        by_shared = None if ctx.shared is None else grad_m.to(ctx.shared)
        by_acc = grad_acc if ctx.has_acc else None
        none = [None] * len(experts.tensors())
        return (
            by_input,
            by_acc,
            by_weights.to(ctx.kind),
            by_shared,
            by_alpha,
            by_beta,
            None,
            None,
            None,
            None,
            None,
            *none,
        )


class Tap(torch.autograd.Function):
    """The weights on their way into a chain. All iterations depend on it, so its backward runs after theirs."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, *tensors):  # noqa: D102
        ctx.ledger = ledger
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads):  # noqa: D102
        ledger = ctx.ledger
        pieces = [ledger.pieces[t] for t in sorted(ledger.pieces)]
        experts = ledger.experts
        found = weight_grads(pieces, experts, ledger.buffers, _wanted(ctx.needs_input_grad[1:], experts))
        ledger.pieces.clear()
        ledger.buffers.clear()
        return None, *_given(found, experts)
