"""Routed experts (mixture of experts) and chains of them: one definition, three ways to compute it.

`routed_experts` and `coe_layer` are differentiable. Backends: `loop` (the definition, fp32 sums in index order),
`grouped_mm` (torch's grouped product) and `triton` (the kernels in `device/`, CUDA). Needs torch; triton is imported
when a kernel is launched.
"""

from .adapter import experts_forward, register
from .chain import Chain, Router, Workspace
from .experts import Experts
from .layer import coe_layer
from .plan import Plan
from .plan_kernels import build_plan
from .routed import backends, routed_experts
from .routing import route

__all__ = [
    "Chain",
    "Experts",
    "Plan",
    "Router",
    "Workspace",
    "backends",
    "build_plan",
    "coe_layer",
    "experts_forward",
    "register",
    "route",
    "routed_experts",
]
