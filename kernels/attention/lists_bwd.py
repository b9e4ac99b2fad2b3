"""Backward kernels of block-sparse attention: dQ over lists of key blocks, dK and dV over lists of query blocks.

The two kernels recompute the weights from the log-sum-exp. Each element of a gradient is summed by one program in the
order of its list: no atomics, the same bits at every run. Where a query has no keys its lse is +inf and its weights are
exactly 0. See `lists_fwd` for tiles, partial blocks and head dims in two parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import product
from .lists_fwd import load_rows, store_rows, visits


@triton.jit
def _visit_keys(
    q0,
    q1,
    dout0,
    dout1,
    lse,
    delta,
    k,
    v,
    k_stride,
    v_stride,
    first,
    limit,
    scale_log2,
    dq0,
    dq1,
    WIDTH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys `first` to `first` + WIDTH to dQ, without the factor of the scores."""
    zeros = tl.zeros([q0.shape[0], WIDTH], dq0.dtype)
    k0 = load_rows(k, k_stride, first, limit, WIDTH, D0, PARTIAL)
    v0 = load_rows(v, v_stride, first, limit, WIDTH, D0, PARTIAL)
    scores = product(q0, tl.trans(k0), zeros, UPCAST, PRECISION)
    dweights = product(dout0, tl.trans(v0), zeros, UPCAST, PRECISION)
    if D1:
        k1 = load_rows(k + D0, k_stride, first, limit, WIDTH, D1, PARTIAL)
        v1 = load_rows(v + D0, v_stride, first, limit, WIDTH, D1, PARTIAL)
        scores = product(q1, tl.trans(k1), scores, UPCAST, PRECISION)
        dweights = product(dout1, tl.trans(v1), dweights, UPCAST, PRECISION)
    if PARTIAL:
        # a score of 0 beside a very negative lse would overflow, and inf * 0 is NaN
        scores = tl.where((first + tl.arange(0, WIDTH) < limit)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    dscores = (weights * (dweights - delta[:, None])).to(k0.dtype)
    dq0 = product(dscores, k0, dq0, UPCAST, PRECISION)
    if D1:
        dq1 = product(dscores, k1, dq1, UPCAST, PRECISION)
    return dq0, dq1


@triton.jit(do_not_specialize=["H", "q_len", "kv_len", "row_step"])
def dq_kernel(
    q,
    k,
    v,
    out,
    lse,
    dout,
    delta,
    dq,
    row_cnt,
    row_idx,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    out_b,
    out_n,
    out_h,
    dout_b,
    dout_n,
    dout_h,
    dq_b,
    dq_n,
    dq_h,
    H,
    q_len,
    kv_len,
    row_step,
    scale_log2,
    scale,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ and delta of one tile of queries; grid: (query tiles * B * H,).

    Args:
        lse: [B, H, q_len] contiguous, from the forward kernel.
        delta: [B, H, q_len] contiguous, written: sum over the head dim of out * dout, for `dkv_kernel`.
        scale: factor of the scores; scale_log2 is it times log2(e). The rest as in `forward_kernel`.
    """
    q_blocks = tl.cdiv(q_len, BLOCK)
    kv_blocks = tl.cdiv(kv_len, BLOCK)
    tile = tl.program_id(0) % q_blocks
    head = tl.program_id(0) // q_blocks
    b = (head // H).to(tl.int64)
    h = head % H
    first = tile * BLOCK
    row = h * row_step + tile
    q += b * q_b + h.to(tl.int64) * q_h
    k += b * k_b + h.to(tl.int64) * k_h
    v += b * v_b + h.to(tl.int64) * v_h
    out += b * out_b + h.to(tl.int64) * out_h
    dout += b * dout_b + h.to(tl.int64) * dout_h
    dq += b * dq_b + h.to(tl.int64) * dq_h
    lse += head.to(tl.int64) * q_len
    delta += head.to(tl.int64) * q_len

    q0 = load_rows(q, q_n, first, q_len, BLOCK, D0, True)
    dout0 = load_rows(dout, dout_n, first, q_len, BLOCK, D0, True)
    out0 = load_rows(out, out_n, first, q_len, BLOCK, D0, True)
    dots = tl.sum(out0.to(ACC) * dout0.to(ACC), 1)
    dq0 = tl.zeros([BLOCK, D0], ACC)
    q1 = q0
    dout1 = dout0
    dq1 = dots
    if D1:
        q1 = load_rows(q + D0, q_n, first, q_len, BLOCK, D1, True)
        dout1 = load_rows(dout + D0, dout_n, first, q_len, BLOCK, D1, True)
        out1 = load_rows(out + D0, out_n, first, q_len, BLOCK, D1, True)
        dots += tl.sum(out1.to(ACC) * dout1.to(ACC), 1)
        dq1 = tl.zeros([BLOCK, D1], ACC)
    rows = first + tl.arange(0, BLOCK)
    tl.store(delta + rows, dots, mask=rows < q_len)
    sums = tl.load(lse + rows, mask=rows < q_len, other=float("inf"))

    steps, partial = visits(row_cnt, row_idx, row, kv_len, kv_blocks, LISTS, BLOCK, STEP, MASKED)
    block = 0
    if LISTS:
        # always one entry ahead, so that the tiles' own loads start without waiting for it
        block = tl.load(row_idx + row * kv_blocks, mask=steps > 0, other=0)
    for i in range(steps):
        start = i * STEP
        if LISTS:
            start = block * BLOCK + i % (BLOCK // STEP) * STEP
            block = tl.load(row_idx + row * kv_blocks + (i + 1) // (BLOCK // STEP), mask=i + 1 < steps, other=0)
        dq0, dq1 = _visit_keys(
            q0, q1, dout0, dout1, sums, dots, k, v, k_n, v_n, start, kv_len, scale_log2, dq0, dq1,
            STEP, D0, D1, MASKED, UPCAST, PRECISION,
        )  # fmt: skip
    if TAIL:
        if partial:
            dq0, dq1 = _visit_keys(
                q0, q1, dout0, dout1, sums, dots, k, v, k_n, v_n, kv_len // BLOCK * BLOCK, kv_len, scale_log2,
                dq0, dq1, TAIL, D0, D1, True, UPCAST, PRECISION,
            )  # fmt: skip

    store_rows(dq, dq_n, first, q_len, dq0 * scale, BLOCK, D0)
    if D1:
        store_rows(dq + D0, dq_n, first, q_len, dq1 * scale, BLOCK, D1)


@triton.jit
def _visit_queries(
    k0,
    k1,
    v0,
    v1,
    q,
    dout,
    lse,
    delta,
    q_stride,
    dout_stride,
    first,
    limit,
    scale_log2,
    dk0,
    dk1,
    dv0,
    dv1,
    WIDTH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the queries `first` to `first` + WIDTH to dK (without the factor of the scores) and dV.

    Scores are transposed, [keys, queries]: they are left operands of both products with 64 rows. Queries beyond the
    last have an lse of +inf, so that they need no mask.
    """
    zeros = tl.zeros([k0.shape[0], WIDTH], dk0.dtype)
    rows = first + tl.arange(0, WIDTH)
    q0 = load_rows(q, q_stride, first, limit, WIDTH, D0, PARTIAL)
    if PARTIAL:
        sums = tl.load(lse + rows, mask=rows < limit, other=float("inf"))
        dots = tl.load(delta + rows, mask=rows < limit, other=0.0)
    else:
        sums = tl.load(lse + rows)
        dots = tl.load(delta + rows)
    scores = product(k0, tl.trans(q0), zeros, UPCAST, PRECISION)
    if D1:
        q1 = load_rows(q + D0, q_stride, first, limit, WIDTH, D1, PARTIAL)
        scores = product(k1, tl.trans(q1), scores, UPCAST, PRECISION)
    weights = tl.exp2(scores * scale_log2 - sums[None, :])
    dout0 = load_rows(dout, dout_stride, first, limit, WIDTH, D0, PARTIAL)
    rounded = weights.to(dout0.dtype)
    dv0 = product(rounded, dout0, dv0, UPCAST, PRECISION)
    dweights = product(v0, tl.trans(dout0), zeros, UPCAST, PRECISION)
    if D1:
        dout1 = load_rows(dout + D0, dout_stride, first, limit, WIDTH, D1, PARTIAL)
        dv1 = product(rounded, dout1, dv1, UPCAST, PRECISION)
        dweights = product(v1, tl.trans(dout1), dweights, UPCAST, PRECISION)
    dscores = (weights * (dweights - dots[None, :])).to(q0.dtype)
    dk0 = product(dscores, q0, dk0, UPCAST, PRECISION)
    if D1:
        dk1 = product(dscores, q1, dk1, UPCAST, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["H", "q_len", "kv_len", "col_step"])
def dkv_kernel(
    q,
    k,
    v,
    lse,
    dout,
    delta,
    dk,
    dv,
    col_cnt,
    col_idx,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    dout_b,
    dout_n,
    dout_h,
    dk_b,
    dk_n,
    dk_h,
    dv_b,
    dv_n,
    dv_h,
    H,
    q_len,
    kv_len,
    col_step,
    scale_log2,
    scale,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one tile of keys; grid: (key tiles * B * H,); `dq_kernel` has written `delta`.

    Args:
        col_step: rows of the column lists between two heads, 0 where all heads share them.
        STEP: queries of one turn of the loop; TAIL and MASKED too are of queries. The rest as in `dq_kernel`.
    """
    q_blocks = tl.cdiv(q_len, BLOCK)
    kv_blocks = tl.cdiv(kv_len, BLOCK)
    tile = tl.program_id(0) % kv_blocks
    head = tl.program_id(0) // kv_blocks
    b = (head // H).to(tl.int64)
    h = head % H
    first = tile * BLOCK
    col = h * col_step + tile
    q += b * q_b + h.to(tl.int64) * q_h
    k += b * k_b + h.to(tl.int64) * k_h
    v += b * v_b + h.to(tl.int64) * v_h
    dout += b * dout_b + h.to(tl.int64) * dout_h
    dk += b * dk_b + h.to(tl.int64) * dk_h
    dv += b * dv_b + h.to(tl.int64) * dv_h
    lse += head.to(tl.int64) * q_len
    delta += head.to(tl.int64) * q_len

    k0 = load_rows(k, k_n, first, kv_len, BLOCK, D0, True)
    v0 = load_rows(v, v_n, first, kv_len, BLOCK, D0, True)
    dk0 = tl.zeros([BLOCK, D0], ACC)
    dv0 = tl.zeros([BLOCK, D0], ACC)
    k1 = k0
    v1 = v0
    dk1 = tl.zeros([16], ACC)
    dv1 = tl.zeros([16], ACC)
    if D1:
        k1 = load_rows(k + D0, k_n, first, kv_len, BLOCK, D1, True)
        v1 = load_rows(v + D0, v_n, first, kv_len, BLOCK, D1, True)
        dk1 = tl.zeros([BLOCK, D1], ACC)
        dv1 = tl.zeros([BLOCK, D1], ACC)

    steps, partial = visits(col_cnt, col_idx, col, q_len, q_blocks, LISTS, BLOCK, STEP, MASKED)
    block = 0
    if LISTS:
        # always one entry ahead, so that the tiles' own loads start without waiting for it
        block = tl.load(col_idx + col * q_blocks, mask=steps > 0, other=0)
    for i in range(steps):
        start = i * STEP
        if LISTS:
            start = block * BLOCK + i % (BLOCK // STEP) * STEP
            block = tl.load(col_idx + col * q_blocks + (i + 1) // (BLOCK // STEP), mask=i + 1 < steps, other=0)
        dk0, dk1, dv0, dv1 = _visit_queries(
            k0, k1, v0, v1, q, dout, lse, delta, q_n, dout_n, start, q_len, scale_log2, dk0, dk1, dv0, dv1,
            STEP, D0, D1, MASKED, UPCAST, PRECISION,
        )  # fmt: skip
    if TAIL:
        if partial:
            dk0, dk1, dv0, dv1 = _visit_queries(
                k0, k1, v0, v1, q, dout, lse, delta, q_n, dout_n, q_len // BLOCK * BLOCK, q_len, scale_log2,
                dk0, dk1, dv0, dv1, TAIL, D0, D1, True, UPCAST, PRECISION,
            )  # fmt: skip

    store_rows(dk, dk_n, first, kv_len, dk0 * scale, BLOCK, D0)
    store_rows(dv, dv_n, first, kv_len, dv0, BLOCK, D0)
    if D1:
        store_rows(dk + D0, dk_n, first, kv_len, dk1 * scale, BLOCK, D1)
        store_rows(dv + D0, dv_n, first, kv_len, dv1, BLOCK, D1)
