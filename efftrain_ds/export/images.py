"""Real images as inputs of an exported model, so that a check of its logits means something."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import bundled
from ..data.crops import eval_resize
from ..data.decode import decode_pil
from .model import ModelSpec

SOURCE = "bundled:fashion_mnist/val"


def real_inputs(spec: ModelSpec, count: int, channels: int = 3) -> Tensor:
    """The first held-out images of the bundled data, prepared as in the run's evaluations.

    Args:
        spec: of the model.
        count: number of images.
        channels: of the model's input.

    Returns:
        [count, channels, R, R] fp32.
    """
    data, source = spec.data, bundled.source(SOURCE)
    pixels = [
        torch.from_numpy(
            eval_resize(decode_pil(source.get(i).payload), spec.resolution, data.eval_crop, data.interpolation).copy()
        )
        for i in range(count)
    ]
    images = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    if channels != images.shape[1]:
        images = images.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    mean, std = (torch.tensor(for_channels(v, channels)).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return ((images - mean) / std).contiguous()


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value a channel; the first one for all where their numbers differ."""
    return tuple(values) if len(values) == channels else tuple(values[:1]) * channels
