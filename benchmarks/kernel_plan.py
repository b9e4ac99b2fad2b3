"""Shapes, tolerances and targets of `kernels.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
PEER_TOLERANCE = 3  # times ours: a peer may round more, but must compute the same thing
DRY_TOLERANCE = 1e-2  # the interpreter truncates bf16
DENSITY_TOLERANCE = 0.02  # of a mask's share of the scores; of 9 x 9 blocks the diagonal alone is 11 %
CROP_TOLERANCE = 2e-3
CROP_PEERS = 1e-2
# targets for the ratio of the best peer's time to ours: (must, aim) by case and pass
TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("DeiT-S 197 dense", "forward"): (1.1, 1.3),
    ("DeiT-S 197 dense", "fwd+bwd"): (1.15, 1.4),
    ("DeiT-S 197 qkv to proj, eager", "fwd+bwd"): (1.5, 1.9),
    ("DeiT-S 197 qkv to proj, compiled", "fwd+bwd"): (1.25, 1.5),
    ("DeiT-S 197 half the heads", "fwd+bwd"): (1.9, 2.6),
    ("DeiT-S 577 50 %", "fwd+bwd"): (1.3, 1.7),
    ("DeiT-S 577 75 %", "fwd+bwd"): (2.0, 3.0),
    ("DeiT-S 577 90 %", "fwd+bwd"): (2.4, 3.4),
    ("DeiT-S 1025 50 %", "fwd+bwd"): (1.3, 1.5),
    ("DeiT-S 1025 75 %", "fwd+bwd"): (2.2, 3.0),
    ("DeiT-S 1025 90 %", "fwd+bwd"): (3.5, 5.0),
    # SDPA against itself there: from packed qkv on both sides, since what puts dq, dk and dv into one tensor costs time
    ("DeiT-S 577 dense / packed", "fwd+bwd"): (0.97, 1.0),
    ("DeiT-S 1025 dense / packed", "fwd+bwd"): (0.97, 1.0),
}
FLEX_TARGET = (1.1, 1.4)
CROP_TARGETS = {"literal FFT": (15, 28), "rfft2": (5, 8), "two matmuls": (1.7, 2.5), "interpolate": (3, 7)}


@dataclass(frozen=True)
class Shape:
    """One attention shape: tokens, images, heads, head dim, and the patch grid where it tiles by 8."""

    name: str
    tokens: int
    images: int
    heads: int
    dim: int
    grid: int = 0
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("DeiT-S 197", 197, 256, 6, 64),
        Shape("DeiT-S 577", 577, 64, 6, 64, 24),
        Shape("DeiT-S 1025", 1025, 32, 6, 64, 32),
        Shape("DeiT-B 197", 197, 256, 12, 64),
        Shape("DeiT-B 577", 577, 64, 12, 64, 24),
        Shape("DeiT-B 1025", 1025, 32, 12, 64, 32),
        Shape("DeiT-S 197 fp16", 197, 256, 6, 64, 0, torch.float16),
        Shape("DeiT-S 577 fp16", 577, 64, 6, 64, 24, torch.float16),
        Shape("16 heads of 80, 257", 257, 128, 16, 80),
        Shape("DeiT-S 65", 65, 512, 6, 64),
        Shape("DeiT-S 101", 101, 512, 6, 64),
        Shape("12 heads of 32, 197", 197, 256, 12, 32),
    )
}
DRY_TOKENS = {65: 9, 101: 12, 197: 17, 257: 18, 577: 257, 1025: 257}
