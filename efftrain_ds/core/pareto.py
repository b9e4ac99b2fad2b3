"""The entries of a table that no other one beats in cost and score."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Places of the entries that no other one beats in cost and score, by ascending cost.

    Args:
        costs: smaller is better.
        scores: larger is better; those that are not finite are left out.
    """
    order = sorted(range(len(costs)), key=lambda j: (costs[j], -scores[j], j))
    front: list[int] = []
    best = -math.inf
    for j in order:
        if math.isfinite(scores[j]) and scores[j] > best:
            front.append(j)
            best = scores[j]
    return front
