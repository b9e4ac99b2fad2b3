"""A long run with stage changes leaks nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed import train_jobs as jobs

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]


def _children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def _shared_memory() -> int:
    folder = Path("/dev/shm")
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 0


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watching(jobs.Recording):
    """Notes resident memory and open files while training."""

    def _after_step(self, done, stage):
        super()._after_step(done, stage)
        if done % 100 == 0:
            self.notes.append((_resident(), len(os.listdir("/proc/self/fd"))))


def long_run(folder: str, steps: int) -> dict:
    from efftrain_ds.config.loader import load_config

    before, shared = _children(), _shared_memory()
    changes = {
        "efftrain/run/steps": steps,
        "efftrain/data/workers": 1,
        "efftrain/checkpoint/every": None,
        "efftrain/observe/log_every": 200,
        "efftrain/observe/tensorboard": True,
        "efftrain/model/kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1},
    }
    trainer = Watching(load_config(jobs.run_config(folder, 1, **changes), world=jobs.dist.get_world_size()))
    trainer.notes = []
    trainer.console._stream = open(os.devnull, "w")  # noqa: SIM115
    trainer.run()
    stages = len(trainer.schedule.stages)
    trainer.engine.destroy()
    return {
        "notes": trainer.notes,
        "stages": stages,
        "new": sorted(_children() - before),
        "shared": _shared_memory() - shared,
    }


def test_two_thousand_steps_leak_nothing(ranks, tmp_path):
    for result in ranks(long_run, str(tmp_path), 2000):
        assert result["stages"] == 10
        assert result["new"] == []
        assert result["shared"] <= 1 << 20
        memory = [m for m, _ in result["notes"]]
        files = [f for _, f in result["notes"]]
        # the first quarter warms caches; after it memory stays within 2 %
        settled = memory[len(memory) // 4 :]
        assert max(settled) <= 1.02 * min(settled), [m >> 20 for m in memory]
        assert max(files[5:]) - min(files[5:]) <= 2
