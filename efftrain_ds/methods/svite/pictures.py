"""Pictures of masks and of live heads and neurons for TensorBoard and the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...observe import maps
from ...observe.maps import unit_map, unit_states

__all__ = ["mask_map", "unit_map", "unit_states"]


def mask_map(masks: Mapping[str, Tensor]) -> Tensor:
    """Masks by clean weight name as one picture, uint8 [3, H, W].

    A masked depthwise or patch convolution [out, in, kh, kw] is shown as [out, in x kh x kw].
    """
    return maps.mask_map(masks)
