"""A quick check of the crop on a device, for ``efftrain doctor``."""

from __future__ import annotations

import torch

from ..runtime import use_triton
from .op import lowfreq_crop
from .reference import fourier_crop

_LIMITS = {torch.float32: 5e-4, torch.bfloat16: 4e-3}  # of the relative error


def self_test(device: torch.device | str) -> str:
    """Crop a few random images, one of them mirrored, and compare with the Fourier definition in float64.

    Args:
        device: "cpu", "cuda", ...

    Returns:
        One line: what ran and how exact it was.

    Raises:
        RuntimeError: a result is wrong, or EFFTRAIN_KERNELS=triton cannot be obeyed.
        ValueError: EFFTRAIN_KERNELS has an unknown value.
    """
    place = torch.device(device)
    side = "Triton kernel" if use_triton("lowfreq_crop", place) else "matrix products of torch"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator).to(torch.uint8)
    flip = torch.tensor([False, True])
    expected = fourier_crop(torch.where(flip[:, None, None, None], images.flip(-1), images), (20, 20))
    expected = (expected / 255 - 0.45) / 0.225
    errors = []
    for dtype, limit in _LIMITS.items():
        found = lowfreq_crop(
            images.to(place), 20, flip=flip.to(place), mean=(0.45,), std=(0.225,), out_dtype=dtype
        ).cpu()
        error = float((found.double() - expected).norm() / expected.norm())
        if not error <= limit:  # NaN fails too
            raise RuntimeError(f"lowfreq_crop ({side} on {place}, {dtype}) is off by {error:.2g}, at most {limit:g}")
        errors.append(f"{error:.1e} ({str(dtype).removeprefix('torch.')})")
    return f"{side} on {place}, relative error {', '.join(errors)}"
