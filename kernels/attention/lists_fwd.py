"""Forward kernel of block-sparse attention over device-side lists of key blocks.

One program computes one tile of queries of one head: it walks over the list of key blocks that its tile keeps, with
the softmax computed online in base 2. Blocks that are not in the list cost nothing. Only the last block of the keys can
be partial; commonly it is a step of its own behind the loop, just as wide as it has to be (a class token makes it 16
wide), so that the loop has no masks.

The tile is the mask's block; a block may be taken in several steps, which needs fewer registers. On Hopper a tile of
fewer than 64 rows leaves the fast tensor-core path: 64 is the size to use, smaller ones are right and slow. A head dim
that is no power of two is computed in two parts (80 = 64 + 16).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import product


@triton.jit
def load_rows(base, stride, first, limit, ROWS: tl.constexpr, COLS: tl.constexpr, PARTIAL: tl.constexpr):
    """Tile [ROWS, COLS] from row `first` on of a matrix with contiguous rows, `stride` elements apart.

    The tile's origin is a 64-bit offset, offsets within the tile are 32-bit ones.

    Args:
        limit: number of rows of the matrix.
        PARTIAL: the tile may reach beyond the last row; such rows are zeros.
    """
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, COLS)[None, :])
    if PARTIAL:
        return tl.load(pointers, mask=(first + rows < limit)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, stride, first, limit, value, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store a tile [ROWS, COLS] as `load_rows` reads one, rows from `limit` on left out, in the type of `base`."""
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, COLS)[None, :])
    tl.store(pointers, value.to(base.dtype.element_ty), mask=(first + rows < limit)[:, None])


@triton.jit
def visits(
    counts,
    lists,
    row,
    length,
    blocks,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """How many steps the loop of a tile has, and whether the partial last block follows behind it.

    Lists are ascending: where the last block is visited, it is the last entry.

    Args:
        counts: int32, number of visited blocks of each row.
        lists: int32 [rows, blocks].
        row: which row.
        length: tokens along the list's axis.
        blocks: ceil(length / BLOCK).
        LISTS: False visits all blocks.
        STEP: tokens of a step, a divisor of BLOCK.
        MASKED: the partial block is part of the loop.
    """
    count = length // BLOCK
    partial = count < blocks
    if LISTS:
        visited = tl.load(counts + row)
        last = tl.load(lists + row * blocks + visited - 1, mask=visited > 0, other=-1)
        partial = partial & (last == blocks - 1)
        count = visited - partial.to(tl.int32)
    steps = count * (BLOCK // STEP)
    if MASKED:
        steps += partial.to(tl.int32) * tl.cdiv(length % BLOCK, STEP)
    return steps, partial


@triton.jit
def _visit(
    q0,
    q1,
    k,
    v,
    k_stride,
    v_stride,
    first,
    limit,
    scale_log2,
    out0,
    out1,
    top,
    total,
    WIDTH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: keys `first` to `first` + WIDTH.

    The first key of a visited block exists, so that `top` is finite after the first step: rows need no guard against a
    maximum of -inf here, only those without any step do.
    """
    k0 = load_rows(k, k_stride, first, limit, WIDTH, D0, PARTIAL)
    scores = product(q0, tl.trans(k0), tl.zeros([q0.shape[0], WIDTH], out0.dtype), UPCAST, PRECISION)
    if D1:
        k1 = load_rows(k + D0, k_stride, first, limit, WIDTH, D1, PARTIAL)
        scores = product(q1, tl.trans(k1), scores, UPCAST, PRECISION)
    if PARTIAL:
        scores = tl.where((first + tl.arange(0, WIDTH) < limit)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    v0 = load_rows(v, v_stride, first, limit, WIDTH, D0, PARTIAL)
    weights = weights.to(v0.dtype)
    out0 = product(weights, v0, out0 * fade[:, None], UPCAST, PRECISION)
    if D1:
        v1 = load_rows(v + D0, v_stride, first, limit, WIDTH, D1, PARTIAL)
        out1 = product(weights, v1, out1 * fade[:, None], UPCAST, PRECISION)
    return out0, out1, new_top, total


@triton.jit(do_not_specialize=["H", "q_len", "kv_len", "row_step"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    H,
    q_len,
    kv_len,
    row_step,
    scale_log2,
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
    """out and lse of one tile of queries; grid: (query tiles * B * H,), tiles of one head next to each other.

    Args:
        lse: [B, H, q_len] contiguous.
        q_b: stride of q over images, q_n over tokens, q_h over heads; likewise for the other tensors.
        row_step: rows of the lists between two heads, 0 where all heads share them.
        scale_log2: factor of the scores times log2(e), positive.
        STEP: keys of one turn of the loop, a divisor of BLOCK.
        TAIL: width of the step behind the loop for the partial last key block, 0 for none.
        MASKED: the partial last key block is part of the loop.
        D0: head dim, or its first part; D1 is the second part or 0.
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

    q0 = load_rows(q, q_n, first, q_len, BLOCK, D0, True)
    out0 = tl.zeros([BLOCK, D0], ACC)
    top = tl.full([BLOCK], float("-inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    q1 = q0
    out1 = total
    if D1:
        q1 = load_rows(q + D0, q_n, first, q_len, BLOCK, D1, True)
        out1 = tl.zeros([BLOCK, D1], ACC)

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
        out0, out1, top, total = _visit(
            q0, q1, k, v, k_n, v_n, start, kv_len, scale_log2, out0, out1, top, total,
            STEP, D0, D1, MASKED, UPCAST, PRECISION,
        )  # fmt: skip
    if TAIL:
        if partial:
            out0, out1, top, total = _visit(
                q0, q1, k, v, k_n, v_n, kv_len // BLOCK * BLOCK, kv_len, scale_log2, out0, out1, top, total,
                TAIL, D0, D1, True, UPCAST, PRECISION,
            )  # fmt: skip

    # without keys: an output of 0, and +inf so that exp2(score - lse) is 0 in the backward kernels
    live = total > 0
    total = tl.where(live, total, 1.0)
    store_rows(out, out_n, first, q_len, out0 / total[:, None], BLOCK, D0)
    if D1:
        store_rows(out + D0, out_n, first, q_len, out1 / total[:, None], BLOCK, D1)
    rows = first + tl.arange(0, BLOCK)
    result = tl.where(live, top + tl.log2(total), float("inf"))
    tl.store(lse + head.to(tl.int64) * q_len + rows, result, mask=rows < q_len)
