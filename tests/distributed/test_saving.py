"""Checkpoints in the background, on a full disk, and in DeepSpeed's form."""

from __future__ import annotations

import pytest

from tests.distributed import saving_jobs as jobs

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("stage", "dtype", "background"),
    [
        (0, "fp32", True),
        (2, "bf16", True),
        (2, "bf16", "sync"),
        pytest.param(3, "fp32", True, marks=pytest.mark.slow),
        *(pytest.param(stage, "fp32", "sync", marks=pytest.mark.slow) for stage in (0, 3)),
    ],
)
def test_background_save_holds_the_state_of_its_moment(ranks, tmp_path, stage, dtype, background):
    for result in ranks(jobs.background_job, str(tmp_path), stage, dtype, background):
        assert result["unfinished"]
        assert result["client"] == {"n": 3}
        assert not result["at_load"]
        assert result["losses"]
        assert not result["at_end"]
        assert result["files"] == [
            "manifest.json",
            "rank-00000.json",
            "rank-00000.safetensors",
            "rank-00001.json",
            "rank-00001.safetensors",
            "state.json",
            "state.safetensors",
        ]
        assert result["left"] == ["latest", "step-00000003"]


@pytest.mark.parametrize(
    ("background", "fault", "named"),
    [
        (False, "save.rank_file:oserror,rank=1", "rank 1: OSError: [Errno 28] No space left on device"),
        (False, "save.before_manifest:oserror", "rank 0: OSError: [Errno 28] No space left on device"),
        (True, "save.rank_file:oserror,rank=1", "rank 1: OSError: [Errno 28] No space left on device"),
        (True, "save.rank_file:oserror,rank=0,hit=2", "rank 0: OSError: [Errno 28] No space left on device"),
        (True, "save.before_rename:oserror", "rank 0: OSError: [Errno 28] No space left on device"),
        ("sync", "save.rank_file:oserror,rank=1", "rank 1: OSError: [Errno 28] No space left on device"),
        ("sync", "save.before_sync:oserror,rank=1", "rank 1: OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_costs_one_checkpoint(ranks, tmp_path, background, fault, named):
    for result in ranks(jobs.failing_job, str(tmp_path), background, fault):
        assert named in result["text"]
        assert "earlier checkpoints are untouched" in result["text"]
        assert result["after_failure"] == ["latest", "step-00000001"]
        assert result["latest"] == "step-00000001"
        assert result["retried"]
        assert result["step"] == 2


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_the_form_of_deepspeed(ranks, tmp_path, stage, dtype):
    for result in ranks(jobs.native_job, str(tmp_path), stage, dtype):
        assert result["n"] == 3
        assert result["step"] == 3
        assert not result["weights"]
        assert not result["state"]
        assert "DeepSpeed's own form" in result["refused"]
