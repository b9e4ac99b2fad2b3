"""Collectives between processes of this machine, and the clocks of several machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from .check import FAIL, NONE, OK, WARN, Check, Setup

MEGABYTES = 64
_SECONDS = 40
_SKEW = 1.0
_PORT = 29531


def collectives(setup: Setup) -> Iterator[Check]:
    """An all-reduce of 64 MB: gloo between two processes, NCCL between the GPUs."""
    yield all_reduce("gloo", 2)
    if setup.gpus:
        yield all_reduce("nccl", setup.gpus)


def all_reduce(backend: str, world: int, megabytes: float = MEGABYTES) -> Check:
    """Start `world` processes, reduce, and compare the sums."""
    package = __package__.split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"{package}.doctor.allreduce"]
        # outside of any run: the variables of a launcher would lead the processes to its store
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(world), backend, str(Path(folder) / "store"), str(megabytes)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(world)
        ]
        limit, answers = time.monotonic() + _SECONDS, []
        try:
            for process in processes:
                answers.append(process.communicate(timeout=max(1.0, limit - time.monotonic())))
        except subprocess.TimeoutExpired:
            return Check(backend, FAIL, f"{world} processes did not find each other in {_SECONDS} s", _fix(backend))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        lines = answers[failed[0]][1].strip().splitlines() or ["no message"]
        text = f"rank {failed[0]} of {world}: {lines[-1]}"
        return Check(backend, FAIL, text, _fix(backend))
    found = json.loads(answers[0][0].strip().splitlines()[-1])
    rate = megabytes / 1e3 / found["seconds"]
    if not found["right"]:
        return Check(backend, FAIL, "an all-reduce gives wrong sums", _fix(backend))
    kind = "processes" if backend == "gloo" else "GPU" + "s" * (world != 1)
    text = f"{world} {kind}, all-reduce of {megabytes:g} MB in {1e3 * found['seconds']:.0f} ms ({rate:.2g} GB/s)"
    return Check(backend, OK, text, data={"seconds": found["seconds"], "world": world})


def _fix(backend: str) -> str:
    if backend == "gloo":
        return "try GLOO_SOCKET_IFNAME=lo; the host's own name must resolve (see /etc/hosts)"
    return "run again with NCCL_DEBUG=INFO; in containers NCCL needs shared memory (--shm-size=8g)"


@dataclass(frozen=True)
class Hosts:
    """Where the first process of a job on several machines listens."""

    rank: int
    world: int
    master: str
    port: int


def hosts_of(environment: Mapping[str, str]) -> Hosts | None:
    """The job on several machines that this process belongs to, by torchrun's or SLURM's variables; else None."""
    get = environment.get
    world, local = int(get("WORLD_SIZE") or 1), int(get("LOCAL_WORLD_SIZE") or get("LOCAL_SIZE") or 1)
    if "RANK" in environment and "LOCAL_WORLD_SIZE" in environment and world > local and get("MASTER_ADDR"):
        return Hosts(int(environment["RANK"]), world, environment["MASTER_ADDR"], _PORT)
    if int(get("SLURM_NNODES") or 1) > 1 and "SLURM_PROCID" in environment and get("SLURM_JOB_NODELIST"):
        if not (get("SLURM_STEP_ID") or get("SLURM_STEPID")):  # in the body of an sbatch script, which runs once
            return Hosts(0, 1, "localhost", _PORT)
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        first = listed.stdout.split()[0]
        return Hosts(int(environment["SLURM_PROCID"]), int(get("SLURM_NTASKS") or 1), first, _PORT)
    return None


def clocks(setup: Setup) -> Check:
    """Difference of the clocks between machines, where a job on several of them asks."""
    hosts = hosts_of(os.environ)
    if hosts is None:
        return Check("clocks", NONE, "one host")
    if hosts.world < 2:
        return Check("clocks", WARN, "one process only", "start it on every host: srun efftrain doctor ...")
    offset, uncertainty = clock_offset(hosts)
    data = {"seconds": offset, "uncertainty": uncertainty}
    text = f"{hosts.world} processes, clocks differ by at most {abs(offset):.3f} s (+- {uncertainty:.3f})"
    if abs(offset) > _SKEW + uncertainty:
        return Check("clocks", WARN, text, "synchronise the hosts (chrony or ntpd)", data)
    return Check("clocks", OK, text, data=data)


def clock_offset(hosts: Hosts, rounds: int = 5) -> tuple[float, float]:
    """(offset of largest size, its uncertainty) in seconds against the first process, by the round trip of a message.

    Every process calls this; all of them get the same answer.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{hosts.master}:{hosts.port}",
        rank=hosts.rank,
        world_size=hosts.world,
        timeout=timedelta(seconds=15),
    )
    try:
        own = torch.zeros(2, dtype=torch.float64)
        message = torch.zeros(1, dtype=torch.float64)
        for other in range(1, hosts.world):
            best = (0.0, float("inf"))
            for _ in range(rounds):
                if hosts.rank == other:
                    sent = time.time()
                    dist.send(message, 0)
                    dist.recv(message, 0)
                    back = time.time()
                    best = min(best, (float(message) - (sent + back) / 2, (back - sent) / 2), key=lambda pair: pair[1])
                elif hosts.rank == 0:
                    dist.recv(message, other)
                    message.fill_(time.time())
                    dist.send(message, other)
            if hosts.rank == other:
                own = torch.tensor(best, dtype=torch.float64)
        gathered = [torch.zeros(2, dtype=torch.float64) for _ in range(hosts.world)]
        dist.all_gather(gathered, own)
        offset, uncertainty = max((pair.tolist() for pair in gathered), key=lambda pair: abs(pair[0]))
        return offset, uncertainty
    finally:
        dist.destroy_process_group()
