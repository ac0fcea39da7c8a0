"""The kernels behind transformers' experts interface, under the name `surgery_triton`.

transformers is imported when asked for, never before: the rest of this package needs torch and triton only.
"""

import warnings
from functools import cache

import torch

from .experts import Experts
from .routed import routed_experts, why_not

NAME = "surgery_triton"
_warned: set[str] = set()


def register() -> str:
    """Make `experts_implementation="surgery_triton"` known to transformers; returns the name. Twice is once."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)
    return NAME


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts module's forward: hidden [T, H], ids and weights [T, K] -> [T, H] in the dtype of hidden.

    Ids past the experts (expert parallelism's sentinels) contribute nothing and their weights get no gradient. What the
    kernels cannot compute goes to transformers' `grouped_mm`, or to the module's own forward where that cannot either,
    with one warning that says why.
    """
    experts, reason = _experts(self)
    if experts is not None:
        reason = why_not("triton", experts)
    if experts is None or reason:
        return _fall_back(self, reason, hidden_states, top_k_index, top_k_weights)
    return routed_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        experts.gate_up_proj,
        experts.down_proj,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        activation=experts.activation,
        is_transposed=experts.is_transposed,
        is_concatenated=experts.is_concatenated,
        slope=experts.slope,
        limit=experts.limit,
        backend="triton",
    )


def _experts(module: torch.nn.Module) -> tuple[Experts | None, str]:
    """The module's weights as ours, or why they are none that the kernels know."""
    if torch.compiler.is_compiling():
        return None, "torch.compile does not trace the kernels"
    if not getattr(module, "has_gate", False):
        return None, "the experts have no gate"
    if getattr(module, "has_post_expert_norm", False):
        return None, "the experts end in a norm"
    up, down = module.gate_up_proj, module.down_proj
    if type(up.data) is not torch.Tensor or type(down.data) is not torch.Tensor:
        return None, f"the weights are of {type(up.data).__name__}"
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    for activation in ("swiglu", "swiglu_oai"):
        try:
            experts = Experts(
                up, down, *biases, activation, module.is_transposed, module.is_concatenated,
                slope=float(getattr(module, "alpha", 1.702)), limit=float(getattr(module, "limit", 7.0)),
            )  # fmt: skip
        except (TypeError, ValueError) as err:
            return None, str(err)
        if _same_gate(module, experts):
            return experts, ""
    return None, f"{type(module).__name__}._apply_gate is none of the gates that the kernels know"


@cache
def _probe() -> torch.Tensor:
    """Values far into both clamps, for 8 columns."""
    return torch.linspace(-20, 20, 16 * 16).view(16, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]


_gates: dict[tuple, bool] = {}


def _same_gate(module: torch.nn.Module, experts: Experts) -> bool:
    """Whether the module's gate does what ours does: compared by value, once for each class and its settings."""
    act = getattr(module, "act_fn", None)
    key = (type(module), type(act), getattr(act, "__name__", ""), experts.activation, experts.slope, experts.limit)
    if key not in _gates:
        with torch.no_grad():
            try:
                theirs = module._apply_gate(_probe())
            except (RuntimeError, AttributeError, TypeError):
                theirs = None
            ours = experts.gate(_probe())
            _gates[key] = theirs is not None and theirs.shape == ours.shape and torch.allclose(theirs, ours)
    return _gates[key]


def _fall_back(
    module: torch.nn.Module, reason: str, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    from transformers.integrations.moe import grouped_mm_experts_forward

    own = getattr(type(module).forward, "__wrapped__", None)
    name = "grouped_mm" if own is None or _whole_rows(module) else "the module's own forward"
    if reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(f"{NAME}: {reason}; using {name}", stacklevel=3)
    return (grouped_mm_experts_forward if name == "grouped_mm" else own)(module, hidden, index, weights)


def _whole_rows(module: torch.nn.Module) -> bool:
    """torch's grouped product refuses rows that are no multiple of 16 bytes, and transformers does not ask."""
    weights = [getattr(module, n, None) for n in ("gate_up_proj", "up_proj", "down_proj")]
    return all(n * w.element_size() % 16 == 0 for w in weights if w is not None for n in w.shape[1:])
