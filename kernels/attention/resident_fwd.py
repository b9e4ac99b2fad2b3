"""Attention forward for at most 256 keys: one program holds the keys and values of one head of one image.

Keys are read once, as up to three pieces whose lengths are powers of two (208 = 128 + 64 + 16), since a tile's length
is one and masking up to the next power of two would multiply the work. A query tile sees its whole row of scores at
once, so softmax needs no running maximum and no rescaling. Only the last piece can be partial. At this length attention
is bound by memory traffic, so masked blocks are a predicate on the scores and never skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import product

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(pointer, rows, stride, columns, limit, MASKED: tl.constexpr):
    """Tile [rows, columns] of a matrix with contiguous columns; rows from `limit` on read 0 where MASKED."""
    # 64-bit: with batch inside tokens ([N, B, H, D] storage) a few rows can be more than 2^31 elements apart
    tile = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(tile, mask=(rows < limit)[:, None], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def scores(q0, q1, k0, k1, D1: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T [M, N] of head dims that are a sum of two powers of two; k is given as [N, D]."""
    s = product(q0, tl.trans(k0), tl.zeros((q0.shape[0], k0.shape[0]), ACC), UPCAST, PRECISION)
    if D1 > 0:
        s = product(q1, tl.trans(k1), s, UPCAST, PRECISION)
    return s


