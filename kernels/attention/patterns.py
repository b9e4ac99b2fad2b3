"""Patterns of block masks: functions that return `keep` tensors for `BlockMask`, and the order of tokens in tiles.

In raster order a block of 64 patches is a strip of some rows; in tile order, 8 x 8 patches to a tile, it is a tile.
Tile order pays for windows made of tiles (`tile_windows`) and for sliding windows of about two tiles or more; below
that a strip of a small grid touches fewer blocks than a tile's 3 x 3 neighbours (32 x 32 patches: a window of 7 keeps
29 % of the blocks in raster order and 39 % in tiles, a window of 15 keeps 48 % and 39 %).
Extra tokens (class, distillation, registers) come last: a grid of whole tiles and one token then is k whole blocks and
a short tail.

Shape legend: Hm heads of the mask, nQ x nK blocks of queries and keys, N tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .mask import num_blocks

Shape = tuple[int, int]


def tile_order(grid: Shape, tile: int = 8, extra: int = 0) -> Tensor:
    """Order of the tokens that puts patches in tiles, row by row inside a tile, and extra tokens last.

    ``x.index_select(1, order)`` once after the embedding brings tokens [B, N, C] into tile order (position embeddings
    that are added later likewise, with ``extra=0`` where they have no rows for extra tokens), and
    ``y.index_select(1, inverse_order(order))`` brings them back.

    Args:
        grid: rows and columns of patches, multiples of `tile`.
        tile: patches along a side of a tile; 8 for blocks of 64.
        extra: tokens before the patches in the input order, as timm has them.

    Returns:
        int64 [N], N = extra + rows * columns: entry i is the input index of the token at place i.

    Raises:
        ValueError: a grid that does not tile.
    """
    rows, columns = _grid(grid)
    if tile < 1 or rows % tile or columns % tile:
        raise ValueError(
            f"tile order: a grid of {rows} x {columns} patches has no whole tiles of {tile} x {tile}; allowed are "
            f"multiples of {tile} (leave other grids in raster order)"
        )
    if extra < 0:
        raise ValueError(f"tile order: extra is a number of tokens >= 0, found {extra}")
    patches = torch.arange(rows * columns).view(rows // tile, tile, columns // tile, tile).transpose(1, 2)
    return torch.cat([patches.reshape(-1) + extra, torch.arange(extra)])


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order` (int64 [N])."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def windows(grid: Shape, window: int, block: int = 64, *, tile: int | None = 8, extra: int = 0) -> Tensor:
    """Square windows over a grid of patches, rounded out to blocks; extra tokens see and are seen by all.

    A patch sees the patches at most window // 2 rows and columns away. A block is kept as soon as one of its pairs is
    inside: within kept blocks attention is complete.

    Args:
        grid: rows and columns of patches.
        window: odd side of the window, in patches.
        block: tokens of a block.
        tile: side of the tiles of `tile_order`; None for patches in raster order.
        extra: extra tokens, after the patches.

    Returns:
        keep bool [1, n, n], n the number of blocks of extra + rows * columns tokens.

    Raises:
        ValueError: an even window, or a grid that does not tile.
    """
    rows, columns = _grid(grid)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"windows: the side of a window is odd and >= 1, found {window}")
    index = torch.arange(rows * columns) if tile is None else tile_order(grid, tile)
    return _near(torch.stack([index // columns, index % columns]), window // 2, block, extra)


def tile_windows(grid: Shape, radius: int, block: int = 64, *, tile: int = 8, extra: int = 0) -> Tensor:
    """Windows made of whole tiles: a patch sees its tile and those up to `radius` tiles away in rows and columns.

    Exact with blocks of tile * tile tokens or less. With radius 0 these are separate windows, as in Swin (arXiv
    2103.14030) without the shift.

    Args:
        grid: rows and columns of patches, multiples of `tile`.
        radius: reach in tiles, at least 0.
        block: tokens of a block.
        tile: side of the tiles of `tile_order`.
        extra: extra tokens, after the patches; they see and are seen by all.

    Returns:
        keep bool [1, n, n], n the number of blocks of extra + rows * columns tokens.
    """
    if radius < 0:
        raise ValueError(f"tile windows: radius is >= 0, found {radius}")
    index = tile_order(grid, tile)
    place = torch.stack([index // grid[1], index % grid[1]]).div(tile, rounding_mode="floor")
    return _near(place, radius, block, extra)


def _near(place: Tensor, radius: int, block: int, extra: int) -> Tensor:
    """Blocks with a pair of patches at most `radius` apart in both coordinates `place` [2, N]; extra tokens global."""
    patches = place.shape[1]
    n = num_blocks(patches + extra, block)
    keep = torch.zeros(1, n, n, dtype=torch.bool)
    block_of = torch.arange(patches) // block
    for i, own in enumerate(place.split(block, dim=1)):
        near = ((own[:, :, None] - place[:, None]).abs() <= radius).all(0)
        keep[0, i, block_of[near.any(0)]] = True
    length = patches + extra
    return union(keep, global_tokens(length, length, range(patches, length), block)) if extra else keep


def strided(shape: Shape, stride: int, *, local: int = 1, heads: int = 1) -> Tensor:
    """A band along the diagonal and every `stride`-th block, after the sparse transformer (arXiv 1904.10509).

    Block i sees the blocks j with |i - j| < local, and those with (i - j + h) divisible by stride for head h: heads
    take different residues, so that together they reach everything from `stride` heads on.

    Args:
        shape: blocks (nQ, nK).
        stride: distance of the seen blocks, at least 1.
        local: half width of the band in blocks, the own block included; 0 for none.
        heads: Hm.

    Returns:
        keep bool [heads, nQ, nK].
    """
    if stride < 1:
        raise ValueError(f"strided: stride is >= 1, found {stride}")
    distance = torch.arange(shape[0])[:, None] - torch.arange(shape[1])
    phase = torch.arange(heads)[:, None, None]
    return (distance.abs() < local) | ((distance + phase) % stride == 0)


def diagonal(shape: Shape) -> Tensor:
    """Each block of queries sees the block of keys at its place: bool [1, nQ, nK], scaled where nQ and nK differ."""
    keep = torch.zeros(1, *shape, dtype=torch.bool)
    keep[0, torch.arange(shape[0]), torch.arange(shape[0]) * shape[1] // shape[0]] = True
    return keep


def global_tokens(q_len: int, kv_len: int, tokens: Sequence[int], block: int = 64) -> Tensor:
    """Whole rows and columns of the blocks that hold certain tokens: they see all and are seen by all.

    Args:
        q_len: queries.
        kv_len: keys.
        tokens: places of the tokens, as queries and as keys; negative ones count from each end.
        block: tokens of a block.

    Returns:
        keep bool [1, nQ, nK].

    Raises:
        ValueError: a token outside of either sequence.
    """
    keep = torch.zeros(1, num_blocks(q_len, block), num_blocks(kv_len, block), dtype=torch.bool)
    for token in tokens:
        if not all(-length <= token < length for length in (q_len, kv_len)):
            raise ValueError(f"global tokens: token {token} is outside of {q_len} queries or {kv_len} keys")
        keep[:, token % q_len // block] = True
        keep[:, :, token % kv_len // block] = True
    return keep


def random_blocks(
    shape: Shape,
    density: float,
    heads: int,
    generator: torch.Generator,
    *,
    per: str = "head",
    always: Tensor | None = None,
) -> Tensor:
    """Uniformly random blocks, drawn for each head, with the diagonal kept.

    Args:
        shape: blocks (nQ, nK).
        density: share of kept blocks, the certain ones included; see `from_scores` for the rounding.
        heads: Hm.
        generator: a CPU generator. The same seed gives the same mask on every rank and machine.
        per: "head" or "row", see `from_scores`.
        always: keep bool [1 or heads, nQ, nK] of blocks kept besides the diagonal, such as `global_tokens`; or None.

    Returns:
        keep bool [heads, nQ, nK].
    """
    scores = torch.rand(heads, *shape, generator=generator)
    certain = diagonal(shape) if always is None else union(diagonal(shape), always)
    return from_scores(scores, density, per=per, always=certain)


def from_scores(scores: Tensor, density: float, *, per: str = "head", always: Tensor | None = None) -> Tensor:
    """The blocks with the highest scores, as many for each head (or row), on the device of `scores` and without sync.

    Args:
        scores: [Hm, nQ, nK], any real type; equal scores go to the lower index. No NaN.
        density: share of kept blocks, 0 to 1. The count is rounded to the nearest, at least 1 unless density is 0.
        per: "head": the best blocks of each head, rows may differ; "row": the best of each row of each head.
        always: bool [1 or Hm, nQ, nK], blocks that come first whatever their score. They count within the density;
            where they are more than it allows, all of them are kept.

    Returns:
        keep bool [Hm, nQ, nK].

    Raises:
        ValueError: a density outside of 0 to 1, an unknown `per`, or shapes that do not fit.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"from scores: density is 0 to 1, found {density}")
    if per not in ("head", "row"):
        raise ValueError(f'from scores: per is "head" or "row", found {per!r}')
    if scores.dim() != 3:
        raise ValueError(f"from scores: scores have shape (heads, nQ, nK), found {tuple(scores.shape)}")
    if always is None:
        always = torch.zeros_like(scores, dtype=torch.bool)
    elif always.dim() != 3 or always.shape[0] not in (1, scores.shape[0]) or always.shape[1:] != scores.shape[1:]:
        raise ValueError(
            f"from scores: always has shape {tuple(always.shape)}, allowed is (1 or {scores.shape[0]}, "
            f"{scores.shape[1]}, {scores.shape[2]})"
        )
    flat = scores.detach().flatten(1 if per == "head" else 2)
    first = always.expand(scores.shape).reshape(flat.shape)
    count = max(1, int(density * flat.shape[-1] + 0.5)) if density > 0 else 0
    # Sorted twice, by score and then by certainty: certain blocks come first even among scores of +inf.
    order = flat.argsort(dim=-1, descending=True, stable=True)
    uncertain = (~first).gather(-1, order).to(torch.uint8)
    order = order.gather(-1, uncertain.argsort(dim=-1, stable=True))
    best = torch.zeros_like(first).scatter_(-1, order[..., :count], True)
    return (best | first).view(scores.shape)


def prune_heads(keep: Tensor, live: Tensor) -> Tensor:
    """Empty the masks of dead heads: `keep` [1 or H, nQ, nK] and `live` bool [H] give bool [H, nQ, nK]."""
    return keep & live[:, None, None]


def union(*keeps: Tensor) -> Tensor:
    """Blocks kept by any of the patterns; masks for one head spread over the others' heads.

    Raises:
        ValueError: different block counts, or numbers of heads other than 1 and one more.
    """
    shapes = [tuple(keep.shape) for keep in keeps]
    if len({shape[1:] for shape in shapes}) != 1 or len({shape[0] for shape in shapes} - {1}) > 1:
        raise ValueError(f"union: patterns (heads, nQ, nK) with one nQ x nK and 1 or H heads, found {shapes}")
    return reduce(torch.logical_or, keeps)


def _grid(grid: Shape) -> Shape:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid: rows and columns of patches, both >= 1, found {grid!r}")
    return grid
