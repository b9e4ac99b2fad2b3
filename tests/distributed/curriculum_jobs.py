"""Functions run on the ranks by the tests of the curriculum search."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from efftrain_ds.config.loader import load_config
from efftrain_ds.observe.journal import read_journal
from efftrain_ds.train_curriculum import CurriculumRun
from efftrain_ds.train_trial import TrialTrainer
from tests.distributed.train_jobs import Stop, run_config

HOLD_OUT = {"per_class": 6, "train_share": 0.02}
CHECKPOINT_EVERY = 3
"""Steps; a search ended before them has nothing to go on from."""


def config_of(folder: str, search: dict[str, Any], changes: dict[str, Any] | None = None) -> dict:
    """A run of ten steps, and its search."""
    defaults = {
        "efftrain/run/steps": ...,
        "efftrain/run/epochs": 2,
        "efftrain/data/val": "bundled:fashion_mnist/val",
        "efftrain/data/eval_batch": 30,
        "efftrain/model/ema": None,
        "efftrain/methods": {"efficienttrain": {"search": {"stages": 2, "hold_out": HOLD_OUT, **search}}},
        "efftrain/checkpoint": {"every": f"{CHECKPOINT_EVERY}st", "keep": 1},
    }
    return run_config(folder, 1, **{**defaults, **(changes or {})})


class Bomb:
    """Ends the search in a step of a training, as a kill would; counts the steps of all trainings."""

    def __init__(self, at: int | None):
        self.at, self.steps = at, 0

    def __enter__(self) -> Bomb:
        bomb, original = self, TrialTrainer._after_step

        def after(trainer: TrialTrainer, done: int, stage: Any) -> None:
            original(trainer, done, stage)
            bomb.steps += 1
            if bomb.steps == bomb.at:
                raise Stop

        self.patched = patch.object(TrialTrainer, "_after_step", after)
        self.patched.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patched.stop()


def searched(config: dict, at: int | None = None) -> dict[str, Any] | None:
    """Run a search; None where it was ended."""
    screen = io.StringIO()
    run = CurriculumRun(load_config(config, world=dist.get_world_size()))
    run.console._stream = screen
    run.console.write(run.price_text())
    with Bomb(at) as bomb:
        try:
            outcome = run.run()
        except Stop:
            return None
    folder = run.folder
    rows = [row for row in read_journal(folder / "journal.jsonl") if "n" in row]
    found = json.loads((folder / "curriculum.json").read_text())
    return {
        "sizes": outcome.sizes,
        "results": run.search.results,
        "decisions": run.search.decisions,
        "spent": run.search.spent,
        "extent": run.search.extent(),
        "steps": bomb.steps,
        "screen": screen.getvalue(),
        "journal": [{key: value for key, value in row.items() if key not in ("time", "step")} for row in rows],
        "schedule": found["efftrain"]["methods"].get("efficienttrain"),
        "epochs": found["efftrain"]["run"]["epochs"],
        "val": found["efftrain"]["data"]["val"],
        "hold_out": found["efftrain"]["data"]["hold_out"],
        "relative": json.loads((folder / "search.json").read_text())["relative_cost"],
        "checkpoints": [str(path) for path in folder.glob("trials/*/checkpoints/*")],
    }


def search_job(folder: str, search: dict[str, Any], stops: list[int]) -> dict[str, Any]:
    """An uninterrupted search, and others that were ended after so many steps and gone on with."""
    whole = searched(config_of(f"{folder}/whole", search))
    assert whole is not None
    differences = []
    for stop in stops:
        config = config_of(f"{folder}/{stop}", search)
        ended, again = searched(config, stop), None
        if ended is None:
            dist.barrier()
            again = searched(config)
        else:
            differences.append(f"{stop}: it was not ended")
        if again is not None:
            same = ("sizes", "results", "decisions", "spent", "journal", "schedule", "epochs")
            differences += [f"{stop}: {key}: {again[key]} {whole[key]}" for key in same if again[key] != whole[key]]
            if stop >= CHECKPOINT_EVERY and not again["steps"] < whole["steps"]:
                differences.append(f"{stop}: nothing was kept")
    return {**whole, "differences": differences}


def refused_job(folder: str) -> list[str]:
    """What is said where the folder holds another search, or a limit is too low."""
    from efftrain_ds.core.errors import EffTrainError

    said = []
    search = {"algorithm": "et", "candidates": [12]}
    assert searched(config_of(folder, search), 2) is None
    for other, changes in (
        ({"tolerance": 0.01}, {}),
        ({"max_epochs": 2.0}, {}),
        ({"candidates": [10]}, {}),
        ({"stages": 10}, {"efftrain/run/epochs": 1}),
        ({}, {"efftrain/run/seed": 5}),
        ({"hold_out": {"per_class": 700}}, {}),
    ):
        try:
            CurriculumRun(
                load_config(config_of(folder, {**search, **other}, changes), world=dist.get_world_size())
            ).run()
        except EffTrainError as error:
            said.append(f"{error.exit_code} {error}")
    Path(folder, "curriculum", "state.json").write_text("{}") if dist.get_rank() == 0 else None
    dist.barrier()
    try:
        searched(config_of(folder, search))
    except EffTrainError as error:
        said.append(f"{error.exit_code} {error}")
    return said
