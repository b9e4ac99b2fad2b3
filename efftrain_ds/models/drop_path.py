"""Stochastic depth of a model whose depth changes: the rates are set in place, no weight is touched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.errors import ModelError
from .growth import check_positions
from .stacks import blocks_of, stacks_of

_PLACES = ("drop_path1", "drop_path2", "drop_path")


def ensure_drop_path(model: nn.Module) -> nn.Module:
    """Give every block of a stack timm's DropPath where any block of the stack has it, in place.

    timm puts an identity where the rate is 0 (always in the first block), and that has no rate to change. Call it
    before blocks are taken away or copied.
    """
    from timm.layers import DropPath

    for blocks in blocks_of(model):
        examples = [m for block in blocks for m in _modules(block) if isinstance(m, DropPath)]
        if not examples:
            continue
        for block in blocks:
            for place in _PLACES:
                if isinstance(getattr(block, place, None), nn.Identity):
                    made = DropPath(0.0, scale_by_keep=examples[0].scale_by_keep)
                    setattr(block, place, made.train(block.training))
    return model


def set_drop_path(model: nn.Module, rate: float, paths: Sequence[Sequence[int]] | None = None) -> None:
    """Set the rates of stochastic depth: block i of l gets ``rate * i / (l - 1)``.

    The blocks of all stacks are counted together. A stack without DropPath (VOLO's outlookers) counts but stays as
    it is. Blocks that are not in `paths` keep their rate; they do not run.

    Args:
        model: prepared by `prepare_growth`, and by `ensure_drop_path` at full depth.
        rate: probability of the last block.
        paths: the blocks that run, by stack; None is all.

    Raises:
        ModelError: `rate` is not in [0, 1), or is positive and no block has DropPath.
    """
    from timm.layers import DropPath

    if not 0 <= rate < 1:
        raise ModelError(f"drop path rate {rate}; allowed: 0 <= rate < 1")
    if paths is None:
        paths = [range(stack.depth) for stack in stacks_of(model)]
    check_positions(model, paths)
    active = [blocks[i] for blocks, path in zip(blocks_of(model), paths, strict=True) for i in path]
    found = False
    for i, block in enumerate(active):
        for module in _modules(block):
            if isinstance(module, DropPath):
                module.drop_prob = rate * i / (len(active) - 1) if len(active) > 1 else 0.0
                found = True
    if rate > 0 and not found:
        raise ModelError(
            f"{type(model).__name__} has no DropPath to set to {rate}; build it with a positive drop_path_rate and "
            "call ensure_drop_path(model) before its depth changes"
        )


def _modules(block: nn.Module) -> list[nn.Module]:
    return [module for place in _PLACES if (module := getattr(block, place, None)) is not None]
