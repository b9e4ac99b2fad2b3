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


def step_cost(trained: float, passed: float = 1.0) -> float:
    """Cost of a training step over that of one that trains everything, ``(1 + v + u) / 3``.

    Of the three equal parts of a step (forward, gradient of the inputs, gradient of the weights) the last shrinks with
    the share u of blocks that are `trained`, the second with the share v that the backward pass has to run through
    (`passed`; all of them where the first block or the embeddings train).
    """
    return (1 + passed + trained) / 3
