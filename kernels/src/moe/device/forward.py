"""Grouped matrix products of the forward pass: rows gathered by token, one tile one expert.

A tile is BM rows of one expert (see `device.plan`); a tile whose expert is -1 ends at once. Consecutive programs walk
the column tiles of one row tile, so its rows and its expert's weights stay in L2. Row, token and expert numbers are
widened to 64 bits where they meet a stride: their products pass 2^31 on real models. Offsets inside one expert's
matrix stay in 32 bits (the caller refuses matrices that do not fit).
"""

import triton
import triton.language as tl

from .activation import gate, mma


@triton.jit
def up_swiglu(
    x, weight, bias, act, pre, token_of_row, expert_start, tile_expert, tile_row,
    width_in, width, stride_x, stride_we, stride_wj, stride_wk, weight_up, stride_be, stride_bj, bias_up, slope, limit,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, CLAMPED: tl.constexpr,
    HAS_BIAS: tl.constexpr, STORE_PRE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """act[row] = gate(x[token] @ W_gate^T, x[token] @ W_up^T) with both sums in fp32; pre[row] = both sums, if asked.

    Gate column j lies at `weight + e * stride_we + j * stride_wj`, its partner `weight_up` further on: halves and
    interleaved columns, plain and transposed matrices are one code. Same for the bias.
    """
    columns = tl.cdiv(width, BN)
    pid = tl.program_id(0)
    expert = tl.load(tile_expert + pid // columns)
    if expert < 0:
        return
    row = tl.load(tile_row + pid // columns) + tl.arange(0, BM)
    in_rows = row < tl.load(expert_start + expert + 1)
    token = tl.load(token_of_row + row, mask=in_rows, other=0).to(tl.int64)
    j = (pid % columns) * BN + tl.arange(0, BN)
    in_width = j < width
    k = tl.arange(0, BK)
    x_at = x + token[:, None] * stride_x + k[None, :]
    w_at = weight + expert.to(tl.int64) * stride_we + j[None, :] * stride_wj + k[:, None] * stride_wk
    gate_sum = tl.zeros([BM, BN], tl.float32)
    up_sum = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width_in, BK):
        if EVEN_K:
            a = tl.load(x_at, mask=in_rows[:, None], other=0.0)
            g = tl.load(w_at, mask=in_width[None, :], other=0.0)
            u = tl.load(w_at + weight_up, mask=in_width[None, :], other=0.0)
        else:
            in_k = start + k < width_in
            a = tl.load(x_at, mask=in_rows[:, None] & in_k[None, :], other=0.0)
            g = tl.load(w_at, mask=in_width[None, :] & in_k[:, None], other=0.0)
            u = tl.load(w_at + weight_up, mask=in_width[None, :] & in_k[:, None], other=0.0)
        gate_sum = mma(a, g, gate_sum, PRECISION, UPCAST)
        up_sum = mma(a, u, up_sum, PRECISION, UPCAST)
        x_at += BK
        w_at += BK * stride_wk
    if HAS_BIAS:
        b_at = bias + expert.to(tl.int64) * stride_be + j * stride_bj
        gate_sum += tl.load(b_at, mask=in_width, other=0.0).to(tl.float32)[None, :]
        up_sum += tl.load(b_at + bias_up, mask=in_width, other=0.0).to(tl.float32)[None, :]
    inside = in_rows[:, None] & in_width[None, :]
    wide = row.to(tl.int64)
    if STORE_PRE:
        p_at = pre + wide[:, None] * (2 * width) + j[None, :]
        tl.store(p_at, gate_sum.to(pre.dtype.element_ty), mask=inside)
        tl.store(p_at + width, up_sum.to(pre.dtype.element_ty), mask=inside)
    value = gate(gate_sum, up_sum, slope, limit, CLAMPED)
    tl.store(act + wide[:, None] * width + j[None, :], value.to(act.dtype.element_ty), mask=inside)


@triton.jit
def rows_times_expert(
    a, weight, bias, out, expert_start, tile_expert, tile_row,
    width_in, width, stride_a, stride_we, stride_wn, stride_wk, a_second, weight_second, stride_be, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TWO: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[row, n] = sum_k a[row, k] * W_e[n, k] (+ bias), rows in expert order: the down projection.

    TWO adds a second pair of operands, `a_second` and `weight_second` further on: the gate and the up half of the
    gradient of the up projection's input.
    """
    columns = tl.cdiv(width, BN)
    pid = tl.program_id(0)
    expert = tl.load(tile_expert + pid // columns)
    if expert < 0:
        return
    row = tl.load(tile_row + pid // columns) + tl.arange(0, BM)
    in_rows = row < tl.load(expert_start + expert + 1)
    wide = row.to(tl.int64)
    n = (pid % columns) * BN + tl.arange(0, BN)
    in_width = n < width
    k = tl.arange(0, BK)
    a_at = a + wide[:, None] * stride_a + k[None, :]
    w_at = weight + expert.to(tl.int64) * stride_we + n[None, :] * stride_wn + k[:, None] * stride_wk
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width_in, BK):
        in_a = in_rows[:, None]
        in_w = in_width[None, :]
        if not EVEN_K:
            in_k = start + k < width_in
            in_a = in_a & in_k[None, :]
            in_w = in_w & in_k[:, None]
        total = mma(tl.load(a_at, mask=in_a, other=0.0), tl.load(w_at, mask=in_w, other=0.0), total, PRECISION, UPCAST)
        if TWO:
            a_two = tl.load(a_at + a_second, mask=in_a, other=0.0)
            w_two = tl.load(w_at + weight_second, mask=in_w, other=0.0)
            total = mma(a_two, w_two, total, PRECISION, UPCAST)
        a_at += BK
        w_at += BK * stride_wk
    if HAS_BIAS:
        b_at = bias + expert.to(tl.int64) * stride_be + n * stride_bn
        total += tl.load(b_at, mask=in_width, other=0.0).to(tl.float32)[None, :]
    o_at = out + wide[:, None] * width + n[None, :]
    tl.store(o_at, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_width[None, :])
