"""Runs of launch/train.py as real processes, started by a fork server so that the imports are paid once."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0
GRACE_S = 20.0


def _rank_main(environment: dict[str, str], log: str, argv: list[str], faults: str) -> None:
    """One rank: as the launcher would start it."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import runpy

    from efftrain_ds.core import faults as points

    points.arm(faults)
    sys.argv = argv
    os.chdir(ROOT)
    code = runpy.run_path(argv[0], run_name="launched")["main"]()
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        codes: exit code of each rank, negative for a signal.
        text: what each rank wrote.
        seconds: wall time until the last rank had ended.
        orphans: ranks that had to be killed by us.
    """

    codes: list[int]
    text: list[str]
    seconds: float
    orphans: list[int] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """Last optimizer step of which rank 0 showed the line (0 = none)."""
        found = re.findall(r"^step ([\d,]+)/", self.text[0], re.M)
        return int(found[-1].replace(",", "")) if found else 0


class Fleet:
    """Starts runs. One fork server serves all of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["efftrain_ds.trainer", "deepspeed", "timm", "tests.faults.frozen"])
        self._runs = 0
        self._logs: list[Path] = []

    def run(
        self,
        config: dict[str, Any],
        *,
        world: int = 2,
        faults: str = "",
        during: Callable[[list[int]], None] | None = None,
        grace_s: float = GRACE_S,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Run a configuration to its end.

        Args:
            config: DeepSpeed's JSON.
            world: number of ranks.
            faults: armed fault points, see `efftrain_ds.core.faults`.
            during: called with the process ids as soon as they exist.
            grace_s: how long the other ranks may live on after one has failed (a launcher would end them then).
            arguments: further arguments of launch/train.py.
            environment: further variables.
        """
        self._runs += 1
        path = self.folder / f"config-{self._runs}.json"
        path.write_text(json.dumps(config))
        logs = self._logs = [self.folder / f"log-{self._runs}.rank{rank}.txt" for rank in range(world)]
        common = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions")),
            "PYTHONPATH": str(ROOT), **(environment or {}),
        }  # fmt: skip
        argv = [str(ROOT / "launch" / "train.py"), "--ds_config", str(path), *arguments]
        processes = []
        start = time.monotonic()
        for rank in range(world):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = self._context.Process(target=_rank_main, args=(own, str(logs[rank]), argv, faults))
            process.start()
            processes.append(process)
        if during is not None:
            during([process.pid for process in processes])
        orphans = _wait(processes, start, grace_s)
        text = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
        return Outcome([p.exitcode for p in processes], text, time.monotonic() - start, orphans)

    def said(self, text: str) -> bool:
        """True once some rank of the run that is going on has written `text`; for `during`."""
        return any(log.exists() and text in log.read_text(errors="replace") for log in self._logs)


def _wait(processes: list[Any], start: float, grace_s: float) -> list[int]:
    """Until all have ended; ranks left behind by a failed one are ended after a while, as a launcher does it."""
    failed_at: float | None = None
    while any(p.is_alive() for p in processes):
        time.sleep(0.05)
        now = time.monotonic()
        if failed_at is None and any(p.exitcode not in (None, 0) for p in processes):
            failed_at = now
        if now - start > LIMIT_S or (failed_at is not None and now - failed_at > grace_s):
            left = [rank for rank, p in enumerate(processes) if p.is_alive()]
            for rank in left:
                os.kill(processes[rank].pid, signal.SIGKILL)
                processes[rank].join()
            return left
    return []


def limit_file_size(pid: int, size: int) -> None:
    """From now on the process cannot write beyond `size` bytes into any file; -1 lifts it. As a full disk, but real."""
    hard = resource.RLIM_INFINITY
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if size < 0 else size, hard))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
