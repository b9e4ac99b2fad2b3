"""launch/train.py as a user starts it: through the DeepSpeed launcher, with its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from efftrain_ds.zero.shared_buffers import FOLDER, PREFIX

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "ds_configs/smoke_et_vit_fmnist.json"
pytestmark = pytest.mark.dist


def launch(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    from tests.pool import free_port

    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    port = free_port()
    command += ["--master_port", str(port), "launch/train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert list(FOLDER.glob(f"{PREFIX}_*_{port}_*")) == []  # 66 MB a rank that DeepSpeed would leave for ever
    return done


def short(output: Path) -> list[str]:
    changes = {"run.output": output, "run.epochs": 0.25, "data.val": "null", "observe.log_every": 5}
    return [part for path, value in changes.items() for part in ("--set", f"efftrain.{path}={value}")]


def test_a_run(tmp_path):
    done = launch("--deepspeed_config", CONFIG, *short(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "fresh start" in done.stdout
    assert "plan against actual" in done.stdout
    assert done.stdout.count("fresh start") == 1


@pytest.mark.slow
def test_a_continuation(tmp_path):
    assert launch("--ds_config", CONFIG, *short(tmp_path)).returncode == 0
    again = launch("--ds_config", CONFIG, *short(tmp_path))
    assert again.returncode == 0
    assert "resumed from step-" in again.stdout


def test_a_mistake_ends_with_one_message_and_exit_code_2(tmp_path):
    done = launch(
        "--ds_config", CONFIG, "--set", "efftrain.data.workerz=3", "--set", f"efftrain.run.output={tmp_path}/x"
    )
    assert done.returncode == 2
    text = done.stdout + done.stderr
    assert text.count('Did you mean "workers"?') == 1
    assert "Traceback" not in text
    assert not (tmp_path / "x").exists()
