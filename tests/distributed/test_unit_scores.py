"""Scores of heads and neurons: ZeRO 0-3 on two gloo ranks."""

from __future__ import annotations

import pytest

from tests.distributed import unit_jobs as jobs

pytestmark = pytest.mark.dist
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "dtype", "extra"),
    [
        pytest.param(0, "fp32", {}, marks=slow),
        pytest.param(1, "bf16", {}, marks=slow),
        pytest.param(2, "fp16", {"offload": True}, marks=slow),
        pytest.param(3, "fp32", {"stage3_param_persistence_threshold": 0}, marks=slow),
        pytest.param(3, "fp16", {}, marks=slow),
        pytest.param(3, "bf16", {"offload_param": {"device": "cpu"}, "offload": True}, marks=slow),
        pytest.param(1, "fp32", {"autocast": True}, marks=slow),
        pytest.param(2, "fp32", {"compiled": True}, marks=slow),
    ],
)
def test_scores_of_the_global_batch(ranks, stage, dtype, extra):
    answers = ranks(jobs.scores_job, stage, dtype, extra)
    exact = dtype == "fp32" and "autocast" not in extra
    for found in answers:
        assert found["worst"] < (1e-5 if exact else 0.1)
        assert found["images"] == {16}
        assert found["collectives"] == 1
        if "compiled" not in extra:  # compiled code rounds differently from the eager step of the probe
            assert found["losses"]
            assert found["changed"] == []
    assert answers[0]["sums"] == answers[1]["sums"]
