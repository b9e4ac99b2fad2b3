"""The batch that travels from the loader through the methods to the loss.

Shape legend: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        images: [N, C, H, W]; uint8 0..255 as it leaves the loader, floating point (normalised) for the model.
        labels: [N] int64; -100 where the sample is not valid.
        valid: [N] bool; False for samples that could not be read.
        positions: [N] int64, place of each sample in the endless training order (-1 outside training); stays on the
            host, where the draws that it keys are made.
        ids: [N] int64, row of each sample in the data set's index (-1 when unknown).
        labels_b: [N] int64 partner labels of mixup/cutmix, or None.
        lam: weight of `labels` against `labels_b`, in [0, 1].
        mean: per-channel mean in 0..1 to be applied by whoever turns `images` into floating point.
        std: per-channel standard deviation in 0..1.
        denominator: what the loss divides the sum over the valid samples by, so that the step's gradient is the mean
            over the valid samples of all ranks and micro-batches; scalar float. None = their number in this batch.
    """

    images: Tensor
    labels: Tensor | None = None
    valid: Tensor | None = None
    positions: Tensor | None = None
    ids: Tensor | None = None
    labels_b: Tensor | None = None
    lam: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    denominator: Tensor | None = None

    @property
    def normalized(self) -> bool:
        """True once `images` is floating point."""
        return self.images.dtype != torch.uint8

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Move every tensor but `positions` to `device`; returns self."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "positions":
                setattr(self, name, value.to(device, non_blocking=non_blocking))
        return self

    def __len__(self) -> int:
        return self.images.shape[0]
