"""Routed experts in plain torch: the definition, the grouped product, and one product a pair (a baseline)."""

import torch
from torch.nn import functional

from .experts import Experts


def _product(rows: torch.Tensor, matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
    return rows @ (matrix if transposed else matrix.transpose(-2, -1))


def loop(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """The definition. All in fp32 (fp64 for fp64 input); a token's experts are added in the order of its slots."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens, k = index.shape
    # One row more takes what nobody wants: the result of a pair without an expert stays zero.
    out = torch.zeros(tokens * k, experts.hidden, dtype=wide, device=hidden.device)
    flat = index.reshape(-1)
    for e in range(experts.num_experts):
        pair = (flat == e).nonzero().squeeze(1)
        if not pair.numel() and e:  # the first is gone through in any case, so that gradients have a way back
            continue
        gate_up = _product(hidden[pair // k].to(wide), experts.gate_up_proj[e].to(wide), experts.is_transposed)
        if experts.gate_up_bias is not None:
            gate_up = gate_up + experts.gate_up_bias[e].to(wide)
        y = _product(experts.gate(gate_up), experts.down_proj[e].to(wide), experts.is_transposed)
        if experts.down_bias is not None:
            y = y + experts.down_bias[e].to(wide)
        out = out.index_put((pair,), y * weights.reshape(-1)[pair, None].to(wide))
    slots = out.view(tokens, k, experts.hidden)
    total = torch.zeros(tokens, experts.hidden, dtype=wide, device=hidden.device)
    for slot in range(k):
        total = total + slots[:, slot]
    return total.to(hidden.dtype)


def grouped_mm(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Rows sorted by expert, torch's grouped product for each projection. Intermediates in the dtype of the weights."""
    tokens, k = index.shape
    dtype, number = experts.gate_up_proj.dtype, experts.num_experts
    if not index.numel():
        return loop(hidden, index, weights, experts)
    flat = index.reshape(-1)
    valid = (flat >= 0) & (flat < number)
    in_order, pair = torch.sort(torch.where(valid, flat, number), stable=True)
    ends = torch.searchsorted(in_order, torch.arange(number, device=flat.device, dtype=flat.dtype), right=True)
    ends = ends.to(torch.int32)
    # Rows past the last end are never written by the product: they are cut off, both ways. A GPU is not asked
    # whether there are any.
    known = (in_order < number)[:, None]
    all_known = not flat.is_cuda and not torch.compiler.is_compiling() and bool(valid.all())
    expert = in_order if all_known else in_order.clamp(max=number - 1)

    def cut(rows: torch.Tensor) -> torch.Tensor:
        return rows if all_known else rows.masked_fill(~known, 0)

    def linear(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = matrix if experts.is_transposed else matrix.transpose(-2, -1)
        out = cut(functional.grouped_mm(rows, matrix, offs=ends))
        return out if bias is None else out + bias[expert]

    rows = cut(hidden.to(dtype)[pair // k])
    act = experts.gate(linear(rows, experts.gate_up_proj, experts.gate_up_bias))
    y = linear(cut(act.contiguous()), experts.down_proj, experts.down_bias)
    scale = cut(weights.reshape(-1)[pair, None].float())
    row_of_pair = torch.empty_like(pair).index_copy(0, pair, torch.arange(pair.numel(), device=pair.device))
    weighted = (y.float() * scale)[row_of_pair]
    return weighted.view(tokens, k, -1).sum(1).to(hidden.dtype)


def batched_mm(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """One matrix-vector product a pair, its expert's weights copied: a baseline for measurements, never a default."""
    tokens, k = index.shape
    flat = index.reshape(-1)
    valid = (flat >= 0) & (flat < experts.num_experts)
    expert = torch.where(valid, flat, 0)

    def linear(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = matrix[expert] if experts.is_transposed else matrix[expert].transpose(-2, -1)
        out = torch.bmm(rows[:, None], matrix).squeeze(1)
        return out if bias is None else out + bias[expert]

    rows = hidden.to(experts.gate_up_proj.dtype).repeat_interleave(k, dim=0)
    act = experts.gate(linear(rows, experts.gate_up_proj, experts.gate_up_bias))
    y = linear(act, experts.down_proj, experts.down_bias)
    scale = torch.where(valid, weights.reshape(-1), 0).float()
    return (y.float() * scale[:, None]).view(tokens, k, -1).sum(1).to(hidden.dtype)
