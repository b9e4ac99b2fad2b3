"""MACs of a model with fewer heads and neurons: from densities before it is made, and from the model itself.

Shape legend: d width, H heads, n tokens of which `prefix` are not patches, P patch side; MLPs 4 d wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...core.errors import ModelError
from ...core.timeline import PlanSpec
from ...cost.macs import vit_shape
from .accounting import grid_of, live_macs, selected_tokens
from .s2vite_slots import live_count

_RATIO = 4
_HEAD_WIDTHS = {1280: 80}
"""Width of a head of the plain models, by the width of the model, where it is not 64."""


def mac_share(heads: float, neurons: float, spec: PlanSpec, excluded: int = 0) -> float:
    """Forward MACs with these densities over those of the full model, the classifier left out.

    Counts are whole numbers where the width, and for heads the name of a plain model, say how many units there are.
    Where the width is not known, the products of the attention and the patch embedding are left out too:
    ``(heads + 2 neurons) / 3``.

    Args:
        heads: density of the heads.
        neurons: density of the neurons.
        spec: of the run.
        excluded: blocks that keep all their units.
    """
    known = vit_shape(spec.model) if spec.model else None
    width = spec.width or (known.dim if known is not None and known.depth == spec.depth else 0)
    if known is not None and known.dim == width:
        count = width // _HEAD_WIDTHS.get(width, 64)
        heads = live_count(count, heads) / count
    part = 1 - min(1.0, excluded / spec.depth) if spec.depth else 1.0
    if not width or not spec.depth:
        return 1 - part * (1 - (heads + 2 * neurons) / 3)
    neurons = live_count(_RATIO * width, neurons) / (_RATIO * width)
    patches = (-(-spec.resolution // spec.stride)) ** 2
    tokens = patches + spec.prefix
    attention, mlp = 4 * tokens * width**2 + 2 * tokens**2 * width, 2 * _RATIO * tokens * width**2
    full = spec.depth * (attention + mlp) + patches * 3 * spec.stride**2 * width
    return 1 - spec.depth * part * ((1 - heads) * attention + (1 - neurons) * mlp) / full


def measured_macs(
    model: nn.Module,
    side: int,
    masks: Mapping[str, Tensor] | None = None,
    heads: Sequence[int] | None = None,
    *,
    selected: bool = True,
) -> int:
    """Forward MACs of one image as `accounting.live_macs`; 0 where the model is not of a known kind.

    Args:
        model: the model.
        side: of the image in pixels, as for `accounting.grid_of`.
        masks: as for `accounting.live_macs`.
        heads: as for `accounting.live_macs`.
        selected: the blocks see the selected tokens only, where the model selects some; False counts all.
    """
    try:
        grid = grid_of(model, side)
        kept = selected_tokens(model, grid) if selected else None
        return live_macs(model, grid, masks, kept=kept, heads=heads)
    except (ModelError, AttributeError):
        return 0
