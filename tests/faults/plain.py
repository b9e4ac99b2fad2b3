"""Plain DeepSpeed on two ranks, for the controls: what happens there under the same faults."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

from .fleet import _free_port, _wait


def _rank_main(environment: dict[str, str], folder: str, mode: str) -> None:
    os.environ.update(environment)
    import deepspeed
    import torch
    from torch import nn

    rank = int(environment["RANK"])
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> None:
        engine.backward(engine(torch.ones(2, 64)).square().mean())
        engine.step()

    if mode.startswith("save"):
        step()
        engine.save_checkpoint(folder, tag="first")
        if mode == "save and be killed":
            step()
            if rank == 1:
                torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            engine.save_checkpoint(folder, tag="second")
        result: object = "saved"
    else:
        try:
            path, _ = engine.load_checkpoint(folder)
            result = [path, [float(p.double().sum()) for p in model.parameters()]]
            # the optimizer's part decides what the next step gives
            step()
            result.append([float(p.double().sum()) for p in model.parameters()])
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    Path(folder, f"result-{rank}.json").write_text(json.dumps(result))
    os._exit(0)


def run(folder: Path, mode: str, root: Path) -> tuple[list[int], list[object]]:
    """Exit codes and results of both ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["efftrain_ds.trainer", "deepspeed", "timm"])
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": os.environ["PATH"],
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(root / ".torch_extensions")),
    }  # fmt: skip
    processes = []
    for rank in range(2):
        (folder / f"result-{rank}.json").unlink(missing_ok=True)
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(context.Process(target=_rank_main, args=(own, str(folder), mode)))
        processes[-1].start()
    import time

    _wait(processes, time.monotonic(), grace_s=5)
    results = [folder / f"result-{rank}.json" for rank in range(2)]
    return [p.exitcode for p in processes], [json.loads(r.read_text()) if r.exists() else None for r in results]
