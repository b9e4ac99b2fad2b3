"""Functions run on the ranks: a run that starts from another one's weights, with other classes and sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.checkpoint.survey import newest
from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.core.ranks import gather, rank
from efftrain_ds.data import bundled
from efftrain_ds.data.manifest import load_manifest
from tests.distributed.train_jobs import Recording, final_weights, go, run_config

KEPT = ("Sandal", "Bag", "Coat")
"""Classes of the second run, in its order; a fourth one is new."""


def _fine_tuned(folder: str, stage: int, **changes) -> dict:
    names = Path(folder) / "names.txt"
    goal = Path(folder) / "goal.txt"
    if rank() == 0:
        names.write_text("\n".join(bundled.classes("bundled:fashion_mnist/train")))
        goal.write_text("\n".join((*KEPT[:2], "Hat", KEPT[2])))
    gather(None)
    settings = {
        "efftrain/methods": {},
        "efftrain/run/steps": 2,
        "efftrain/data/resolution": 24,
        "efftrain/data/eval_resolution": 32,
        "efftrain/data/val": "bundled:fashion_mnist/val",
        "efftrain/data/eval_batch": 100,
        "efftrain/data/labels": {"target": str(goal), "missing": "drop"},
        "efftrain/model/init": {"weights": f"{folder}/base", "head": "map", "labels": str(names), "missing": "new"},
        "efftrain/optim/layer_decay": {"rate": 0.5},
    }
    return run_config(f"{folder}/tuned", stage, **(settings | changes))


def fine_tune_job(folder: str, stage: int) -> dict:
    """Two steps of a base run, then two steps of a run that starts from its average."""
    base, _ = go(run_config(f"{folder}/base", stage, **{"efftrain/run/steps": 2, "efftrain/methods": {}}))
    base.engine.destroy()
    source = Checkpoint(newest(Path(folder) / "base"))
    config = _fine_tuned(folder, stage)
    trainer = Recording(load_config(config, world=len(gather(0))))
    start = final_weights(trainer)
    trainer.engine.destroy()
    rows = [list(bundled.classes("bundled:fashion_mnist/train")).index(name) for name in KEPT]
    problems = []
    for name, value in start.items():
        want = source.parameter(name, average=True)
        if name.startswith("head."):
            value, want = value[[0, 1, 3]], want[rows]
        if name != "pos_embed" and not torch.equal(value, want):
            problems.append(name)
    trainer, screen = go(config)
    layout_rates = trainer.engine.get_lr()
    found = {
        "problems": problems,
        "positions": list(start["pos_embed"].shape),
        "screen": screen,
        "rates": [rate / layout_rates[0] for rate in layout_rates],
        "kept": (trainer.run_parts.train_manifest.kept, trainer.run_parts.val_manifest.kept),
        "expected": tuple(
            int(np.isin(load_manifest(bundled.resolve(f"bundled:fashion_mnist/{part}")).table["label"], rows).sum())
            for part in ("train", "val")
        ),
        "bad": trainer.run_parts.loader.bad_samples,
        "results": trainer.results,
        "plan": trainer.schedule.spec.samples,
    }
    trainer.engine.destroy()
    if rank() == 0:
        (Path(folder) / "base").rename(Path(folder) / "gone")  # a resume does without what the run began with
    gather(None)
    again, text = go(config)  # its end is resumed: nothing is trained
    again.engine.destroy()
    journal = Path(folder) / "tuned" / "journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()] if rank() == 0 else []
    found["init"] = [event for event in events if event.get("event") == "init"]
    found["again"] = text
    return found


def error_job(folder: str, changes: dict) -> tuple[str, int]:
    """What a wrong configuration is told."""
    try:
        config = _fine_tuned(folder, 1, **changes)
        Recording(load_config(config, world=len(gather(0)))).engine.destroy()
    except EffTrainError as error:
        return str(error), error.exit_code
    return "", 0
