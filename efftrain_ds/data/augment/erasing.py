"""Random erasing of normalised batches (Zhong et al., "Random Erasing Data Augmentation", arXiv:1708.04896).

Semantics of timm's ``RandomErasing(mode="pixel", count 1)``: one box a sample, filled with standard normal noise.

The noise is cut out of one long sequence of normal values that is drawn once on the host from the seed: a sample's
window starts at an offset that its position decides. So the noise depends on (seed, position) and the image size only
- not on the batch, the rank layout or the device - at the price of one gather.

Legend: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...core.draws import uniforms
from ...core.rng import torch_rng
from .transfer import Transfer

_ATTEMPTS = 10
_OFFSETS = 1 << 20


class RandomErasing:
    """Erase a box of some samples.

    Args:
        prob: probability that a sample is erased.
        area: range of the box's share of the image area.
        aspect: range of height / width, drawn uniformly in its logarithm.
    """

    def __init__(
        self,
        prob: float = 0.25,
        area: tuple[float, float] = (0.02, 1 / 3),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
    ):
        self.prob = prob
        self.area = area
        self.aspect = aspect
        self._noise: Tensor | None = None
        self._noise_key: tuple[int, torch.device] | None = None

    def draw(
        self, positions: np.ndarray, seed: int, height: int, width: int, prob: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of the samples at `positions`; a pure function of (seed, position, image size).

        A sample's box does not depend on the probability, so a smaller one erases a subset of the samples.

        Args:
            positions: [N] integers.
            seed: seed of the run.
            height: rows of the images in pixels.
            width: columns of the images in pixels.
            prob: probability that a sample is erased; None = `self.prob`.

        Returns:
            boxes: [N, 4] int64 (top, left, height, width); all 0 where nothing is erased.
            offsets: [N] int64, starts of the noise windows.
        """
        u = uniforms(seed, "erasing", positions, 4 + 2 * _ATTEMPTS)
        size = (self.area[0] + (self.area[1] - self.area[0]) * u[:, 4::2]) * height * width
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        aspect = np.exp(low + (high - low) * u[:, 5::2])
        rows, columns = np.rint(np.sqrt(size * aspect)), np.rint(np.sqrt(size / aspect))
        fits = (rows < height) & (columns < width)
        first = fits.argmax(1)[:, None]  # the first attempt that fits
        tall, wide = np.take_along_axis(rows, first, 1)[:, 0], np.take_along_axis(columns, first, 1)[:, 0]
        boxes = np.stack([u[:, 1] * (height - tall + 1), u[:, 2] * (width - wide + 1), tall, wide], 1)
        boxes[(u[:, 0] >= (self.prob if prob is None else prob)) | ~fits.any(1)] = 0
        return boxes.astype(np.int64), (u[:, 3] * _OFFSETS).astype(np.int64)

    def __call__(self, images: Tensor, positions: np.ndarray | Tensor, seed: int, prob: float | None = None) -> Tensor:
        """Erase in place.

        Args:
            images: [N, C, H, W] floating point, normalised.
            positions: [N] integers on the host, places in the training order.
            seed: seed of the run.
            prob: probability that a sample is erased; None = `self.prob`.

        Returns:
            `images`.
        """
        channels, height, width = images.shape[1:]
        boxes, offsets = self.draw(np.asarray(positions), seed, height, width, prob)
        chosen = np.flatnonzero(boxes[:, 2] * boxes[:, 3])
        if len(chosen) == 0:
            return images
        noise = self._bank(seed, channels * height * width, images.device)
        if self._on_host(images.device):  # only the pixels of the boxes
            for i, (top, left, tall, wide), offset in zip(
                chosen.tolist(), boxes[chosen].tolist(), offsets[chosen].tolist(), strict=True
            ):
                window = noise[offset : offset + channels * height * width].view(channels, height, width)
                part = slice(top, top + tall), slice(left, left + wide)
                images[i, :, part[0], part[1]] = window[:, part[0], part[1]]
            return images
        # The same values in a fixed number of kernels.
        transfer = Transfer()
        index, box, start = transfer.add(chosen), transfer.add(boxes[chosen]), transfer.add(offsets[chosen])
        transfer.send(images.device)
        top, left, tall, wide = transfer.get(box)[:, :, None].unbind(1)
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        inside = ((y >= top) & (y < top + tall))[:, None, :, None] & ((x >= left) & (x < left + wide))[:, None, None]
        pixel = torch.arange(channels * height * width, device=images.device)
        window = noise[transfer.get(start)[:, None] + pixel].view(-1, channels, height, width).to(images.dtype)
        rows = transfer.get(index)
        return images.index_copy_(0, rows, torch.where(inside, window, images.index_select(0, rows)))

    @staticmethod
    def _on_host(device: torch.device) -> bool:
        return device.type == "cpu"

    def _bank(self, seed: int, window: int, device: torch.device) -> Tensor:
        """The normal sequence on `device`, long enough for a window at the last offset; [at least that] float32."""
        length = _OFFSETS + window
        if self._noise is None or self._noise_key != (seed, device) or len(self._noise) < length:
            head = torch.randn(_OFFSETS, generator=torch_rng("cpu", seed, "erasing"))
            turns = -(-length // _OFFSETS)  # wraps around, so that its values do not depend on its length
            self._noise, self._noise_key = head.repeat(turns)[:length].to(device), (seed, device)
        return self._noise
