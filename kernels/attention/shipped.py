"""Every launch that ``table.json`` leads to, for the code gate.

The launchers are called with tensors that have no memory and their launches are recorded, so what is compiled is what a
GPU would get: kernel, argument types, alignment, constants, warps and stages. Equal launches are compiled once. Rows
that prefer torch's attention are compiled too, since the kernels can be forced there; ``may_spill`` marks them where
no launch of the kernels is known that fits the registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product

import torch

from ..gate import GateCase, recorded
from . import resident, table
from .mask import BlockMask
from .table import Key, Launch

LENGTHS = {"64": (50,), "128": (101,), "256": (197,), "list": (577, 600, 1024)}
"""Tokens that stand for a length bucket; the long ones end in a narrow, a wider and a whole block."""

DTYPES = ("bf16", "fp16", "fp32")
BLOCKS = (64, 128)
CAPABILITIES = {"sm_90": (90,), "sm_89": (89, 120), "sm_80": (80,), "sm_100": (100,), "default": (120,)}
"""Compute capabilities that each architecture's rows are compiled for; what is unknown: one with little memory."""
BOTH_TYPES = (90, 89, 80)
"""Capabilities whose rows are compiled in fp16 beside bf16; elsewhere one 16-bit type stands for both."""
OTHERS = ((16, 64), (48, 64), (96, 64), (64, 16), (64, 32), (80, 16), (128, 16))
"""Head dims that use the rows of others, and blocks of fewer tokens: (head dim, block), list kernels, 16 bits."""
IMAGES, HEADS = 2, 6
_PIECE = 16  # the resident kernels divide their tokens anew after so many


def gate_cases() -> list[GateCase]:
    """Cases of all keys of all architectures, without repetitions."""
    cases: list[GateCase] = []
    seen: set[tuple[object, ...]] = set()
    for key in table.keys(CAPABILITIES):
        if key.dtype not in DTYPES:
            continue  # float64 is for the interpreter
        for block in BLOCKS if key.sparse and key.dtype != "fp16" else BLOCKS[:1]:
            own = Key(key.arch, key.dtype, key.head_dim, key.length, key.sparse, block)
            wanted = [n for n in CAPABILITIES[key.arch] if key.dtype != "fp16" or n in BOTH_TYPES]
            for case in (case for capability in wanted for case in _cases(own, capability)):
                what = (case.kernel, *map(str, (case.signature, case.constants, case.num_warps, case.num_stages)))
                if (*what, case.capability) not in seen:
                    seen.add((*what, case.capability))
                    cases.append(case)
    for arch, (dim, block) in product(("sm_90", "sm_89", "sm_80"), OTHERS):
        key = Key(arch, "bf16", table.HEAD_DIMS[dim], "list", True, block)
        cases += _cases(key, CAPABILITIES[arch][0], dim)
    return cases


def lengths(key: Key) -> tuple[int, ...]:
    """Tokens to compile for: in 16 bits and blocks of 64 each division that the resident kernels make of a bucket."""
    if key.length == "list" or key.dtype != "bf16" or key.block != table.BLOCK:
        return LENGTHS[key.length][:1] if key.dtype != "bf16" else LENGTHS[key.length]
    last = int(key.length)
    first = {64: 0, 128: 64, 256: 128}[last]
    # one token more than a whole number of pieces, as in a model with a class token, and the full bucket
    return (*LENGTHS[key.length], *range(first + 1, last, _PIECE), last)


def may_spill(key: Key) -> bool:
    """Whether a key's kernels run where they are forced only, and are known not to fit the registers everywhere."""
    return key.dtype == "fp32" or (key.head_dim == 128 and key.arch not in ("sm_90", "sm_100"))


def chosen(key: Key, side: str, tokens: int) -> Launch:
    """The launch of one pass as the operation chooses it: a resident one only where that kernel takes the size."""
    entry = table.resolve(key, table.shipped_rows())
    launch: Launch = getattr(entry, side)
    if launch.kernel != "resident":
        return launch
    dtype, version = _dtype(key), divmod(CAPABILITIES[key.arch][0], 10)
    if resident.supports(key.head_dim, tokens, tokens, dtype, version, backward=side == "backward") is None:
        return launch
    long = Key(key.arch, key.dtype, key.head_dim, "list", key.sparse, key.block)
    fallback: Launch = getattr(table.resolve(long, table.shipped_rows()), side)
    return fallback


def _cases(key: Key, capability: int, dim: int = 0) -> Iterator[GateCase]:
    """Cases of one key, equal ones among them; none where the operation refuses to launch. `dim`: if not the key's."""
    from .lists import too_large

    if too_large(divmod(capability, 10), _dtype(key), key.head_dim, key.block) is not None:
        return
    dim = dim or key.head_dim
    for tokens in lengths(key):
        for side in ("forward", "backward"):
            launch = chosen(key, side, tokens)
            if launch.kernel == "list" and tokens not in LENGTHS[key.length]:
                continue  # the list kernels see a length by its last block alone
            name = f"table {launch.kernel} {side} {key.dtype} D{dim} N{tokens}"
            name += f" blocks of {key.block}" if key.sparse else ""
            name += " unknown GPU" if key.arch == "default" else ""
            found = recorded(_launcher(key, dim, side, launch, tokens))
            for kernel, signature, constants, options in found:
                yield GateCase(
                    name if len(found) == 1 else f"{name} {kernel.__name__}",
                    kernel,
                    signature,
                    constants,
                    capability=capability,
                    wgmma=key.arch == "sm_90" and key.dtype != "fp32" and key.block >= table.BLOCK,
                    exp2=True,
                    may_spill=may_spill(key),
                    **options,
                )


def _dtype(key: Key) -> torch.dtype:
    return next(dtype for dtype, name in table.DTYPES.items() if name == key.dtype)


@lru_cache(maxsize=128)
def _mask(tokens: int, block: int) -> BlockMask:
    return BlockMask.full(HEADS, tokens, tokens, block)


def _launcher(key: Key, head_dim: int, side: str, launch: Launch, tokens: int) -> Callable[[], None]:
    """A call of the launcher as the operation makes it, on packed qkv."""
    dtype = _dtype(key)
    qkv = torch.empty(IMAGES, tokens, 3, HEADS, head_dim, dtype=dtype, device="meta")
    q, k, v = qkv.unbind(2)
    dq, dk, dv = torch.empty_like(qkv).unbind(2)
    out = torch.empty(IMAGES, tokens, HEADS, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(IMAGES, HEADS, tokens, dtype=torch.float32, device="meta")
    mask = _mask(tokens, key.block)
    end = (key.block, head_dim**-0.5, launch)

    def resident_call() -> None:
        bits = mask.row_bits if key.sparse else None
        if side == "forward":
            resident.forward(q, k, v, out, lse, bits, *end)
        else:
            resident.backward(q, k, v, out, lse, torch.empty_like(out), dq, dk, dv, bits, *end)

    def list_call() -> None:
        from . import lists

        none = (None, None)  # without a mask there are no lists: other variants than those of a full mask
        rows = (mask.row_cnt, mask.row_idx) if key.sparse else none
        columns = (mask.col_cnt, mask.col_idx) if key.sparse else none
        if side == "forward":
            lists.forward(q, k, v, out, lse, *rows, *end)
        else:
            lists.backward(q, k, v, out, lse, torch.empty_like(out), dq, dk, dv, *rows, *columns, *end)

    return resident_call if launch.kernel == "resident" else list_call
