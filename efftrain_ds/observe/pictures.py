"""The batch as the network sees it, as a picture.

Shape legend: N samples, R side of the original in pixels, B side of what the network sees (bandwidth).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.files import write_whole

GAP = 2
_OUTLINE = np.array([255, 64, 64], dtype=np.uint8)


def _hwc(image: Tensor) -> np.ndarray:
    """[C, H, W] uint8 as [H, W, 3]; one channel becomes grey, channels beyond three are left out."""
    array = image.cpu().numpy()
    array = np.repeat(array, 3, axis=0) if array.shape[0] < 3 else array[:3]
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised [N, C, B, B] of any floating type as uint8."""
    shape = (1, -1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(shape)
    shift = torch.tensor(mean, dtype=torch.float32).view(shape)
    pixels = images.detach().float().cpu() * scale + shift
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """[B, B, 3] repeated to [side, side, 3]: nearest neighbour, so that the true pixels show."""
    rows = np.arange(side) * image.shape[0] // side
    columns = np.arange(side) * image.shape[1] // side
    return image[rows][:, columns]


def spectrum(image: Tensor, bandwidth: int) -> np.ndarray:
    """Log-magnitude of the channel mean's 2-D Fourier transform, zero frequency in the centre.

    Args:
        image: [C, R, R] uint8.
        bandwidth: side B of the block of low frequencies that is kept; it is outlined unless it is the whole.

    Returns:
        [R, R, 3] uint8.
    """
    plane = image.float().mean(0).cpu().numpy()
    height, width = plane.shape
    magnitude = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(plane))))
    low, high = magnitude.min(), magnitude.max()
    grey = np.rint(255 * (magnitude - low) / max(high - low, 1e-12)).astype(np.uint8)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    if bandwidth < min(height, width):
        top, left = height // 2 - bandwidth // 2, width // 2 - bandwidth // 2
        bottom, right = top + bandwidth - 1, left + bandwidth - 1
        picture[[top, bottom], left : right + 1] = _OUTLINE
        picture[top : bottom + 1, [left, right]] = _OUTLINE
    return picture


def batch_picture(
    original: Tensor, seen: Tensor, mean: Sequence[float], std: Sequence[float], *, limit: int = 6
) -> np.ndarray:
    """A grid with one row a sample: original | as the network sees it | spectrum with the kept block outlined.

    Args:
        original: [N, C, R, R] uint8, before the crop.
        seen: [N, C, B, B] normalised, as the model takes it.
        mean: per-channel mean in 0..1 that `seen` was normalised with.
        std: per-channel standard deviation in 0..1.
        limit: most samples to show.

    Returns:
        [H, W, 3] uint8.
    """
    count, side, bandwidth = min(len(original), limit), original.shape[-1], seen.shape[-1]
    pixels = denormalize(seen[:count], mean, std)
    step = side + GAP
    canvas = np.full((count * step - GAP, 3 * step - GAP, 3), 255, dtype=np.uint8)
    for row in range(count):
        tiles = (_hwc(original[row]), enlarge(_hwc(pixels[row]), side), spectrum(original[row], bandwidth))
        for column, tile in enumerate(tiles):
            canvas[row * step : row * step + side, column * step : column * step + side] = tile
    return canvas


def zoomed(picture: np.ndarray, tile: int, least: int = 112) -> np.ndarray:
    """A whole multiple of `picture` [H, W, 3], so that tiles of `tile` pixels become at least about `least`."""
    factor = max(1, round(least / tile))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def save_png(picture: np.ndarray, path: str | Path) -> None:
    """Write a [H, W, 3] uint8 picture as PNG, whole or not at all; the folder is made.

    Raises:
        OSError: the disk refuses.
    """
    from PIL import Image

    path, file = Path(path), io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, file.getvalue())
