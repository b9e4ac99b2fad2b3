"""Worker-side geometry: RandomResizedCrop for training, resize and centre crop for evaluation.

Shape legend: n samples, H x W source pixels, R output pixels a side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..core.draws import uniforms

_ATTEMPTS = 10
_PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def crop_boxes(
    seed: int,
    positions: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Draw the boxes of RandomResizedCrop (Szegedy et al., arXiv:1409.4842; torchvision's rules) for a micro-batch.

    Ten attempts at an area share uniform in `scale` and an aspect ratio log-uniform in `ratio`; the first that fits
    is placed uniformly; without one, the largest centred box within `ratio`.

    Args:
        seed: seed of the run.
        positions: [n] places in the endless order; with `seed` they determine the draw.
        widths: [n] source widths in pixels.
        heights: [n] source heights in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.

    Returns:
        [n, 4] int64: top, left, height, width in source pixels.
    """
    u = uniforms(seed, "crop", positions, 2 * _ATTEMPTS + 2)
    width = np.asarray(widths, dtype=np.float64)[:, None]
    height = np.asarray(heights, dtype=np.float64)[:, None]
    area = width * height * (scale[0] + (scale[1] - scale[0]) * u[:, :_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[:, _ATTEMPTS : 2 * _ATTEMPTS])
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    rows = np.arange(len(u))
    first = fits.argmax(axis=1)
    w, h, found = w[rows, first], h[rows, first], fits[rows, first]
    width, height = width[:, 0], height[:, 0]
    top = np.floor(u[:, -2] * (height - h + 1))
    left = np.floor(u[:, -1] * (width - w + 1))
    if not found.all():
        # A box of the whole image, narrowed to the nearest allowed aspect ratio, in the centre.
        whole_w = np.minimum(width, np.maximum(np.rint(height * ratio[1]), 1))
        whole_h = np.minimum(height, np.maximum(np.rint(width / ratio[0]), 1))
        w, h = np.where(found, w, whole_w), np.where(found, h, whole_h)
        top = np.where(found, top, (height - h) // 2)
        left = np.where(found, left, (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def scale_box(
    box: tuple[int, int, int, int], indexed: tuple[int, int], decoded: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Carry a box (top, left, height, width) from the indexed size (H, W) to the size of the decoded rendition.

    The crop stays the same part of the picture whichever rendition is read.
    """
    (top, left, height, width), (rows, columns) = box, decoded
    vertical, horizontal = rows / indexed[0], columns / indexed[1]
    y, x = min(round(top * vertical), rows - 1), min(round(left * horizontal), columns - 1)
    bottom = min(max(round((top + height) * vertical), y + 1), rows)
    right = min(max(round((left + width) * horizontal), x + 1), columns)
    return y, x, bottom - y, right - x


def resized_crop(pixels: np.ndarray, box: tuple[int, int, int, int], out: Tensor, interpolation: str) -> None:
    """Cut a box and resize it with antialiasing, straight into the batch.

    Args:
        pixels: [H, W, 3] uint8, or [H, W, 1] for a grey image.
        box: top, left, height, width in pixels of `pixels`.
        out: [3, R, R] uint8, written in place.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
    """
    top, left, height, width = box
    # The view is channels-last, for which torch has a vectorised uint8 kernel (measured 1.9 to 4 times faster than
    # Pillow from 28 to 500 pixels; results differ by one level at most in all but a few values).
    view = torch.from_numpy(pixels[None, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    out.copy_(F.interpolate(view, size=out.shape[1:], mode=interpolation, antialias=True)[0])


class SmallCrops:
    """`resized_crop` for many small boxes at once, as two batched matrix products.

    For a box of some 30 pixels the call of a resize kernel costs several times its arithmetic. The arithmetic is that
    of torch's uint8 kernel: weights as 16-bit integers, columns first, rounded to 8 bits in between. All numbers are
    integers below 2^24, so float32 is exact and a pixel does not depend on the other samples of the batch.

    Args:
        resolution: side R of the results in pixels.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
    """

    MAX_BOX = 40
    MAX_RESOLUTION = 64
    _MAX_BITS = 15  # 255 * sum |weights| * 2^15 < 2^24; larger only when shrinking

    def __init__(self, resolution: int, interpolation: str):
        self.resolution = resolution
        self.lengths: set[int] = set()
        if resolution > self.MAX_RESOLUTION:
            return
        side = self.MAX_BOX
        self._weights = torch.zeros(side + 1, side, resolution)
        self._scales = torch.ones(side + 1)
        for length in range(1, side + 1):
            weights = _resize_weights(length, resolution, interpolation)
            # As many bits as let the largest weight fit into 16 bits.
            bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * (1 << (b + 1))) >= 1 << 15)
            if bits <= self._MAX_BITS:
                fixed = np.trunc(weights * (1 << bits) + np.where(weights < 0, -0.5, 0.5))
                self._weights[length, :length] = torch.from_numpy(fixed.T.astype(np.float32))
                self._scales[length] = 2.0**-bits
                self.lengths.add(length)

    def fits(self, box: tuple[int, int, int, int]) -> bool:
        """True if a box of this height and width can be done here."""
        return box[2] in self.lengths and box[3] in self.lengths

    def run(self, cuts: list[np.ndarray], rows: list[int], images: Tensor) -> None:
        """Resize boxes and write them into the batch.

        Args:
            cuts: the pixels of each box, [h, w, 3] or [h, w, 1] uint8.
            rows: row of the batch for each box.
            images: [n, 3, R, R] uint8, written in place.
        """
        for channels in (1, 3):
            picked = [i for i, cut in enumerate(cuts) if cut.shape[2] == channels]
            if not picked:
                continue
            heights = torch.tensor([cuts[i].shape[0] for i in picked])
            widths = torch.tensor([cuts[i].shape[1] for i in picked])
            m, side, size = len(picked), int(max(heights.max(), widths.max())), self.resolution
            # Whatever the padding holds is multiplied by weights of zero.
            padded = np.empty((m, side, channels, side), np.uint8)
            for out, i in zip(padded, picked, strict=True):
                cut = cuts[i]
                out[: cut.shape[0], :, : cut.shape[1]] = cut.transpose(0, 2, 1)
            x = torch.from_numpy(padded).view(m, side * channels, side).float()
            x = torch.bmm(x, self._weights[widths, :side])
            x = _to_levels(x, self._scales[widths]).view(m, side, channels * size)
            x = torch.bmm(self._weights[heights, :side].transpose(1, 2), x)
            x = _to_levels(x, self._scales[heights]).view(m, size, channels, size).transpose(1, 2)
            images[torch.tensor([rows[i] for i in picked])] = x.to(torch.uint8).expand(m, 3, size, size)


def _to_levels(sums: Tensor, scales: Tensor) -> Tensor:
    """Fixed-point sums [m, :, :] to levels 0..255, in place; half rounds up."""
    return sums.mul_(scales[:, None, None]).add_(0.5).floor_().clamp_(0, 255)


def _resize_weights(length: int, size: int, interpolation: str) -> np.ndarray:
    """Weights of an antialiased resize from `length` to `size` pixels, [size, length] float64, rows sum to 1.

    Cubic convolution with a = -0.5 (Keys, 1981) or a triangle, widened by the scale when shrinking.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if interpolation == "bicubic" else 1.0) * stretch
    centers = scale * (np.arange(size) + 0.5)[:, None]
    pixels = np.arange(length)[None]
    inside = (pixels >= np.floor(centers - support + 0.5)) & (pixels < np.floor(centers + support + 0.5))
    t = np.abs((pixels + 0.5 - centers) / stretch)
    if interpolation == "bicubic":
        near = (1.5 * t - 2.5) * t * t + 1
        far = ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    else:
        weights = np.maximum(1 - t, 0.0)
    weights = np.where(inside, weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def eval_resize(image: Image.Image, resolution: int, crop: float, interpolation: str) -> np.ndarray:
    """Resize the short side to ``floor(resolution / crop)`` and take the centre (Pillow, as published numbers do).

    Args:
        image: RGB picture.
        resolution: side R of the result in pixels.
        crop: share of the resized short side that is kept.
        interpolation: ``"bicubic"`` or ``"bilinear"``.

    Returns:
        [R, R, 3] uint8.
    """
    short = math.floor(resolution / crop)
    width, height = image.size
    if width <= height:
        size = (short, max(int(short * height / width), short))
    else:
        size = (max(int(short * width / height), short), short)
    if size != image.size:
        image = image.resize(size, _PIL_FILTERS[interpolation])
    left, top = round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))
