"""Every launch that ``table.json`` leads to, for the code gate.

The launchers are called with tensors that have no memory and their launches are recorded, so what is compiled is what a
GPU would get: kernel, argument types, alignment, constants, warps and stages. Equal launches are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..gate import GateCase, recorded
from . import table
from .mask import BlockMask
from .table import Key, Launch

LENGTHS = {"64": 50, "128": 101, "256": 197, "list": 577}
"""Tokens that stand for a length bucket."""

DTYPES = ("bf16", "fp32")  # fp16 compiles to the same code as bf16 but for the type in its products
CAPABILITIES = {"sm_90": 90, "sm_89": 89, "sm_80": 80}
IMAGES, HEADS = 2, 6


def gate_cases() -> list[GateCase]:
    """Cases of all keys of sm_90, sm_89 and sm_80, without repetitions."""
    cases: list[GateCase] = []
    seen: set[tuple[object, ...]] = set()
    keys = [key for key in table.keys(CAPABILITIES) if key.dtype in DTYPES]
    keys += [replace(key, block=128) for key in keys if key.sparse and key.length == "list"]
    for key in keys:
        entry = table.resolve(key, table.shipped_rows())
        if entry.prefer == "sdpa":
            continue
        for side, launch in (("forward", entry.forward), ("backward", entry.backward)):
            for case in _cases(key, side, launch):
                what = (case.kernel, *map(str, (case.signature, case.constants, case.num_warps, case.num_stages)))
                if (*what, case.capability) not in seen:
                    seen.add((*what, case.capability))
                    cases.append(case)
    return cases


def _cases(key: Key, side: str, launch: Launch) -> list[GateCase]:
    """Cases of the launches of one pass."""
    head_dim = next(dim for dim in (32, 64, 80, 128) if table.HEAD_DIMS[dim] == key.head_dim or dim == key.head_dim)
    name = f"table {launch.kernel} {side} {key.dtype} D{head_dim} N{LENGTHS[key.length]}"
    name += f" blocks of {key.block}" if key.sparse else ""
    found = recorded(_launcher(key, side, launch, head_dim))
    return [
        GateCase(
            name if len(found) == 1 else f"{name} {kernel.__name__}",
            kernel,
            signature,
            constants,
            capability=CAPABILITIES[key.arch],
            wgmma=CAPABILITIES[key.arch] == 90 and key.dtype != "fp32",
            **options,
        )
        for kernel, signature, constants, options in found
    ]


def _launcher(key: Key, side: str, launch: Launch, head_dim: int) -> Callable[[], None]:
    """A call of the launcher as the operation makes it, on packed qkv."""
    dtype = next(dtype for dtype, name in table.DTYPES.items() if name == key.dtype)
    tokens = LENGTHS[key.length]
    qkv = torch.empty(IMAGES, tokens, 3, HEADS, head_dim, dtype=dtype, device="meta")
    q, k, v = qkv.unbind(2)
    dq, dk, dv = torch.empty_like(qkv).unbind(2)
    out = torch.empty(IMAGES, tokens, HEADS, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(IMAGES, HEADS, tokens, dtype=torch.float32, device="meta")
    mask = BlockMask.full(HEADS if key.sparse else 1, tokens, tokens, key.block)
    end = (key.block, head_dim**-0.5, launch)

    def resident_call() -> None:
        from . import resident

        bits = mask.row_bits if key.sparse else None
        if side == "forward":
            resident.forward(q, k, v, out, lse, bits, *end)
        else:
            resident.backward(q, k, v, out, lse, torch.empty_like(out), dq, dk, dv, bits, *end)

    def list_call() -> None:
        from . import lists

        rows, columns = (mask.row_cnt, mask.row_idx), (mask.col_cnt, mask.col_idx)
        if side == "forward":
            lists.forward(q, k, v, out, lse, *rows, *end)
        else:
            lists.backward(q, k, v, out, lse, torch.empty_like(out), dq, dk, dv, *rows, *columns, *end)

    return resident_call if launch.kernel == "resident" else list_call
