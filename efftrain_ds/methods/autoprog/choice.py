"""The choice of a search: the candidate furthest below the common trade-off between loss and time.

The score of a candidate is ``L T^alpha``; alpha is no constant but fitted on the candidates of the search itself, so
that candidates on the common curve ``L = a T^-alpha`` score alike (Li et al., CVPR 2022, arXiv 2203.14509).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.errors import DivergenceError

_TIE = 1e-6
_SAME_TIME = 1e-9


@dataclass(frozen=True)
class Choice:
    """Outcome of a search.

    Attributes:
        index: the chosen candidate.
        alpha: weight of the time, at least 0.
        scores: ``L T^alpha`` by candidate, smaller is better; inf for candidates that were left out.
    """

    index: int
    alpha: float
    scores: tuple[float, ...]


def fit_alpha(times: Sequence[float], losses: Sequence[float]) -> float:
    """Exponent of the loss-time trade-off: unweighted least squares of ``y = a2 x^a1``, returned as max(-a1, 0).

    Levenberg-Marquardt from the line through the logarithms; the unit of the times does not matter.

    Args:
        times: [n] seconds, MACs or any other cost, all positive.
        losses: [n] finite losses.

    Returns:
        alpha; 0 where all times are equal or the loss does not fall with time.
    """
    x, y = np.asarray(times, np.float64), np.asarray(losses, np.float64)
    scale = np.abs(y).mean()
    if x.max() - x.min() <= _SAME_TIME * x.max() or scale == 0:
        return 0.0
    u = np.log(x)
    u, y = u - u.mean(), y / scale
    exponent = float(np.polyfit(u, np.log(y), 1)[0]) if (y > 0).all() else 0.0
    factor = _factor(exponent, u, y)
    damping, cost = 1e-3, _cost(exponent, factor, u, y)
    for _ in range(200):
        curve = np.exp(exponent * u)
        jacobian = np.stack([factor * u * curve, curve], 1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ (factor * curve - y)
        if normal[0, 0] == 0:  # the best factor is 0: no exponent is better than another
            return 0.0
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
        tried = _cost(exponent + step[0], factor + step[1], u, y)
        if tried <= cost:
            exponent, factor, cost = exponent + float(step[0]), factor + float(step[1]), tried
            damping = max(damping / 10, 1e-12)
            if abs(step[0]) <= 1e-12 * (1 + abs(exponent)):
                break
        else:
            damping *= 10
            if damping > 1e12:
                break
    return max(-exponent, 0.0)


def choose(times: Sequence[float], losses: Sequence[float], previous_alpha: float | None = None) -> Choice:
    """Choose the candidate with the smallest score ``L T^alpha``.

    With one or two candidates, or times that are all equal, nothing can be fitted: alpha is that of the previous
    search, or 0 (the smallest loss wins). Scores within a relative 1e-6 tie, and the shorter time wins.

    Args:
        times: [n] cost of a step of each candidate, positive.
        losses: [n] losses; candidates with a loss or a time that is not finite are left out.
        previous_alpha: alpha of the search before.

    Raises:
        DivergenceError: no candidate has a finite loss.
    """
    x, y = np.asarray(times, np.float64), np.asarray(losses, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"one time and one loss a candidate, found {x.shape} and {y.shape}")
    usable = np.isfinite(y) & np.isfinite(x) & (x > 0)
    if not usable.any():
        raise DivergenceError(
            f"autoprog search: none of the {len(x)} candidates has a finite loss (losses {y.tolist()}, "
            f"costs {x.tolist()}); lower the learning rate or check the data"
        )
    t, loss = x[usable], y[usable]
    if len(t) <= 2 or t.max() - t.min() <= _SAME_TIME * t.max():
        alpha = 0.0 if previous_alpha is None else previous_alpha
    else:
        alpha = fit_alpha(t, loss)
    scores, relative = np.full(len(x), math.inf), np.full(len(x), math.inf)
    with np.errstate(over="ignore"):
        scores[usable] = loss * t**alpha
        # compared in a unit of the times that cannot overflow; the order is the same in every unit
        relative[usable] = loss * (t / t.max()) ** alpha
    best = relative.min()
    tied = np.flatnonzero(usable & (relative <= best + _TIE * abs(best)))
    index = min(tied.tolist(), key=lambda i: (x[i], i))
    return Choice(index, alpha, tuple(scores.tolist()))


def _factor(exponent: float, u: np.ndarray, y: np.ndarray) -> float:
    """The best factor for this exponent (linear least squares)."""
    curve = np.exp(exponent * u)
    return float(curve @ y / (curve @ curve))


def _cost(exponent: float, factor: float, u: np.ndarray, y: np.ndarray) -> float:
    """Sum of squared residuals; inf where the curve overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        cost = float(np.square(factor * np.exp(exponent * u) - y).sum())
    return cost if math.isfinite(cost) else math.inf
