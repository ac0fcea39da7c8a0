"""The one entry that computes routed experts, by the backend that fits."""

from functools import cache

import torch

from .experts import Experts
from .function import triton_experts
from .launch import interpreting
from .reference import batched_mm, grouped_mm, loop

BACKENDS = ("loop", "grouped_mm", "triton")


def backends() -> set[str]:
    """The backends that run here: `loop` always, `grouped_mm` with a torch that has it, `triton` with a CUDA device (or
    under TRITON_INTERPRET=1)."""
    found = {"loop"}
    if hasattr(torch.nn.functional, "grouped_mm"):
        found.add("grouped_mm")
    if _has_triton() and (torch.cuda.is_available() or interpreting()):
        found.add("triton")
    return found


@cache
def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def why_not(backend: str, experts: Experts) -> str:
    """Why `backend` cannot compute these experts here; empty when it can."""
    weight = experts.gate_up_proj
    if backend not in BACKENDS:
        return f"backend '{backend}' is none of auto, {', '.join(BACKENDS)}"
    if backend not in backends():
        return {"grouped_mm": "this torch has no grouped_mm"}.get(backend, "there is no CUDA device")
    if backend == "grouped_mm":
        align = 16 // weight.element_size()
        uneven = {f"{n} {s}" for n, s in (("H", experts.hidden), ("I", experts.width)) if s % align}
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or (
            weight.is_cuda and _capability(weight) < 80
        ):
            return f"grouped_mm takes fp32, bf16 and fp16 on sm80 and later, not {weight.dtype} on {weight.device}"
        if uneven:
            return f"grouped_mm needs rows of whole 16 bytes: {', '.join(sorted(uneven))} is no multiple of {align}"
        strided = [t for t in (experts.gate_up_proj, experts.down_proj) if not t.is_contiguous() or t.data_ptr() % 16]
        if strided:
            return f"grouped_mm needs contiguous weights at 16-byte addresses, not strides {strided[0].stride()}"
    if backend == "triton":
        if not (weight.is_cuda or interpreting()):
            return f"the kernels run on CUDA, the weights lie on {weight.device}"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the kernels take fp32, bf16 and fp16, not {weight.dtype}"
        if max(t[0].numel() for t in (experts.gate_up_proj, experts.down_proj)) >= 2**31:
            return f"one expert's matrix {tuple(weight.shape[1:])} has 2^31 elements or more"
    return ""


def _capability(tensor: torch.Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def choose(backend: str, hidden: torch.Tensor, experts: Experts) -> str:
    """`backend`, or for `auto` the first of triton (on CUDA), grouped_mm, loop that can. Raises ValueError if none."""
    if backend == "auto":
        order = ("triton", "grouped_mm", "loop") if hidden.is_cuda else ("grouped_mm", "loop")
        return next(name for name in order if not why_not(name, experts))
    reason = why_not(backend, experts)
    if reason:
        raise ValueError(f"{reason} (weights {tuple(experts.gate_up_proj.shape)}, hidden {tuple(hidden.shape)})")
    return backend


def check_routing(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> None:
    """Raises ValueError, with the shapes, unless hidden is [T, H] and ids and weights are [T, K]."""
    if hidden.dim() != 2 or hidden.shape[1] != experts.hidden:
        raise ValueError(f"hidden must be [tokens, {experts.hidden}], got {tuple(hidden.shape)}")
    if index.dim() != 2 or index.shape[0] != hidden.shape[0] or weights.shape != index.shape:
        raise ValueError(
            f"top_k_index {tuple(index.shape)} and top_k_weights {tuple(weights.shape)} must both be "
            f"[{hidden.shape[0]}, k] for hidden {tuple(hidden.shape)}"
        )
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"top_k_index must be int32 or int64, got {index.dtype}")


def routed_experts(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "swiglu",
    is_transposed: bool = False,
    is_concatenated: bool = True,
    slope: float = 1.702,
    limit: float = 7.0,
    backend: str = "auto",
) -> torch.Tensor:
    """out[t] = sum over slots s of top_k_weights[t, s] * Expert_{top_k_index[t, s]}(hidden[t]); differentiable.

    `hidden` [T, H] of any float dtype (computed in that of the weights, returned in its own), ids and weights [T, K];
    see `Experts` for the rest. An id outside [0, N) contributes nothing, and its weight gets no gradient. T may be 0.
    Sums are in fp32. `backend`: auto, loop, grouped_mm, triton. Raises ValueError for shapes that do not fit, and when
    the named backend cannot compute them here.
    """
    experts = Experts(
        gate_up_proj, down_proj, gate_up_bias, down_bias, activation, is_transposed, is_concatenated, 0, slope, limit
    )  # fmt: skip
    check_routing(hidden, top_k_index, top_k_weights, experts)
    name = choose(backend, hidden, experts)
    return compute(name)(hidden, top_k_index, top_k_weights, experts)


def compute(backend: str):
    """The function of a backend: (hidden, ids, weights, experts) -> [T, H] in the dtype of hidden."""
    if backend == "triton":
        return triton_experts
    return {"loop": loop, "grouped_mm": grouped_mm, "batched_mm": batched_mm}[backend]
