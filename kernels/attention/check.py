"""A quick check of attention on the device at hand, for ``efftrain doctor``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime
from .mask import BlockMask
from .op import attention
from .table import lookup

LIMIT = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def self_test(device: str | torch.device) -> str:
    """Compare output and gradients with float64, at a length of each kind of kernel, and say what ran.

    Args:
        device: "cpu", "cuda" or a device.

    Returns:
        One line.

    Raises:
        RuntimeError: a result is off, or a forced side cannot run.
        ValueError: see `runtime.requested`.
    """
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    if runtime.why_not(where.type, where.index or 0) is None and where.type != "cuda":
        lengths = (50,)  # the interpreter takes a second for it
    else:
        lengths = (197, 577)
    worst, kernels = 0.0, set()
    for length in lengths:
        worst = max(worst, _error(length, where, dtype))
        entry = lookup(where, dtype, 64, length, length, sparse=True)
        kernels |= {entry.forward.kernel, entry.backward.kernel}
    if worst > LIMIT[dtype]:
        raise RuntimeError(f"attention is off by {worst:.1e} in {dtype} on {where}; set {runtime.VARIABLE}=reference")
    if runtime.use_triton("attention", where):
        return f"{' and '.join(sorted(kernels))} kernels on {where}, error {worst:.0e} in {dtype}"
    side = "plain torch" if runtime.requested() == "reference" else "scaled_dot_product_attention of torch"
    return f"{side} on {where}, error {worst:.0e}"


def _error(length: int, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of the output and of dqkv, on a mask with an empty row."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-length // 64)
    keep = torch.rand(2, blocks, blocks, generator=generator) < 0.5
    keep[0, 0] = False
    mask = BlockMask(keep.to(device), length, length)
    qkv = torch.randn(1, length, 3, 2, 64, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(1, length, 2, 64, generator=generator).to(device, dtype)
    found = _with_gradient(qkv, mask, weight, "auto")
    exact = _with_gradient(qkv.detach().double().requires_grad_(), mask, weight.double(), "sdpa")
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def _with_gradient(qkv: Tensor, mask: BlockMask, weight: Tensor, route: str) -> tuple[Tensor, Tensor]:
    out = attention(qkv, mask, route=route)
    return out.detach(), torch.autograd.grad((out * weight).sum(), qkv)[0]
