"""Several forward and backward passes over a micro-batch: their gradients are summed, on every ZeRO stage."""

from __future__ import annotations

import pytest

from tests.distributed import pass_jobs as jobs

pytestmark = pytest.mark.dist


def _check(results, limit: float) -> None:
    order = [(step, index) for step in range(3) for _ in range(2) for index in range(3)]
    for result in results:
        assert result["worst"] <= limit < 0.1 * result["moved"]
        assert result["seen"] == order
        assert result["steps"] == 3
        assert "each_pass" in result["outside"]


@pytest.mark.parametrize(
    "stage",
    [
        2,
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_passes_are_one_backward_of_the_sum(ranks, stage):
    _check(ranks(jobs.passes_job, stage), 1e-6)
