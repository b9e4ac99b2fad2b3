"""Replay and larger early batches on two ranks, in the whole loop."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from tests.distributed import replay_jobs as jobs
from tests.distributed import train_jobs

pytestmark = pytest.mark.dist


@pytest.mark.slow
def test_resume_in_mid_stage_is_exact(ranks, tmp_path):
    """Two stages of 5 and 2 steps; one warm-up step of 12 samples a rank, then 6 new ones a step."""
    for result in ranks(jobs.resume_job, str(tmp_path), 1, [3], False, jobs.SHORT):
        assert result["problems"] == []
        assert result["refills"] == {3: [12 + 6 + 6]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "large", "refilled"),
    [(0, True, {3: True, 8: False}), (2, False, {6: False, 13: True}), (3, True, {6: True, 20: False})],
)
def test_resume_anywhere_is_exact(ranks, tmp_path, stage, large, refilled):
    """In warm-up, at a switch, in the middle, in a stage without replay; with workers and half precision."""
    more = {"efftrain/data/workers": 1, "bf16": {"enabled": True}, "efftrain/run/steps": 24}
    for result in ranks(jobs.resume_job, str(tmp_path), stage, list(refilled), large, more):
        assert result["problems"] == []
        assert {stop: bool(counts) for stop, counts in result["refills"].items()} == refilled


@pytest.mark.slow
def test_steps_and_rates_are_those_without_replay_and_samples_are_counted_apart(ranks, tmp_path):
    plain = ranks(partial(jobs.logged_run, replay=False), str(tmp_path / "plain"), 1)
    both = ranks(partial(jobs.logged_run, replay=True), str(tmp_path / "replay"), 1)
    for a, b in zip(plain, both, strict=True):
        assert a["sides"] == b["sides"]  # step, side and size of every micro-batch
        assert [e["lr"] for e in a["log"]] == [e["lr"] for e in b["log"]]
        assert (a["steps"], a["samples"], a["batches"]) == (b["steps"], b["samples"], b["batches"])
        assert a["consumed"] == a["samples"] == a["total_loaded"]
        assert b["consumed"] == b["total_loaded"] < b["samples"]
        assert [e["fresh"] for e in b["log"]] == b["loaded"]
        assert [e["fresh"] + e["replayed"] for e in b["log"]] == [24 * (i + 1) for i in range(b["steps"])]
        assert "fresh" not in a["log"][0]
    assert "replay" in both[0]["screen"]
    assert len({i for result in both for ids in result["ids"] for i in ids}) == both[0]["total_loaded"]


@pytest.mark.slow
def test_larger_early_batches_train(ranks, tmp_path):
    for result in ranks(partial(jobs.logged_run, large=True, replay=False), str(tmp_path), 2):
        assert set(result["batches"]) == {96, 24}
        rates = [e["lr"] for e in result["log"]]
        assert len(rates) == result["steps"]
        first = next(i for i, (_, side, _) in enumerate(result["sides"]) if side != 12)
        assert max(rates[:first]) > 1.9 * 1e-3


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_where_the_loader_was(ranks, tmp_path):
    options = jobs.changes(**{"efftrain/run/steps": 16, "efftrain/data/streams": 60})
    whole = ranks(train_jobs.loss_of_run, str(tmp_path / "w"), 1, options)
    shutil.copytree(tmp_path / "w", tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 6:
            shutil.rmtree(path)
    rest = ranks(train_jobs.loss_of_run, str(tmp_path / "r"), 1, options, world=1)[0]
    assert "resumed from step-00000006" in rest["screen"]
    assert len(rest["ids"]) == 10 * 24
    # the same samples are loaded, whoever draws the others
    later = {i for result in whole for i in result["ids"][6 * 12 :]}
    assert len(set(rest["ids"]) & later) > 0.8 * len(later)
