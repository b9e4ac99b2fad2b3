"""Block-sparse attention for any length: launchers of the list kernels, their limits and launch options.

Without lists (None) the kernels visit every block: dense attention with the same code. Triton is imported at the first
launch only.

Shape legend: B images, Nq queries, Nk keys, H heads, D head dim, nQ = ceil(Nq / block), nK = ceil(Nk / block),
Hm heads of the mask (1 or H). q, k, v, out and their gradients are [B, N, H, D] of one dtype with any strides but a
contiguous head dim.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime import FUSED, architecture, interpreted

if TYPE_CHECKING:
    from ..gate import GateCase
    from .table import Launch

BLOCKS = (16, 32, 64, 128)
HEAD_DIMS = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
"""Head dims and the two parts they are computed in."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP32_BLOCKS: dict[str, dict[int, int]] = {
    "sm_80": {128: 64},
    "sm_89": {80: 64, 128: 0},
    "default": {80: 64, 128: 0},
}
"""Largest block whose fp32 backward kernels fit the shared memory, by architecture and head dim, where that is not
every block. A GPU that we do not know is taken for one with little."""


def supports(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> str | None:
    """Why the list kernels cannot compute this attention; None where they can.

    Args:
        q: [B, Nq, H, D]; k and v: [B, Nk, H, D].
        block: tokens of a mask block, in queries and in keys.
        scale: factor of the scores.
    """
    if block not in BLOCKS:
        return f"blocks of {block} tokens, the kernels have {', '.join(map(str, BLOCKS))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head dim {q.shape[-1]}, the kernels have {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES and not (q.dtype == torch.float64 and interpreted()):
        return f"dtype {q.dtype}, the kernels have bfloat16, float16 and float32"
    if not scale > 0:
        return f"scale {scale}, the kernels need a positive one"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            return f"{name} is {x.dtype} on {x.device} beside q in {q.dtype} on {q.device}"
        if x.stride(-1) != 1:
            return f"{name} has a head dim of stride {x.stride(-1)}, the kernels need 1"
        if too_far(x, block):
            return f"{name} has tokens {x.stride(1)} elements apart, one block of them is over 2^31 elements long"
    images, q_len, heads, _ = q.shape
    if max(-(-q_len // block), -(-k.shape[1] // block)) * images * heads >= 2**31:
        return f"{images} images x {heads} heads x {q_len} tokens make more tiles than a grid has"
    return None


def too_far(x: Tensor, block: int) -> bool:
    """Whether a block of tokens of x [B, N, H, D] spans 2^31 elements or more, which the kernels' offsets cannot."""
    return block * x.stride(1) >= 2**31


def too_large(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Why a GPU has too little shared memory for the backward kernels; None where it has enough.

    Args:
        capability: of the GPU.
        dtype: of q, k, v.
        head_dim: D.
        block: tokens of a mask block.
    """
    most = FP32_BLOCKS.get(architecture(capability), {}).get(head_dim, block)
    if dtype != torch.float32 or block <= most:
        return None
    allowed = f"blocks up to {most}" if most else "16-bit types"
    return f"float32, head dim {head_dim}, blocks of {block} on sm_{capability[0]}{capability[1]}; allowed: {allowed}"


def tail_width(length: int, block: int) -> int:
    """Width of the step for the partial last block: a power of two from 16 on; 0 where all blocks are whole."""
    rest = length % block
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_cnt: Tensor | None,
    row_idx: Tensor | None,
    block: int,
    scale: float,
    launch: Launch,
) -> None:
    """Write all of out and lse.

    Args:
        q: [B, Nq, H, D]; k, v: [B, Nk, H, D]; see `supports`.
        out: [B, Nq, H, D], written; 0 for queries without keys.
        lse: [B, H, Nq] contiguous, fp32 (float64 for float64 inputs), written: base-2 log-sum-exp of the scaled
            scores, +inf for queries without keys.
        row_cnt: int32 [Hm, nQ], kept key blocks of each query block; None visits all.
        row_idx: int32 [Hm, nQ, nK], their indices, ascending, then anything.
        block: tokens of a block.
        scale: factor of the scores.
        launch: num_warps, num_stages, precision, and tile: keys of one step, at most a block.
    """
    from .lists_fwd import forward_kernel

    q_len, kv_len, heads = q.shape[1], k.shape[1], q.shape[2]
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[0], heads, q_len)
    q_blocks, kv_blocks = -(-q_len // block), -(-kv_len // block)
    step = _list_step(row_cnt, row_idx, heads, q_blocks, kv_blocks)
    if not q.shape[0] * heads * q_blocks:
        return
    forward_kernel[(q_blocks * q.shape[0] * heads,)](
        q, k, v, out, lse, row_cnt, row_idx,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, q_len, kv_len, step, scale * math.log2(math.e),
        **constants("forward", q.dtype, q.shape[3], block, kv_len, row_cnt is not None, launch.tile, launch.precision),
        num_warps=launch.num_warps, num_stages=launch.num_stages, **FUSED,
    )  # fmt: skip


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
    row_cnt: Tensor | None,
    row_idx: Tensor | None,
    col_cnt: Tensor | None,
    col_idx: Tensor | None,
    block: int,
    scale: float,
    launch: Launch,
) -> None:
    """Write all of dq, dk and dv; 0 where a query has no keys and where no query sees a key.

    Args:
        q: [B, Nq, H, D]; k, v: [B, Nk, H, D]; out, lse: as `forward` wrote them.
        dout: [B, Nq, H, D], gradient of `out`.
        dq: [B, Nq, H, D], written; dk, dv: [B, Nk, H, D], written.
        row_cnt: as for `forward`, as are row_idx, block and scale.
        col_cnt: int32 [Hm, nK], query blocks that see each key block; None with `row_cnt` None only.
        col_idx: int32 [Hm, nK, nQ], their indices, ascending, then anything.
        launch: num_warps and num_stages of the dQ kernel, dkv_warps and dkv_stages of the other, precision, and tile:
            keys or queries of one step, at most a block.
    """
    from .lists_bwd import dkv_kernel, dq_kernel

    images, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    assert lse.is_contiguous()
    assert lse.shape == (images, heads, q_len)
    assert dout.stride(-1) == 1
    assert (row_cnt is None) == (col_cnt is None)
    q_blocks, kv_blocks = -(-q_len // block), -(-kv_len // block)
    row_step = _list_step(row_cnt, row_idx, heads, q_blocks, kv_blocks)
    col_step = _list_step(col_cnt, col_idx, heads, kv_blocks, q_blocks)
    listed, log2 = row_cnt is not None, scale * math.log2(math.e)
    delta = torch.empty_like(lse)
    if images * heads * q_blocks:
        dq_kernel[(q_blocks * images * heads,)](
            q, k, v, out, lse, dout, delta, dq, row_cnt, row_idx,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
            heads, q_len, kv_len, row_step, log2, scale,
            **constants("dq", q.dtype, dim, block, kv_len, listed, launch.tile, launch.precision),
            num_warps=launch.num_warps, num_stages=launch.num_stages, **FUSED,
        )  # fmt: skip
    if images * heads * kv_blocks:
        dkv_kernel[(kv_blocks * images * heads,)](
            q, k, v, lse, dout, delta, dk, dv, col_cnt, col_idx,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            heads, q_len, kv_len, col_step, log2, scale,
            **constants("dkv", q.dtype, dim, block, q_len, listed, launch.tile, launch.precision),
            num_warps=launch.dkv_warps or launch.num_warps, num_stages=launch.dkv_stages or launch.num_stages,
            **FUSED,
        )  # fmt: skip


def _list_step(counts: Tensor | None, lists: Tensor | None, heads: int, rows: int, columns: int) -> int:
    """Rows of the lists between two heads: 0 where all heads share them."""
    if counts is None or lists is None:
        assert counts is lists
        return 0
    assert counts.dtype == lists.dtype == torch.int32
    assert counts.is_contiguous()
    assert lists.is_contiguous()
    assert counts.shape in ((1, rows), (heads, rows))
    assert lists.shape == (counts.shape[0], rows, columns)
    return rows if counts.shape[0] > 1 else 0


def constants(
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    block: int,
    length: int,
    listed: bool,
    step: int = 64,
    precision: str = "ieee",
) -> dict[str, Any]:
    """Values of a kernel's constexpr arguments.

    Args:
        kernel: "forward", "dq" or "dkv".
        dtype: of the inputs.
        head_dim: D.
        block: tokens of a block.
        length: tokens along the axis that a program walks: keys, or queries for dK and dV.
        listed: there are lists.
        step: tokens of one step of the walk, a power of two; at most a block.
        precision: "ieee" or "tf32", for fp32 inputs.
    """
    import triton.language as tl

    step = min(step, block)
    tail = tail_width(length, block)
    # dK and dV need no masks but those of the loads: there the partial block is a turn of the loop unless it is almost
    # empty. A second copy of wide code would make some variants spill.
    masked = tail > (16 if kernel == "dkv" else step)
    first, second = HEAD_DIMS[head_dim]
    return {
        "LISTS": listed,
        "BLOCK": block,
        "STEP": step,
        "TAIL": 0 if masked else tail,
        "MASKED": masked,
        "D0": first,
        "D1": second,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "UPCAST": interpreted(),
        "PRECISION": precision,
    }


def gate_cases() -> list[GateCase]:
    """The shipped variants for 16-bit inputs, where the table prefers these kernels, with blocks of 64."""
    from ..gate import GateCase
    from .lists_bwd import dkv_kernel, dq_kernel
    from .lists_fwd import forward_kernel
    from .table import Key, resolve, shipped_rows

    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    cases = []
    for capability in (90, 80, 89, 100, 120):
        names = ("bf16", "fp16") if capability == 90 else ("bf16",)
        arch = architecture(divmod(capability, 10))
        for name, head_dim, sparse in itertools.product(names, (32, 64, 80, 128), (True, False)):
            entry = resolve(Key(arch, name, head_dim, "list", sparse), shipped_rows())
            if entry.prefer != "kernel" and not (capability == 90 and head_dim == 64 and name == "bf16"):
                continue
            for kernel, tail in itertools.product(kernels, (1, 50) if name == "bf16" and sparse else (1,)):
                launch = entry.forward if kernel == "forward" else entry.backward
                own = kernel == "dkv"
                dtype = torch.bfloat16 if name == "bf16" else torch.float16
                values = constants(kernel, dtype, head_dim, 64, 576 + tail, sparse, launch.tile)
                cases.append(
                    GateCase(
                        f"attention list {kernel} {name} D{head_dim} tail {tail}{'' if sparse else ' dense'}",
                        kernels[kernel],
                        _signature(kernels[kernel].arg_names, name, values, sparse),
                        values if sparse else values | _no_lists(kernels[kernel].arg_names),
                        num_warps=(own and launch.dkv_warps) or launch.num_warps,
                        num_stages=(own and launch.dkv_stages) or launch.num_stages,
                        exp2=True,
                        capability=capability,
                        wgmma=capability == 90,
                        quick=capability == 90 and head_dim == 64 and name == "bf16" and sparse and tail == 1,
                    )
                )
    return cases


def _no_lists(names: list[str]) -> dict[str, None]:
    """The list arguments of a dense launch."""
    return {name: None for name in names if name.endswith(("_cnt", "_idx"))}


def _signature(names: list[str], dtype: str, values: dict[str, Any], listed: bool) -> dict[str, str]:
    """Types of a kernel's other arguments: strides are multiples of 16, as they are for every head dim we ship."""
    left_out = values if listed else values | _no_lists(names)
    types = {}
    for name in names:
        if name in left_out:
            continue
        if name.endswith(("_cnt", "_idx")):
            types[name] = "*i32"
        elif name in ("lse", "delta"):
            types[name] = "*fp32"
        elif name.startswith("scale"):
            types[name] = "fp32"
        elif name in ("H", "q_len", "kv_len", "row_step", "col_step"):
            types[name] = "i32"
        else:
            types[name] = "i32:16" if name.endswith(("_b", "_n", "_h")) else f"*{dtype}"
    return types
