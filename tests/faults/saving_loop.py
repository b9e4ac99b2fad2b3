"""A process that does nothing but save, to be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from efftrain_ds.checkpoint.folder import name_of, newest_good, prune, recover, seal
from efftrain_ds.checkpoint.writer import Part, write_parts


def _save_for_ever(root: str, same_name: bool) -> None:
    folder, step = Path(root), 0
    with open(folder / "done.txt", "a", buffering=1) as done:
        while True:
            step += 1
            final = folder / ("last" if same_name else name_of(step))
            partial = folder / f".tmp-{final.name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            tensors = {"x": torch.full((100_000,), step)}
            parts = [Part("rank-00000.safetensors", tensors), Part("state.json", f"{step}\n")]
            seal(partial, final, write_parts(partial, parts))
            prune(folder, 2, protect=[final])
            done.write(f"{step}\n")


def trials(folder: Path, count: int) -> list[str]:
    """Kill `count` such processes at random moments; returns what was wrong with what they left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["efftrain_ds.trainer", "deepspeed", "timm"])
    rng, problems = random.Random(0), []
    for number in range(count):
        root = folder / "saving-loop"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        process = context.Process(target=_save_for_ever, args=(str(root), bool(number % 2)))
        process.start()
        log = root / "done.txt"
        while not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        least = int(log.read_text().rpartition("\n")[0].rpartition("\n")[2])
        try:
            recover(root)
            found = newest_good(root)
            value = int(load_file(str(found / "rank-00000.safetensors"))["x"][0]) if found is not None else 0
            if value < least:
                problems.append(f"trial {number}: step {value} is there, {least} was complete")
        except Exception as error:
            problems.append(f"trial {number}: {type(error).__name__}: {error}")
    return problems
