"""Pictures of what is hidden and how it is filled in.

Shape legend: N samples, C channels, B side of the image as the network sees it, P patch side, L patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.mae import patchify, unpatchify
from ...observe.pictures import GAP, denormalize

_HIDDEN = 0.5
"""Grey of a hidden patch, in 0..1."""
_LEAST = 112
"""Sides of the tiles are enlarged by a whole factor to about so many pixels."""


def reconstruction_picture(
    images: Tensor, predicted: Tensor, hidden: Tensor, patch: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """One row a sample: the image | its visible patches | the same with the hidden ones as predicted.

    Args:
        images: [N, C, B, B] normalised.
        predicted: [N, L, P * P * C] normalised pixels.
        hidden: [N, L] bool.
        patch: P.
        mean: per-channel mean in 0..1 that the images were normalised with.
        std: per-channel standard deviation in 0..1.

    Returns:
        uint8 [3, height, width].
    """
    images, predicted, hidden = images.float().cpu(), predicted.float().cpu(), hidden.cpu()
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    patches = patchify(images, patch)
    grey = ((_HIDDEN - torch.tensor(mean)) / torch.tensor(std)).repeat(patch * patch)
    cover = hidden[..., None]
    columns = [
        images,
        unpatchify(torch.where(cover, grey, patches), patch, grid),
        unpatchify(torch.where(cover, predicted, patches), patch, grid),
    ]
    factor = max(1, round(_LEAST / images.shape[3]))
    tiles = [_enlarged(denormalize(column, mean, std), factor) for column in columns]
    height, width = tiles[0].shape[2:]
    canvas = torch.full((3, len(images) * (height + GAP) - GAP, len(tiles) * (width + GAP) - GAP), 255).byte()
    for across, column in enumerate(tiles):
        for down, tile in enumerate(column):
            top, left = down * (height + GAP), across * (width + GAP)
            canvas[:, top : top + height, left : left + width] = tile
    return canvas


def _enlarged(pixels: Tensor, factor: int) -> Tensor:
    """Every pixel repeated, [N, C, B, B] uint8 to [N, 3, factor B, factor B]; one channel becomes grey."""
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return shown.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
