"""A few tokens: matrix-vector products, one program for each pair and block of columns, no sort.

Rows are pairs here, so `device.combine` takes them as they are. Each program reads its own block of the expert's
matrix once; at these sizes the time is that of reading the weights.
"""

import triton
import triton.language as tl

from .activation import gate


@triton.jit
def decode_up(
    x, weight, bias, act, ids,
    width_in, width, num_experts, stride_x, stride_we, stride_wj, stride_wk, weight_up, stride_be, stride_bj, bias_up,
    slope, limit,
    TOP_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CLAMPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """act[pair] = gate(W_gate x, W_up x) of the pair's token. A pair without an expert is left unwritten."""
    pair = tl.program_id(0)
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    in_width = j < width
    k = tl.arange(0, BK)
    x_at = x + (pair // TOP_K).to(tl.int64) * stride_x + k
    w_at = weight + expert * stride_we + j[:, None] * stride_wj + k[None, :] * stride_wk
    gate_sum = tl.zeros([BN, BK], tl.float32)
    up_sum = tl.zeros([BN, BK], tl.float32)
    for start in range(0, width_in, BK):
        in_k = start + k < width_in
        a = tl.load(x_at, mask=in_k, other=0.0).to(tl.float32)[None, :]
        inside = in_width[:, None] & in_k[None, :]
        gate_sum += tl.load(w_at, mask=inside, other=0.0).to(tl.float32) * a
        up_sum += tl.load(w_at + weight_up, mask=inside, other=0.0).to(tl.float32) * a
        x_at += BK
        w_at += BK * stride_wk
    g = tl.sum(gate_sum, axis=1)
    u = tl.sum(up_sum, axis=1)
    if HAS_BIAS:
        b_at = bias + expert * stride_be + j * stride_bj
        g += tl.load(b_at, mask=in_width, other=0.0).to(tl.float32)
        u += tl.load(b_at + bias_up, mask=in_width, other=0.0).to(tl.float32)
    value = gate(g, u, slope, limit, CLAMPED)
    tl.store(act + pair.to(tl.int64) * width + j, value.to(act.dtype.element_ty), mask=in_width)


@triton.jit
def decode_down(
    a, weight, bias, out, ids,
    width_in, width, num_experts, stride_a, stride_we, stride_wn, stride_wk, stride_be, stride_bn,
    BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out[pair] = W_down a[pair] (+ bias)."""
    pair = tl.program_id(0)
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_width = n < width
    k = tl.arange(0, BK)
    a_at = a + pair.to(tl.int64) * stride_a + k
    w_at = weight + expert * stride_we + n[:, None] * stride_wn + k[None, :] * stride_wk
    total = tl.zeros([BN, BK], tl.float32)
    for start in range(0, width_in, BK):
        in_k = start + k < width_in
        row = tl.load(a_at, mask=in_k, other=0.0).to(tl.float32)[None, :]
        total += tl.load(w_at, mask=in_width[:, None] & in_k[None, :], other=0.0).to(tl.float32) * row
        a_at += BK
        w_at += BK * stride_wk
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + expert * stride_be + n * stride_bn, mask=in_width, other=0.0).to(tl.float32)
    tl.store(out + pair.to(tl.int64) * width + n, y.to(out.dtype.element_ty), mask=in_width)
