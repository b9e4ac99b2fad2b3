"""Attention backward in one pass for at most 256 queries: one program holds Q and dO of one head of one image.

A loop over key tiles recomputes P and dS [queries, keys] once and finishes dV and dK of the tile, while dQ of all
queries stays in registers: five products instead of the seven of separate passes, every input is read once, and nothing
needs an atomic. dV^T = dO^T P and dK^T = Q^T dS are computed transposed, with the head dim as the rows of the product:
Hopper's tensor-core instructions on whole warp groups need 64 rows, which a narrow tile of keys would not give.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import product
from .resident_fwd import LOG2E, load_rows


@triton.jit(do_not_specialize=["heads", "n_q", "n_k", "lse_b", "lse_h", "bits_h", "scale"])
def backward_kernel(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dq,
    dk,
    dv,
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
    do_b,
    do_n,
    do_h,
    dq_b,
    dq_n,
    dq_h,
    dk_b,
    dk_n,
    dk_h,
    dv_b,
    dv_n,
    dv_h,
    lse_b,
    lse_h,
    bits_h,
    heads,
    n_q,
    n_k,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one head of one image; grid (batch x heads,). Arguments as in the forward kernel.

    Args:
        out, lse, dout: results of the forward pass and the gradient of its output.
        dq, dk, dv: written whole; never read.
        ROWS: a power of two, at least n_q.
        TILE: keys of one step; divides BLOCK.
        WHOLE: TILE divides n_k.
    """
    program = tl.program_id(0)
    b, h = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    lse += b * lse_b + h * lse_h
    dout += b * do_b + h * do_h
    dq += b * dq_b + h * dq_h
    dk += b * dk_b + h * dk_h
    dv += b * dv_b + h * dv_h

    queries = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    live = queries < n_q
    do_tile = load_rows(dout, queries, do_n, dims, n_q, True)
    out_tile = load_rows(out, queries, out_n, dims, n_q, True)
    delta = tl.sum(out_tile.to(ACC) * do_tile.to(ACC), 1)
    q_tile = load_rows(q, queries, q_n, dims, n_q, True)
    sums = tl.load(lse + queries, mask=live, other=float("inf"))  # absent queries get P = 0
    bits = queries
    if HAS_BITS:
        bits = tl.load(row_bits + h * bits_h + queries // BLOCK, mask=live, other=0).to(tl.int32)
    dq_tile = tl.zeros((ROWS, D), ACC)
    for first in range(0, n_k, TILE):
        # one body for whole and partial tiles: a second copy for the tail costs more registers than there are
        keys = first + tl.arange(0, TILE)
        k_tile = load_rows(k, keys, k_n, dims, n_k, not WHOLE)
        v_tile = load_rows(v, keys, v_n, dims, n_k, not WHOLE)
        s = product(q_tile, tl.trans(k_tile), tl.zeros((ROWS, TILE), ACC), UPCAST, PRECISION)
        limits = sums
        if HAS_BITS:
            # the tile is inside one key block: a query that does not see it gets P = exp2(s - inf) = 0
            limits = tl.where(((bits >> (first // BLOCK)) & 1) != 0, sums, float("inf"))
        p = s * (scale * LOG2E) - limits[:, None]
        if not WHOLE:
            p = tl.where((keys < n_k)[None, :], p, float("-inf"))  # absent keys have score 0: exp2(-sums) may overflow
        p = tl.exp2(p)

        # each result is stored as soon as it is there: registers are what limits this kernel
        dv_tile = product(tl.trans(do_tile), p.to(do_tile.dtype), tl.zeros((D, TILE), ACC), UPCAST, PRECISION)
        target = dv + keys.to(tl.int64)[None, :] * dv_n + dims[:, None]
        if WHOLE:
            tl.store(target, dv_tile.to(dv.dtype.element_ty))
        else:
            tl.store(target, dv_tile.to(dv.dtype.element_ty), mask=(keys < n_k)[None, :])

        # dP - delta; the difference as the product's start needs fewer registers than a subtraction after it
        minus_delta = tl.zeros((ROWS, TILE), ACC) - delta[:, None]
        ds = (p * product(do_tile, tl.trans(v_tile), minus_delta, UPCAST, PRECISION)).to(q_tile.dtype)
        dk_tile = product(tl.trans(q_tile), ds, tl.zeros((D, TILE), ACC), UPCAST, PRECISION) * scale
        dq_tile = product(ds, k_tile, dq_tile, UPCAST, PRECISION)
        target = dk + keys.to(tl.int64)[None, :] * dk_n + dims[:, None]
        if WHOLE:
            tl.store(target, dk_tile.to(dk.dtype.element_ty))
        else:
            tl.store(target, dk_tile.to(dk.dtype.element_ty), mask=(keys < n_k)[None, :])
    tile = dq + queries.to(tl.int64)[:, None] * dq_n + dims[None, :]
    tl.store(tile, (dq_tile * scale).to(dq.dtype.element_ty), mask=live[:, None])
