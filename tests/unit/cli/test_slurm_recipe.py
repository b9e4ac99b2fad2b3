"""launch/slurm.sbatch with stand-ins for srun, scontrol and the ranks: codes, signals and the requeue."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
pids=()
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" & pids+=($!)
done
echo "${pids[@]}" >"$STUBS/tasks"
worst=0
for pid in "${pids[@]}"; do wait $pid; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [[ "$1" == show ]]; then echo node-a; echo node-b; else echo "$@" >>"$STUBS/asked"; fi
"""
RANK = """#!/bin/bash
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $*" >"$STUBS/rank$RANK"
if [[ "$CODES" == wait ]]; then
  trap 'kill $sleeper; exit 75' TERM
  sleep 60 & sleeper=$!
  touch "$STUBS/ready$RANK"
  wait $sleeper
fi
read -ra codes <<<"$CODES"
exit "${codes[$RANK]}"
"""


def start(folder: Path, codes: str, **environment: str) -> subprocess.Popen:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("rank", RANK)):
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
    own = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MASTER_")},
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "STUBS": str(folder),
        "CODES": codes,
        "EFFTRAIN_PYTHON": str(folder / "rank"),
        "EFFTRAIN_CODES": str(folder / "codes"),
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        **environment,
    }
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "X.json", "--set", "a=b c"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=own, **pipes)


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0 0 0", 0, False),
        ("75 75 75 75", 0, True),
        ("75 143 75 137", 0, True),  # ended by srun before they could say it
        ("2 2 2 2", 2, False),
        ("0 1 143 143", 143, False),
    ],
)
def test_only_a_saved_run_is_queued_again(tmp_path, codes, code, requeued):
    job = start(tmp_path, codes)
    out, err = job.communicate(timeout=60)
    assert job.returncode == code, out + err
    found = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert found == ("requeue 123\n" if requeued else "")
    assert (tmp_path / "rank3").read_text() == "3 4 1 2 node-a launch/train.py --ds_config X.json --set a=b c\n"


def test_the_number_of_turns_is_bounded(tmp_path):
    job = start(tmp_path, "75 75 75 75", SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 75
    assert "queued again 2 times" in err
    assert not (tmp_path / "asked").exists()


def test_a_signal_reaches_the_ranks_and_is_waited_for(tmp_path):
    """As Slurm does it: SIGTERM to every process of the step, the shell around a rank included."""
    job = start(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(4)):
        assert time.monotonic() < deadline
        assert job.poll() is None
        os.sched_yield()
    for shell in (tmp_path / "tasks").read_text().split():
        children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        for pid in (shell, *children):
            os.kill(int(pid), signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, out + err
    assert (tmp_path / "asked").read_text() == "requeue 123\n"
    assert {(tmp_path / "codes" / "123.0" / str(rank)).read_text() for rank in range(4)} == {"75\n"}
