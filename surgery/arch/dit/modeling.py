"""Diffusion transformers with grafted operators: the operators, and the two model classes that carry them.

This file is self-contained on purpose: a copy of it travels beside the weights of a grafted model, so that
`AutoModel.from_pretrained(folder, trust_remote_code=True)` works without any package but torch and diffusers (and
transformers for the `mamba2` operator). Operators and their names follow arXiv 2506.05340, Tab. 3.

Every operator maps [B, N, D] to [B, N, D] and is constructed as `Operator(dim, heads, n_tokens, **args)`. Constructors
compute nothing from data and keep no buffers, so they also work on the meta device. Tensor names carry their axes:
B batch, N tokens, D width, H heads, d width of a head, G chunks of queries, Q queries of a chunk, K keys of a chunk.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

# A grafted configuration says "surgery:ada_norm_zero": the stock class, which would leave the grafted operators at
# random values with no more than a warning, then refuses to construct.
NORM_PREFIX = "surgery:"


def _refuse_conditioning(operator: nn.Module, encoder_hidden_states: object, attention_mask: object) -> None:
    """These operators mix one sequence with itself; they have no place for a second sequence or a mask."""
    for what, value in (("encoder_hidden_states", encoder_hidden_states), ("attention_mask", attention_mask)):
        if value is not None:
            raise ValueError(f"{type(operator).__name__} is not cross-attention and takes no {what}")


class DepthwiseConv(nn.Conv1d):
    """One filter of `k` taps per channel over the last axis of [B, C, L], length kept by zeros outside.

    Causal: y[l] = b + Σ_j w[j]·x[l-k+1+j], so tap k-1 meets the current entry. Bidirectional: ⌊k/2⌋ zeros on the left,
    so tap ⌊k/2⌋ does.
    """

    def __init__(self, channels: int, k: int, bidirectional: bool) -> None:
        super().__init__(channels, channels, k, groups=channels)
        self.current_tap = k // 2 if bidirectional else k - 1

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        right = self.kernel_size[0] - 1 - self.current_tap
        return F.conv1d(F.pad(x_BCL, (self.current_tap, right)), self.weight, self.bias, groups=self.groups)

    def over_tokens(self, x_BNC: torch.Tensor) -> torch.Tensor:
        """The same along the tokens of [B, N, C]."""
        taps, n = self.kernel_size[0], x_BNC.shape[1]
        if x_BNC.device.type != "cpu" or taps > 8:
            return self(x_BNC.transpose(1, 2)).transpose(1, 2)
        # On a CPU a few shifted multiply-adds need no transposes and train twice as fast as a depthwise conv1d.
        padded = F.pad(x_BNC, (0, 0, self.current_tap, taps - 1 - self.current_tap))
        y_BNC = torch.addcmul(self.bias, padded[:, :n], self.weight[:, 0, 0])
        for j in range(1, taps):
            y_BNC = torch.addcmul(y_BNC, padded[:, j : j + n], self.weight[:, 0, j])
        return y_BNC

    def start_as_identity(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.weight[..., self.current_tap] = 1.0
            if self.bias is not None:
                self.bias.zero_()


class SelfAttention(Attention):
    """`mha`: the block's own softmax attention, diffusers' class and names, so copied weights give the same bits."""

    def __init__(self, dim: int, heads: int, n_tokens: int) -> None:
        super().__init__(query_dim=dim, heads=heads, dim_head=dim // heads, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        _refuse_conditioning(self, encoder_hidden_states, attention_mask)
        return super().forward(hidden_states, **kwargs)


class SlidingWindowAttention(nn.Module):
    """`swa`: softmax attention in which key j is visible to query i iff |i-j| ≤ w, tokens in raster order.

    A dense mask would cost as much as full attention, so queries go in chunks and each chunk meets only the keys within
    its reach: N·(Q+2w) scores instead of N². With w ≥ N-1 it is plain attention.
    """

    def __init__(self, dim: int, heads: int, n_tokens: int, w: int = 4) -> None:
        super().__init__()
        self.heads, self.w = heads, w
        self.chunk = 32
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        _refuse_conditioning(self, encoder_hidden_states, attention_mask)
        q_BHNd, k_BHNd, v_BHNd = (
            proj(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hidden_states.shape[1] - 1 <= self.w:
            mixed_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd)
        else:
            mixed_BHNd = self._within_window(q_BHNd, k_BHNd, v_BHNd)
        return self.out_proj(mixed_BHNd.transpose(1, 2).flatten(2))

    def _within_window(self, q_BHNd: torch.Tensor, k_BHNd: torch.Tensor, v_BHNd: torch.Tensor) -> torch.Tensor:
        n, w = q_BHNd.shape[2], self.w
        chunk = min(max(self.chunk, w), n)
        chunks = -(-n // chunk)
        tail = chunks * chunk - n
        q_BHGQd = F.pad(q_BHNd, (0, 0, 0, tail)).unflatten(2, (chunks, chunk))
        k_BHGKd, v_BHGKd = (
            F.pad(x_BHNd, (0, 0, w, w + tail)).unfold(2, chunk + 2 * w, chunk).transpose(-1, -2)
            for x_BHNd in (k_BHNd, v_BHNd)
        )
        first_G11 = torch.arange(chunks, device=q_BHNd.device).view(-1, 1, 1) * chunk
        query_GQ1 = first_G11 + torch.arange(chunk, device=q_BHNd.device).view(1, -1, 1)
        key_G1K = first_G11 + torch.arange(-w, chunk + w, device=q_BHNd.device).view(1, 1, -1)
        # Queries past the end are padding and cut off below; they may see padding, as a row without a key would be NaN.
        exists_GQK = ((key_G1K >= 0) & (key_G1K < n)) | (query_GQ1 >= n)
        visible_GQK = exists_GQK & ((query_GQ1 - key_G1K).abs() <= w)
        mixed_BHGQd = F.scaled_dot_product_attention(q_BHGQd, k_BHGKd, v_BHGKd, attn_mask=visible_GQK)
        return mixed_BHGQd.flatten(2, 3)[:, :, :n]


class _Hyena(nn.Module):
    """The gated convolutions of the Hyena family: q, k, v = split(W_in u); y = W_out(q ⊙ CC(k ⊙ v)).

    `k` is the length of the featurizer over the 3D projected channels (None: no featurizer), `k_inner` that of the
    filter between the gates (None: no filter). The filter starts as the identity. No activation, no heads, no
    normalisation.
    """

    def __init__(self, dim: int, *, k: int | None, k_inner: int | None, bidirectional: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = DepthwiseConv(3 * dim, k, bidirectional) if k is not None else None
        self.inner_filter = DepthwiseConv(dim, k_inner, bidirectional) if k_inner is not None else None
        self.out_proj = nn.Linear(dim, dim)
        if self.inner_filter is not None:
            self.inner_filter.start_as_identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        _refuse_conditioning(self, encoder_hidden_states, attention_mask)
        projected = self.in_proj(hidden_states)
        if self.short_filter is not None:
            projected = self.short_filter.over_tokens(projected)
        q_BND, k_BND, v_BND = projected.chunk(3, dim=-1)
        gated_BND = k_BND * v_BND
        if self.inner_filter is not None:
            gated_BND = self.inner_filter.over_tokens(gated_BND)
        return self.out_proj(q_BND * gated_BND)


class HyenaSE(_Hyena):
    """`hyena-se`: featurizer and inner filter; token n reaches n..n+k+k_inner-2."""

    def __init__(
        self, dim: int, heads: int, n_tokens: int, k: int = 4, k_inner: int = 4, bidirectional: bool = False
    ) -> None:
        super().__init__(dim, k=k, k_inner=k_inner, bidirectional=bidirectional)


class HyenaX(_Hyena):
    """`hyena-x`: featurizer only; token n reaches n..n+k-1."""

    def __init__(self, dim: int, heads: int, n_tokens: int, k: int = 4, bidirectional: bool = False) -> None:
        super().__init__(dim, k=k, k_inner=None, bidirectional=bidirectional)


class HyenaY(_Hyena):
    """`hyena-y`: inner filter only; token n reaches n..n+k_inner-1, and at the start no other token."""

    def __init__(self, dim: int, heads: int, n_tokens: int, k_inner: int = 4, bidirectional: bool = False) -> None:
        super().__init__(dim, k=None, k_inner=k_inner, bidirectional=bidirectional)


class Mamba2(nn.Module):
    """`mamba2`: the selective state space of Mamba-2, causal in raster order; transformers' mixer with one group.

    The scan is cut into chunks whose work grows with their length, and padded to whole ones: chunks of at most 64
    tokens, never longer than the sequence, give the same function (up to summation order) for less work than the
    default 256.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        n_tokens: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 16,
    ) -> None:
        super().__init__()
        try:
            from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
            from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
        except ImportError as missing:
            raise ImportError("the mamba2 operator needs transformers: pip install transformers") from missing
        config = Mamba2Config(
            hidden_size=dim,
            state_size=d_state,
            conv_kernel=d_conv,
            expand=expand,
            head_dim=headdim,
            num_heads=expand * dim // headdim,
            n_groups=1,
            use_bias=False,
            chunk_size=min(64, n_tokens),
            num_hidden_layers=1,
        )
        self.mixer = Mamba2Mixer(config, layer_idx=0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        _refuse_conditioning(self, encoder_hidden_states, attention_mask)
        return self.mixer(hidden_states)


class Mlp(FeedForward):
    """`mlp`: W_2 act(W_1 u) with int(r·D) hidden units; r = 4 is the stock operator, diffusers' class and names."""

    def __init__(self, dim: int, heads: int, n_tokens: int, r: float = 4, activation: str = "gelu-approximate") -> None:
        super().__init__(dim, inner_dim=int(r * dim), activation_fn=activation)


class MlpHyenaX(nn.Module):
    """`mlp-hyena-x`: a gated convolution along the channel axis, with tokens as its depthwise channels.

    z = W_in u (3·r·D); every token position filters its own z with its own k taps; y = W_out(q ⊙ k ⊙ v). Only token n
    reaches token n. The filters tie the operator to one number of tokens. The convolution runs over the joined 3·r·D
    axis, so the last k-1 entries of q reach into k, and those of k into v, as in the published operator.
    """

    def __init__(self, dim: int, heads: int, n_tokens: int, r: float = 2, k: int = 4, n: int | None = None) -> None:
        super().__init__()
        if n is not None and n != n_tokens:
            raise ValueError(f"mlp-hyena-x was made for {n} tokens, and this model has {n_tokens}")
        inner = int(r * dim)
        self.n_tokens = n_tokens
        self.in_proj = nn.Linear(dim, 3 * inner)
        self.short_filter = DepthwiseConv(n_tokens, k, bidirectional=False)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden_states.shape[1] != self.n_tokens:
            raise ValueError(
                f"mlp-hyena-x has one filter for each of {self.n_tokens} tokens, and {hidden_states.shape[1]} came; "
                "use the image size of the model's sample_size, and no feed-forward chunking over tokens"
            )
        q, k, v = self.short_filter(self.in_proj(hidden_states)).chunk(3, dim=-1)
        return self.out_proj(q * (k * v))


class IdentityZero(nn.Module):
    """`identity-zero`: output 0, so the block keeps its residual stream; fits both slots."""

    def __init__(self, dim: int, heads: int, n_tokens: int) -> None:
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


OPERATORS: dict[str, Callable[..., nn.Module]] = {
    "mha": SelfAttention,
    "swa": SlidingWindowAttention,
    "hyena-se": HyenaSE,
    "hyena-x": HyenaX,
    "hyena-y": HyenaY,
    "mamba2": Mamba2,
    "mlp": Mlp,
    "mlp-hyena-x": MlpHyenaX,
    "identity-zero": IdentityZero,
}
SLOT_MODULES = {"attn": "attn1", "mlp": "ff"}


def apply_grafts(model: nn.Module, grafts: Sequence[Mapping[str, Any]]) -> None:
    """Put the operators of `grafts` ({"block", "slot", "op", "args"} each) in place; their weights are new.

    Raises ValueError for an operator, slot or block that does not exist and for a slot filled twice.
    """
    config = model.config
    dim = config.num_attention_heads * config.attention_head_dim
    n_tokens = (config.sample_size // config.patch_size) ** 2
    filled = set()
    for graft in grafts:
        block, slot, op = graft["block"], graft["slot"], graft["op"]
        if op not in OPERATORS:
            raise ValueError(f"surgery_grafts names the unknown operator {op!r}; known: {', '.join(OPERATORS)}")
        if slot not in SLOT_MODULES or not 0 <= block < len(model.transformer_blocks) or (block, slot) in filled:
            raise ValueError(f"surgery_grafts: slot {slot!r} of block {block} does not exist or is filled twice")
        filled.add((block, slot))
        operator = OPERATORS[op](dim, config.num_attention_heads, n_tokens, **graft.get("args", {}))
        setattr(model.transformer_blocks[block], SLOT_MODULES[slot], operator)


def _fields_of(stock: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a constructor the parameters of the `stock` class before its own.

    diffusers decides by the signature which configuration fields a class takes; listing the stock ones by hand would
    silently drop a field that a later diffusers adds.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(init).parameters
        inherited = list(inspect.signature(stock.__init__).parameters.values())
        extra = [own[name] for name in own if own[name].kind is inspect.Parameter.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature([*inherited, *extra])  # type: ignore[attr-defined]
        return init

    return decorate


class SurgeryDiTTransformer2DModel(DiTTransformer2DModel):
    """A class-conditional DiT with the operators listed in `surgery_grafts` in place of its own.

    `timestep_freq_shift` and `norm3_eps` set what diffusers fixes at 1 and `norm_eps`; weights trained with the
    original DiT code need 0 and 1e-6 to give the outputs they were trained for.
    """

    @register_to_config
    @_fields_of(DiTTransformer2DModel)
    def __init__(
        self,
        *,
        surgery_grafts: list[dict[str, Any]] | None = None,
        timestep_freq_shift: float | None = None,
        norm3_eps: float | None = None,
        **stock: Any,
    ) -> None:
        norm_type = stock.pop("norm_type", "ada_norm_zero").removeprefix(NORM_PREFIX)
        super().__init__(norm_type=norm_type, **stock)
        # The stock constructor recorded the plain name; what save_pretrained writes must keep the stock class out too.
        self.register_to_config(norm_type=NORM_PREFIX + norm_type)
        for block in self.transformer_blocks:
            if timestep_freq_shift is not None:
                block.norm1.emb.time_proj.downscale_freq_shift = timestep_freq_shift
            if norm3_eps is not None:
                block.norm3.eps = norm3_eps
        apply_grafts(self, surgery_grafts or [])


class SurgeryPixArtTransformer2DModel(PixArtTransformer2DModel):
    """A PixArt text-to-image transformer with grafted operators; cross-attention is never touched."""

    @register_to_config
    @_fields_of(PixArtTransformer2DModel)
    def __init__(self, *, surgery_grafts: list[dict[str, Any]] | None = None, **stock: Any) -> None:
        norm_type = stock.pop("norm_type", "ada_norm_single").removeprefix(NORM_PREFIX)
        super().__init__(norm_type=norm_type, **stock)
        self.register_to_config(norm_type=NORM_PREFIX + norm_type)
        apply_grafts(self, surgery_grafts or [])
