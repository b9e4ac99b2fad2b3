"""Everything that happens to a batch on the device, before and after the methods that change inputs.

``before`` (uint8): horizontal flip, RandAugment. Then methods such as a low-frequency crop. ``after``: normalisation
(unless a method already did it), random erasing, mixup / CutMix.

Legend: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.batch import Batch
from ...core.draws import uniforms
from .erasing import RandomErasing
from .mixing import BatchMixer
from .randaugment import RandAugment
from .transfer import Transfer


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(images / 255 - mean) / std.

    Args:
        images: [N, C, H, W] uint8.
        mean: C channel means in 0..1.
        std: C channel standard deviations in 0..1.
        dtype: dtype of the result; computed in float32.

    Returns:
        [N, C, H, W] of `dtype`.
    """
    transfer = Transfer()
    scale = transfer.add((1 / (255 * np.asarray(std))).astype(np.float32).reshape(-1, 1, 1))
    shift = transfer.add((-np.asarray(mean) / np.asarray(std)).astype(np.float32).reshape(-1, 1, 1))
    transfer.send(images.device)
    return images.float().mul_(transfer.get(scale)).add_(transfer.get(shift)).to(dtype)


def horizontal_flip(images: Tensor, positions: np.ndarray, seed: int, prob: float = 0.5) -> Tensor:
    """Mirror some samples left to right; which ones depends on (seed, position) only.

    Args:
        images: [N, C, H, W] of any dtype; not changed.
        positions: [N] integers, places in the training order.
        seed: seed of the run.
        prob: probability of the flip.

    Returns:
        [N, C, H, W] of the same dtype.
    """
    flipped = uniforms(seed, "flip", positions, 1)[:, 0] < prob
    if not flipped.any():
        return images
    count = len(images)
    transfer = Transfer()
    source = transfer.add(np.arange(count) + count * flipped)
    transfer.send(images.device)
    return torch.cat((images, images.flip(3))).index_select(0, transfer.get(source))


class DeviceAugment:
    """The device half of the augmentation recipe.

    Every draw is a pure function of (seed, position) or, for mixing, of (seed, step, micro-batch), so a resumed or
    re-sharded run repeats it exactly.

    Args:
        seed: seed of the run.
        flip: probability of a horizontal flip.
        randaugment: arguments of `RandAugment` by name (magnitude, num_ops, magnitude_std, prob); None = off. Areas
            that a geometric operation uncovers take the channel means, as in timm.
        erasing: probability of random erasing.
        mixup: Beta parameter of mixup; 0 = off.
        cutmix: Beta parameter of CutMix; 0 = off.
        mix_prob: probability that a batch is mixed at all.
        mix_switch: probability of CutMix where both are on.
        mean: channel means in 0..1.
        std: channel standard deviations in 0..1.
        dtype: dtype of the images that the model gets.
    """

    def __init__(
        self,
        *,
        seed: int,
        flip: float = 0.5,
        randaugment: Mapping[str, Any] | None = None,
        erasing: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_prob: float = 1.0,
        mix_switch: float = 0.5,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        dtype: torch.dtype = torch.float32,
    ):
        self.seed = seed
        self.flip = flip
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.dtype = dtype
        fill = [min(255, round(255 * value)) for value in self.mean]
        self.randaugment = None if randaugment is None else RandAugment(**randaugment, fill=fill)
        self.erasing = RandomErasing(erasing)
        self.mixer = BatchMixer(mixup, cutmix, mix_prob, mix_switch)

    def before(self, batch: Batch, magnitude: float | None = None) -> Batch:
        """Flip and RandAugment; the images stay uint8.

        Args:
            batch: uint8 images and positions.
            magnitude: RandAugment strength 0..10 of this step; None = the configured one.

        Returns:
            `batch`, with new images and with ``mean`` and ``std`` set.
        """
        assert not batch.normalized, "DeviceAugment.before takes uint8 images"
        positions = _positions(batch)
        batch.mean, batch.std = self.mean, self.std
        if self.flip > 0:
            batch.images = horizontal_flip(batch.images, positions, self.seed, self.flip)
        if self.randaugment is not None:
            batch.images = self.randaugment(batch.images, positions, self.seed, magnitude)
        return batch

    def after(self, batch: Batch, step: int, micro: int, erasing: float | None = None) -> Batch:
        """Normalise if nobody has yet, erase, mix (in float32), and cast to `dtype`.

        Args:
            batch: uint8 or normalised images (the latter are changed in place), labels and positions.
            step: optimizer step.
            micro: index of the micro-batch inside the step.
            erasing: probability of random erasing in this step; None = the configured one.

        Returns:
            `batch`, ready for the model and `mixed_cross_entropy`.
        """
        self._normalize(batch, torch.float32)
        probability = self.erasing.prob if erasing is None else erasing
        if probability > 0:
            batch.images = self.erasing(batch.images, _positions(batch), self.seed, probability)
        batch = self.mixer(batch, self.seed, step, micro)
        batch.images = batch.images.to(self.dtype)
        return batch

    def evaluate(self, batch: Batch) -> Batch:
        """Normalise if nobody has yet and cast to `dtype`; all that an evaluation needs.

        Args:
            batch: uint8 or normalised images.

        Returns:
            `batch`.
        """
        self._normalize(batch, self.dtype)
        batch.images = batch.images.to(self.dtype)
        return batch

    def _normalize(self, batch: Batch, dtype: torch.dtype) -> None:
        if not batch.normalized:
            batch.images = normalize(batch.images, batch.mean or self.mean, batch.std or self.std, dtype)


def _positions(batch: Batch) -> np.ndarray:
    """Positions of the samples on the host (`Batch.to` leaves them there; from a GPU this waits for the device)."""
    assert batch.positions is not None, "augmentation is drawn from batch.positions, found None"
    return batch.positions.cpu().numpy()
