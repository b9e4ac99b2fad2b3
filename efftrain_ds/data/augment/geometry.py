"""Batched affine resampling with Pillow's pixel convention.

Legend: S samples, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def normalized_affine(argument: np.ndarray, edge: Sequence[int], height: int, width: int) -> np.ndarray:
    """Maps from output to input coordinates, where -1 and 1 are the outer edges of the image.

    In pixels they are those of timm: ``Image.rotate(degrees)`` about the centre, x + s y (shear), x + t W (translate).

    Args:
        argument: [S] values for Rotate (degrees, counter-clockwise), ShearX, ShearY (factors), TranslateXRel and
            TranslateYRel (shares of the side), in this order.
        edge: six places; kind k of that list stands at ``edge[k]..edge[k + 1]``, counted from ``edge[0]``.
        height: rows in pixels.
        width: columns in pixels.

    Returns:
        [S, 2, 3] float32 maps (a, b, c), (d, e, f): x_in = a x + b y + c, y_in = d x + e y + f.
    """
    turn, shear_x, shear_y, shift_x, shift_y = (
        slice(a - edge[0], b - edge[0]) for a, b in zip(edge, edge[1:], strict=False)
    )
    aspect = height / width
    theta = np.zeros((len(argument), 2, 3), dtype=np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    angle = np.radians(argument[turn])
    theta[turn, 0, 0] = theta[turn, 1, 1] = np.cos(angle)
    sine = np.sin(angle)
    theta[turn, 0, 1] = -sine * aspect
    theta[turn, 1, 0] = sine / aspect
    # Shears are measured from the image's corner, hence the shift.
    theta[shear_x, 0, 1] = theta[shear_x, 0, 2] = argument[shear_x] * aspect
    theta[shear_y, 1, 0] = theta[shear_y, 1, 2] = argument[shear_y] / aspect
    theta[shift_x, 0, 2] = argument[shift_x] * 2
    theta[shift_y, 1, 2] = argument[shift_y] * 2
    return theta


def affine_(images: Tensor, theta: Tensor, fill: Tensor) -> None:
    """Resample bilinearly, in place; output pixels whose centre falls outside the input take `fill`.

    Args:
        images: [S, C, H, W] uint8.
        theta: [S, 2, 3] float32 from `normalized_affine`.
        fill: [C] float32 levels.
    """
    height, width = images.shape[2:]
    x = torch.arange(1 - width, width, 2, device=images.device) / width
    y = torch.arange(1 - height, height, 2, device=images.device) / height
    # Broadcast sums instead of a matrix product, which may run in TF32 and lose whole pixels.
    along_x = torch.addcmul(theta[:, :, 2:], theta[:, :, :1], x)
    along_y = theta[:, :, 1:2] * y
    grid_x = along_x[:, 0, None] + along_y[:, 0, :, None]
    grid_y = along_x[:, 1, None] + along_y[:, 1, :, None]
    grid = torch.stack((grid_x, grid_y), 3)
    inside = torch.maximum(grid_x.abs_(), grid_y.abs_()).lt_(1)[:, None]
    fill = fill.view(-1, 1, 1)
    values = F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow truncates; the small term keeps float32 rounding from turning a flat 200 into 199.
    images.copy_(values.mul_(inside).add_(fill + 2.0**-9))
