"""Launchers of the resident attention kernels: forward and one-pass backward for at most 256 queries and keys.

Shape legend: B batch, H heads, Nq queries, Nk keys, D head dim, Hm heads of the mask (1 or H), nQ = ceil(Nq / block).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..gate import GateCase
from ..runtime import FUSED, architecture, interpreted
from .resident_bwd import backward_kernel
from .resident_fwd import forward_kernel
from .table import Launch

MAX_TOKENS = 256
DTYPES = (torch.float16, torch.bfloat16)
FORWARD_KEYS = {
    "sm_90": {32: 256, 64: 256, 80: 224, 128: 208},
    "sm_80": {32: 224, 64: 208, 80: 208},
    "sm_89": {32: 224, 64: 208, 80: 208},
}
"""Most keys of the forward kernel by architecture and head dim: with more the scores of a query tile do not fit into
the registers."""
BACKWARD_QUERIES = {
    "sm_90": {64: 256, 128: 256},
    "sm_80": {32: 256, 64: 256},
    "sm_89": {32: 256, 64: 128},
}
"""Most queries of the backward kernel by architecture and head dim. Some of its products have the head dim as their
rows, and Hopper's wide instructions take 64: no 32 and 80 there. sm_89 has shared memory for 128 queries of 64
numbers."""


@lru_cache(maxsize=512)
def key_pieces(n_k: int) -> tuple[int, int, int]:
    """Lengths of the at most three pieces that hold the keys: powers of two from 16 on, descending, then zeros.

    The least sum that fits, in the fewest pieces, and all but the last are full. The one exception is 256 as
    128 + 64 + 64: with two pieces of 128 the compiler keeps more of them in registers than there are.

    Args:
        n_k: keys, 1 to 256.
    """
    sizes = (0, 16, 32, 64, 128)
    plans = [(a, b, c) for a in sizes[1:] for b in sizes for c in sizes if a >= b >= c and 256 > a + b + c >= n_k]
    return min(plans, key=lambda plan: (sum(plan), sum(size > 0 for size in plan)), default=(128, 64, 64))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """The head dim as a power of two and a rest that is one too, or 0 (80 = 64 + 16)."""
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


def supports(
    head_dim: int,
    q_len: int,
    kv_len: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
    *,
    backward: bool = False,
) -> str | None:
    """Why these kernels cannot take a shape; None where they can. Strides and masks are never a reason.

    Args:
        head_dim: D.
        q_len: queries.
        kv_len: keys.
        dtype: of q, k, v.
        capability: of the GPU; None under the interpreter, which has no limits of registers or shared memory.
        backward: the backward kernel, else the forward one.
    """
    name = f"the resident {'backward' if backward else 'forward'} kernel"
    if not (1 <= q_len <= MAX_TOKENS and 1 <= kv_len <= MAX_TOKENS):
        return f"{name} takes 1 to {MAX_TOKENS} tokens, found {q_len} queries and {kv_len} keys"
    if capability is None:
        first, rest = split_head_dim(head_dim)
        if head_dim < 16 or rest & (rest - 1) or 0 < rest < 16 or (backward and rest):
            return f"{name} cannot split a head dim of {head_dim}"
        return None
    if dtype not in DTYPES:
        return f"{name} takes fp16 and bf16 on a GPU, found {dtype}"
    arch = architecture(capability)
    limits = (BACKWARD_QUERIES if backward else FORWARD_KEYS).get(arch)
    if limits is None:
        return f"{name} is made for compute capabilities 8.0 to 9.0 and 12.x, found {capability[0]}.{capability[1]}"
    if head_dim not in limits:
        return f"{name} takes head dims {', '.join(map(str, limits))} on {arch}, found {head_dim}"
    found, what = (q_len, "queries") if backward else (kv_len, "keys")
    if found > limits[head_dim]:
        return f"{name} takes up to {limits[head_dim]} {what} of head dim {head_dim} on {arch}, found {found}"
    return None


def default_launch(
    head_dim: int, q_len: int, kv_len: int, capability: tuple[int, int] | None = None, *, backward: bool = False
) -> Launch:
    """Options that compile without spills wherever `supports` has no objection; the tuner's start.

    Args:
        head_dim: D.
        q_len: queries.
        kv_len: keys.
        capability: of the GPU; None as 9.0.
        backward: of the backward kernel, else of the forward one.
    """
    if not backward:
        return Launch("resident", num_warps=4, num_stages=1, tile=64)
    rows = query_rows(q_len)
    warps = 8 if rows * head_dim > 128 * 64 else 4
    if capability is None or architecture(capability) == "sm_90":
        # one or two programs a multiprocessor: the loads of the next tiles have to hide behind this one's work
        return Launch("resident", warps, 2 if kv_len <= 64 else 3, 16 if head_dim > 64 and rows > 128 else 32)
    if head_dim <= 32:
        return Launch("resident", 8 if rows > 128 else 4, 2, 16 if rows > 128 else 32)
    return Launch("resident", warps, 1 if rows > 128 else 2, 32 if rows <= 64 else 16)


def _common(q: Tensor, row_bits: Tensor | None, block: int, launch: Launch) -> dict[str, Any]:
    wide = q.dtype == torch.float64
    return {
        "HAS_BITS": row_bits is not None,
        "BLOCK": block if row_bits is not None else 16,  # one variant without a mask
        "ACC": tl.float64 if wide else tl.float32,
        "UPCAST": interpreted(),
        "PRECISION": launch.precision,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **FUSED,
    }


def _check(tensors: tuple[Tensor, ...], lse: Tensor, row_bits: Tensor | None, scale: float) -> None:
    assert all(tensor.stride(3) == 1 for tensor in tensors), "the head dim is contiguous"
    assert lse.stride(2) == 1, "the log-sum-exp is contiguous along the queries"
    assert row_bits is None or row_bits.stride(1) == 1, "the mask's words are contiguous"
    assert scale > 0, f"the kernels take a scale above 0, found {scale}"


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _head_stride(row_bits: Tensor | None) -> int:
    return row_bits.stride(0) if row_bits is not None and row_bits.shape[0] > 1 else 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_bits: Tensor | None,
    block: int,
    scale: float,
    launch: Launch,
) -> None:
    """Write the output and the log-sum-exp of masked attention.

    Args:
        q: [B, Nq, H, D], any strides with contiguous head dims, as all below.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        out: [B, Nq, H, D]; every element is written, 0 for queries without keys.
        lse: [B, H, Nq] fp32 (float64 for float64 inputs), base 2; +inf for queries without keys.
        row_bits: int64 [Hm, nQ], bit j = key block j is kept; None for all.
        block: tokens of a mask block, a power of two from 16 on.
        scale: factor of the scores, above 0.
        launch: `tile` = queries of one tile.
    """
    _check((q, k, v, out), lse, row_bits, scale)
    batch, n_q, heads, dim = q.shape
    n_k = k.shape[1]
    d0, d1 = split_head_dim(dim)
    k0, k1, k2 = key_pieces(n_k)
    forward_kernel[(batch * heads,)](
        q,
        k,
        v,
        out,
        lse,
        lse if row_bits is None else row_bits,
        *_strides(q, k, v, out),
        *lse.stride()[:2],
        _head_stride(row_bits),
        heads,
        n_q,
        n_k,
        float(scale),
        D0=d0,
        D1=d1,
        K0=k0,
        K1=k1,
        K2=k2,
        ROWS=launch.tile,
        **_common(q, row_bits, block, launch),
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    row_bits: Tensor | None,
    block: int,
    scale: float,
    launch: Launch,
) -> None:
    """Write the gradients of masked attention; every element is written, 0 for queries and keys without partners.

    Args:
        q: [B, Nq, H, D], as in `forward`, which made `out` and `lse`.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        out: [B, Nq, H, D].
        lse: [B, H, Nq].
        dout: gradient of `out`.
        dq: [B, Nq, H, D]
        dk: [B, Nk, H, D]
        dv: [B, Nk, H, D]
        row_bits: as in `forward`.
        block: as in `forward`.
        scale: as in `forward`.
        launch: `tile` = keys of one tile; smaller mask blocks make it smaller.
    """
    _check((q, k, v, out, dout, dq, dk, dv), lse, row_bits, scale)
    batch, n_q, heads, dim = q.shape
    n_k = k.shape[1]
    tile = launch.tile if row_bits is None else min(launch.tile, block)
    backward_kernel[(batch * heads,)](
        q,
        k,
        v,
        out,
        lse,
        dout,
        dq,
        dk,
        dv,
        lse if row_bits is None else row_bits,
        *_strides(q, k, v, out, dout, dq, dk, dv),
        *lse.stride()[:2],
        _head_stride(row_bits),
        heads,
        n_q,
        n_k,
        float(scale),
        D=dim,
        ROWS=query_rows(n_q),
        TILE=tile,
        WHOLE=n_k % tile == 0,
        **_common(q, row_bits, block, launch),
    )


def query_rows(n_q: int) -> int:
    """Rows of the backward kernel's query tile: 64, 128 or 256."""
    return 64 if n_q <= 64 else 128 if n_q <= 128 else 256


