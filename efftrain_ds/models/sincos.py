"""Fixed sine-cosine positions of a grid of patches, in the order of channels that MAE's released weights expect.

The first half of the channels says the column, the second half the row; each half holds the sines of all frequencies,
then the cosines (timm's `build_sincos2d_pos_embed` orders them otherwise and takes whole coordinates only).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int]
"""(rows, columns) of patches."""


def coordinates(count: int, full: int) -> np.ndarray:
    """Where the centres of `count` patches along one side lie, in patches of the full-size image.

    An object so keeps its coordinate when the image is reduced.

    Args:
        count: patches of this image.
        full: patches of the full-size image.

    Returns:
        [count] float64: 0, 1, ..., `full` - 1 where `count` is `full`.
    """
    return (np.arange(count) + 0.5) * (full / count) - 0.5


@lru_cache(maxsize=64)
def sincos_positions(grid: Grid, full: Grid, dim: int, device: torch.device | None = None) -> Tensor:
    """Position code of every patch, row by row.

    Args:
        grid: of this image.
        full: of the full-size image.
        dim: channels D, a multiple of 4.
        device: of the result; None = cpu. The result is cached: it must not be changed.

    Returns:
        [rows * columns, D] float32.
    """
    assert dim % 4 == 0, f"sine-cosine positions need a multiple of 4 channels, found {dim}"
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = (coordinates(n, of) for n, of in zip(grid, full, strict=True))
    across = columns[None, :, None] * frequencies
    down = rows[:, None, None] * frequencies
    halves = [np.concatenate((np.sin(angle), np.cos(angle)), axis=-1) for angle in (across, down)]
    code = np.concatenate([np.broadcast_to(half, (*grid, dim // 2)) for half in halves], axis=-1)
    with torch.inference_mode(False):
        return torch.from_numpy(code.reshape(-1, dim).astype(np.float32)).to(device or "cpu")
