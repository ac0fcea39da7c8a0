"""What routed experts are made of, and the one entry that computes them by the backend that fits."""

import os
from dataclasses import dataclass
from functools import cache

import torch

ACTIVATIONS = ("swiglu", "swiglu_oai")
BACKENDS = ("loop", "grouped_mm", "triton")


@dataclass(frozen=True)
class Experts:
    """The weights of N experts of width I on H channels, and how they are laid out.

    `gate_up_proj` [N, 2I, H] and `down_proj` [N, H, I], or with `is_transposed` [N, H, 2I] and [N, I, H]; the 2I are
    the gate's half and the up half, or with `is_concatenated` false alternate. Biases [N, 2I] and [N, H]. `swiglu` is
    silu(g) * u; `swiglu_oai` is gpt-oss's: g and u clamped by `limit`, g * sigmoid(slope * g) * (u + 1).
    The last `num_shared` experts are no choice of a router: `coe_layer` gives them every token.
    Raises ValueError when shapes, dtypes or devices do not fit together.
    """

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    activation: str = "swiglu"
    is_transposed: bool = False
    is_concatenated: bool = True
    num_shared: int = 0
    slope: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        up, down = self.gate_up_proj, self.down_proj
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation '{self.activation}' is none of {', '.join(ACTIVATIONS)}")
        if up.dim() != 3 or down.dim() != 3 or 0 in up.shape or 0 in down.shape:
            raise ValueError(f"gate_up_proj {tuple(up.shape)} and down_proj {tuple(down.shape)} need three dimensions")
        wanted = (
            (self.num_experts, self.width, self.hidden)
            if self.is_transposed
            else (up.shape[0], self.hidden, self.width)
        )
        if up.shape[1 + self.is_transposed] % 2 or tuple(down.shape) != wanted:
            raise ValueError(f"gate_up_proj {tuple(up.shape)} does not fit down_proj {tuple(down.shape)}")
        for name, bias, length in (
            ("gate_up_bias", self.gate_up_bias, 2 * self.width),
            ("down_bias", self.down_bias, self.hidden),
        ):
            if bias is not None and tuple(bias.shape) != (self.num_experts, length):
                raise ValueError(f"{name} {tuple(bias.shape)} must be ({self.num_experts}, {length})")
        if len({t.dtype for t in self.tensors()}) > 1 or len({t.device for t in self.tensors()}) > 1:
            raise ValueError("the weights of the experts must have one dtype and lie on one device")
        if not 0 <= self.num_shared < self.num_experts:
            raise ValueError(f"{self.num_shared} shared of {self.num_experts} experts leaves none to route to")

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate_up_proj.shape[1 if self.is_transposed else 2]

    @property
    def width(self) -> int:
        return self.gate_up_proj.shape[2 if self.is_transposed else 1] // 2

    @property
    def clamped(self) -> bool:
        return self.activation == "swiglu_oai"

    def tensors(self) -> list[torch.Tensor]:
        """The weights and those biases that are there."""
        return [t for t in (self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias) if t is not None]

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The activation of [..., 2I] in this layout: [..., I]."""
        if self.is_concatenated:
            g, u = gate_up.chunk(2, dim=-1)
        else:
            g, u = gate_up[..., ::2], gate_up[..., 1::2]
        if not self.clamped:
            return torch.nn.functional.silu(g) * u
        g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        return g * torch.sigmoid(self.slope * g) * (u + 1)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU. Triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


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


def why_not(backend: str, hidden: torch.Tensor, experts: Experts) -> str:
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
        return next(name for name in order if not why_not(name, hidden, experts))
    reason = why_not(backend, hidden, experts)
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
        from .function import triton_experts

        return triton_experts
    from . import reference

    return {"loop": reference.loop, "grouped_mm": reference.grouped_mm, "batched_mm": reference.batched_mm}[backend]
