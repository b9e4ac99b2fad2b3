"""Clipping by unit on two ranks against the same on whole tensors."""

from __future__ import annotations

import pytest

from tests.distributed import agc_jobs as jobs

pytestmark = pytest.mark.dist

SLOW = pytest.mark.slow
CELLS = [
    pytest.param(2, "fp32", {}, False, id="2-fp32"),
    *(
        pytest.param(stage, dtype, {}, False, id=f"{stage}-{dtype}", marks=SLOW)
        for stage in range(4)
        for dtype in ("fp32", "bf16", "fp16", "bf16_fp32")
        if (stage, dtype) not in ((2, "fp32"), (0, "fp16"), (0, "bf16_fp32"), (2, "bf16_fp32"), (3, "bf16_fp32"))
    ),
    *(
        pytest.param(stage, dtype, {"offload": True}, False, id=f"{stage}-{dtype}-offload", marks=SLOW)
        for stage, dtype in ((1, "fp32"), (2, "bf16"), (2, "fp16"), (3, "fp32"), (3, "bf16"))
    ),
    *(pytest.param(stage, "fp32", {}, True, id=f"{stage}-masks", marks=SLOW) for stage in range(4)),
]


@pytest.mark.parametrize(("stage", "dtype", "extra", "masks"), CELLS)
def test_clipped_as_on_whole_tensors(ranks, stage, dtype, extra, masks):
    for found in ranks(jobs.clip_job, stage, dtype, extra, masks):
        assert found["worst"] < 1e-6
        assert 0.1 < found["short"] / found["units"] < 0.95
        assert (found["splits"] > 0) == (stage > 0)
        assert found["gradient"] < (1e-5 if dtype == "fp32" else 0.1)
        assert found["trajectory"] < (1e-5 if dtype == "fp32" else 0.05)
        assert found["strays"] == {}
        assert found["removed"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_skipped_step_is_not_clipped(ranks, stage):
    for found in ranks(jobs.overflow_job, stage):
        assert found == {"skipped": True, "calls": 0, "same": True, "goes_on": True}


@pytest.mark.slow
def test_what_cannot_be_clipped_is_refused(ranks):
    for both, half in ranks(jobs.refused_job):
        assert both.startswith("gradient_clipping: 1 beside clipping by unit")
        assert half.startswith("fp16 with zero_optimization.stage 0")
