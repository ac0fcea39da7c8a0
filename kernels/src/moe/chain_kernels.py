"""The chain on the kernels: with gradients (those of the weights once, at the end), and without (router fused)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from . import launch
from .chain import Chain, Router, Workspace, add_used, next_choice, with_shared
from .experts import Experts
from .function import DECODE_PAIRS, ChainStep, Ledger, Tap, expert_rows, ready
from .launch import RouterStep, Step
from .routing import SCORINGS

FUSED_EXPERTS, FUSED_CHOICES = 256, 16  # what the kernel that combines and routes holds in registers

Shared = Callable[[torch.Tensor], torch.Tensor]


def train(
    n: torch.Tensor, routers: Sequence[Router], experts: Experts, alphas: list[torch.Tensor], betas: list[torch.Tensor],
    cfg: Chain, shared: Shared | None,
) -> torch.Tensor:  # fmt: skip
    """Each iteration is one autograd step; torch differentiates routers, shared function and gates around it."""
    z, acc, used = n.to(experts.gate_up_proj.dtype).contiguous(), None, None
    ledger = Ledger(experts)
    tapped = Tap.apply(ledger, *experts.tensors())
    for t, router in enumerate(routers):
        weights, index, used = next_choice(router.logits(z), router, cfg, t, used)
        index, weights = with_shared(index, weights, experts, cfg.shared(t))
        z, index, weights = ready(z, index, weights, experts)
        base = None
        if shared is not None and cfg.shared(t):
            base = (cfg.shared(t) * shared(z)).to(z.dtype).contiguous()
        alpha = alphas[t] if t + 1 < len(routers) else None
        z, acc = ChainStep.apply(z, acc, weights, base, alpha, betas[t], index, experts, ledger, t, cfg.rho, *tapped)
    if cfg.kappa:
        acc = acc + cfg.kappa * n.float()
    return acc.to(n.dtype)


def infer(
    n: torch.Tensor, routers: Sequence[Router], experts: Experts, alphas: list[torch.Tensor], betas: list[torch.Tensor],
    cfg: Chain, shared: Shared | None, workspace: Workspace,
) -> torch.Tensor:  # fmt: skip
    """Without gradients: the next router runs in the kernel that combines, wherever it fits."""
    z = n.to(experts.gate_up_proj.dtype).contiguous()
    tokens, width, device = *z.shape, z.device
    acc = workspace.take("acc", (tokens, width), torch.float32, device)
    last = len(routers) - 1

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return workspace.take(name, shape, dtype, device)

    weights, index, used = next_choice(routers[0].logits(z), routers[0], cfg, 0, None)
    counts = None
    for t in range(len(routers)):
        index, weights = with_shared(index, weights, experts, cfg.shared(t))
        counts = counts if index.numel() > DECODE_PAIRS and not experts.num_shared else None
        z, index, weights = ready(z, index, weights, experts)
        rows = expert_rows(z, index, experts, training=False, allocate=allocate, counts=counts)
        base = None
        if shared is not None and cfg.shared(t):
            base = shared(z).to(z.dtype).contiguous()
        step = Step(beta=betas[t], acc=acc, acc_out=acc, shared=base, sigma=cfg.shared(t), first=t == 0)
        if t == last:
            rows.combine(weights, tokens, index.shape[1], step, experts)
            break
        # Two states take turns: the kernel reads one and writes the other.
        state = workspace.take(f"z{t % 2}", (tokens, width), z.dtype, device)
        step = replace(step, z=z, z_out=state, alpha=alphas[t], rho=cfg.rho)
        if rows.plan is not None and _fits(routers[t + 1], cfg, t + 1, experts):
            following = _router_step(routers[t + 1], cfg, t + 1, used)
            weights, index, *counted = launch.combine_route(
                rows.y, rows.rows, weights, tokens, index.shape[1], step, following, rows.chosen
            )
            counts = (counted[0], counted[1])
            used = add_used(used, index, cfg)
        else:
            rows.combine(weights, tokens, index.shape[1], step, experts)
            router = routers[t + 1]
            weights, index, used = next_choice(router.logits(state), router, cfg, t + 1, used)
            counts = None
        z = state
    if cfg.kappa:
        return (acc + cfg.kappa * n.float()).to(n.dtype)
    return acc.to(n.dtype, copy=True)


def _fits(router: Router, cfg: Chain, t: int, experts: Experts) -> bool:
    """Whether the fused kernel can be this router: no groups, and few enough experts and choices for registers."""
    number = experts.num_experts - experts.num_shared
    grouped = cfg.groups is not None and cfg.groups[0] > 1
    return not grouped and number <= FUSED_EXPERTS and cfg.base(t) <= FUSED_CHOICES and router.weight.is_contiguous()


def _router_step(router: Router, cfg: Chain, t: int, used: torch.Tensor | None) -> RouterStep:
    return RouterStep(
        weight=router.weight,
        bias=router.bias,
        correction=router.correction,
        used=used,
        scoring=SCORINGS.index(cfg.scoring),
        normalize=cfg.normalize,
        scale=cfg.scale,
        base_k=cfg.base(t),
        keep_k=cfg.topk[t],
        penalty=cfg.penalty,
    )
