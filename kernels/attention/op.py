"""Block-sparse attention: the public functions, their checks, and the choice of implementation.

Shape legend: B batch, N tokens (Nq queries, Nk keys), H heads, D head dim.

**Which implementation runs.** ``EFFTRAIN_KERNELS`` wins, then the argument `route`, then the table for the GPU. The
choice is made on the host and never waits for the device: it depends on the device, the dtype, D, the length's bucket
(64, 128, 256, longer) and on whether a mask is given, but not on what the mask holds. So a mask may change at every
step, and under torch.compile nothing is compiled again. Where its sparsity should count (with few pruned blocks, by an
estimate under 30 %, SDPA with a dense mask is faster than the list kernels), the caller asks `route_for` when it has
changed the mask, outside of the compiled code, and passes the answer as `route`; the code is compiled once per route.
Compiled code keeps the choice between our operators and SDPA from the time it was compiled, also if the environment
variable changes.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import runtime
from .operators import NO_LISTS, Lists
from .sdpa import sdpa
from .table import BLOCK, DTYPES, HEAD_DIMS, bucket, key_for, lookup_key, supported

if TYPE_CHECKING:
    from .mask import BlockMask

ROUTES = ("auto", "resident", "list", "sdpa", "reference")


def attention(
    qkv: Tensor, mask: BlockMask | None = None, scale: float | None = None, *, route: str = "auto", tf32: bool = False
) -> Tensor:
    """softmax(scale q k^T, over the kept blocks) v, non-causal, without dropout.

    Differentiable once. A query without any kept key gives 0 and gets gradients of 0. Under autocast qkv is cast to the
    autocast dtype, as in scaled_dot_product_attention.

    Args:
        qkv: [B, N, 3, H, D] as the linear writes it; any strides, D contiguous. bf16, fp16, fp32 or float64.
        mask: block mask for N queries and N keys, on qkv's device; None for all.
        scale: factor of the products, > 0; default D ** -0.5.
        route: "auto", or one of "resident" (at most 256 tokens), "list", "sdpa", "reference"; see the module's text.
        tf32: multiply fp32 inputs in TF32 (10-bit mantissas), default full fp32. Concerns our kernels only, and "auto"
            gives fp32 to SDPA: name route="list" with it. SDPA follows torch's own settings.

    Returns:
        [B, N, H, D], contiguous, dtype of (cast) qkv.

    Raises:
        ValueError: wrong rank, dtype, layout, scale or route; a mask of another shape or device; a size that the forced
            kernels do not have.
        RuntimeError: kernels are forced that cannot run on this machine.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention takes qkv [B, N, 3, H, D], found shape {tuple(qkv.shape)}")
    n, heads, dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    qkv = _cast(qkv)
    factor = _checked("qkv", qkv, mask, heads, n, n, dim, scale, route)
    kind = _kind(qkv, n, n, dim, mask, route)
    if kind == "sdpa":
        q, k, v = qkv.unbind(2)
        return sdpa(q, k, v, None if mask is None else mask.keep, 0 if mask is None else mask.block, factor)
    return torch.ops.efftrain_ds.attention_packed(qkv, *_lists(mask), _block(mask), factor, kind, tf32)[0]


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    scale: float | None = None,
    *,
    route: str = "auto",
    tf32: bool = False,
) -> Tensor:
    """`attention` on separate tensors, whose lengths may differ (pooled keys).

    Args:
        q: [B, Nq, H, D]; any strides, D contiguous.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        mask: block mask for Nq queries and Nk keys; None for all.
        scale: as in `attention`.
        route: as in `attention`.
        tf32: as in `attention`.

    Returns:
        [B, Nq, H, D], contiguous.

    Raises:
        ValueError: as in `attention`, or q, k and v that do not fit each other.
        RuntimeError: as in `attention`.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "attention takes q [B, Nq, H, D], k and v [B, Nk, H, D], found shapes "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    q, k, v = _cast(q), _cast(k), _cast(v)
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v have one dtype and device, found {found}")
    n_q, heads, dim, n_k = q.shape[1], q.shape[2], q.shape[3], k.shape[1]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        factor = _checked(name, tensor, mask, heads, n_q, n_k, dim, scale, route)
    kind = _kind(q, n_q, n_k, dim, mask, route)
    if kind == "sdpa":
        return sdpa(q, k, v, None if mask is None else mask.keep, 0 if mask is None else mask.block, factor)
    return torch.ops.efftrain_ds.attention_unpacked(q, k, v, *_lists(mask), _block(mask), factor, kind, tf32)[0]


def route_for(mask: BlockMask | None, dtype: torch.dtype, head_dim: int) -> str:
    """The `route` for a mask as it is now: "sdpa" where too few blocks are pruned for the kernels to win, else "auto".

    Reads the mask's density, which waits for the device: call it where the mask is changed, on every rank alike, not in
    the forward pass.

    Args:
        mask: the mask.
        dtype: of the attention's inputs.
        head_dim: D.
    """
    if mask is None or dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return "auto"
    device = mask.keep.device
    key = key_for(device, dtype, head_dim, bucket(mask.q_len, mask.kv_len), True, mask.block)
    return "sdpa" if 1 - mask.density < lookup_key(key, device).min_sparsity else "auto"


# ---- checks and choice


def _checked(
    name: str,
    x: Tensor,
    mask: BlockMask | None,
    heads: int,
    n_q: int,
    n_k: int,
    dim: int,
    scale: float | None,
    route: str,
) -> float:
    """Check one input and the options; returns the scale.

    Raises:
        ValueError: see `attention`.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES.values())}, found {x.dtype}")
    if x.stride(-1) != 1 and dim != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous, found strides {tuple(x.stride())}")
    if mask is not None:
        mask.check(heads, n_q, n_k, x.device)
    if route not in ROUTES:
        raise ValueError(f"route is one of {', '.join(ROUTES)}, found {route!r}")
    if scale is None:
        return dim**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be > 0, found {scale!r}")
    return scale


