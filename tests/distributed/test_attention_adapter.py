"""Block attention in a ViT under ZeRO 1 and 3 on two gloo ranks: checkpoints, rebuilds, partitioned weights."""

from __future__ import annotations

import pytest

from tests.distributed import attention_jobs as jobs

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_masks_and_training_go_on(ranks, tmp_path, stage):
    for found in ranks(jobs.adapter_job, str(tmp_path), stage):
        assert len(found["other_masks"]) > 0, "the fresh engine starts with other masks"
        assert found["masks"] == []
        assert found["losses_equal"]
        assert found["state"] == []
        assert found["new_objects"], "a rebuild makes other modules"
        assert found["rebuilt"] == []
        assert found["adapted"] == found["routes"] == list(jobs.LAYERS)
        assert found["goes_on"]


def test_weights_partitioned_before_the_masks(ranks):
    for partitioned, plain in ranks(jobs.partitioned_job):
        assert plain == pytest.approx(partitioned, abs=1e-6)
