import math

import numpy as np
import pytest

from efftrain_ds.core.errors import DivergenceError, EffTrainError
from efftrain_ds.cost.macs import vit_macs
from efftrain_ds.methods.autoprog.candidates import candidates
from efftrain_ds.methods.autoprog.choice import choose, fit_alpha

TENTHS = (0.1, 0.2, 0.3, 0.4)
ON_CURVE = tuple(5 * t**-0.1 for t in TENTHS)
GRID = candidates(None, (6, 8, 10, 12), (128, 160, 192, 224))
GRID_COST = [vit_macs(r, dim=384, depth=d) / vit_macs(224, dim=384, depth=12) for d, r in GRID]
GRID_LOSS = (6.30, 6.26, 6.25, 6.20, 6.10, 6.09, 6.17, 6.07, 6.06)


@pytest.mark.parametrize(
    ("times", "losses", "alpha", "index"),
    [
        (TENTHS, ON_CURVE, 0.100, 0),
        (TENTHS, (*ON_CURVE[:2], ON_CURVE[2] * 0.98, ON_CURVE[3]), 0.106, 2),
        (TENTHS, (4.0, 4.1, 4.2, 4.3), 0.0, 0),
        ((1, 2, 4, 8), (4.0, 3.6, 3.3, 3.1), 0.1250, 2),
        ((1, 2, 4, 8), (4.0, 3.9, 3.1, 3.0), 0.1562, 2),
        ((1, 2, 4), (3.0, 2.4, 2.3), 0.2034, 1),
        (GRID_COST, GRID_LOSS, 0.0238, 4),
    ],
    ids="abcdefg",
)
def test_oracles(times, losses, alpha, index):
    for unit in (1.0, 1e-3, 1e3):
        choice = choose([t * unit for t in times], losses)
        assert choice.alpha == pytest.approx(alpha, abs=2e-3)
        assert choice.index == index
        assert choice.alpha == pytest.approx(choose(times, losses).alpha, abs=1e-9)


def test_scores():
    assert choose(TENTHS, ON_CURVE).scores == pytest.approx([5.0] * 4, rel=1e-6)
    assert choose((1, 2, 4, 8), (4.0, 3.6, 3.3, 3.1)).scores == pytest.approx((4.000, 3.926, 3.924, 4.020), abs=1e-3)
    assert GRID[choose(GRID_COST, GRID_LOSS).index] == (10, 192)


def test_the_fit_is_the_least_squares_optimum():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = np.exp(rng.uniform(-3, 3, 9)) * 1e9
        y = 3 * (x / 1e9) ** -0.4 * np.exp(rng.normal(0, 0.5, 9))

        def cost(alpha, x=x / 1e9, y=y):
            curve = x**-alpha
            return np.square(curve @ y / (curve @ curve) * curve - y).sum()

        grid = np.linspace(0, 3, 30001)
        best = grid[np.argmin([cost(a) for a in grid])]
        assert fit_alpha(x, y) == pytest.approx(best, abs=2e-4)


def test_too_few_points_reuse_alpha():
    assert choose([3.0], [2.0]).index == 0
    assert [choose((1, 2), (3.0, 2.4), previous).index for previous in (0.1, 0.5, None)] == [1, 0, 1]
    assert choose((1, 2), (3.0, 2.4), 0.5).alpha == 0.5
    same = choose((2, 2, 2), (3.0, 2.4, 2.5), 0.3)
    assert (same.index, same.alpha) == (1, 0.3)
    assert fit_alpha((2, 2, 2), (3.0, 2.4, 2.5)) == 0


def test_steep_fits_do_not_overflow():
    times = [1e10 * (1 + i * 1e-4) for i in range(3)]
    choice = choose(times, (9.0, 3.0, 2.0))
    assert choice.alpha > 1000
    assert choice.index == 1  # by far the furthest below the curve, though every score is beyond a float


def test_ties_take_the_faster():
    assert choose((4, 1, 2), (3.0, 3.0, 3.0)).index == 1  # alpha 0, equal losses
    assert choose((2, 1), (3.0, 3.0 * (1 + 5e-7))).index == 1
    assert choose((2, 1), (3.0, 3.0 * (1 + 5e-6))).index == 0


def test_bad_losses_are_left_out():
    clean = choose((1, 2, 4), (3.0, 2.4, 2.3))
    choice = choose((1, 1.5, 2, 3, 4), (3.0, math.nan, 2.4, math.inf, 2.3))
    assert (choice.index, choice.alpha) == (2, clean.alpha)
    assert choice.scores[1] == choice.scores[3] == math.inf
    assert choose((1, 2, 4), (math.nan, 2.4, 2.3), 0.5).alpha == 0.5  # two points left
    assert choose((1, math.nan), (3.0, 2.0)).index == 0
    with pytest.raises(DivergenceError, match="none of the 2 candidates"):
        choose((1, 2), (math.nan, math.inf))
    assert issubclass(DivergenceError, EffTrainError)
    with pytest.raises(ValueError, match="one time and one loss"):
        choose((1, 2), (3.0,))
