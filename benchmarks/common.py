"""What the benchmark scripts share: the machine's name, medians, result files."""

from __future__ import annotations

import datetime
import json
import os
import socket
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from efftrain_ds.cost.throughput import machine_name

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Machine, cores and versions for a result file."""
    import deepspeed

    return {
        "machine": machine_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "date": datetime.date.today().isoformat(),
    }


def launcher(ranks: int) -> list[str]:
    """DeepSpeed's launcher of this environment for `ranks` processes on this machine, on GPUs where there are any."""
    gpus = torch.cuda.device_count()
    count = ["--num_gpus", str(min(ranks, gpus))] if gpus else ["--num_accelerators", str(ranks)]
    return [str(Path(sys.executable).parent / "deepspeed"), *count, "--master_port", str(free_port())]


def own_environment() -> dict[str, str]:
    """Environment of processes that are started: this environment's tools first, compiled extensions in one place."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"TORCH_EXTENSIONS_DIR": str(ROOT / ".torch_extensions"), **os.environ, "PATH": path}


def free_port() -> int:
    """A free TCP port, so that runs of the launcher do not meet another one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def store(name: str, command: str, result: dict[str, Any], out: str | None) -> Path:
    """Write a result beside the command and the machine that made it."""
    path = Path(out) if out else ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, **environment(), **result}, indent=1) + "\n")
    return path
