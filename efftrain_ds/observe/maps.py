"""Maps of what lives in a sparse model, as pictures: masks of weights, and heads or neurons layer by layer.

Shape legend: H, W pixels; a state is one of `UNUSED` to `LIVE`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIDE = 256
"""Most pixels of a side of one mask."""
UNUSED, PAST, DROPPED, GROWN, LIVE = range(5)
"""States of a unit: never live, live once and not now, dropped or grown by the last update, live since longer."""
STATES = ("never live", "live before", "dropped now", "grown now", "live")

_WIDTH = 1340  # of a picture, about
_GAP, _LINE = 6, 14
_STATE_COLORS = np.array(
    [(226, 228, 233), (158, 172, 190), (214, 69, 65), (46, 160, 67), (31, 78, 140)], dtype=np.uint8
)
_SCALE = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
"""Five points of the viridis colour scale, from 0 to 1."""
_INK, _PAPER, _EMPTY = (40, 40, 40), 255, (246, 246, 246)


def colors(values: np.ndarray) -> np.ndarray:
    """Shares [H, W] in 0..1 as colours uint8 [H, W, 3], dark violet to yellow."""
    at = np.clip(values, 0, 1) * (len(_SCALE) - 1)
    low = np.minimum(at.astype(int), len(_SCALE) - 2)
    part = (at - low)[..., None]
    return np.rint(_SCALE[low] * (1 - part) + _SCALE[low + 1] * part).astype(np.uint8)


def block_density(mask: Tensor, block: int) -> np.ndarray:
    """Live share of every square of `block` entries.

    Args:
        mask: bool [out, in] or [out, in, kh, kw] (then a row holds in x kh x kw entries).
        block: side; squares at the right and lower edge may be smaller.

    Returns:
        float64 [ceil(out / block), ceil(in / block)].
    """
    plane = mask.detach().flatten(1).to(torch.float32).cpu().numpy().astype(np.float64)
    rows, columns = (np.arange(0, side, block) for side in plane.shape)
    sums = np.add.reduceat(np.add.reduceat(plane, rows, axis=0), columns, axis=1)
    heights, widths = (np.minimum(block, side - np.arange(0, side, block)) for side in plane.shape)
    return sums / (heights[:, None] * widths[None, :])


def mask_map(masks: Mapping[str, Tensor], side: int = SIDE) -> Tensor:
    """Masks of weights side by side, all at one scale; a colour is the live share of a square of entries.

    Args:
        masks: bool [out, in] or [out, in, kh, kw] by the name of the weight; shown in their order.
        side: most pixels that one mask may be high or wide.

    Returns:
        uint8 [3, H, W]; above each mask its name and live share, below all the colour scale.
    """
    shapes = [mask.flatten(1).shape for mask in masks.values()]
    longest = max((max(shape) for shape in shapes), default=1)
    block = math.ceil(longest / side)
    zoom = max(1, side // math.ceil(longest / block))  # small models are enlarged
    groups: dict[str, list[np.ndarray]] = {}
    for name, mask in masks.items():
        picture = colors(block_density(mask, block)).repeat(zoom, axis=0).repeat(zoom, axis=1)
        share = float(mask.sum()) / max(1, mask.numel())
        groups.setdefault(_block_of(name), []).append(_titled(f"{_short(name)}  {share:.3f}", picture))
    return _tensor(_stacked([_shelves([_columns(tiles) for tiles in groups.values()]), _scale_bar(block)]))


def unit_states(live: Sequence[int], count: int, *, ever: Tensor | None = None, before: Any = None) -> Tensor:
    """States of the units (heads or neurons) of one layer.

    Args:
        live: units that live now.
        count: units of the full layer.
        ever: bool [count], units that lived at any time; None where that is not known.
        before: units that lived before the last update; None or equal to `live` where nothing moved.

    Returns:
        uint8 [count] of `UNUSED`, `PAST`, `DROPPED`, `GROWN`, `LIVE`.
    """
    now = _members(live, count)
    states = torch.full((count,), UNUSED, dtype=torch.uint8)
    if ever is not None:
        states[ever.cpu().bool()] = PAST
    states[now] = LIVE
    if before is not None:
        earlier = _members(before, count)
        states[earlier & ~now] = DROPPED
        states[now & ~earlier] = GROWN
    return states


def unit_map(rows: Mapping[str, Tensor]) -> Tensor:
    """Units of every layer as a band of coloured cells, one layer below the other.

    Args:
        rows: states [units] (see `unit_states`) by layer, shown in their order. A layer of many units takes several
            lines, read from left to right and from top to bottom.

    Returns:
        uint8 [3, H, W] with the layers' names and live counts, and what the colours mean.
    """
    most = max((row.numel() for row in rows.values()), default=1)
    per_line = min(most, 64 if most <= 256 else 128 if most <= 512 else 192)
    cell = max(4, min(24, 768 // per_line))
    bands = [(name, _band(row, per_line, cell), row) for name, row in rows.items()]
    words = [f"{_short(name)}  {int((row >= GROWN).sum())}/{row.numel()}" for name, _, row in bands]
    margin = max((_text_width(text) for text in words), default=0) + _GAP
    parts = []
    for text, (_, band, _) in zip(words, bands, strict=True):
        line = _blank(max(len(band), _LINE), margin + band.shape[1])
        line[: len(band), margin:] = band
        _write(line, text, 0, max(0, (min(len(band), 2 * _LINE) - _LINE) // 2))
        parts.append(line)
    legend = _side_by_side(
        [_labelled(np.broadcast_to(c, (_LINE, _LINE, 3)), t) for c, t in zip(_STATE_COLORS, STATES, strict=True)]
    )
    return _tensor(_stacked([*parts, legend]))


def _band(states: Tensor, per_line: int, cell: int) -> np.ndarray:
    """Cells of one layer with thin lines between them where they are large enough."""
    values = states.detach().cpu().numpy().astype(int)
    lines = math.ceil(len(values) / per_line)
    picture = np.full((lines * per_line, 3), _EMPTY, dtype=np.uint8)
    picture[: len(values)] = _STATE_COLORS[values]
    picture = picture.reshape(lines, per_line, 3).repeat(cell, axis=0).repeat(cell, axis=1)
    if cell >= 6:
        picture[cell - 1 :: cell] = _PAPER
        picture[:, cell - 1 :: cell] = _PAPER
    return picture


def _members(units: Any, count: int) -> Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    found[torch.as_tensor(list(units), dtype=torch.long)] = True
    return found


def _short(name: str) -> str:
    """A layer's name in little room: "blocks.3.attn.qkv.weight" as "3.attn.qkv"; "blocks.3" stays."""
    short = name.removesuffix(".weight")
    rest = short.removeprefix("blocks.")
    return rest if "." in rest else short


