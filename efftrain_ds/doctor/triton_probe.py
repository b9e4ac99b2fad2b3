"""A Triton kernel of three lines, to see whether Triton can compile here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double(source, target, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + at, 2 * tl.load(source + at, mask=at < count), mask=at < count)


def doubled() -> str | None:
    """Compile and run; returns what is wrong."""
    source = torch.arange(1000, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    try:
        _double[(triton.cdiv(1000, 256),)](source, target, 1000, block=256)
        torch.cuda.synchronize()
    except Exception as error:
        return f"cannot compile: {type(error).__name__}: {error}"
    return None if torch.equal(target, 2 * source) else "a compiled kernel gives wrong numbers"