# ---- code gate

_ROW_TENSORS = {"q": "q", "k": "k", "v": "v", "out": "out"}
_GRADIENTS = {"dout": "do", "dq": "dq", "dk": "dk", "dv": "dv"}
_FORWARD_CASES = {
    90: ((64, 50), (64, 101), (64, 197), (64, 256), (32, 197), (32, 256), (80, 197), (80, 224), (128, 101), (128, 197)),
    80: ((64, 50), (64, 101), (64, 197), (32, 224), (80, 197)),
    89: ((64, 197),),
    120: ((64, 197), (32, 224), (80, 197)),
}
_BACKWARD_CASES = {
    90: ((64, 50), (64, 101), (64, 192), (64, 197), (128, 50), (128, 101), (128, 197)),
    80: ((64, 50), (64, 101), (64, 197), (32, 50), (32, 101), (32, 197)),
    89: ((64, 101), (32, 197)),
    120: ((64, 101), (32, 197)),
}


def gate_cases() -> list[GateCase]:
    """The default launches at typical lengths (head dim, tokens), dense and masked."""
    cases = []
    for backward, lengths in ((False, _FORWARD_CASES), (True, _BACKWARD_CASES)):
        for capability, shapes in lengths.items():
            cases += [_gate_case(capability, dim, n, block, "bf16", backward) for dim, n in shapes for block in (0, 64)]
        cases.append(_gate_case(90, 64, 197, 0, "fp16", backward))
        cases.append(_gate_case(90, 64, 197, 16, "bf16", backward))
    return cases


