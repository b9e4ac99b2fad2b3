"""Block form: b x b blocks of a weight live or die together, which a block-sparse product can skip.

Shape legend: weight [out, in], grid [R, C] = [out / b, in / b], n live blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ModelError
from ...core.ranks import rank
from .densities import Shapes, grid_shapes, mask_rng
from .rules import Rule, Update, check_choices, grow_after_drop, random_order, top_k

_log = logging.getLogger(__name__)

SMALLEST_GRID = 32
"""Grids of fewer blocks stay dense: an update fraction of them is mostly less than one block."""
_LEAST_ALPHA = 0.05
"""Above this update fraction at least one block is exchanged."""

DROP_SCORES = ("mean_abs", "frobenius", "sensitivity", "random")
GROW_SCORES = ("frobenius", "mean_abs")


def expand(mask: Tensor, block: int) -> Tensor:
    """Grid mask [R, C] to entries [R b, C b]."""
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def block_scores(values: Tensor, block: int, kind: str) -> Tensor:
    """One number for each block of [out, in]: "mean_abs", "frobenius" norm, or the absolute "sum"; [R, C] fp32."""
    tiles = values.float().reshape(values.shape[0] // block, block, values.shape[1] // block, block)
    if kind == "mean_abs":
        return tiles.abs().mean((1, 3))
    return tiles.sum((1, 3)).abs() if kind == "sum" else tiles.square().sum((1, 3)).sqrt()


def small_grids(shapes: Shapes, block: int) -> list[str]:
    """Weights with fewer than `SMALLEST_GRID` blocks, which stay dense; each is named in a warning.

    Raises:
        ModelError: see `densities.grid_shapes`.
    """
    small = [name for name, (rows, columns) in grid_shapes(shapes, block).items() if rows * columns < SMALLEST_GRID]
    for name in small:
        if rank() == 0:
            _log.warning("%s %s stays dense: under %d blocks of %d", name, list(shapes[name]), SMALLEST_GRID, block)
    return small


def droppable(importance: Tensor, mask: Tensor, k: int) -> Tensor:
    """The up to `k` least important live blocks whose loss empties no row and no column of the grid.

    A row without live blocks is an output that no weight reaches any more, a column an input that nobody reads: neither
    would get a gradient that brings it back. The choice is greedy in the order of importance (NaN last, ties by the
    lower flat index), and smaller than `k` only where no further block may go.
    """
    gone: list[int] = []
    rows, columns = mask.sum(1).tolist(), mask.sum(0).tolist()
    values = importance.masked_fill(importance.isnan(), torch.inf) if importance.is_floating_point() else importance
    places = mask.flatten().nonzero().squeeze(1)
    for place in places[values.flatten()[places].argsort(stable=True)].tolist():
        if k == 0:
            break
        row, column = divmod(place, mask.shape[1])
        if rows[row] > 1 and columns[column] > 1:
            rows[row], columns[column], k = rows[row] - 1, columns[column] - 1, k - 1
            gone.append(place)
    dropped = torch.zeros_like(mask)
    dropped.view(-1)[gone] = True
    return dropped


@dataclass(frozen=True)
class BlockRule(Rule):
    """Prune-and-grow of square blocks; masks are grids [R, C].

    Attributes:
        block: side b of a block.
        drop: importance of a live block: "mean_abs" or "frobenius" of its weights, "sensitivity" ``|sum W G|``,
            "random".
        grow: "gradient", "random" or "mixed".
        gradient_score: "frobenius" or "mean_abs" of a block's gradient.
        random_share: part of a "mixed" growth that is random.
        exclude_just_dropped: never grow what this update dropped.
        connected: keep a live block in every row and column of the grid.
    """

    block: int = 64
    drop: str = "mean_abs"
    grow: str = "gradient"
    gradient_score: str = "frobenius"
    random_share: float = 0.5
    exclude_just_dropped: bool = False
    connected: bool = True

    def __post_init__(self) -> None:
        check_choices(self.drop, DROP_SCORES, self.grow, self.random_share)
        check_choices(self.gradient_score, GROW_SCORES, self.grow, self.random_share)

    @property
    def needs_gradient(self) -> bool:
        """True for growth by gradient and for the importance "sensitivity"."""
        return self.needs_dense_gradient or self.drop == "sensitivity"

    @property
    def needs_dense_gradient(self) -> bool:
        """True for growth by gradient."""
        return self.grow != "random"

    def unit_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Grid of a weight; see `densities.grid_shapes`."""
        return grid_shapes({name: tuple(shape)}, self.block)[name]

    def dense_layers(self, shapes: Shapes) -> list[str]:
        """Weights whose grid is too small; see `small_grids`."""
        return small_grids(shapes, self.block)

    def expand(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Entries of a grid mask."""
        return expand(mask, self.block)

    def initial(self, name: str, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
        """First grid mask: one random block in every row and column (where `connected`), the rest uniform.

        Raises:
            ModelError: too few blocks to reach every row and column.
        """
        rows, columns = self.unit_shape(name, shape)
        if not self.connected:
            return super().initial(name, shape, count, seed)
        if count < max(rows, columns):
            raise ModelError(
                f"{name}: {count} live blocks of {self.block} cannot reach all rows and columns of its grid "
                f"{rows} x {columns}, at least {max(rows, columns)} are needed"
            )
        generator = mask_rng(seed, name, "initial")
        row, column = torch.randperm(rows, generator=generator), torch.randperm(columns, generator=generator)
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        places = torch.arange(max(rows, columns))  # no pair repeats: the longer side passes each index once
        mask[row[places % rows], column[places % columns]] = True
        return mask | top_k(random_order(mask, generator), ~mask, count - int(mask.sum()))

    def swaps(self, alpha: float, mask: Tensor, count: int | None = None) -> int:
        """Blocks to exchange: as for entries, but at least one while `alpha` is above 0.05."""
        live = int(mask.sum())
        free = min(mask.numel() - max(live, live if count is None else count), live)
        return max(super().swaps(alpha, mask, count), min(1, free) if alpha > _LEAST_ALPHA else 0)

    def update(
        self,
        weight: Tensor,
        gradient: Tensor | None,
        mask: Tensor,
        k: int,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Update:
        """Drop the least important live blocks that may go, grow the best dead ones; see `Rule.update`."""
        live = int(mask.sum())
        count = live if count is None else count
        if self.needs_gradient and gradient is None:
            raise ValueError("the block rule needs the dense gradient, and none was given")
        if self.drop == "random":
            importance = random_order(mask, generator)
        elif self.drop == "sensitivity":
            importance = block_scores(weight * gradient, self.block, "sum")
        else:
            importance = block_scores(weight, self.block, self.drop)
        number = k + max(0, live - count)
        if number > live:
            raise ValueError(f"cannot drop {number} of {live} live blocks")
        if self.connected:
            dropped = droppable(importance, mask, number)
        else:
            dropped = top_k(-importance, mask, number)
        scores = None if self.grow == "random" else block_scores(gradient, self.block, self.gradient_score)
        share = self.random_share if self.grow == "mixed" else 0.0
        exclude = self.exclude_just_dropped
        return grow_after_drop(
            mask, dropped, count, scores, generator, random_share=share, exclude_just_dropped=exclude
        )


@dataclass(frozen=True)
class BlockIndex:
    """Places of the live blocks by rows (CSR) and by columns, int32; the shapes depend on the counts only.

    Attributes:
        crow: [R + 1] first live block of every block row.
        col: [n] block column of every live block, row by row.
        ccol: [C + 1] first live block of every block column.
        row: [n] block row of every live block, column by column.
        order: [n] place in `col`'s order of every block in `row`'s order.
    """

    crow: Tensor
    col: Tensor
    ccol: Tensor
    row: Tensor
    order: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> BlockIndex:
        """Index of a grid mask [R, C]."""
        rows, columns = mask.nonzero(as_tuple=True)
        order = columns.argsort(stable=True)
        parts = (_starts(mask.sum(1)), columns, _starts(mask.sum(0)), rows[order], order)
        return cls(*(part.to(torch.int32) for part in parts))

    def update_(self, mask: Tensor) -> None:
        """Take the places of another mask of the same grid and count, in place (fit for a captured CUDA graph).

        Raises:
            ValueError: the grid or the number of live blocks differs.
        """
        new = BlockIndex.of(mask)
        for mine, other in zip(vars(self).values(), vars(new).values(), strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"index of {len(self.col)} blocks cannot take a mask of {len(new.col)}")
            mine.copy_(other)


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def to_bsr(weight: Tensor, mask: Tensor, block: int, *, name: str = "weight") -> Tensor:
    """The weight as a torch BSR tensor that stores exactly the live blocks.

    ``Tensor.to_sparse_bsr`` would leave out live blocks that are all zero (just grown ones).

    Args:
        weight: [out, in].
        mask: [R, C].
        block: side of a block.
        name: for the error.

    Raises:
        ModelError: weight, mask and block do not fit.
    """
    grid = grid_shapes({name: tuple(weight.shape)}, block)[name]
    if tuple(mask.shape) != grid:
        raise ModelError(f"{name}: a mask {list(mask.shape)} does not fit its grid {list(grid)} of blocks of {block}")
    tiles = weight.detach().reshape(grid[0], block, grid[1], block).transpose(1, 2)
    crow = _starts(mask.sum(1)).to(torch.int32)
    column = mask.nonzero()[:, 1].to(torch.int32)
    return torch.sparse_bsr_tensor(
        crow, column, tiles[mask].contiguous(), size=tuple(weight.shape), check_invariants=True
    )


def connected(masks: Mapping[str, Tensor]) -> str | None:
    """Name of the first grid mask with an empty row or column, or None."""
    for name, mask in masks.items():
        if not bool(mask.any(0).all() and mask.any(1).all()):
            return name
    return None
