"""Operations that blend an image with a degenerate version of itself (Pillow's ``ImageEnhance``).

Legend: S samples, H x W pixels; images are RGB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grey(images: Tensor) -> Tensor:
    """Luma of ITU-R 601-2 with Pillow's 16-bit weights.

    Args:
        images: [S, 3, H, W] float32 with integer values 0..255.

    Returns:
        [S, H, W] float32, integer values 0..255.
    """
    red, green, blue = images.unbind(1)
    # All terms stay below 2**24, so float32 is exact.
    total = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return total.add_(0x8000).mul_(2.0**-16).floor_()


def smooth_(out: Tensor, images: Tensor) -> None:
    """Pillow's SMOOTH filter: 3x3 mean with a centre weight of 5; the outermost pixels are kept.

    Args:
        out: [S, 3, H, W] float32, takes the result (integer values).
        images: [S, 3, H, W] float32 with integer values 0..255.
    """
    out.copy_(images)
    if min(images.shape[2:]) >= 3:
        total = F.avg_pool2d(images, 3, stride=1, divisor_override=1).add_(images[:, :, 1:-1, 1:-1], alpha=4)
        out[:, :, 1:-1, 1:-1] = total.mul_(1 / 13).round_()  # thirteenths are never halfway between two levels


def enhance_(images: Tensor, factor: Tensor, color: int, contrast: int) -> None:
    """Color, Contrast and Sharpness in one pass: degenerate + factor * (image - degenerate), clipped and truncated.

    Args:
        images: [S, 3, H, W] uint8, changed in place; first the samples for Color, then Contrast, the rest for
            Sharpness.
        factor: [S] float32, 1 = no change.
        color: number of samples for Color (degenerate: grey).
        contrast: number of samples for Contrast (degenerate: the mean of grey, rounded).
    """
    values = images.float()
    degenerate = torch.empty_like(values)
    toned = color + contrast
    if toned:
        base = grey(values[:toned])
        degenerate[:color] = base[:color, None]
        if contrast:
            # Sums of integers in float64 are exact, so the rounding is the same on every device.
            mean = base[color:].mean((1, 2), dtype=torch.float64).add_(0.5).floor_()
            degenerate[color:toned] = mean.view(-1, 1, 1, 1)
    if toned < len(images):
        smooth_(degenerate[toned:], values[toned:])
    images.copy_(values.sub_(degenerate).mul_(factor.view(-1, 1, 1, 1)).add_(degenerate).clamp_(0, 255))
