"""Staged unfreezing: which blocks train at which level (AutoProg-Zero, arXiv 2410.00350)."""

from __future__ import annotations

from typing import Literal

Order = Literal["interleaved", "suffix"]


def trained_blocks(blocks: int, level: int, levels: int, order: Order = "interleaved") -> frozenset[int]:
    """Indices of the blocks that train at an unfreezing level.

    Args:
        blocks: number of blocks L, counted from the input.
        level: 1..levels; the last one trains every block.
        levels: number of levels K.
        order: "interleaved" trains blocks with ``index mod K < level``, spread over the depth; "suffix" trains the
            ``ceil(level L / K)`` blocks next to the head.

    Raises:
        ValueError: the level is out of range.
    """
    if not 1 <= level <= levels:
        raise ValueError(f"unfreezing level must be in 1..{levels}, found {level}")
    if order == "suffix":
        return frozenset(range(blocks - -(-level * blocks // levels), blocks))
    return frozenset(i for i in range(blocks) if i % levels < level)


def frozen_step_cost(share: float) -> float:
    """Cost of a training step relative to one that trains everything, ``(2 + u) / 3``.

    Of the three equal parts of a step (forward, gradient of the inputs, gradient of the weights) only the last shrinks
    with the `share` u of trained block weights, as long as the backward pass still has to reach the embeddings.
    """
    return (2 + share) / 3
