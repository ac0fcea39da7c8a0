"""A chain of experts: the same experts several times in one layer, each time routed on what the last time made.

With n [T, H]:  z_0 = n;  m_t = Routed_t(z_{t-1}) + sigma_t * Shared(z_{t-1});  z_t = rho * z_{t-1} + alpha_t (.) m_t;
block(n) = sum_t beta_t (.) m_t + kappa * n.  Source: Chain-of-Experts, arXiv 2506.18945; alpha, beta, rho, kappa and
sigma name its variants and the conversions that keep a pretrained function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from .experts import Experts, choose, compute
from .routing import SCORINGS, route

FUSED_EXPERTS, FUSED_CHOICES = 256, 16  # what the kernel that combines and routes holds in registers


@dataclass(frozen=True)
class Router:
    """One iteration's router: `weight` [N, H] (the logits have its dtype), `bias` [N], `correction` [N] (chooses)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        return functional.linear(z.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Chain:
    """How the iterations go together.

    `topk[t]` experts a token in iteration t, out of the `base_k` (default: the same) that the router chooses and
    normalises over. `reselect`: `forbid` experts that the token used in earlier iterations, `allow` them, or a number
    taken off their weight in the comparison. `sigma[t]` weighs the shared experts. The rest as in the module's text.
    """

    topk: tuple[int, ...]
    base_k: int | None = None
    scoring: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: tuple[int, int] | None = None
    reselect: str | float = "allow"
    rho: float = 1.0
    kappa: float = 0.0
    sigma: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f"topk {self.topk} must name at least one expert for each iteration")
        if isinstance(self.reselect, str) and self.reselect not in ("forbid", "allow"):
            raise ValueError(f"reselect '{self.reselect}' is none of forbid, allow, or a penalty")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring '{self.scoring}' is none of {', '.join(SCORINGS)}")
        if self.sigma and len(self.sigma) != len(self.topk):
            raise ValueError(f"{len(self.sigma)} weights of shared experts for {len(self.topk)} iterations")

    def base(self, t: int) -> int:
        return self.topk[t] if self.base_k is None else self.base_k

    def shared(self, t: int) -> float:
        return self.sigma[t] if self.sigma else 1.0

    @property
    def penalty(self) -> float | None:
        """None where used experts are out of the question."""
        return None if self.reselect == "forbid" else 0.0 if self.reselect == "allow" else float(self.reselect)


@dataclass
class Workspace:
    """Buffers of inference, grown to the largest size asked for and reused by every iteration and layer."""

    buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = 1
        for length in shape:
            size *= length
        key = (name, dtype, device)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self.buffers[key][:size].view(shape)


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
    from .chain_kernels import infer, train

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


def next_choice(
    logits: torch.Tensor, router: Router, cfg: Chain, t: int, used: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(weights, ids, ids used so far) of iteration t."""
    weights, index = route(
        logits, cfg.topk[t], cfg.scoring, cfg.normalize, cfg.scale, router.correction, cfg.groups, used,
        base_k=cfg.base(t), penalty=cfg.penalty,
    )  # fmt: skip
    return weights, index, add_used(used, index, cfg)


def add_used(used: torch.Tensor | None, index: torch.Tensor, cfg: Chain) -> torch.Tensor | None:
    """The list of used experts, kept only where it is read."""
    if cfg.penalty == 0.0:
        return None
    return index if used is None else torch.cat([used, index], dim=1)


def with_shared(
    index: torch.Tensor, weights: torch.Tensor, experts: Experts, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights with a slot for each shared expert of the pool, unless they weigh nothing here."""
    if not experts.num_shared or not sigma:
        return index, weights
    first = experts.num_experts - experts.num_shared
    ids = torch.arange(first, experts.num_experts, dtype=index.dtype, device=index.device)
    ids = ids.expand(index.shape[0], -1)
    return torch.cat([index, ids], 1), torch.cat([weights, torch.full_like(ids, sigma, dtype=weights.dtype)], 1)


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
