"""Sub-networks that a search compares, and which of them a step trains.

A candidate is (depth in blocks, resolution in pixels). Sets are products of a list of resolutions and a list of
depths, in r-major order: all depths of the smallest resolution first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...core.draws import uniforms

Candidate = tuple[int, int]
"""(depth, resolution)."""

_STREAM = "autoprog.supernet"


def candidates(
    current: Candidate | None,
    depths: Iterable[int],
    resolutions: Iterable[int],
    force_depth_growth: bool = False,
) -> tuple[Candidate, ...]:
    """The candidates of one search.

    Without a current network: first, middle and last level of both dimensions. Later: the current resolution and the
    next, with the current depth and the next two; a search may thus keep the network as it is.

    Args:
        current: (depth, resolution) of the running network; None at the first stage.
        depths: levels of the depth, in any order; duplicates are dropped.
        resolutions: levels of the resolution.
        force_depth_growth: leave the current depth out unless it is the largest, and take the next three (as the
            authors' code does).

    Returns:
        At least one candidate, none smaller than `current` in either dimension.
    """
    depths, resolutions = sorted(set(depths)), sorted(set(resolutions))
    if current is None:
        return _product(_spread(depths), _spread(resolutions))
    depth, resolution = current
    deeper = [d for d in depths if d > depth]
    larger = [r for r in resolutions if r > resolution]
    own = deeper[:3] or [depth] if force_depth_growth else [depth, *deeper[:2]]
    return _product(own, [resolution, *larger[:1]])


def unfreezing_candidates(
    current: Candidate | None, unfreezing: Iterable[int], resolutions: Iterable[int]
) -> tuple[Candidate, ...]:
    """Candidates (unfreezing level, resolution) of staged unfreezing: {current, next} in both dimensions.

    Args:
        current: (level, resolution) of the stage before; None at the first stage, which takes the first two of each.
        unfreezing: levels 1..K; duplicates are dropped.
        resolutions: levels of the resolution.

    Source: AutoProg-Zero (arXiv 2410.00350).
    """
    unfreezing, resolutions = sorted(set(unfreezing)), sorted(set(resolutions))
    if current is None:
        return _product(unfreezing[:2], resolutions[:2])
    level, resolution = current
    return _product(
        [level, *[u for u in unfreezing if u > level][:1]],
        [resolution, *[r for r in resolutions if r > resolution][:1]],
    )


def draw(candidates: Sequence[Candidate], seed: int, step: int) -> Candidate:
    """The sub-network that step `step` of a search trains: depth and resolution uniform and independent.

    A pure function of its arguments, equal on every rank; no generator is read or moved.

    Args:
        candidates: a full product of depths and resolutions.
        seed: seed of the run.
        step: optimizer step of the run.
    """
    depths, resolutions = sorted({d for d, _ in candidates}), sorted({r for _, r in candidates})
    assert len(set(candidates)) == len(depths) * len(resolutions), f"not a product: {candidates}"
    u, v = uniforms(seed, _STREAM, np.array([step]), 2)[0]
    return depths[int(u * len(depths))], resolutions[int(v * len(resolutions))]


def _spread(values: Sequence[int]) -> list[int]:
    return sorted({values[0], values[len(values) // 2], values[-1]})


def _product(depths: Sequence[int], resolutions: Sequence[int]) -> tuple[Candidate, ...]:
    return tuple((d, r) for r in resolutions for d in depths)
