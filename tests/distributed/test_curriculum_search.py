"""``efftrain search curriculum`` on two gloo ranks: through the real trainer, ended and gone on with, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import curriculum_jobs as jobs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.dist


def check(result: dict, algorithm: str) -> None:
    assert result["differences"] == []
    assert result["journal"] == result["decisions"]
    assert result["extent"][0] - 1e-9 <= result["spent"] <= result["extent"][1] + 1e-9
    assert result["relative"] <= 1.02
    assert result["val"] == "bundled:fashion_mnist/val"
    assert result["hold_out"] is None
    assert result["checkpoints"] == []
    if result["sizes"] is None:
        assert result["schedule"] is None
        assert result["epochs"] == 2
    else:
        rows = result["schedule"]["schedule"]
        assert result["schedule"]["search"] is None
        assert result["schedule"]["pacing"] == ("samples" if algorithm == "et" else "compute")
        assert [rows[0]["bandwidth"], rows[-1]["bandwidth"]] == [result["sizes"][0], result["sizes"][-1]]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stage_search_ended_in_a_training_and_gone_on_with(ranks, tmp_path, world):
    search = {"candidates": [12], "tune": 0.2, "check": False}
    first, *others = ranks(jobs.search_job, str(tmp_path), search, [8], world=world)
    check(first, "et++")
    assert [name for name, _ in first["results"]] == ["stage1-B12", "stage1-B28"]
    assert "times the baseline" in first["screen"]
    assert all(other["results"] == first["results"] and other["screen"] == "" for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "search"),
    [("et++", {"stages": 3, "candidates": [12, 20], "tune": 0.2}), ("et", {"stages": 3, "tolerance": 0.1})],
)
def test_searches_ended_anywhere(ranks, tmp_path, algorithm, search):
    result = ranks(jobs.search_job, str(tmp_path), {"algorithm": algorithm, **search}, [1, 10, 11, 14, 17, 18, 25])[0]
    check(result, algorithm)


@pytest.mark.slow
def test_what_is_refused(ranks, tmp_path):
    said = ranks(jobs.refused_job, str(tmp_path))
    assert said[0] == said[1]
    other, limit, candidate, stages, seed, small, broken = said[0]
    assert "tolerance: 0.0 -> 0.01" in other
    assert limit.startswith("3 ")
    assert "max_epochs" in limit
    assert candidate.startswith("3 ")
    assert "10 is not a multiple" in candidate
    assert stages.startswith("3 ")
    assert "optimizer steps" in stages
    assert "efftrain.run.seed: 0 -> 5" in seed
    assert "nothing left to train on" in small
    assert "not the state of a curriculum search" in broken


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_started_again_by_the_launcher(tmp_path):
    """SIGKILL in a stage, in its tuning and in the next candidate; the same command goes on and finds the same."""
    from tests.pool import free_port

    search = {"stages": 2, "candidates": [12], "tune": 0.2, "check": False}
    search["hold_out"] = {"per_class": 5, "train_share": 0.04}
    changes = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 16,
        "efftrain.run.epochs": 3,
        "efftrain.data.workers": 0,
        "efftrain.checkpoint.every": "1st",
        "efftrain.methods.efficienttrain.search": search,
    }

    def command(folder: Path) -> list[str]:
        words = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
        words += ["--master_port", str(free_port()), "launch/train.py", "--search", "curriculum"]
        words += ["--ds_config", "ds_configs/smoke_curriculum_search_vit_fmnist.json"]
        for key, value in {**changes, "efftrain.run.output": str(folder)}.items():
            words += ["--set", f"{key}={json.dumps(value)}"]
        return words

    def complete(folder: Path) -> tuple[dict, str]:
        done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads((folder / "curriculum" / "search.json").read_text()), done.stdout

    def kill_at(sign: str) -> bool:
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        with subprocess.Popen(command(tmp_path / "b"), cwd=ROOT, **options) as process:
            end, seen = time.monotonic() + 600, False
            while not seen and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
                seen = any((tmp_path / "b" / "curriculum" / "trials").glob(sign))
            os.killpg(process.pid, signal.SIGKILL)
        return seen

    for sign in ("stage1-B12/checkpoints/step-*2", "stage1-B12-tune/checkpoints", "stage1-B28/checkpoints/step-*1"):
        assert kill_at(sign), sign
    found, shown = complete(tmp_path / "b")
    assert "resumed  1 trainings are done" in shown
    assert "stage1-B28: " in shown
    assert "stage1-B12: " not in shown.split("cost", 1)[1]
    assert found == complete(tmp_path / "a")[0]
