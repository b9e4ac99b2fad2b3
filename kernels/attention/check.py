"""A quick check of attention on the device at hand, for ``efftrain doctor``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime
from .mask import BlockMask
from .op import attention
from .operators import kernels_of
from .reference import attention_reference

LIMIT = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def self_test(device: str | torch.device) -> str:
    """Compare output and gradients with float64: by the choice of "auto", and by each set of kernels that runs here.

    Args:
        device: "cpu", "cuda" or a device.

    Returns:
        One line; it names the kernels that ran.

    Raises:
        RuntimeError: a result is off, or a forced side cannot run.
        ValueError: see `runtime.requested`.
    """
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    # the interpreter takes a second for 50 tokens
    lengths = (50,) if runtime.interpreted() else (197, 577)
    routes = ("auto", "list", "resident") if runtime.use_triton("attention", where) else ("auto",)
    errors, kernels = [], set()
    for length in lengths:
        qkv, mask, weight = _case(length, where, dtype)
        exact = _exact(qkv, mask, weight)
        for route in routes:
            if route != "auto":
                try:
                    kernels |= set(kernels_of(*qkv.unbind(2), mask.block, route))
                except ValueError:
                    if route == "list":
                        raise
                    continue  # longer than the resident kernels take, or a GPU that they are not made for
            out = attention(qkv, mask, route=route)
            found = (out.detach(), torch.autograd.grad((out * weight).sum(), qkv)[0])
            errors += [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    off = [error for error in errors if not error <= LIMIT[dtype]]  # NaN too
    if off:
        raise RuntimeError(f"attention is off by {off[0]:.1e} in {dtype} on {where}; set {runtime.VARIABLE}=reference")
    worst = max(errors)
    if kernels:
        return f"{' and '.join(sorted(kernels))} kernels on {where}, error {worst:.0e} in {dtype}"
    side = "plain torch" if runtime.requested() == "reference" else "scaled_dot_product_attention of torch"
    return f"{side} on {where}, error {worst:.0e}"


def _case(length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, BlockMask, Tensor]:
    """Inputs [1, N, 3, 2, 64], a mask with an empty row, and weights of the output."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-length // 64)
    keep = torch.rand(2, blocks, blocks, generator=generator) < 0.5
    keep[0, 0] = False
    keep[1, 0, 0] = True
    qkv = torch.randn(1, length, 3, 2, 64, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(1, length, 2, 64, generator=generator).to(device, dtype)
    return qkv, BlockMask(keep.to(device), length, length), weight


def _exact(qkv: Tensor, mask: BlockMask, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient by the definition, in float64."""
    wide = qkv.detach().double().requires_grad_()
    out, _ = attention_reference(*wide.unbind(2), mask.to_dense(), qkv.shape[-1] ** -0.5)
    return out.detach(), torch.autograd.grad((out * weight.double()).sum(), wide)[0]
