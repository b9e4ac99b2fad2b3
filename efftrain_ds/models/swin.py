"""timm's Swin Transformer at several image sizes without a change of its parameters.

Windows scale with the image (S/32 for the common models: 7 at 224 pixels, 5 at 160, 3 at 96), so no position is padded.
The table of relative position biases stays a parameter at the size it was built for (13 x 13 for windows of 7); for
windows of w it is resampled to (2w - 1) x (2w - 1) in each forward (bilinear, antialiased), so the gradient reaches all
of it at any size.
EfficientTrain's code resamples the parameter itself at each switch, and the optimizer's moments with it; timm's
``set_input_size`` replaces the parameter, which an optimizer or ZeRO partition made before never learns of.

Shape legend: N images, H x W positions, C channels, w window side.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError

Size = tuple[int, int]
"""(height, width) in positions."""

_CONSTANTS: dict[tuple[Any, ...], Tensor] = {}
"""Index tables, masks and resampling matrices by what they are made of; pure functions of their key."""


def accept_sizes(model: nn.Module) -> nn.Module:
    """Let a Swin take images of any sides that are multiples of 32, in place; no parameter or buffer changes.

    At the size it was built for, the model computes exactly what it did before.

    Raises:
        ModelError: not a Swin of timm (the second version and its variants have other position biases).
    """
    from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention

    if not isinstance(model, SwinTransformer):
        raise ModelError(f"{type(model).__name__} is not timm's SwinTransformer")
    block, attention = _dynamic(SwinTransformerBlock, WindowAttention)
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock) and not isinstance(module, block):
            if type(module) is not SwinTransformerBlock or type(module.attn) is not WindowAttention:
                raise ModelError(f"{type(model).__name__}: {type(module).__name__} is not timm's Swin block")
            module.__class__, module.attn.__class__ = block, attention
    model.patch_embed.strict_img_size = False
    model.dynamic_img_size = True  # says the same as that of a ViT built with dynamic_img_size=True
    return model


def scaled_window(window: Size, grid: Size, full: Size) -> Size:
    """The window on a map of another size: the same share of the map, at least one position."""
    return tuple(max(1, w * now // ref) for w, now, ref in zip(window, grid, full, strict=True))  # type: ignore[return-value]


def bilinear_matrix(source: int, target: int) -> Tensor:
    """[target, source] weights of the antialiased bilinear interpolation of a line.

    Those of ``interpolate(mode="bilinear", antialias=True)``. Antialiased, so that every entry of the source has a
    share: without it, 4 of the 13 rows of a table would get no gradient at windows of 3, and keep their initial noise
    between trained neighbours when the windows grow.
    """
    scale = source / target
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    distance = torch.arange(source, dtype=torch.float64) + 0.5 - centre[:, None]
    weights = (1 - distance.abs() / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def resampled_table(table: Tensor, window: Size, target: Size) -> Tensor:
    """The bias table of another window: [(2h-1)(2w-1), heads] -> [(2h'-1)(2w'-1), heads].

    A product with a constant matrix, whose gradient is the same in every run (that of `interpolate` is not on a GPU).
    """
    if window == target:
        return table

    def make() -> Tensor:
        rows, columns = (bilinear_matrix(2 * a - 1, 2 * b - 1) for a, b in zip(window, target, strict=True))
        return torch.kron(rows, columns).float()

    matrix = _constant(("resample", window, target), make, table.device)
    return (matrix @ table.float()).to(table.dtype)


def _constant(key: tuple[Any, ...], make: Any, device: torch.device) -> Tensor:
    """`make()` on a device, kept for the next call."""
    found = _CONSTANTS.get((*key, device))
    if found is None:
        # made outside of whatever mode the caller is in, as the next caller may be in another
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            found = make().to(device)
        if type(found) is Tensor:  # not a tracer's stand-in
            _CONSTANTS[(*key, device)] = found
    return found


def _shift_mask(grid: Size, window: Size, shift: Size) -> Tensor:
    """[windows, w*w, w*w]: 0 between positions that were neighbours before the cyclic shift, -100 otherwise."""
    from timm.models.swin_transformer import window_partition

    regions = []
    for side, w, s in zip(grid, window, shift, strict=True):
        place = torch.arange(side)
        regions.append((place >= side - w).int() + (place >= side - s).int() if s else torch.zeros(side).int())
    labels = (3 * regions[0][:, None] + regions[1][None, :]).float()
    labels = window_partition(labels[None, :, :, None], window).flatten(1)
    return torch.where(labels[:, None, :] == labels[:, :, None], 0.0, -100.0)


@functools.cache
def _dynamic(block: Any, attention: Any) -> tuple[type[nn.Module], type[nn.Module]]:
    """Subclasses of timm's block and attention that follow the size of their input."""
    from timm.models.swin_transformer import get_relative_position_index, window_partition, window_reverse

    def bias(self: Any) -> Tensor:
        """[1, heads, w*w, w*w] for the window of this call."""
        window: Size | None = self.window_now
        if window is None:
            return attention._get_rel_pos_bias(self)
        table = resampled_table(self.relative_position_bias_table, self.window_size, window)
        index = _constant(("index", window), lambda: get_relative_position_index(*window).flatten(), table.device)
        area = window[0] * window[1]
        return table[index].view(area, area, -1).permute(2, 0, 1).unsqueeze(0)

    def attend(self: Any, x: Tensor) -> Tensor:
        """Attention within (shifted) windows of a map [N, H, W, C]."""
        n, height, width, c = x.shape
        grid: Size = (height, width)
        if grid == tuple(self.input_resolution):
            return block._attn(self, x)
        window = scaled_window(self.window_size, grid, self.input_resolution)
        pad = tuple(-side % w for side, w in zip(grid, window, strict=True))
        padded: Size = (height + pad[0], width + pad[1])
        # as timm: half a window, and none where the window covers the map
        moved = any(self.target_shift_size)
        wide = self.always_partition
        shift = tuple(w // 2 if moved and (wide or side > w) else 0 for side, w in zip(grid, window, strict=True))
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        x = nn.functional.pad(x, (0, 0, 0, pad[1], 0, pad[0]))
        mask = None
        if any(shift):
            make = functools.partial(_shift_mask, padded, window, shift)
            mask = _constant(("mask", padded, window, shift), make, x.device).to(x.dtype)
        windows = window_partition(x, window).view(-1, window[0] * window[1], c)
        self.attn.window_now = window
        try:
            windows = self.attn(windows, mask=mask)
        finally:
            self.attn.window_now = None
        x = window_reverse(windows.view(-1, *window, c), window, *padded)[:, :height, :width, :]
        return torch.roll(x, shifts=shift, dims=(1, 2)) if any(shift) else x

    place = {"__module__": __name__}
    return (
        type(f"Dynamic{block.__name__}", (block,), {"_attn": attend, "__doc__": accept_sizes.__doc__, **place}),
        type(
            f"Dynamic{attention.__name__}",
            (attention,),
            {"_get_rel_pos_bias": bias, "window_now": None, "__doc__": resampled_table.__doc__, **place},
        ),
    )
