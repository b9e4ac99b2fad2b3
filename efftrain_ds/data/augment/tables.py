"""Per-pixel operations as 256-entry tables, built for many samples at once.

Every table is the one that Pillow (``ImageOps``, ``ImageEnhance``) builds for the operation of that name.
Legend: S samples, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_SOLARIZE, _SOLARIZE_ADD = 9, 9 + 257


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """Every table with an integer argument: Posterize by bits 0..8, Solarize by threshold, SolarizeAdd by amount."""
    level = np.arange(256)
    posterize = [level & (256 - (1 << (8 - bits))) for bits in range(9)]
    solarize = [np.where(level < threshold, level, 255 - level) for threshold in range(257)]
    add = [np.where(level < 128, np.minimum(level + amount, 255), level) for amount in range(129)]
    return np.stack(posterize + solarize + add).astype(np.uint8)


def fixed_tables(argument: np.ndarray, edge: Sequence[int]) -> np.ndarray:
    """Tables that do not depend on the image.

    Args:
        argument: [S] values for Posterize (bits 0..8), Solarize (threshold 0..256), SolarizeAdd (amount 0..128),
            Invert (not used) and Brightness (factor), in this order.
        edge: six places; kind k of that list stands at ``edge[k]..edge[k + 1]``.

    Returns:
        [S, 256] uint8.
    """
    row = argument[: edge[4]].astype(np.int64)
    row[edge[1] : edge[2]] += _SOLARIZE
    row[edge[2] : edge[3]] += _SOLARIZE_ADD
    row[edge[3] :] = _SOLARIZE  # inverting is solarizing from level 0 on
    known = _bank()[row]
    if edge[5] == edge[4]:
        return known
    factor = argument[edge[4] : edge[5], None].astype(np.float32)
    scaled = factor * np.arange(256, dtype=np.float32)
    return np.concatenate([known, np.minimum(scaled, 255).astype(np.uint8)])


def autocontrast_tables(images: Tensor) -> Tensor:
    """Tables that stretch each channel to 0..255 (``ImageOps.autocontrast`` without cutoff).

    Args:
        images: [S, C, H, W] uint8.

    Returns:
        [S, C, 256] uint8; the identity for a channel of one level.
    """
    low, high = torch.aminmax(images.flatten(2), dim=2, keepdim=True)
    low, span = low.double(), (high - low).double()
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = torch.full_like(span, 255.0) / span  # a true division: 255.0 / span multiplies by the reciprocal
    # Pillow's order of operations, int(i * scale + offset), and its truncation.
    stretched = (level * scale).sub_(low * scale).clamp_(0, 255)
    return torch.where(span > 0, stretched, level).to(torch.uint8)


def histograms(levels: Tensor, counting: bool) -> Tensor:
    """Histogram of each row.

    Args:
        levels: [R, P] int64 in 0..255.
        counting: use ``bincount``, faster on a CPU; on a GPU it reads its maximum back to the host.

    Returns:
        [R, 256] int64 counts.
    """
    rows = levels.shape[0]
    if counting:
        offset = torch.arange(0, rows * 256, 256, device=levels.device)[:, None]
        return torch.bincount((levels + offset).view(-1), minlength=rows * 256).view(rows, 256)
    counts = torch.zeros(rows, 256, dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(1, levels, torch.ones((), dtype=torch.int64, device=levels.device).expand_as(levels))


def equalize_tables(levels: Tensor) -> Tensor:
    """Tables that flatten each channel's histogram (``ImageOps.equalize``).

    Args:
        levels: [S, C, P] int64 in 0..255.

    Returns:
        [S, C, 256] uint8; the identity for a channel with too few pixels outside its highest level.
    """
    samples, channels, pixels = levels.shape
    counts = histograms(levels.view(samples * channels, pixels), levels.device.type == "cpu")
    upto = counts.cumsum(1)
    # Pixels below the channel's highest level: the largest cumulated count that is not yet the total.
    step = (upto * (upto < pixels)).amax(1, keepdim=True) // 255
    table = upto.sub_(counts).add_(step // 2).floor_divide_(step.clamp(min=1)).clamp_(max=255)
    level = torch.arange(256, device=levels.device)
    return torch.where(step > 0, table, level).to(torch.uint8).view(samples, channels, 256)


def recode_(images: Tensor, fixed: Tensor, autocontrast: int) -> None:
    """Replace every level by its table entry, in place.

    Args:
        images: [S, C, H, W] uint8, contiguous; first the samples that `fixed` holds tables for, then those for
            AutoContrast, the rest for Equalize.
        fixed: [F, 256] uint8, the same table for every channel.
        autocontrast: number of samples for AutoContrast.
    """
    flat = images.flatten(2)
    levels = flat.long()
    parts = [fixed[:, None].expand(-1, images.shape[1], -1)]
    first = len(fixed)
    last = first + autocontrast
    if autocontrast:
        parts.append(autocontrast_tables(images[first:last]))
    if last < len(images):
        parts.append(equalize_tables(levels[last:]))
    torch.gather(torch.cat(parts) if len(parts) > 1 else parts[0], 2, levels, out=flat)