def _cast(x: Tensor) -> Tensor:
    # torch.library.register_autocast casts to one fixed dtype a device; this follows the region's own
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _kind(x: Tensor, n_q: int, n_k: int, dim: int, mask: BlockMask | None, route: str) -> str:
    """What runs: "sdpa", or the `kernel` argument of the operators.

    Raises:
        ValueError: kernels are asked for that do not have this size.
        RuntimeError: kernels are asked for that cannot run here.
    """
    block = 0 if mask is None else mask.block
    device = x.device
    # D is symbolic under torch.compile(dynamic=True); index() makes it a number, with a guard, where int() does not
    return _decide(device.type, device.index or 0, x.dtype, index(dim), bucket(n_q, n_k), block, route)


@torch.compiler.assume_constant_result
def _decide(device_type: str, number: int, dtype: torch.dtype, dim: int, length: str, block: int, route: str) -> str:
    # constant for torch.compile: it would trace the environment, the table's files and Triton's settings
    if device_type == "meta":
        return "reference"  # shapes and FLOPs only
    side = runtime.requested()
    if side == "reference" or (side == "" and route in ("sdpa", "reference")):
        return "reference" if side else route
    able = dim in HEAD_DIMS and (dtype != torch.float64 or runtime.interpreted())
    unable = None if able else f"head dim {dim} with {DTYPES[dtype]}; {supported()}"
    if route == "resident" and length == "list":
        raise ValueError('route "resident" takes up to 256 tokens')
    kernel = route if route in ("resident", "list") else "auto"
    if side == "triton" or kernel != "auto":
        if unable is not None:
            raise ValueError(f"attention has no kernels for {unable}")
        reason = runtime.why_not(device_type, number)
        if reason is None and device_type == "cuda":
            from .lists import too_large

            small = too_large(torch.cuda.get_device_capability(number), dtype, dim, block or BLOCK)
            if small is not None:
                raise ValueError(f"attention has no kernels for {small}")
        if reason is not None:
            forced = f"{runtime.VARIABLE}=triton" if side else f"route={route!r}"
            raise RuntimeError(f"{forced}, but attention cannot run its kernels: {reason}")
        return kernel
    if not runtime.use_triton("attention", torch.device(device_type, number), unable):
        return "sdpa"
    device = torch.device(device_type, number)
    key = key_for(device, dtype, dim, length, block > 0, block or BLOCK)
    return "sdpa" if lookup_key(key, device).prefer == "sdpa" else "auto"


def _lists(mask: BlockMask | None) -> Lists:
    if mask is None:
        return NO_LISTS
    return mask.keep, mask.row_cnt, mask.row_idx, mask.col_cnt, mask.col_idx, mask.row_bits


def _block(mask: BlockMask | None) -> int:
    return BLOCK if mask is None else mask.block