def _gate_case(capability: int, dim: int, n: int, block: int, dtype: str, backward: bool) -> GateCase:
    """One square shape; `block` 0 = without a mask."""
    version = divmod(capability, 10)
    launch = default_launch(dim, n, n, version, backward=backward)
    names = _ROW_TENSORS | (_GRADIENTS if backward else {})
    signature = dict.fromkeys(names, f"*{dtype}")
    signature |= {f"{name}_{axis}": "i32:16" for name in names.values() for axis in "bnh"}
    signature |= {"lse": "*fp32", "row_bits": "*i64" if block else "*fp32", "scale": "fp32"}
    signature |= dict.fromkeys(("lse_b", "lse_h", "bits_h", "heads", "n_q", "n_k"), "i32")
    constants = {"HAS_BITS": block > 0, "BLOCK": block or 16, "ACC": tl.float32, "UPCAST": False, "PRECISION": "ieee"}
    if backward:
        tile = min(launch.tile, block or launch.tile)
        constants |= {"D": dim, "ROWS": query_rows(n), "TILE": tile, "WHOLE": n % tile == 0}
    else:
        constants |= dict(zip(("D0", "D1", "K0", "K1", "K2"), (*split_head_dim(dim), *key_pieces(n)), strict=True))
        constants["ROWS"] = launch.tile
    return GateCase(
        name=f"attention resident {'backward' if backward else 'forward'} {dtype} D={dim} N={n} block={block}",
        kernel=backward_kernel if backward else forward_kernel,
        signature=signature,
        constants=constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        exp2=True,
        capability=capability,
        wgmma=capability == 90,
        quick=(capability, dim, n, block, dtype) == (90, 64, 197, 0, "bf16"),
    )
