"""Gradients of the routed experts. The down projection's output is never needed, so it is never kept.

With dA'[row] = dO[token] @ W_down: the router's gradient is <dA', A>, the activation's is weight * dA'. Weight
gradients are one sum an expert over its rows in their order, written once; an expert without rows gets zeros.
"""

import triton
import triton.language as tl

from .activation import gate_backward, mma


@triton.jit
def down_backward(
    grad, weight, bias, pre, weights, grad_pre, scaled_act, part_score,
    token_of_row, pair_of_row, expert_start, tile_expert, tile_row,
    width_in, width, stride_g, stride_we, stride_wn, stride_wk, stride_be, stride_bn, slope, limit,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, CLAMPED: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per row and column j of the expert's width: dA'[j] = sum_h grad[token, h] * W_down[h, j], and from it
    grad_pre = weight * dA' * gate'(pre), scaled_act = weight * gate(pre), and part_score[row, block] = the block's part
    of <dA', A> (the first block adds <grad, bias>). W_down[h, j] lies at h * stride_wk + j * stride_wn.
    """
    columns = tl.cdiv(width, BN)
    pid = tl.program_id(0)
    column = pid % columns
    expert = tl.load(tile_expert + pid // columns)
    if expert < 0:
        return
    row = tl.load(tile_row + pid // columns) + tl.arange(0, BM)
    in_rows = row < tl.load(expert_start + expert + 1)
    wide = row.to(tl.int64)
    token = tl.load(token_of_row + row, mask=in_rows, other=0).to(tl.int64)
    j = column * BN + tl.arange(0, BN)
    in_width = j < width
    k = tl.arange(0, BK)
    g_at = grad + token[:, None] * stride_g + k[None, :]
    w_at = weight + expert.to(tl.int64) * stride_we + j[None, :] * stride_wn + k[:, None] * stride_wk
    total = tl.zeros([BM, BN], tl.float32)
    by_bias = tl.zeros([BM], tl.float32)
    for start in range(0, width_in, BK):
        in_g = in_rows[:, None]
        in_w = in_width[None, :]
        if not EVEN_K:
            in_k = start + k < width_in
            in_g = in_g & in_k[None, :]
            in_w = in_w & in_k[:, None]
        piece = tl.load(g_at, mask=in_g, other=0.0)
        total = mma(piece, tl.load(w_at, mask=in_w, other=0.0), total, PRECISION, UPCAST)
        if HAS_BIAS:
            b_at = bias + expert.to(tl.int64) * stride_be + (start + k) * stride_bn
            b = tl.load(b_at, mask=start + k < width_in, other=0.0).to(tl.float32)
            by_bias += tl.sum(piece.to(tl.float32) * b[None, :], axis=1)
        g_at += BK
        w_at += BK * stride_wk
    inside = in_rows[:, None] & in_width[None, :]
    p_at = wide[:, None] * (2 * width) + j[None, :]
    g = tl.load(pre + p_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(pre + p_at + width, mask=inside, other=0.0).to(tl.float32)
    value, by_g, by_u = gate_backward(g, u, slope, limit, CLAMPED)
    score = tl.sum(tl.where(inside, total * value, 0.0), axis=1)
    if HAS_BIAS:
        score += tl.where(column == 0, by_bias, 0.0)
    tl.store(part_score + wide * columns + column, score, mask=in_rows)
    pair = tl.load(pair_of_row + row, mask=in_rows, other=0)
    w = tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    scaled = total * w
    tl.store(grad_pre + p_at, (scaled * by_g).to(grad_pre.dtype.element_ty), mask=inside)
    tl.store(grad_pre + p_at + width, (scaled * by_u).to(grad_pre.dtype.element_ty), mask=inside)
    a_at = scaled_act + wide[:, None] * width + j[None, :]
    tl.store(a_at, (value * w).to(scaled_act.dtype.element_ty), mask=inside)


@triton.jit
def expert_weight_grad(
    left, right, out, left_row, right_row, expert_start,
    width_left, width_right, stride_left, stride_right, left_second, stride_oe, stride_ol, stride_or, out_second,
    BL: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out[e, l, r] = sum over the expert's rows of left[left_row, l] * right[right_row, r], summed in row order.

    TWO: a second product with left `left_second` further on, written `out_second` further on (gate and up share the
    right side). Both sides are gathered, so that rows of several iterations can be one expert's rows.
    """
    blocks_right = tl.cdiv(width_right, BR)
    blocks = tl.cdiv(width_left, BL) * blocks_right
    pid = tl.program_id(0)
    expert = pid // blocks
    at_left = (pid % blocks) // blocks_right * BL + tl.arange(0, BL)
    at_right = (pid % blocks_right) * BR + tl.arange(0, BR)
    in_left = at_left < width_left
    in_right = at_right < width_right
    first = tl.load(expert_start + expert)
    last = tl.load(expert_start + expert + 1)
    k = tl.arange(0, BK)
    one = tl.zeros([BL, BR], tl.float32)
    two = tl.zeros([BL, BR], tl.float32)
    for start in range(first, last, BK):
        row = start + k
        in_rows = row < last
        a = tl.load(left_row + row, mask=in_rows, other=0).to(tl.int64)
        b = tl.load(right_row + row, mask=in_rows, other=0).to(tl.int64)
        l_at = left + a[:, None] * stride_left + at_left[None, :]
        in_l = in_rows[:, None] & in_left[None, :]
        r = tl.load(
            right + b[:, None] * stride_right + at_right[None, :], mask=in_rows[:, None] & in_right[None, :], other=0.0
        )
        one = mma(tl.trans(tl.load(l_at, mask=in_l, other=0.0)), r, one, PRECISION, UPCAST)
        if TWO:
            two = mma(tl.trans(tl.load(l_at + left_second, mask=in_l, other=0.0)), r, two, PRECISION, UPCAST)
    inside = in_left[:, None] & in_right[None, :]
    o_at = out + expert.to(tl.int64) * stride_oe + at_left[:, None] * stride_ol + at_right[None, :] * stride_or
    tl.store(o_at, one.to(out.dtype.element_ty), mask=inside)
    if TWO:
        tl.store(o_at + out_second, two.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expert_bias_grad(
    rows, weights, out, row_at, pair_of_row, expert_start,
    width, stride_rows, stride_oe, BK: tl.constexpr, BN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """out[e, n] = sum over the expert's rows of (weight *) rows[row_at, n]; zeros where there are none."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_width = n < width
    first = tl.load(expert_start + expert)
    last = tl.load(expert_start + expert + 1)
    k = tl.arange(0, BK)
    total = tl.zeros([BN], tl.float32)
    for start in range(first, last, BK):
        row = start + k
        in_rows = row < last
        at = tl.load(row_at + row, mask=in_rows, other=0).to(tl.int64)
        inside = in_rows[:, None] & in_width[None, :]
        part = tl.load(rows + at[:, None] * stride_rows + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            pair = tl.load(pair_of_row + row, mask=in_rows, other=0)
            part = part * tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(part, axis=0)
    tl.store(out + expert.to(tl.int64) * stride_oe + n, total.to(out.dtype.element_ty), mask=in_width)
