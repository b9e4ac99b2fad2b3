"""Head compaction: run attention with the live heads' weights only, everything dense and smaller.

Rows of the fused qkv weight and columns of the projection are gathered in the forward pass; autograd scatters their
gradients back and leaves exactly 0 at the dead heads. The number of live heads is a shape, which heads live is data: an
update that swaps heads one for one compiles nothing anew.

A dead head whose weights are masked but whose biases live is not silent: its keys are all alike, so its softmax rows
sum to 1 over the constant b_v, and W_proj b_v is added to every token. The two readings:

- ``dead_bias="mask"``: the biases are masked like the weights, a dead head gives 0.
- ``dead_bias="fold"``: the biases live on, their constant is folded into the bias of the projection, with gradients.
  Exact as long as every query has a key and nothing drops attention weights at random.

Shape legend: C model width, H heads, D head dim, L live heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEAD_BIAS = ("mask", "fold")


class HeadWeights(NamedTuple):
    """Weights of an attention layer.

    Attributes:
        qkv_weight: [3 L D, C] (all of q, then k, then v; heads in ascending order).
        qkv_bias: [3 L D] or None.
        proj_weight: [Cout, L D].
        proj_bias: [Cout] or None.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None


def live_heads(live: Tensor, count: int) -> Tensor:
    """Indices of the live heads, ascending, without a host sync.

    Args:
        live: bool [H].
        count: number of live heads L, which `live` must have: it is a shape, so it cannot be read from the device.

    Returns:
        int64 [L].
    """
    if live.dtype != torch.bool or live.dim() != 1:
        raise ValueError(f"live heads: live is bool (H,), found {live.dtype} {tuple(live.shape)}")
    if not 0 <= count <= live.numel():
        raise ValueError(f"live heads: count is 0 to {live.numel()}, found {count}")
    return live.logical_not().to(torch.uint8).argsort(stable=True)[:count]


def compact_heads(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    live: Tensor,
    num_heads: int,
    dead_bias: str = "mask",
) -> HeadWeights:
    """Weights of the live heads, differentiable: for use in a forward pass, or once for export.

    The softmax scale stays that of the head dim D. Block masks per head are gathered alike, ``keep[live]``.

    Args:
        qkv_weight: [3 H D, C], all of q, then k, then v.
        qkv_bias: [3 H D] or None.
        proj_weight: [Cout, H D].
        proj_bias: [Cout] or None.
        live: int64 [L], indices as of `live_heads`: no host sync. Or bool [H]: reads the count from the device.
        num_heads: H.
        dead_bias: "mask" or "fold", see the module.

    Returns:
        Weights for L heads. With "fold" and a qkv bias there is a projection bias even where there was none.

    Raises:
        ValueError: shapes that do not fit each other, an unknown reading, or `live` of another type.
    """
    dim = _head_dim(qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, dead_bias)
    if live.dtype == torch.bool:
        live = live_heads(_bool_live(live, num_heads), int(live.sum()))
    if live.dtype != torch.int64 or live.dim() != 1 or live.numel() > num_heads:
        raise ValueError(
            f"head compaction: live is bool ({num_heads},) or int64 (L,) with L <= {num_heads}, "
            f"found {live.dtype} {tuple(live.shape)}"
        )
    split = (3, num_heads, dim)
    if dead_bias == "fold" and qkv_bias is not None:
        alive = torch.zeros(num_heads, 1, dtype=torch.bool, device=live.device).scatter_(0, live[:, None], True)
        constant = qkv_bias.unflatten(0, split)[2].masked_fill(alive, 0.0)  # b_v, what a dead head gives
        with torch.autocast(qkv_bias.device.type, enabled=False):  # a bias is worth its own precision
            folded = proj_weight @ constant.flatten()
        proj_bias = folded if proj_bias is None else proj_bias + folded
    rows = qkv_weight.unflatten(0, split).index_select(1, live)
    columns = proj_weight.unflatten(1, split[1:]).index_select(1, live)
    if qkv_bias is not None:
        qkv_bias = qkv_bias.unflatten(0, split).index_select(1, live).flatten()
    return HeadWeights(rows.flatten(0, 2), qkv_bias, columns.flatten(1), proj_bias)


def mask_heads(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    live: Tensor,
    num_heads: int,
    dead_bias: str = "mask",
    *,
    dense_grad: bool = False,
) -> HeadWeights:
    """The same layer at full size: weights of all heads with the dead ones' rows at zero.

    It costs what the dense layer costs. It is the definition of `compact_heads`, and the step before a regrowth, which
    needs gradients of dead heads: with `dense_grad` the values are masked and the gradients are not.

    Args:
        qkv_weight: [3 H D, C].
        qkv_bias: [3 H D] or None; masked with the reading "mask", left alone with "fold".
        proj_weight: [Cout, H D], left alone.
        proj_bias: [Cout] or None, left alone.
        live: bool [H].
        num_heads: H.
        dead_bias: "mask" or "fold", see the module.
        dense_grad: let gradients through to the masked rows.

    Returns:
        Weights for H heads.

    Raises:
        ValueError: as `compact_heads`.
    """
    dim = _head_dim(qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, dead_bias)
    dead = ~_bool_live(live, num_heads)[:, None].expand(3, num_heads, dim).reshape(-1)

    def masked(x: Tensor, where: Tensor) -> Tensor:
        if dense_grad:
            return x - x.detach().masked_fill(~where, 0.0)
        return x.masked_fill(where, 0.0)

    qkv_weight = masked(qkv_weight, dead[:, None])
    if qkv_bias is not None and dead_bias == "mask":
        qkv_bias = masked(qkv_bias, dead)
    return HeadWeights(qkv_weight, qkv_bias, proj_weight, proj_bias)


def _head_dim(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    dead_bias: str,
) -> int:
    """D, after a check that all shapes belong to one layer."""
    if dead_bias not in DEAD_BIAS:
        raise ValueError(f'head compaction: dead_bias is "mask" or "fold", found {dead_bias!r}')
    rows = qkv_weight.shape[0]
    if qkv_weight.dim() != 2 or num_heads < 1 or rows % (3 * num_heads):
        raise ValueError(
            f"head compaction: the qkv weight is (3 * {num_heads} heads * head dim, width), "
            f"found {tuple(qkv_weight.shape)}"
        )
    inner = rows // 3
    if proj_weight.dim() != 2 or proj_weight.shape[1] != inner:
        raise ValueError(
            f"head compaction: the projection takes {inner} channels, as the qkv weight {tuple(qkv_weight.shape)} "
            f"gives, found {tuple(proj_weight.shape)}"
        )
    for name, bias, length in (("qkv", qkv_bias, rows), ("projection", proj_bias, proj_weight.shape[0])):
        if bias is not None and tuple(bias.shape) != (length,):
            raise ValueError(f"head compaction: the {name} bias is ({length},), found {tuple(bias.shape)}")
    return inner // num_heads


def _bool_live(live: Tensor, num_heads: int) -> Tensor:
    if live.dtype != torch.bool or tuple(live.shape) != (num_heads,):
        raise ValueError(f"head compaction: live is bool ({num_heads},), found {live.dtype} {tuple(live.shape)}")
    return live
