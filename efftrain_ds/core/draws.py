"""Cheap counter-based draws for single samples: a pure function of (seed, stream, position), never of rank or worker.

A generator object costs tens of microseconds to construct, too much for one sample; this is one hash of a counter
(the finaliser of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np

from .rng import derive_seed

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser, a bijection of 64-bit words; uint64 of any shape to the same shape (a new array)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def words(seed: int, stream: str, positions: np.ndarray, n: int) -> np.ndarray:
    """Random 64-bit words for each position.

    Args:
        seed: seed of the run.
        stream: name of the purpose; other names give independent words.
        positions: [P] integers (any sign).
        n: words a position; word j does not depend on n.

    Returns:
        [P, n] uint64.
    """
    key = np.uint64(derive_seed(seed, stream))
    counters = np.atleast_1d(np.asarray(positions)).astype(np.int64).view(np.uint64)
    base = mix64(counters * _GAMMA + key)
    # Second keyed mix: consecutive words of one position are far apart from those of every other position.
    return mix64(base[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GAMMA)


def uniforms(seed: int, stream: str, positions: np.ndarray, n: int) -> np.ndarray:
    """Uniform draws in [0, 1) with 53 random bits for each position.

    Args:
        seed: seed of the run.
        stream: name of the purpose; other names give independent draws.
        positions: [P] integers, places of the samples in the endless training order.
        n: draws a position; draw j does not depend on n.

    Returns:
        [P, n] float64.
    """
    return (words(seed, stream, positions, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53
