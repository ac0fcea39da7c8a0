"""From rows back to tokens: the weighted sum over a token's experts, and what the chain does with it.

Sums run over the slots of a token in their order, in fp32, by one program; nothing is added atomically, so the same
input gives the same bits.
"""

import triton
import triton.language as tl

from .activation import mma


@triton.jit
def row_at(rows, pair, in_tokens, num_experts, ROWS_ARE_PAIRS: tl.constexpr):
    """The row that holds the pair's product, and whether there is one. In decoding `rows` holds expert ids."""
    found = tl.load(rows + pair, mask=in_tokens, other=-1)
    if ROWS_ARE_PAIRS:
        return pair.to(tl.int64), (found >= 0) & (found < num_experts)
    return found.to(tl.int64), found >= 0


@triton.jit
def combine(
    y, rows, weights, shared, z, alpha, beta, m_out, z_out, acc, acc_out,
    num_tokens, width, num_experts, rho, sigma, stride_z, stride_shared,
    TOP_K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ROWS_ARE_PAIRS: tl.constexpr, WEIGHTED: tl.constexpr,
    HAS_SHARED: tl.constexpr, STORE_M: tl.constexpr, STEP: tl.constexpr, HAS_ALPHA: tl.constexpr,
    ACC: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """m = sum_s weight_s * y[row_s] (+ sigma * shared); then, as asked,
    m_out = m;  z_out = rho * z + alpha (.) m;  acc_out = (FIRST ? 0 : acc) + beta (.) m, both fp32, maybe one tensor.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    in_tokens = token < num_tokens
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_width = h < width
    inside = in_tokens[:, None] & in_width[None, :]
    wide = token.to(tl.int64)
    m = tl.zeros([BT, BH], tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = wide * TOP_K + slot
        row, there = row_at(rows, pair, in_tokens, num_experts, ROWS_ARE_PAIRS)
        part = tl.load(y + row[:, None] * width + h[None, :], mask=inside & there[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            w = tl.load(weights + pair, mask=in_tokens & there, other=0.0).to(tl.float32)
            part = part * w[:, None]
        m += part
    if HAS_SHARED:
        base = tl.load(shared + wide[:, None] * stride_shared + h[None, :], mask=inside, other=0.0)
        m += sigma * base.to(tl.float32)
    at = wide[:, None] * width + h[None, :]
    if STORE_M:
        tl.store(m_out + at, m.to(m_out.dtype.element_ty), mask=inside)
    if STEP:
        before = tl.load(z + wide[:, None] * stride_z + h[None, :], mask=inside, other=0.0).to(tl.float32)
        step = m
        if HAS_ALPHA:
            step = m * tl.load(alpha + h, mask=in_width, other=0.0).to(tl.float32)[None, :]
        tl.store(z_out + at, (rho * before + step).to(z_out.dtype.element_ty), mask=inside)
    if ACC:
        part = m * tl.load(beta + h, mask=in_width, other=0.0).to(tl.float32)[None, :]
        if not FIRST:
            part += tl.load(acc + at, mask=inside, other=0.0)
        tl.store(acc_out + at, part, mask=inside)


@triton.jit
def combine_route(
    y, rows, weights, shared, z, alpha, beta, z_out, acc, acc_out, router, router_bias, correction, used,
    ids_out, weights_out, counts,
    num_tokens, width, num_experts, rho, sigma, stride_z, stride_shared, stride_used, scale, penalty,
    TOP_K: tl.constexpr, BASE_K: tl.constexpr, KEEP_K: tl.constexpr, USED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr, SCORING: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CORRECTION: tl.constexpr, FORBID: tl.constexpr,
    FIRST: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`combine` of iteration t, then the router of iteration t + 1 on the rows while they are in registers.

    The next state is rounded to its dtype before it meets the router, so the logits are those of the state that is
    stored. Choice and weights follow `routing.route`; counts[block, expert] is what `plan.count_pairs` would count for
    blocks of BT * KEEP_K pairs. SCORING: 0 softmax, 1 sigmoid, 2 softmax over the chosen logits.
    """
    block = tl.program_id(0)
    token = block * BT + tl.arange(0, BT)
    in_tokens = token < num_tokens
    wide = token.to(tl.int64)
    experts = tl.arange(0, BE)
    in_experts = experts < num_experts
    logits = tl.zeros([BT, BE], tl.float32)
    for start in range(0, width, BH):
        h = start + tl.arange(0, BH)
        in_width = h < width
        inside = in_tokens[:, None] & in_width[None, :]
        m = tl.zeros([BT, BH], tl.float32)
        for slot in tl.static_range(TOP_K):
            pair = wide * TOP_K + slot
            row, there = row_at(rows, pair, in_tokens, num_experts, False)
            part = tl.load(y + row[:, None] * width + h[None, :], mask=inside & there[:, None], other=0.0)
            w = tl.load(weights + pair, mask=in_tokens & there, other=0.0).to(tl.float32)
            m += part.to(tl.float32) * w[:, None]
        if HAS_SHARED:
            base = tl.load(shared + wide[:, None] * stride_shared + h[None, :], mask=inside, other=0.0)
            m += sigma * base.to(tl.float32)
        at = wide[:, None] * width + h[None, :]
        before = tl.load(z + wide[:, None] * stride_z + h[None, :], mask=inside, other=0.0).to(tl.float32)
        step = m * tl.load(alpha + h, mask=in_width, other=0.0).to(tl.float32)[None, :]
        state = (rho * before + step).to(z_out.dtype.element_ty)
        tl.store(z_out + at, state, mask=inside)
        part = m * tl.load(beta + h, mask=in_width, other=0.0).to(tl.float32)[None, :]
        if not FIRST:
            part += tl.load(acc + at, mask=inside, other=0.0)
        tl.store(acc_out + at, part, mask=inside)
        r_at = router + experts[None, :].to(tl.int64) * width + h[:, None]
        matrix = tl.load(r_at, mask=in_width[:, None] & in_experts[None, :], other=0.0)
        logits = mma(state.to(router.dtype.element_ty), matrix, logits, PRECISION, UPCAST)
    if HAS_BIAS:
        logits += tl.load(router_bias + experts, mask=in_experts, other=0.0).to(tl.float32)[None, :]
    if ROUND:
        logits = logits.to(router.dtype.element_ty).to(tl.float32)
    nothing = float("-inf")
    logits = tl.where(in_experts[None, :], logits, nothing)
    if SCORING == 0:
        grown = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        score = grown / tl.sum(grown, axis=1)[:, None]
    elif SCORING == 1:
        score = tl.where(in_experts[None, :], tl.sigmoid(logits), 0.0)
    else:
        score = logits
    choice = score
    if HAS_CORRECTION:
        choice += tl.load(correction + experts, mask=in_experts, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(in_experts[None, :], choice, nothing)
    chosen = tl.zeros([BT, BE], tl.int1)
    for _ in tl.static_range(BASE_K):
        best = tl.argmax(tl.where(chosen, nothing, choice), axis=1)
        chosen = chosen | (experts[None, :] == best[:, None])
    if SCORING == 2:
        only = tl.where(chosen, logits, nothing)
        grown = tl.exp(only - tl.max(only, axis=1)[:, None])
        weight = grown / tl.sum(grown, axis=1)[:, None]
    else:
        weight = tl.where(chosen, score, 0.0)
        if NORMALIZE:
            weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)
    weight = weight * scale
    key = weight
    for column in tl.static_range(USED):
        before_id = tl.load(used + wide * stride_used + column, mask=in_tokens, other=-1)
        again = experts[None, :] == before_id[:, None]
        if FORBID:
            key = tl.where(again, nothing, key)
        else:
            key = tl.where(again, weight - penalty, key)
    key = tl.where(chosen, key, nothing)
    number = tl.zeros([BE], tl.int32)
    for slot in tl.static_range(KEEP_K):
        best = tl.argmax(key, axis=1)
        mine = experts[None, :] == best[:, None]
        kept = tl.sum(tl.where(mine, weight, 0.0), axis=1)
        tl.store(ids_out + wide * KEEP_K + slot, best.to(ids_out.dtype.element_ty), mask=in_tokens)
        tl.store(weights_out + wide * KEEP_K + slot, kept.to(weights_out.dtype.element_ty), mask=in_tokens)
        number += tl.sum((mine & in_tokens[:, None]).to(tl.int32), axis=0)
        key = tl.where(mine, nothing, key)
    tl.store(counts + block.to(tl.int64) * num_experts + experts, number, mask=in_experts)


@triton.jit
def step_backward(
    grad_acc, grad_z, m, alpha, beta, grad_m, part_alpha, part_beta,
    num_tokens, width, BT: tl.constexpr, BH: tl.constexpr, HAS_Z: tl.constexpr, HAS_ACC: tl.constexpr,
):  # fmt: skip
    """grad_m = beta (.) grad_acc + alpha (.) grad_z, and per block of tokens the sums grad_z (.) m, grad_acc (.) m."""
    block = tl.program_id(0)
    token = block * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_width = h < width
    inside = (token < num_tokens)[:, None] & in_width[None, :]
    at = token.to(tl.int64)[:, None] * width + h[None, :]
    value = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BT, BH], tl.float32)
    out = block.to(tl.int64) * width + h
    if HAS_ACC:
        grad = tl.load(grad_acc + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(beta + h, mask=in_width, other=0.0).to(tl.float32)[None, :]
        tl.store(part_beta + out, tl.sum(grad * value, axis=0), mask=in_width)
    if HAS_Z:
        grad = tl.load(grad_z + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(alpha + h, mask=in_width, other=0.0).to(tl.float32)[None, :]
        tl.store(part_alpha + out, tl.sum(grad * value, axis=0), mask=in_width)
    tl.store(grad_m + at, total.to(grad_m.dtype.element_ty), mask=inside)
