"""Masks and updates in a form to be stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .rules import Update


def packed(mask: Tensor) -> Tensor:
    """A boolean mask of any shape as uint8, eight entries a byte, on the host."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `packed`."""
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(flat.astype(bool)).view(*shape)


def counts_of(done: Update) -> dict[str, int]:
    """Live, dropped and at once regrown units of an update."""
    return {
        "live": int(done.mask.sum()),
        "dropped": int(done.dropped.sum()),
        "regrown": int((done.dropped & done.grown).sum()),
    }
