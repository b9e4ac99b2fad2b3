"""Masked attention in plain torch: the definition that every kernel is compared with, and the path without Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T, over the kept keys) v; non-causal, without dropout.

    A query without kept keys gives an output of 0, a log-sum-exp of +inf (so that exp2(score - lse) is 0 in the
    backward kernels) and gradients of exactly 0. Finite inputs never give a NaN, in either direction. 16-bit inputs
    are computed in fp32 and the output is rounded once.

    Shape legend: B batch, H heads, Nq queries, Nk keys, D head dim, Dv dim of the values.

    Args:
        q: [B, Nq, H, D], any float type and any strides.
        k: [B, Nk, H, D].
        v: [B, Nk, H, Dv].
        keep: bool [Hm, Nq, Nk] with Hm 1 or H, True where a query sees a key; None for all.
        scale: factor of the products (natural-log softmax), commonly D ** -0.5.

    Returns:
        The output [B, Nq, H, Dv] in the type of the inputs, and the base-2 log-sum-exp of the scaled scores
        [B, H, Nq] in fp32 (float64 for float64 inputs), detached.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if keep is not None:
        # the smallest finite number, not -inf: softmax of a row of -inf is NaN, and so is its gradient
        scores = scores.masked_fill(~keep, torch.finfo(wide).min)
    weights = scores.softmax(-1)
    lse = torch.logsumexp(scores.detach(), -1) / math.log(2.0)
    if keep is not None:
        weights = weights.masked_fill(~keep, 0.0)
        lse = lse.masked_fill(~keep.any(-1), math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(dtype), lse
