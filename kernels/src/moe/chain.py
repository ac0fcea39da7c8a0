"""How the iterations of a chain go together: its routers, its weights, and what one iteration hands to the next.

A chain of experts is the same experts several times in one layer; `layer` has the formula and computes it.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from .experts import Experts
from .routing import SCORINGS, route


@dataclass(frozen=True)
class Router:
    """One iteration's router: `weight` [N, H] (the logits have its dtype), `bias` [N], `correction` [N] (chooses)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """[T, N] of z [T, H], in the dtype of the weight."""
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
        """How many experts the router of iteration t chooses and normalises over."""
        return self.topk[t] if self.base_k is None else self.base_k

    def shared(self, t: int) -> float:
        """What the shared experts weigh in iteration t."""
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
        """A tensor of `shape` whose content is whatever was there; asked for again by `name`, it is the same memory."""
        size = 1
        for length in shape:
            size *= length
        key = (name, dtype, device)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self.buffers[key][:size].view(shape)


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
