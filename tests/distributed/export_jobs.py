"""Functions run on the ranks by the tests of exporting and inspecting."""

from __future__ import annotations

import torch

from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.export.images import real_inputs
from efftrain_ds.export.model import model_spec
from tests.distributed.train_jobs import go, run_config

IMAGES = 6


def grown_run(folder: str, stage: int, stop: int | None, changes: dict) -> dict:
    """A run that grows from 2 to 4 blocks; returns its own logits of bundled images, with and without the average."""
    method = {"stages": 3, "depth_start": 0.5, "resolution_start": None}
    settings = {
        "efftrain/methods": {"autoprog": method},
        "efftrain/model/kwargs/depth": 4,
        "efftrain/run/steps": 6,
        "efftrain/observe/log_every": 100,
        **changes,
    }
    return _logits(run_config(folder, stage, **settings), stop)


def sparse_run(folder: str, stage: int, methods: dict) -> dict:
    """A run of 6 steps that moves live weights, heads or neurons twice and keeps pictures of them; its own logits."""
    settings = {
        "efftrain/methods": methods,
        "efftrain/model/kwargs/num_heads": 4,
        "efftrain/run/steps": 6,
        "efftrain/observe/log_every": 100,
        "efftrain/observe/images_every": "2st",
    }
    return _logits(run_config(folder, stage, **settings), None)


def _logits(config: dict, stop: int | None) -> dict:
    trainer, _ = go(config, stop)
    engine = trainer.engine
    images = real_inputs(
        model_spec(Checkpoint(trainer.output / "checkpoints" / f"step-{engine.step_index:08d}")), IMAGES
    )
    logits = {}
    for average in (False, True):
        with engine.evaluating(ema=average), torch.no_grad():
            logits[average] = engine(images.to(next(engine.module.parameters()).dtype)).float().numpy()
    return {"logits": logits, "step": engine.step_index, "blocks": len(engine.module.blocks)}
