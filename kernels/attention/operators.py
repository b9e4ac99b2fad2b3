"""The attention operators as torch sees them, and the calls of the kernels behind them.

Two operators, on packed qkv and on separate q, k and v, each with a backward operator of its own. All four are opaque
to torch.compile, with their shapes registered, so a graph with them has no breaks. Outputs and gradients are allocated
here and written by the kernels: `dqkv` is one tensor in the layout of qkv, nothing is stacked or copied.

In selective checkpointing save the outputs of `SAVED`: computing them again costs what checkpointing should not.

Shape legend: B batch, N tokens (Nq queries, Nk keys), H heads, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import runtime
from .reference import attention_reference
from .sdpa import dense_mask, reference_backward
from .table import Launch, bucket, key_for, lookup_key

Lists = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of a mask: keep, row_cnt, row_idx, col_cnt, col_idx, row_bits."""
NO_LISTS: Lists = (None, None, None, None, None, None)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, block: int, scale: float, kernel: str, tf32: bool, backward: bool
) -> Launch:
    """Which kernel takes a call and with which options: the table's, or the list kernels where that one cannot.

    Raises:
        ValueError: the kernel that is asked for cannot take it either.
    """
    from . import lists as list_kernels

    device, dim, masked = q.device, q.shape[3], lists[0] is not None
    length = bucket(q.shape[1], k.shape[1])
    entry = lookup_key(key_for(device, q.dtype, dim, length, masked, block), device)
    launch = entry.backward if backward else entry.forward
    if "resident" in (kernel, launch.kernel) and kernel != "list":
        from . import resident

        capability = None if runtime.interpreted() else _capability(device.index or 0)
        if launch.kernel != "resident":
            launch = resident.default_launch(dim, q.shape[1], k.shape[1], capability, backward=backward)
        reason = resident.supports(dim, q.shape[1], k.shape[1], q.dtype, capability, backward=backward)
        if reason is None:
            return replace(launch, precision="tf32" if tf32 else "ieee")
        if kernel == "resident" and not backward:
            raise ValueError(f'route "resident": {reason}')
    if launch.kernel != "list":
        entry = lookup_key(key_for(device, q.dtype, dim, "list", masked, block), device)
        launch = entry.backward if backward else entry.forward
    if (reason := list_kernels.supports(q, k, v, block, scale)) is not None:
        raise ValueError(f"attention cannot run its kernels: {reason}")
    return replace(launch, precision="tf32" if tf32 else "ieee")


def kernels_of(q: Tensor, k: Tensor, v: Tensor, block: int, kernel: str) -> tuple[str, str]:
    """Names of the kernels, "resident" or "list", that run forward and backward for `kernel`, with a mask.

    Raises:
        ValueError: those that are asked for cannot take these inputs.
    """
    lists: Lists = (q, *NO_LISTS[1:])  # only its presence counts
    forward, backward = (_launch(q, k, v, lists, block, 1.0, kernel, False, side) for side in (False, True))
    return forward.kernel, backward.kernel


@lru_cache(maxsize=16)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, block: int, scale: float, kernel: str, tf32: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _like_outputs(q)
    keep, row_cnt, row_idx, _, _, row_bits = lists
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("inf"))
    if kernel == "reference":
        allowed = None if keep is None else dense_mask(keep, block, q.shape[1], k.shape[1])
        with torch.autocast(q.device.type, enabled=False):  # it would cast the products inside once more
            result, sums = attention_reference(q, k, v, allowed, scale)
        return out.copy_(result), lse.copy_(sums)
    launch = _launch(q, k, v, lists, block, scale, kernel, tf32, backward=False)
    with _current(q.device):
        if launch.kernel == "resident":
            from . import resident

            resident.forward(q, k, v, out, lse, row_bits, block, scale, launch)
        else:
            from . import lists as list_kernels

            list_kernels.forward(q, k, v, out, lse, row_cnt, row_idx, block, scale, launch)
    return out, lse


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    lists: Lists,
    block: int,
    scale: float,
    kernel: str,
    tf32: bool,
) -> None:
    keep, row_cnt, row_idx, col_cnt, col_idx, row_bits = lists
    if out.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
        return
    if kernel == "reference":
        allowed = None if keep is None else dense_mask(keep, block, q.shape[1], k.shape[1])
        with torch.autocast(q.device.type, enabled=False):
            reference_backward(q, k, v, out, lse, dout, *grads, allowed, scale)
        return
    launch = _launch(q, k, v, lists, block, scale, kernel, tf32, backward=True)
    if dout.stride(-1) != 1 or _too_far(dout, block):
        dout = dout.contiguous()  # the gradient of a sum is expanded from one number
    with _current(q.device):
        if launch.kernel == "resident":
            from . import resident

            resident.backward(q, k, v, out, lse, dout, *grads, row_bits, block, scale, launch)
        else:
            from . import lists as list_kernels

            list_kernels.backward(
                q, k, v, out, lse, dout, *grads, row_cnt, row_idx, col_cnt, col_idx, block, scale, launch
            )


