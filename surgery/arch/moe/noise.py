"""Noise on the copies of a router, for passes that should begin to differ before training."""

from typing import Any

from surgery.errors import UsageError


def noise_of(routers: str) -> float:
    """0.01 in noise:0.01, as a share of the router's own standard deviation; 0 for copy and share."""
    kind, _, number = routers.partition(":")
    if kind != "noise":
        return 0.0
    value = float(number)
    if not 0 < value <= 10:
        raise UsageError("bad-option", f"--routers {routers}: out of range", hint="noise:0.01; above 0, at most 10")
    return value


def noisy(weight: Any, share: float, generator: Any) -> Any:
    """`weight` [N, H] plus normal noise of `share` times the standard deviation of its values, drawn in float32."""
    import torch

    wide = weight.float()
    return wide + share * wide.std() * torch.randn(wide.shape, generator=generator)
