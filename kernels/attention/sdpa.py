"""Attention by torch: scaled_dot_product_attention with a block mask, and the gradients of the reference.

Shape legend: B batch, H heads, Nq queries, Nk keys, D head dim, Hm heads of the mask (1 or H).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_mask(keep: Tensor, block: int, q_len: int, kv_len: int) -> Tensor:
    """Mask of single tokens, bool [Hm, Nq, Nk], from one of blocks [Hm, nQ, nK]. No host sync."""
    dense = keep.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return dense[:, :q_len, :kv_len]


def sdpa(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, block: int, scale: float) -> Tensor:
    """torch's attention with the empty-row rule of this package: output 0 and gradients of exactly 0.

    torch's backends treat a query without keys differently (NaN, zeros, or an average, by backend and version), so such
    a query is given all keys, and its output is replaced by 0 afterwards; then its gradients are 0 too.

    Args:
        q: [B, Nq, H, D].
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        keep: bool [Hm, nQ, nK]; None for all.
        block: tokens of a block.
        scale: factor of the products.

    Returns:
        [B, Nq, H, D], contiguous.
    """
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if keep is None:
        return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()
    empty = ~keep.any(-1, keepdim=True)
    allowed = dense_mask(keep | empty, block, q.shape[1], k.shape[1])
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=allowed[None], scale=scale)
    rows = empty.repeat_interleave(block, 1)[:, : q.shape[1]]
    return out.masked_fill(rows, 0.0).transpose(1, 2).contiguous()


def reference_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    allowed: Tensor | None,
    scale: float,
) -> None:
    """Write the gradients of `attention_reference` into dq, dk and dv, by the formulas of the kernels.

    P = 2^(S - lse), dV = P^T dO, dS = P (dO V^T - sum(O dO)), dQ = scale dS K, dK = scale dS^T Q (FlashAttention,
    NeurIPS 2022, appendix B.4). 16-bit inputs are computed in fp32.

    Args:
        q, k, v, out, dout: [B, N, H, D].
        lse: [B, H, Nq] base-2 log-sum-exp, +inf where a query has no keys.
        dq, dk, dv: written.
        allowed: bool [Hm, Nq, Nk]; None for all.
        scale: factor of the products.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, out, dout = (x.to(wide) for x in (q, k, v, out, dout))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale / math.log(2.0))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)  # - inf - inf = - inf: no NaN in empty rows
    weights = torch.exp2(scores - lse[..., None])
    delta = (out * dout).sum(-1).transpose(1, 2)
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, dout))
    dscores = weights * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta[..., None]) * scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dscores, k))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", dscores, q))