@triton.jit
def masked(s, first, bits, n_k, TAIL: tl.constexpr, HAS_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Scores with -inf at keys past the end (TAIL) and in blocks that are not kept; `first` is the first key."""
    keys = first + tl.arange(0, s.shape[1])
    if HAS_BITS:
        kept = ((bits[:, None] >> (keys // BLOCK)[None, :]) & 1) != 0
        if TAIL:
            kept = kept & (keys < n_k)[None, :]
        s = tl.where(kept, s, float("-inf"))
    elif TAIL:
        s = tl.where((keys < n_k)[None, :], s, float("-inf"))
    return s


@triton.jit
def weigh(p, v0, v1, o0, o1, D1: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Add p v to both parts of the output."""
    p = p.to(v0.dtype)
    o0 = product(p, v0, o0, UPCAST, PRECISION)
    if D1 > 0:
        o1 = product(p, v1, o1, UPCAST, PRECISION)
    return o0, o1


@triton.jit(do_not_specialize=["heads", "n_q", "n_k", "lse_b", "lse_h", "bits_h", "scale"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    row_bits,
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
    lse_b,
    lse_h,
    bits_h,
    heads,
    n_q,
    n_k,
    scale,
    D0: tl.constexpr,
    D1: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and base-2 log-sum-exp of one head of one image; grid (batch x heads,).

    Args:
        q, k, v, out: first elements of [B, N, H, D] tensors with the strides `*_b`, `*_n`, `*_h`; dims are contiguous.
        lse: [B, H, Nq].
        row_bits: int64 [Hm, nQ], bit j = key block j is kept; unused without HAS_BITS.
        bits_h: 0 where all heads share one mask.
        scale: factor of the scores, above 0.
        D0, D1: powers of two with D0 + D1 = D; D1 may be 0.
        K0, K1, K2: powers of two, the lengths of the key pieces; K1 and K2 may be 0.
        ROWS: queries of one tile.
        BLOCK: tokens of a mask block, a power of two.
    """
    program = tl.program_id(0)
    b, h = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    lse += b * lse_b + h * lse_h
    scale *= LOG2E
    d0 = tl.arange(0, D0)

    # names of absent parts are bound to present ones and never used
    rows = tl.arange(0, K0)
    k00 = load_rows(k, rows, k_n, d0, n_k, K1 == 0)
    v00 = load_rows(v, rows, v_n, d0, n_k, K1 == 0)
    k01, v01, k10, v10, k11, v11, k20, v20, k21, v21 = k00, v00, k00, v00, k00, v00, k00, v00, k00, v00
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k01 = load_rows(k, rows, k_n, d1, n_k, K1 == 0)
        v01 = load_rows(v, rows, v_n, d1, n_k, K1 == 0)
    if K1 > 0:
        rows = K0 + tl.arange(0, K1)
        k10 = load_rows(k, rows, k_n, d0, n_k, K2 == 0)
        v10 = load_rows(v, rows, v_n, d0, n_k, K2 == 0)
        if D1 > 0:
            k11 = load_rows(k, rows, k_n, d1, n_k, K2 == 0)
            v11 = load_rows(v, rows, v_n, d1, n_k, K2 == 0)
    if K2 > 0:
        rows = K0 + K1 + tl.arange(0, K2)
        k20 = load_rows(k, rows, k_n, d0, n_k, True)
        v20 = load_rows(v, rows, v_n, d0, n_k, True)
        if D1 > 0:
            k21 = load_rows(k, rows, k_n, d1, n_k, True)
            v21 = load_rows(v, rows, v_n, d1, n_k, True)

    queries = tl.arange(0, ROWS)
    next0 = load_rows(q, queries, q_n, d0, n_q, True)
    next1 = next0
    if D1 > 0:
        next1 = load_rows(q, queries, q_n, d1, n_q, True)
    for start in range(0, n_q, ROWS):
        queries = start + tl.arange(0, ROWS)
        q0, q1 = next0, next1
        bits = queries
        if HAS_BITS:
            # at most 16 key blocks: 32 bits are enough, and cheaper to shift
            if BLOCK >= ROWS:
                word = tl.load(row_bits + h * bits_h + start // BLOCK).to(tl.int32)
                bits = tl.full((1,), 0, tl.int32) + word
            else:
                bits = tl.load(row_bits + h * bits_h + queries // BLOCK, mask=queries < n_q, other=0).to(tl.int32)

        s0 = scores(q0, q1, k00, k01, D1, ACC, UPCAST, PRECISION)
        s0 = masked(s0, 0, bits, n_k, K1 == 0, HAS_BITS, BLOCK)
        top = tl.max(s0, 1)
        if K1 > 0:
            s1 = scores(q0, q1, k10, k11, D1, ACC, UPCAST, PRECISION)
            s1 = masked(s1, K0, bits, n_k, K2 == 0, HAS_BITS, BLOCK)
            top = tl.maximum(top, tl.max(s1, 1))
        if K2 > 0:
            s2 = scores(q0, q1, k20, k21, D1, ACC, UPCAST, PRECISION)
            s2 = masked(s2, K0 + K1, bits, n_k, True, HAS_BITS, BLOCK)
            top = tl.maximum(top, tl.max(s2, 1))
        # the next tile's queries are on their way during the rest of this one (the last time nothing is read)
        next0 = load_rows(q, queries + ROWS, q_n, d0, n_q, True)
        next1 = next0
        if D1 > 0:
            next1 = load_rows(q, queries + ROWS, q_n, d1, n_q, True)
        if HAS_BITS:
            top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys: exp2(-inf - 0) = 0, no NaN
        top *= scale

        o0 = tl.zeros((ROWS, D0), ACC)
        o1 = o0
        if D1 > 0:
            o1 = tl.zeros((ROWS, D1), ACC)
        p0 = tl.exp2(s0 * scale - top[:, None])
        total = tl.sum(p0, 1)
        o0, o1 = weigh(p0, v00, v01, o0, o1, D1, UPCAST, PRECISION)
        if K1 > 0:
            p1 = tl.exp2(s1 * scale - top[:, None])
            total += tl.sum(p1, 1)
            o0, o1 = weigh(p1, v10, v11, o0, o1, D1, UPCAST, PRECISION)
        if K2 > 0:
            p2 = tl.exp2(s2 * scale - top[:, None])
            total += tl.sum(p2, 1)
            o0, o1 = weigh(p2, v20, v21, o0, o1, D1, UPCAST, PRECISION)

        if HAS_BITS:
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            top = tl.where(empty, float("inf"), top)
        sums = top + tl.log2(total)
        share = (1.0 / total)[:, None]
        live = queries < n_q
        tl.store(lse + queries, sums, mask=live)
        tile = out + queries.to(tl.int64)[:, None] * out_n
        tl.store(tile + d0[None, :], (o0 * share).to(out.dtype.element_ty), mask=live[:, None])
        if D1 > 0:
            tl.store(tile + d1[None, :], (o1 * share).to(out.dtype.element_ty), mask=live[:, None])
