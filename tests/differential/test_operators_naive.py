"""Every operator against its definition (arXiv 2506.05340, Tab. 3), written as loops in float64.

Axes: B batch, N tokens, D width, H heads, d width of a head, C channels. Nothing here calls an operator's own code.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_dits import resolve_operator
from torch import nn

B, N, D, H = 2, 7, 4, 2
PLACE = {"dim": D, "heads": H, "n_tokens": N}
State = dict[str, torch.Tensor]


def operator(text: str, *, random_filters: bool = True, **place: int) -> nn.Module:
    """The operator in float64; inner filters get random values, as trained ones have."""
    spec, args = resolve_operator(text)
    module = spec.build(**{**PLACE, **place}, **args, generator=torch.Generator().manual_seed(1)).double()
    if random_filters and getattr(module, "inner_filter", None) is not None:
        with torch.no_grad():
            for parameter in module.inner_filter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return module


def tokens(n: int = N, dim: int = D, seed: int = 3) -> torch.Tensor:
    return torch.randn(B, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """y[o] = b[o] + Σ_i W[o,i] x[i] for a vector."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    y = torch.zeros(weight.shape[0], dtype=x.dtype)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            y[o] += weight[o, i] * x[i]
    return y if bias is None else y + bias


def causal_filter(state: State, name: str, x_LC: torch.Tensor, left: int | None = None) -> torch.Tensor:
    """y[l,c] = b_c + Σ_j w[c,j]·x[l-left+j, c], zeros outside; left = K-1 is causal."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    taps = weight.shape[-1]
    left = taps - 1 if left is None else left
    y = torch.zeros_like(x_LC)
    for place in range(x_LC.shape[0]):
        for channel in range(x_LC.shape[1]):
            y[place, channel] = bias[channel]
            for j in range(taps):
                if 0 <= place - left + j < x_LC.shape[0]:
                    y[place, channel] += weight[channel, 0, j] * x_LC[place - left + j, channel]
    return y


def naive_attention(state: State, u_ND: torch.Tensor, names: tuple[str, ...], window: int | None) -> torch.Tensor:
    n, head = u_ND.shape[0], D // H
    q, k, v = (torch.stack([linear(state, name, u) for u in u_ND]) for name in names[:3])
    mixed = torch.zeros_like(u_ND)
    for h in range(H):
        part = slice(h * head, (h + 1) * head)
        for i in range(n):
            visible = [j for j in range(n) if window is None or abs(i - j) <= window]
            weights = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(head)) for j in visible]
            for j, weight in zip(visible, weights, strict=True):
                mixed[i, part] += weight / sum(weights) * v[j, part]
    return torch.stack([linear(state, names[3], row) for row in mixed])


def naive_mha(state: State, u_ND: torch.Tensor, **args: Any) -> torch.Tensor:
    return naive_attention(state, u_ND, ("to_q", "to_k", "to_v", "to_out.0"), None)


def naive_swa(state: State, u_ND: torch.Tensor, w: int, **args: Any) -> torch.Tensor:
    return naive_attention(state, u_ND, ("q_proj", "k_proj", "v_proj", "out_proj"), w)


def naive_hyena(state: State, u_ND: torch.Tensor, bidirectional: bool, **args: Any) -> torch.Tensor:
    z = torch.stack([linear(state, "in_proj", u) for u in u_ND])
    if "k" in args:
        z = causal_filter(state, "short_filter", z, args["k"] // 2 if bidirectional else None)
    q, k, v = z[:, :D], z[:, D : 2 * D], z[:, 2 * D :]
    gated = k * v
    if "k_inner" in args:
        gated = causal_filter(state, "inner_filter", gated, args["k_inner"] // 2 if bidirectional else None)
    return torch.stack([linear(state, "out_proj", row) for row in q * gated])


def naive_mlp(state: State, u_ND: torch.Tensor, **args: Any) -> torch.Tensor:
    rows = []
    for u in u_ND:
        hidden = linear(state, "net.0.proj", u)
        # gelu with the tanh approximation
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        rows.append(linear(state, "net.2", 0.5 * hidden * (1 + torch.tanh(inner))))
    return torch.stack(rows)


def naive_mlp_hyena(state: State, u_ND: torch.Tensor, **args: Any) -> torch.Tensor:
    z = torch.stack([linear(state, "in_proj", u) for u in u_ND])
    z = causal_filter(state, "short_filter", z.T).T  # along the joined channel axis, one filter a token
    q, k, v = z.chunk(3, dim=1)
    return torch.stack([linear(state, "out_proj", row) for row in q * k * v])


def naive_zero(state: State, u_ND: torch.Tensor, **args: Any) -> torch.Tensor:
    return torch.zeros_like(u_ND)


def naive_mamba(state: State, u_ND: torch.Tensor, d_state: int, expand: int, headdim: int, **args: Any) -> torch.Tensor:
    """One state S[h] per head: S ← exp(A Δ) S + Δ x Bᵀ, y = S C + D x; then a gated RMS norm and the output layer."""
    state = {name.removeprefix("mixer."): value for name, value in state.items()}
    n, inner = u_ND.shape[0], expand * u_ND.shape[1]
    heads = inner // headdim
    z = torch.stack([linear(state, "in_proj", u) for u in u_ND])
    gate, convolved, step = z.split([inner, inner + 2 * d_state, heads], dim=1)
    convolved = F.silu(causal_filter(state, "conv1d", convolved))
    x, into, out_of = convolved.split([inner, d_state, d_state], dim=1)
    y = torch.zeros(n, inner, dtype=u_ND.dtype)
    for h in range(heads):
        memory = torch.zeros(headdim, d_state, dtype=u_ND.dtype)
        part = slice(h * headdim, (h + 1) * headdim)
        for i in range(n):
            delta = F.softplus(step[i, h] + state["dt_bias"][h])
            memory = torch.exp(-torch.exp(state["A_log"][h]) * delta) * memory + delta * torch.outer(
                x[i, part], into[i]
            )
            y[i, part] = memory @ out_of[i] + state["D"][h] * x[i, part]
    y = y * F.silu(gate)
    y = y / torch.sqrt((y**2).mean(dim=1, keepdim=True) + 1e-5) * state["norm.weight"]
    return torch.stack([linear(state, "out_proj", row) for row in y])


CASES: list[tuple[str, Callable[..., torch.Tensor]]] = [
    ("mha", naive_mha),
    *((f"swa:w={w}", naive_swa) for w in (1, 2, 5, 6, 9)),
    *((f"hyena-se:k={k},k_inner={7 - k}", naive_hyena) for k in (3, 4)),
    *((f"hyena-x:k={k}", naive_hyena) for k in (1, 3, 4, 9)),
    *((f"hyena-y:k_inner={k}", naive_hyena) for k in (3, 4)),
    *((f"hyena-se:k={k},bidirectional=true", naive_hyena) for k in (3, 4)),
    *((f"mlp:r={r}", naive_mlp) for r in (1.6, 3, 4)),
    *((f"mlp-hyena-x:k={k}", naive_mlp_hyena) for k in (3, 4)),
    ("mlp-hyena-x:r=1.5", naive_mlp_hyena),
    ("identity-zero", naive_zero),
]


@pytest.mark.parametrize(("text", "definition"), CASES)
def test_operator_is_its_definition(text: str, definition: Callable[..., torch.Tensor]) -> None:
    module, args = operator(text), resolve_operator(text)[1]
    u_BND, state = tokens(), module.state_dict()
    expected = torch.stack([definition(state, u_ND, **args) for u_ND in u_BND])
    with torch.no_grad():
        assert torch.allclose(module(u_BND), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 7, 70])
def test_mamba2_is_its_recurrence(n: int) -> None:
    """The scan runs in float32 whatever the weights are; 70 tokens take two chunks."""
    text = "mamba2:d_state=3,d_conv=4,headdim=4"
    module, args = operator(text, n_tokens=n), resolve_operator(text)[1]
    u_BND, state = tokens(n), module.state_dict()
    expected = torch.stack([naive_mamba(state, u_ND, **args) for u_ND in u_BND])
    with torch.no_grad():
        assert torch.allclose(module(u_BND), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "text",
    ["mha", "swa:w=2", "hyena-se:k=3", "hyena-x", "hyena-y", "hyena-x:k=3,bidirectional=true", "r3", "mlp-hyena-x"],
)
def test_gradients_are_those_of_finite_differences(text: str) -> None:
    module = operator(text, n_tokens=5)
    names = list(dict(module.named_parameters()))

    def apply(u_BND: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (u_BND,))

    inputs = [tokens(5)[:1].requires_grad_()] + [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(apply, inputs)


def test_mamba2_passes_gradients_to_every_weight() -> None:
    module = operator("mamba2:d_state=3,headdim=4").float().train()
    module(tokens().float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        ("hyena-se", range(2, 9)),
        ("hyena-x", range(2, 6)),
        ("hyena-y", range(2, 6)),
        ("hyena-x:k=3,bidirectional=true", range(1, 4)),
        ("swa:w=4", range(0, 7)),
        ("swa:w=1", range(1, 4)),
        ("mlp-hyena-x", range(2, 3)),
        ("r3", range(2, 3)),
        ("mha", range(0, 12)),
        ("mamba2:d_state=3,headdim=4", range(2, 12)),
        ("identity-zero", range(0)),
    ],
)
def test_a_changed_token_reaches_the_tokens_it_should_and_no_other(text: str, reach: range) -> None:
    module, u_BND = operator(text, n_tokens=12), tokens(12)
    changed = u_BND.clone()
    changed[:, 2] += 1.0
    with torch.no_grad():
        moved_N = (module(changed) - module(u_BND)).abs().amax(dim=(0, 2))
    # mamba2's scan is float32, and a matrix product over other values may round its untouched rows otherwise.
    noise = 1e-6 if "mamba2" in text else 1e-14
    assert {n for n in range(12) if moved_N[n] > noise} == set(reach)


def test_hyena_y_mixes_no_tokens_at_the_start() -> None:
    module, u_BND = operator("hyena-y", random_filters=False), tokens()
    with torch.no_grad():
        together, apart = module(u_BND), torch.cat([module(u_BND[:, n : n + 1]) for n in range(N)], dim=1)
    assert torch.allclose(together, apart, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bidirectional", ["false", "true"])
def test_hyena_se_at_the_start_is_hyena_x(bidirectional: str) -> None:
    se = operator(f"hyena-se:bidirectional={bidirectional}", random_filters=False)
    x = operator(f"hyena-x:bidirectional={bidirectional}")
    x.load_state_dict({name: value for name, value in se.state_dict().items() if not name.startswith("inner")})
    with torch.no_grad():
        assert torch.equal(se(tokens()), x(tokens()))


@pytest.mark.parametrize(("n", "w"), [(1, 1), (1, 4), (3, 4), (5, 4), (6, 4), (33, 4), (64, 4), (70, 3), (100, 40)])
def test_chunked_window_is_masked_attention(n: int, w: int) -> None:
    """Token counts below the window, a single token, and ones that no chunk of 32 divides."""
    module, u_BND = operator(f"swa:w={w}", n_tokens=n).float(), tokens(n).float()
    with torch.no_grad():
        q, k, v = (
            proj(u_BND).view(B, n, H, D // H).transpose(1, 2) for proj in (module.q_proj, module.k_proj, module.v_proj)
        )
        index = torch.arange(n)
        band = (index[:, None] - index[None, :]).abs() <= w
        expected = module.out_proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=band).transpose(1, 2).reshape(B, n, D)
        )
        assert torch.allclose(module(u_BND), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_the_chunk_length_does_not_change_the_window(chunk: int) -> None:
    module, u_BND = operator("swa:w=2", n_tokens=23), tokens(23)
    with torch.no_grad():
        expected = module(u_BND)
        module.chunk = chunk
        assert torch.allclose(module(u_BND), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["mha", "swa", "hyena-se", "hyena-x", "hyena-y", "mamba2:headdim=4"])
def test_attention_substitutes_take_no_mask_and_no_second_sequence(text: str) -> None:
    module, u_BND = operator(text), tokens()
    assert module(u_BND, encoder_hidden_states=None, attention_mask=None).shape == u_BND.shape
    with pytest.raises(ValueError, match="takes no attention_mask"):
        module(u_BND, attention_mask=torch.ones(B, N))
    with pytest.raises(ValueError, match="takes no encoder_hidden_states"):
        module(u_BND, encoder_hidden_states=u_BND)


def test_the_convolutional_mlp_refuses_any_other_number_of_tokens() -> None:
    module = operator("mlp-hyena-x")
    with pytest.raises(ValueError, match="one filter for each of 7 tokens, and 8 came"):
        module(tokens(8))
