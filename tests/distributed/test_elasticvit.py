"""Supernet training on two ranks: one step's sub-networks, equal choices, resuming, evaluation, calibration."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import elasticvit_jobs as jobs
from tests.pool import free_port

pytestmark = pytest.mark.dist

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "decay", "agc", "hybrid"),
    [
        (2, False, 0.1, False),
        pytest.param(0, False, None, False, marks=SLOW),
        pytest.param(1, False, None, False, marks=SLOW),
        pytest.param(2, False, None, False, marks=SLOW),
        pytest.param(3, False, None, False, marks=SLOW),
        pytest.param(1, True, None, False, marks=SLOW),
        pytest.param(3, True, None, False, marks=SLOW),
        pytest.param(0, False, 0.1, False, marks=SLOW),
        pytest.param(1, False, 0.1, False, marks=SLOW),
        pytest.param(3, False, 0.1, False, marks=SLOW),
        pytest.param(3, True, 0.1, False, marks=SLOW),
        pytest.param(0, False, None, True, marks=SLOW),
        pytest.param(1, False, 0.1, True, marks=SLOW),
        pytest.param(2, False, None, True, marks=SLOW),
        pytest.param(3, False, 0.1, True, marks=SLOW),
        pytest.param(3, True, None, True, marks=SLOW),
    ],
)
def test_a_step_is_one_backward_of_the_sum_and_unused_blocks_stay(ranks, stage, decay, agc, hybrid):
    results = ranks(jobs.step_job, stage, decay, agc, hybrid)
    for result in results:
        assert result["worst"] <= 1e-6 < 0.01 * result["moved"]
        assert result["configs"] == results[0]["configs"]
        assert result["skipped"]
        assert result["finite"]


@pytest.mark.slow
def test_ranks_choose_alike(ranks):
    first, second = ranks(jobs.agreement_job, 200)
    assert first["drawn"] == second["drawn"]
    assert first["bank"] == second["bank"]
    assert first["size"] > 6
    assert 0.3 < first["explored"] < 1


@pytest.mark.parametrize(
    ("stage", "stops"), [(1, [3]), pytest.param(2, [4], marks=SLOW), pytest.param(3, [5], marks=SLOW)]
)
def test_resumed_training_is_the_same(ranks, tmp_path, stage, stops):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, stops):
        assert result["problems"] == []
        assert result["bank"]


@pytest.mark.slow
def test_evaluation_of_chosen_sub_networks(ranks, tmp_path):
    first, second = ranks(jobs.evaluation_job, str(tmp_path))
    assert first["results"] == second["results"]
    names = {f"{v}{e}{k}" for v in ("", "largest_", "level1_") for e in ("", "ema_") for k in ("top1", "top5", "loss")}
    assert set(first["results"]) == names
    assert first["training"]
    assert first["momentum"] == {0.1}
    assert first["config"] is None
    assert "level1_top1" in first["screen"]


def test_calibration_pools_the_ranks(ranks):
    first, second = ranks(jobs.calibration_job)
    assert first["all"] == second["all"]
    assert first["count"] == 32
    assert first["mean"] < 1e-6
    assert first["var"] < 3e-3  # the variances of the batches are unbiased ones
    assert set(first["unused"]) <= {1.0}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_shrunken_supernet_learns_and_resumes(ranks, tmp_path):
    first, second = ranks(jobs.learning_job, str(tmp_path), 200, 120)
    assert first["after"] == second["after"]
    assert first["losses"] != second["losses"]  # other images on each rank
    assert all(math.isfinite(loss) for loss in first["losses"])
    for kind in ("smallest", "random"):
        before, after = (sum(first[when][kind]) / len(first[when][kind]) for when in ("before", "after"))
        assert after < before - 0.02  # 3,200 images; the smallest learn from the others alone
        assert all(math.isfinite(x) for x in first["after"][kind])
    assert sum(first["sizes"]) > 0.8 * sum(first["capacity"])
    assert first["different"] == second["different"] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_timm_model_teaches(ranks, tmp_path):
    for found in ranks(jobs.teacher_job, str(tmp_path)):
        for count in (1, 2):
            assert found[f"teachers{count}"] == count
            assert found[f"wrong{count}"] < 1e-5
            assert found[f"frozen{count}"]
        assert found["closer2"] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tables", "teacher"])
def test_ranks_of_a_loop_of_ones_own_prepare_together(tmp_path, case):
    port, started = str(free_port()), []
    for rank in ("0", "1"):
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "tests.distributed.elasticvit_jobs", case, str(tmp_path)]
        started.append(subprocess.Popen(command, env=env, cwd=Path(__file__).resolve().parents[2]))
    try:
        assert [process.wait(300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    assert not first["before"]
    assert first["ranks"] == second["ranks"] == 2
    assert first == second
    if case == "tables":
        assert len(first["tables"]) == 3
    else:
        assert "(rank 1 of 2): efftrain.methods.elasticvit.teachers.0.weights" in first["error"]
        assert "no such file" in first["error"]
