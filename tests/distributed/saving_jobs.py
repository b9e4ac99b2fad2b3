"""Functions run on the ranks by the tests of saving."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import torch.distributed as dist

from efftrain_ds.core import faults
from efftrain_ds.core.errors import CheckpointError
from efftrain_ds.core.ranks import problem_of
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


def native_fails_job(folder: str, stage: int, dtype: str) -> dict:
    """DeepSpeed's form where one rank cannot write, or not read: all hear of it, and go on."""
    root, rank = Path(folder), dist.get_rank()
    engine = make(stage, dtype, ema=False)
    train(engine, 0, 1)
    engine.save_checkpoint(root, tag="first", form="deepspeed")

    def full_disk(state_dict, path):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    def scripts(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    result = {"texts": []}
    places = [(0, engine.checkpoint_engine, "save", full_disk)]
    if stage:  # plain data parallelism has no shards of other ranks, and no script to put them together
        places.append((1, engine.checkpoint_engine, "save", full_disk))
        places.append((0, engine.deepspeed_engine, "_copy_recovery_script", scripts))
    for where, owner, name, failing in places:
        if rank == where:
            setattr(owner, name, failing)
        result["texts"].append(problem_of(lambda: engine.save_checkpoint(root, tag="second", form="deepspeed")))
        owner.__dict__.pop(name, None)
        dist.barrier()
    result["left"] = sorted(p.name for p in root.iterdir() if p.is_dir())
    result["latest"] = (root / "latest").read_text()
    dist.barrier()
    engine.save_checkpoint(root, tag="second", form="deepspeed")
    result["next"] = (root / "latest").read_text()
    result["refused"] = [
        problem_of(lambda: engine.save_checkpoint(root, form="deepspeed", keep=2, background=True)),
        problem_of(lambda: engine.save_checkpoint(root, form="deepspeed", background="sync")),
    ]
    train(engine, 1, 2)
    state = full_state(engine)
    dist.barrier()
    if rank == 0:
        pattern = "*zero_pp_rank_1_*optim_states.pt" if stage else "mp_rank_00_model_states.pt"
        (shard,) = (root / "second").glob(pattern)
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 0xFF
        shard.write_bytes(data)
        (root / "third").mkdir()
    dist.barrier()
    result["damaged"] = problem_of(lambda: engine.load_checkpoint(root, form="deepspeed"))
    result["missing"] = problem_of(lambda: engine.load_checkpoint(root, tag="third", form="deepspeed"))
    result["unchanged"] = not same(state, full_state(engine))
    train(engine, 2, 3)
    engine.destroy()
    return result


def read_fails_job(folder: str, stage: int) -> dict:
    """One rank cannot copy its frozen values, or not read a shard after all have agreed to load: all hear of it."""
    from efftrain_ds.checkpoint import store

    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    engine = make(stage, "fp32", frozen=True)
    train(engine, 0, 1)
    rank, result = dist.get_rank(), {}
    frozen = engine.module.a.weight
    if rank == 0:
        frozen.detach = fails
    result["frozen"] = problem_of(lambda: engine.save_checkpoint(folder))
    frozen.__dict__.pop("detach", None)
    dist.barrier()
    engine.save_checkpoint(folder)
    reading = store.read_into
    if rank == 1:
        store.read_into = fails
    result["read"] = problem_of(lambda: engine.load_checkpoint(folder))
    store.read_into = reading
    result["again"] = problem_of(lambda: engine.load_checkpoint(folder))
    engine.destroy()
    return result


def recovered_job(folder: str) -> dict:
    """A run is killed while it replaces a checkpoint: the next one finds it under its tag."""
    engine = make(2, "fp32")
    train(engine, 0, 1)
    engine.save_checkpoint(folder, tag="last")
    state = full_state(engine)
    train(engine, 1, 2)
    dist.barrier()
    if dist.get_rank() == 0:  # as a kill at save.replacing leaves it
        (Path(folder) / "last").rename(Path(folder) / ".tmp-old-last")
    dist.barrier()
    path, _ = engine.load_checkpoint(folder, tag="last")
    result = {"path": path, "state": same(state, full_state(engine))}
    engine.destroy()
    return result


def leaving_job(folder: str, background: bool | str) -> dict:
    """A rank on its way out completes the save in the background, without a collective; it gives up for a dead rank."""
    from efftrain_ds.checkpoint import background as module

    engine = make(2, "fp32")
    train(engine, 0, 1)
    slow = "save.before_sync:sleep=0.4,rank=1" if background == "sync" else "save.rank_file:sleep=0.2,rank=1,always"
    faults.arm(slow)
    engine.save_checkpoint(folder, background=background)
    engine.leave_saving()
    faults.arm("")
    result = {"sealed": sorted(p.name for p in Path(folder).iterdir()), "idle": engine._saving is None}
    dist.barrier()
    train(engine, 1, 2)
    grace, module._GRACE = module._GRACE, 0.3
    faults.arm("save.rank_file:sleep=1.5,rank=1")  # as one that is gone
    engine.save_checkpoint(folder, background=True)
    start = time.monotonic()
    if dist.get_rank() == 0:
        engine.leave_saving()
    result["seconds"] = time.monotonic() - start
    dist.barrier()
    result["left"] = sorted(p.name for p in Path(folder).iterdir())
    result["latest"] = (Path(folder) / "latest").read_text().strip()
    engine.leave_saving()  # the sleeping thread
    faults.arm("")
    module._GRACE = grace
    engine.destroy()
    return result
