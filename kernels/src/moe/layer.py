"""A chain of experts: the same experts several times in one layer, each time routed on what the last time made.

With n [T, H]:  z_0 = n;  m_t = Routed_t(z_{t-1}) + sigma_t * Shared(z_{t-1});  z_t = rho * z_{t-1} + alpha_t (.) m_t;
block(n) = sum_t beta_t (.) m_t + kappa * n.  Source: Chain-of-Experts, arXiv 2506.18945; alpha, beta, rho, kappa and
sigma name its variants and the conversions that keep a pretrained function.
"""

from collections.abc import Callable, Sequence

import torch

from .chain import Chain, Router, Workspace, next_choice, with_shared
from .chain_kernels import infer, train
from .experts import Experts
from .routed import choose, compute


def coe_layer(
    n: torch.Tensor,
    routers: Sequence[Router],
    experts: Experts,
    alpha: torch.Tensor | None,
    beta: torch.Tensor,
    cfg: Chain,
    *,
    backend: str = "auto",
    workspace: Workspace | None = None,
    shared: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """block(n) of the module's text, [T, H] in the dtype of `n`; differentiable in n, routers, experts, alpha and beta.

    `routers`: one for each of C iterations (the same object may repeat). `alpha` [C-1, H] or [C-1, 1], `beta` [C, H] or
    [C, 1]; both are used, and the sum over iterations is kept, in fp32 (fp64 for fp64). Shared experts are the last
    `num_shared` of `experts` (every token goes through them, in the same grouped products) or a function `shared` of z
    [T, H]. `workspace` holds the buffers of inference on the kernels.
    Raises ValueError, with the shapes, when something does not fit, as `routed_experts` does.
    """
    _check(n, routers, experts, alpha, beta, cfg)
    name = choose(backend, n, experts)
    wide = torch.promote_types(n.dtype, torch.float32)
    alphas = [a.to(wide).expand(n.shape[1]).contiguous() for a in alpha] if alpha is not None else []
    betas = [b.to(wide).expand(n.shape[1]).contiguous() for b in beta]
    if name != "triton":
        return _plain(n, routers, experts, alphas, betas, cfg, compute(name), shared)
    if torch.is_grad_enabled() and _anything_learns(n, routers, experts, alpha, beta, shared):
        return train(n, routers, experts, alphas, betas, cfg, shared)
    with torch.no_grad():
        return infer(n, routers, experts, alphas, betas, cfg, shared, workspace or Workspace())


def _plain(n, routers, experts, alphas, betas, cfg: Chain, routed, shared) -> torch.Tensor:
    z, acc, used = n, None, None
    for t, router in enumerate(routers):
        weights, index, used = next_choice(router.logits(z), router, cfg, t, used)
        m = routed(z, *with_shared(index, weights, experts, cfg.shared(t)), experts)
        if shared is not None and cfg.shared(t):
            m = m + cfg.shared(t) * shared(z)
        wide = m.to(betas[t].dtype)
        acc = betas[t] * wide if acc is None else torch.addcmul(acc, betas[t], wide)
        if t + 1 < len(routers):
            before = z.to(wide.dtype) if cfg.rho == 1.0 else cfg.rho * z.to(wide.dtype)
            z = torch.addcmul(before, alphas[t], wide).to(n.dtype)
    if cfg.kappa:
        acc = acc + cfg.kappa * n.to(acc.dtype)
    return acc.to(n.dtype)


def _anything_learns(n, routers, experts: Experts, alpha, beta, shared) -> bool:
    found = [n, alpha, beta, *experts.tensors(), *(t for r in routers for t in (r.weight, r.bias))]
    return shared is not None or any(t is not None and t.requires_grad for t in found)


def _check(n, routers, experts: Experts, alpha, beta, cfg: Chain) -> None:
    c, h = len(routers), experts.hidden
    routable = experts.num_experts - experts.num_shared
    if n.dim() != 2 or n.shape[1] != h:
        raise ValueError(f"n must be [tokens, {h}], got {tuple(n.shape)}")
    if c != len(cfg.topk):
        raise ValueError(f"{c} routers for {len(cfg.topk)} iterations ({cfg.topk})")
    for t, router in enumerate(routers):
        if tuple(router.weight.shape) != (routable, h):
            raise ValueError(f"router {t} has weight {tuple(router.weight.shape)}, not ({routable}, {h})")
    for name, gate, rows in (("alpha", alpha, c - 1), ("beta", beta, c)):
        if gate is None and rows == 0:
            continue
        if gate is None or gate.dim() != 2 or gate.shape[0] != rows or gate.shape[1] not in (1, h):
            got = "none" if gate is None else tuple(gate.shape)
            raise ValueError(f"{name} must be [{rows}, {h}] or [{rows}, 1], got {got}")
