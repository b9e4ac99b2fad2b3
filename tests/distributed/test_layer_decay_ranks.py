"""Learning rates by layer under ZeRO 0-3: the rates, an equal run in one process, and what a change of blocks keeps."""

from __future__ import annotations

import pytest

from tests.distributed import layer_decay_jobs as jobs

pytestmark = pytest.mark.dist


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rates_by_layer_are_kept_by_partitions_and_rebuilds(ranks, stage):
    for result in ranks(jobs.layer_decay_job, stage):
        assert result["wrong"] == []
        assert result["error"] < 2e-6
