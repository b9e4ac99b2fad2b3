"""Functions run on the ranks by the tests of saving."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from efftrain_ds.core import faults
from efftrain_ds.core.errors import CheckpointError
from tests.distributed.zero_jobs import full_state, make, same, train, weights


def background_job(folder: str, stage: int, dtype: str, background: bool | str = True) -> dict:
    """The checkpoint holds the state at the save, whatever the steps after it do while it is written."""
    engine = make(stage, dtype)
    train(engine, 0, 3)
    at_save = full_state(engine)
    faults.arm("save.before_sync:sleep=0.3" if background == "sync" else "save.rank_file:sleep=0.3")
    engine.save_checkpoint(folder, client_state={"n": 3}, background=background)
    unfinished = engine._saving is not None and not (Path(folder) / "latest").exists()
    expected = train(engine, 3, 6)
    engine.finish_saving()
    faults.arm("")
    end = full_state(engine)
    engine.destroy()
    again = make(stage, dtype)
    path, client = again.load_checkpoint(folder)
    result = {
        "unfinished": unfinished,
        "client": client,
        "files": sorted(p.name for p in Path(path).iterdir()),
        "at_load": same(at_save, full_state(again)),
        "losses": train(again, 3, 6) == expected,
        "at_end": same(end, full_state(again)),
        "left": sorted(p.name for p in Path(folder).iterdir()),
    }
    again.destroy()
    return result


def failing_job(folder: str, background: bool | str, fault: str) -> dict:
    """One rank's disk is full: all hear of it, the checkpoint before stays, the next one is written."""
    engine = make(2, "fp32")
    train(engine, 0, 1)
    engine.save_checkpoint(folder)
    train(engine, 1, 2)
    faults.arm(fault)
    text = ""
    try:
        engine.save_checkpoint(folder, background=background)
        engine.finish_saving()
    except CheckpointError as error:
        text = str(error)
    faults.arm("")
    dist.barrier()
    after_failure = sorted(p.name for p in Path(folder).iterdir())
    latest = (Path(folder) / "latest").read_text().strip()
    dist.barrier()
    state = full_state(engine)
    engine.save_checkpoint(folder, background=background)
    engine.finish_saving()
    engine.destroy()
    again = make(2, "fp32")
    again.load_checkpoint(folder)
    result = {
        "text": text,
        "after_failure": after_failure,
        "latest": latest,
        "retried": not same(state, full_state(again)),
        "step": again.step_index,
    }
    again.destroy()
    return result


def native_job(folder: str, stage: int, dtype: str) -> dict:
    """DeepSpeed's own form, written and read through our engine; plain DeepSpeed's files are told apart."""
    engine = make(stage, dtype, ema=False)
    train(engine, 0, 3)
    engine.save_checkpoint(folder, client_state={"n": 3}, form="deepspeed")
    state, low = full_state(engine), weights(engine)
    engine.destroy()
    again = make(stage, dtype, ema=False)
    _, client = again.load_checkpoint(folder, form="deepspeed")
    result = {
        "n": client["n"],
        "step": again.step_index,
        "weights": same(low, weights(again)),
        "state": same(state, full_state(again)),
    }
    train(again, 3, 4)
    again.destroy()
    refused = ""
    third = make(stage, dtype, ema=False)
    try:
        third.load_checkpoint(folder)
    except CheckpointError as error:
        refused = str(error)
    third.destroy()
    return {**result, "refused": refused}
