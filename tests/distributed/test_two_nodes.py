"""Two nodes as two instances of DeepSpeed's launcher on loopback, one rank each: one run, and one end."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.checkpoint.survey import newest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]
NODES = ("node-a", "node-b")


def configuration(folder: Path) -> Path:
    """Six steps of a tiny model on the bundled images, ZeRO-2."""
    document = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "efftrain": {
            "run": {"steps": 6, "output": "set on the command line"},
            "model": {
                "name": "vit_tiny_patch16_224",
                "kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
            },
            "data": {
                "train": "bundled:fashion_mnist/train",
                "resolution": 28,
                "workers": 0,
                "mean": [0.3] * 3,
                "std": [0.3] * 3,
                "streams": 60,
            },
            "methods": {"efficienttrain": {"schedule": "et++"}},
            "checkpoint": {"every": "3st"},
            "observe": {"tensorboard": False, "images_every": None, "log_every": 2},
        },
    }
    path = folder / "run.json"
    path.write_text(json.dumps(document))
    return path


def one_core() -> None:
    """As many threads a rank in both forms: their number decides the order of sums."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def launch(config: Path, output: Path, faults: tuple[str, str] = ("", "")) -> list[subprocess.Popen]:
    """One launcher a node, as the main launcher starts it over ssh."""
    from tests.pool import free_port

    world = base64.urlsafe_b64encode(json.dumps({node: [0] for node in NODES}).encode()).decode()
    port, found = free_port(), []
    for number, own in enumerate(faults):
        command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
        command += [f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command += [str(ROOT / "launch" / "train.py"), "--ds_config", str(config)]
        command += ["--set", f"efftrain.run.output={output}"]
        environment = {**os.environ, "EFFTRAIN_FAULTS": own, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        found.append(subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=one_core, **pipes))
    return found


def finished(launchers: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str]]:
    """(exit code, all output) of each launcher."""
    try:
        texts = [launcher.communicate(timeout=timeout)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # it ends its ranks
    return [(launcher.returncode, text) for launcher, text in zip(launchers, texts, strict=True)]


def masters(output: Path) -> dict[str, torch.Tensor]:
    found = Checkpoint(newest(output))
    return {name: found.parameter(name) for name in found.shapes}


def test_two_nodes_are_one_run(tmp_path):
    config, output = configuration(tmp_path), tmp_path / "two"
    (first, text), (second, other) = finished(launch(config, output))
    assert (first, second) == (0, 0), text[-3000:] + other[-3000:]
    events = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("start") == 1
    assert [event["event"] for event in events].count("end") == 1
    assert "plan against actual" in text
    assert "plan against actual" not in other  # the first rank speaks for all
    found = Checkpoint(newest(output))
    assert (found.world, found.step) == (2, 6)
    halves = [
        sum(piece.length for pieces in found.pieces.values() for piece in pieces if piece.rank == r) for r in (0, 1)
    ]
    assert min(halves) > 0.3 * sum(halves)
    alone = tmp_path / "one"
    from tests.pool import free_port

    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), "launch/train.py", "--ds_config", str(config)]
    command += ["--set", f"efftrain.run.output={alone}"]
    done = subprocess.run(command, cwd=ROOT, timeout=600, check=False, preexec_fn=one_core)
    assert done.returncode == 0
    expected = masters(alone)
    assert {name: float((value - expected[name]).abs().max()) for name, value in masters(output).items()} == {
        name: 0.0 for name in expected
    }


def test_a_failing_node_ends_the_other_and_a_new_start_goes_on(tmp_path):
    config, output = configuration(tmp_path), tmp_path / "run"
    (first, text), (second, other) = finished(launch(config, output, ("", "step.begin:kill,hit=5")))
    assert second != 0
    assert "exits with return code = -9" in other
    assert first == 1, text[-3000:]
    assert "another rank has ended" in text
    again = finished(launch(config, output))
    assert [code for code, _ in again] == [0, 0]
    assert "resumed from step-00000003" in again[0][1]
