"""Block masks of attention sparsity: fixed patterns, first masks, and one exchange of blocks in one head.

Tokens are in timm's order: class and register tokens first, then the patches row by row.

Shape legend: H heads, N tokens, n = ceil(N / block) blocks along a side, so n x n blocks of queries x keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ModelError
from ...kernels.attention import BlockMask
from ...kernels.attention.mask import num_blocks
from ...kernels.attention.patterns import diagonal, from_scores, global_tokens, strided, union
from .attention_config import KEY, AttentionConfig
from .densities import mask_rng
from .rules import Update, grow_after_drop

SHORT = 256
"""Up to here a program of the kernels holds all keys of a head, and a masked block is computed all the same."""

_LEAST_ALPHA = 0.05
"""Above this update fraction at least one block is exchanged."""


@dataclass(frozen=True)
class Layer:
    """What a mask of an attention layer depends on.

    Attributes:
        name: clean name of the layer.
        heads: H.
        prefix: tokens before the patches.
        seed: of random blocks.
    """

    name: str
    heads: int
    prefix: int
    seed: int


def protected(config: AttentionConfig, tokens: int, prefix: int) -> Tensor:
    """Blocks that always live: bool [1, n, n]."""
    n = num_blocks(tokens, config.block)
    kept = torch.zeros(1, n, n, dtype=torch.bool)
    if "prefix" in config.protect and prefix:
        kept |= global_tokens(tokens, tokens, range(prefix), config.block)
    if "diagonal" in config.protect:
        kept |= diagonal((n, n))
    return kept


def live_count(config: AttentionConfig, tokens: int) -> int:
    """Live blocks of a head for the patterns with a density: its share, rounded half up."""
    n = num_blocks(tokens, config.block)
    return max(1, math.floor(config.target * n * n + 0.5))


def first_keep(config: AttentionConfig, layer: Layer, tokens: int) -> Tensor:
    """Random blocks, equally many in every head and drawn for each: protected ones, the diagonal where it fits, others.

    Every block of queries sees at least one of keys.

    Returns:
        bool [H, n, n].

    Raises:
        ModelError: the density allows fewer blocks than have to live.
    """
    n, count, certain = (
        num_blocks(tokens, config.block),
        live_count(config, tokens),
        protected(config, tokens, layer.prefix),
    )
    own = diagonal((n, n))
    least = certain | (own & ~certain.any(-1, keepdim=True))
    if int(least.sum()) > count:
        held = int(certain.sum())
        raise ModelError(
            f"{layer.name}: density {config.target:g} of {n} x {n} blocks ({tokens} tokens in blocks of "
            f"{config.block}) is {count} a head, but {held} are protected ({', '.join(config.protect) or 'none'}) and "
            f"every block of queries needs one; allowed: density from {int(least.sum()) / (n * n):.3f}, smaller "
            "blocks, or less in `protect`"
        )
    wish = least | own
    generator = mask_rng(layer.seed, layer.name, "attention", tokens)
    scores = torch.rand(layer.heads, n, n, generator=generator)
    return from_scores(scores, count / (n * n), always=wish if int(wish.sum()) <= count else least)


def windows(grid: tuple[int, int], window: int, block: int, prefix: int) -> Tensor:
    """Blocks with a pair of patches at most window // 2 rows and columns apart; prefix tokens see and are seen by all.

    Args:
        grid: rows and columns of patches.
        window: odd side of the window.
        block: tokens of a block.
        prefix: tokens before the patches.

    Returns:
        bool [1, n, n].
    """
    patches = grid[0] * grid[1]
    index, tokens = torch.arange(patches), patches + prefix
    n = num_blocks(tokens, block)
    place, home = torch.stack([index // grid[1], index % grid[1]]), (index + prefix) // block
    keep = torch.zeros(1, n, n, dtype=torch.bool)
    for i in home.unique().tolist():
        near = ((place[:, home == i][:, :, None] - place[:, None]).abs() <= window // 2).all(0).any(0)
        keep[0, i, home[near]] = True
    return union(keep, global_tokens(tokens, tokens, range(prefix), block)) if prefix else keep


def fixed_keep(config: AttentionConfig, layer: Layer, tokens: int, grid: tuple[int, int] | None = None) -> Tensor:
    """A fixed pattern for a number of tokens, bool [1 or H, n, n].

    Args:
        config: with a pattern other than "learned".
        layer: whose mask it is.
        tokens: N.
        grid: rows and columns of patches; None for a square.

    Raises:
        ModelError: windows over patches that are no square, or a density that is too low.
    """
    if config.pattern == "random":
        return first_keep(config, layer, tokens)
    if config.pattern == "strided":
        n = num_blocks(tokens, config.block)
        keep = strided((n, n), config.stride, local=config.local, heads=layer.heads)
        return union(keep, global_tokens(tokens, tokens, range(layer.prefix), config.block)) if layer.prefix else keep
    side = math.isqrt(tokens - layer.prefix)
    if grid is None and side * side != tokens - layer.prefix:
        raise ModelError(
            f"{layer.name}: {tokens - layer.prefix} patches are no square; windows need the grid of the images that "
            "the model was built for, or square ones"
        )
    return windows(grid or (side, side), config.window, config.block, layer.prefix)


@dataclass(frozen=True)
class FixedMask:
    """Makes the mask of a fixed pattern for any number of tokens; None where no mask is wanted for so few."""

    config: AttentionConfig
    layer: Layer

    def __call__(self, tokens: int) -> BlockMask | None:
        """The mask of `tokens` tokens, on the host.

        Raises:
            ModelError: as `fixed_keep`.
        """
        if tokens <= SHORT and not self.config.allow_short:
            return None
        try:
            keep = fixed_keep(self.config, self.layer, tokens)
        except ModelError as error:
            raise ModelError(f"{KEY}: {error}") from error
        return BlockMask(keep, tokens, tokens, self.config.block)


def swaps(alpha: float, live: int, blocks: int, certain: int) -> int:
    """Blocks of a head to exchange: floor(alpha x live), at least one while alpha is above 0.05.

    Args:
        alpha: update fraction.
        live: live blocks.
        blocks: all blocks.
        certain: protected ones among the live.
    """
    most = max(0, min(live - certain, blocks - live))
    return min(most, max(math.floor(alpha * live), 1 if alpha > _LEAST_ALPHA else 0))


def lowest(mass: Tensor, keep: Tensor, certain: Tensor, k: int) -> Tensor:
    """The up to `k` live blocks with the least mass that may go; bool [n, n].

    Protected blocks may not, nor the last live block of a row: its queries would attend to nothing. The choice is
    greedy in the order of mass, ties by the lower flat index, and smaller than `k` only where no other block may go.
    """
    gone: list[int] = []
    rows = keep.sum(1).tolist()
    places = (keep & ~certain).flatten().nonzero().squeeze(1)
    for place in places[mass.flatten()[places].argsort(stable=True)].tolist():
        if len(gone) == k:
            break
        row = place // keep.shape[1]
        if rows[row] > 1:
            rows[row] -= 1
            gone.append(place)
    dropped = torch.zeros_like(keep)
    dropped.view(-1)[gone] = True
    return dropped


def exchange(
    keep: Tensor,
    mass: Tensor,
    slope: Tensor | None,
    certain: Tensor,
    alpha: float,
    generator: torch.Generator | None = None,
    exclude_just_dropped: bool = False,
) -> Update:
    """One update of one head: drop the blocks with the least mass, grow as many.

    Args:
        keep: bool [n, n], live blocks; a tensor on the host, as all others.
        mass: [n, n].
        slope: [n, n], highest is grown; None grows at random.
        certain: bool [n, n], protected blocks.
        alpha: update fraction.
        generator: for random growth, equal on all ranks.
        exclude_just_dropped: do not grow what was just dropped.

    Returns:
        The update, with as many live blocks as before.
    """
    live = int(keep.sum())
    k = swaps(alpha, live, keep.numel(), int((keep & certain).sum()))
    dropped = lowest(mass, keep, certain, k)
    return grow_after_drop(keep, dropped, live, slope, generator, exclude_just_dropped=exclude_just_dropped)