def _block_of(name: str) -> str:
    """What stands together: "blocks.3.attn.qkv.weight" belongs to "blocks.3"; a name without a number stands alone."""
    head = re.match(r".*?\.\d+(?=\.)", name)
    return head.group() if head else name


# -- parts of a picture ----------------------------------------------------------------------------------------


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _PAPER, dtype=np.uint8)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default()


def _text_width(text: str) -> int:
    return math.ceil(_font().getlength(text)) + 2


def _write(canvas: np.ndarray, text: str, left: int, top: int) -> None:
    """Text on a canvas, in place."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(canvas)
    ImageDraw.Draw(image).text((left + 1, top), text, fill=_INK, font=_font())
    canvas[:] = np.asarray(image)


def _titled(text: str, picture: np.ndarray) -> np.ndarray:
    canvas = _blank(_LINE + picture.shape[0], max(picture.shape[1], _text_width(text)))
    canvas[_LINE:, : picture.shape[1]] = picture
    _write(canvas, text, 0, 0)
    return canvas


def _labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture with text on its right."""
    canvas = _blank(max(_LINE, picture.shape[0]), picture.shape[1] + 4 + _text_width(text))
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    _write(canvas, text, picture.shape[1] + 4, 0)
    return canvas


def _side_by_side(parts: Sequence[np.ndarray], gap: int = _GAP) -> np.ndarray:
    canvas = _blank(max(p.shape[0] for p in parts), sum(p.shape[1] + gap for p in parts) - gap)
    left = 0
    for part in parts:
        canvas[: part.shape[0], left : left + part.shape[1]] = part
        left += part.shape[1] + gap
    return canvas


def _stacked(parts: Sequence[np.ndarray], *, margin: int = _GAP) -> np.ndarray:
    height = sum(p.shape[0] + _GAP for p in parts) - _GAP
    canvas = _blank(height + 2 * margin, max(p.shape[1] for p in parts) + 2 * margin)
    top = margin
    for part in parts:
        canvas[top : top + part.shape[0], margin : margin + part.shape[1]] = part
        top += part.shape[0] + _GAP
    return canvas


def _columns(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures in columns that are hardly higher than the highest picture."""
    limit = 1.2 * max(tile.shape[0] for tile in tiles)
    columns: list[list[np.ndarray]] = []
    for tile in tiles:
        if columns and sum(t.shape[0] + _GAP for t in columns[-1]) + tile.shape[0] <= limit:
            columns[-1].append(tile)
        else:
            columns.append([tile])
    return _side_by_side([_stacked(column, margin=0) for column in columns])


def _shelves(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures from left to right, in as many rows as they need."""
    rows: list[list[np.ndarray]] = [[]]
    width = 0
    for part in parts:
        if rows[-1] and width + part.shape[1] > _WIDTH:
            rows.append([])
            width = 0
        rows[-1].append(part)
        width += part.shape[1] + 2 * _GAP
    return _stacked([_side_by_side(row, 2 * _GAP) for row in rows if row] or [_blank(_LINE, _LINE)], margin=0)


def _scale_bar(block: int) -> np.ndarray:
    bar = colors(np.linspace(0, 1, 128)[None, :].repeat(_LINE, axis=0))
    text = "live share of a square of " + (f"{block} x {block} entries" if block > 1 else "one entry")
    zero = _blank(_LINE, _text_width("0"))
    _write(zero, "0", 0, 0)
    return _side_by_side([zero, _labelled(bar, f"1   {text}")])


def _tensor(picture: np.ndarray) -> Tensor:
    """[H, W, 3] as [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
