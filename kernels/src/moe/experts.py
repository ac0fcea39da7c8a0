"""What routed experts are made of: the weights, how they are laid out, and the gate between them."""

from dataclasses import dataclass

import torch

ACTIVATIONS = ("swiglu", "swiglu_oai")


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
        """N, shared ones included."""
        return self.gate_up_proj.shape[0]

    @property
    def hidden(self) -> int:
        """H, channels in and out."""
        return self.gate_up_proj.shape[1 if self.is_transposed else 2]

    @property
    def width(self) -> int:
        """I, columns of one expert between its projections."""
        return self.gate_up_proj.shape[2 if self.is_transposed else 1] // 2

    @property
    def clamped(self) -> bool:
        """Whether the gate is that of gpt-oss."""
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