def _too_far(x: Tensor, block: int) -> bool:
    from . import lists as list_kernels

    return list_kernels.too_far(x, block)


def _like_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Buffers for the output [B, Nq, H, D] and the log-sum-exp [B, H, Nq]."""
    b, n, h, d = q.shape
    return q.new_empty(b, n, h, d), q.new_empty(b, h, n, dtype=torch.promote_types(q.dtype, torch.float32))


# ---- operators

_LISTS = "Tensor? keep, Tensor? row_cnt, Tensor? row_idx, Tensor? col_cnt, Tensor? col_idx, Tensor? row_bits"
_OPTIONS = f"{_LISTS}, int block, float scale, str kernel, bool tf32"


@torch.library.custom_op(
    "efftrain_ds::attention_packed", mutates_args=(), schema=f"(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)"
)
def _packed(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _run_forward(q, k, v, options[:6], *options[6:])


@torch.library.custom_op(
    "efftrain_ds::attention_packed_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor",
)
def _packed_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    _run_backward(q, k, v, out, lse, dout, (dq, dk, dv), options[:6], *options[6:])
    return dqkv


@torch.library.custom_op(
    "efftrain_ds::attention_unpacked",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _unpacked(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(q, k, v, options[:6], *options[6:])


@torch.library.custom_op(
    "efftrain_ds::attention_unpacked_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _unpacked_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _unpacked_backward_fake(dout, q, k, v)
    _run_backward(q, k, v, out, lse, dout, grads, options[:6], *options[6:])
    return grads


@_packed.register_fake
def _packed_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_outputs(qkv.select(2, 0))


@_packed_backward.register_fake
def _packed_backward_fake(dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


@_unpacked.register_fake
def _unpacked_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_outputs(q)


@_unpacked_backward.register_fake
def _unpacked_backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup(ctx, inputs, output, 1)


def _setup_unpacked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup(ctx, inputs, output, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], tensors: int) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs[:tensors], out, lse, *inputs[tensors : tensors + 6])
    ctx.options = inputs[tensors + 6 :]


def _packed_grad(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = torch.ops.efftrain_ds.attention_packed_backward(dout, *ctx.saved_tensors, *ctx.options)
    return (grad, *(None,) * 10)


def _unpacked_grad(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.efftrain_ds.attention_unpacked_backward(dout, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * 10)


def _no_second(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError('attention has no second derivative; use route="sdpa" with torch\'s math backend')


_packed.register_autograd(_packed_grad, setup_context=_setup_packed)
_unpacked.register_autograd(_unpacked_grad, setup_context=_setup_unpacked)
_packed_backward.register_autograd(_no_second)
_unpacked_backward.register_autograd(_no_second)

SAVED = (torch.ops.efftrain_ds.attention_packed.default, torch.ops.efftrain_ds.attention_unpacked.default)
"""Operators whose outputs a selective checkpoint keeps."""


@register_flop_formula([torch.ops.efftrain_ds.attention_packed, torch.ops.efftrain_ds.attention_packed_backward])
def _packed_flops(*shapes: Any, **_: Any) -> int:
    backward = len(shapes[0]) == 4
    b, n, _three, h, d = shapes[1] if backward else shapes[0]
    return _flops(b, n, n, h, d, backward)


@register_flop_formula([torch.ops.efftrain_ds.attention_unpacked, torch.ops.efftrain_ds.attention_unpacked_backward])
def _unpacked_flops(first: Any, second: Any, third: Any, fourth: Any, *_: Any, **__: Any) -> int:
    backward = fourth is not None and len(fourth) == 4
    q, k = (second, third) if backward else (first, second)
    return _flops(q[0], q[1], k[1], q[2], q[3], backward)


def _flops(b: int, n_q: int, n_k: int, h: int, d: int, backward: bool) -> int:
    """FLOPs without a mask: two products forward, five backward. What a mask saves is not in the shapes."""
    return (10 if backward else 4) * b * h * n_q * n_k * d
