"""What a masked autoencoder is to predict, and how far off it is.

Source: MAE (He et al., CVPR 2022, arXiv 2111.06377) and its released code.

Shape legend: N images, C channels, H x W pixels, P patch side, L patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core.draws import uniforms
from ...models.mae import patchify

EPSILON = 1e-6
"""Added to the variance of a patch."""


@dataclass(frozen=True)
class Target:
    """Pixels to predict.

    Attributes:
        values: [N, L, P * P * C] float32.
        mean: what was subtracted from the pixels of a patch, [N, L, 1].
        scale: what they were divided by, [N, L, 1].
    """

    values: Tensor
    mean: Tensor
    scale: Tensor

    def pixels(self, values: Tensor) -> Tensor:
        """Values in the target's units as normalised pixels, both [N, L, P * P * C]."""
        return values * self.scale + self.mean


def make_target(images: Tensor, patch: int, norm_pixels: bool) -> Target:
    """The target of a batch.

    Args:
        images: [N, C, H, W] normalised images as the model sees them, cropped to the bandwidth of the stage.
        patch: side of a patch.
        norm_pixels: standardise the pixels of every patch by their own mean and (unbiased) variance.
    """
    values = patchify(images.detach().float(), patch)
    if not norm_pixels:
        zeros = values.new_zeros(1, 1, 1)
        return Target(values, zeros, torch.ones_like(zeros))
    mean = values.mean(dim=2, keepdim=True)
    scale = (values.var(dim=2, keepdim=True) + EPSILON).sqrt()
    return Target((values - mean) / scale, mean, scale)


def sample_losses(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of each image over its hidden patches, in float32.

    Args:
        predicted: [N, L, P * P * C] of any floating dtype.
        target: [N, L, P * P * C].
        hidden: [N, L] bool, at least one True in every row.

    Returns:
        [N] float32.
    """
    each = (predicted.float() - target.float()).square().mean(dim=2)
    return torch.where(hidden, each, 0.0).sum(dim=1) / hidden.sum(dim=1)


def drawn_order(seed: int, stream: str, samples: np.ndarray, patches: int) -> Tensor:
    """A random order of the patches for each sample: a pure function of its arguments, never of rank or batch.

    Args:
        seed: of the masks.
        stream: name of the purpose; other names give independent orders.
        samples: [N] integers that name the samples.
        patches: L.

    Returns:
        [N, L] int64 on the host.
    """
    return torch.from_numpy(uniforms(seed, stream, samples, patches).argsort(axis=1, kind="stable"))
