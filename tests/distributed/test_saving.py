"""Checkpoints in the background, on a full disk, after a kill, with one rank that fails, and in DeepSpeed's form."""

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


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "dtype"), [(2, "bf16"), pytest.param(3, "fp32", marks=slow), pytest.param(0, "fp32", marks=slow)]
)
def test_the_form_of_deepspeed_where_one_rank_fails(ranks, tmp_path, stage, dtype):
    for result in ranks(jobs.native_fails_job, str(tmp_path), stage, dtype):
        for writer, text in zip([0, 1, 0] if stage else [0], result["texts"], strict=True):
            assert f"rank {writer}: OSError: [Errno 28] No space left on device" in text
            assert "DeepSpeed could not write its checkpoint" in text
        assert result["left"] == ["first"]
        assert result["latest"] == "first"
        assert result["next"] == "second"
        both, one = result["refused"]
        assert 'found keep and background together with form="deepspeed"' in both
        assert 'found background together with form="deepspeed"' in one
        assert "is damaged" in result["damaged"]
        assert ("(rank 1 of 2)" in result["damaged"]) == bool(stage)
        assert "third" in result["missing"]
        assert result["unchanged"]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=slow)])
def test_one_rank_that_cannot_copy_or_read(ranks, tmp_path, stage):
    for result in ranks(jobs.read_fails_job, str(tmp_path), stage):
        assert "rank 0: OSError: [Errno 5] Input/output error" in result["frozen"]
        assert "read in part only, the engine cannot be used any more (rank 1 of 2)" in result["read"]
        assert result["again"] is None


def test_a_tag_that_was_being_replaced_is_found(ranks, tmp_path):
    for result in ranks(jobs.recovered_job, str(tmp_path)):
        assert result["path"] == str(tmp_path / "last")
        assert not result["state"]


@pytest.mark.parametrize("background", [True, pytest.param("sync", marks=slow)])
def test_leaving_completes_a_save_or_gives_up(ranks, tmp_path, background):
    first, second = ranks(jobs.leaving_job, str(tmp_path), background)
    for result in (first, second):
        assert result["sealed"] == ["latest", "step-00000001"]  # on both ranks before they went on
        assert result["idle"]
        assert result["left"] == ["latest", "step-00000001"]
        assert result["latest"] == "step-00000001"
    assert first["seconds"] >= 0.3
