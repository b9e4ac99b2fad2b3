"""Masked autoencoders on two ranks: steps against one process, resuming, and fine-tuning from a pre-training."""

from __future__ import annotations

import pytest

from tests.distributed import mae_jobs as jobs

pytestmark = pytest.mark.dist

SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=SLOW) for s in (0, 1, 3))])
def test_steps_equal_those_of_one_process(ranks, stage):
    for result in ranks(jobs.step_job, stage):
        assert result["worst"] <= 1e-5 < 1e-3 * result["moved"]
        assert result["losses"] <= 1e-5
        assert result["still"] == []  # every parameter moves in every step, also after the switch


@pytest.mark.parametrize(("stage", "stops"), [pytest.param(s, [2, 4], marks=SLOW) for s in (1, 2, 3)])
def test_resumed_pre_training_is_the_same(ranks, tmp_path, stage, stops):
    assert ranks(jobs.resume_job, str(tmp_path), stage, stops) == [[], []]


@pytest.mark.parametrize("stage", [3, *(pytest.param(s, marks=SLOW) for s in (0, 1, 2))])
def test_a_classifier_starts_from_a_pre_training(ranks, tmp_path, stage):
    first, second = ranks(jobs.fine_tune_job, str(tmp_path), stage)
    for result in (first, second):
        assert result["problems"] == []
        assert result["from_checkpoint"] == 3 + 2 * 12  # token, patch embedding, two blocks
        assert result["positions"]
        assert 1e-5 < result["head"] < 3e-5
        assert result["rates"] == pytest.approx([1.0, 0.65, 0.65**2, 0.65**3], abs=1e-5)
        assert result["order"] is None
        assert result["held_out"] == first["held_out"]
        assert result["results"] == first["results"]
    assert set(first["held_out"]) == {"loss", "ema_loss"}
    assert 0.5 < first["held_out"]["loss"] < 2  # of standardised pixels
    assert "top1" in first["results"]
    assert "mask 0.75" in first["screens"][0]
    assert "(of a masked autoencoder)" in first["screens"][1]
    pictures = {path.name for path in (tmp_path / "pretrain" / "pictures").glob("*.png")}
    assert "mae-seen_visible_predicted-step-00000000.png" in pictures
    assert len(pictures) == 4
