"""One training of a curriculum search: the real trainer on a schedule, or on its first stages, with a held-out part."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from .checkpoint.folder import LATEST, newest_good
from .checkpoint.survey import FOLDER
from .config.loader import LoadedConfig, check_config
from .core.durations import parse_duration
from .core.errors import CheckpointError, DivergenceError
from .core.ranks import from_first
from .core.timeline import Schedule, Stage
from .cost.plan import PricedPlan, PricedStage
from .data.holdout import HoldOutConfig
from .methods.efficienttrain.config import EfficientTrainConfig
from .methods.efficienttrain.search import Trial
from .methods.efficienttrain.search_rows import pacing_of, progress, schedule_rows
from .trainer import Trainer
from .zero import access

logger = logging.getLogger(__name__)

_EPS = 1e-9
METHOD = "efficienttrain"


def scheduled(config: LoadedConfig, sizes: tuple[int, ...] | None, epochs: float) -> dict[str, Any]:
    """The whole file with the schedule of these bandwidths instead of its own and without a search.

    Args:
        config: with the search.
        sizes: bandwidth of every stage; None leaves the method out.
        epochs: budget of the run.
    """
    document = config.resolved()
    section = document["efftrain"]
    section["run"]["epochs"] = round(epochs, 9)
    if sizes is None:
        del section["methods"][METHOD]
        return document
    settings = config.methods[METHOD]
    assert isinstance(settings, EfficientTrainConfig)
    assert settings.search is not None
    magnitude = settings.magnitude and config.efftrain.data.randaugment is not None
    section["methods"][METHOD] |= {
        "schedule": schedule_rows(settings.search, sizes, magnitude=magnitude),
        "pacing": pacing_of(settings.search),
        "replay": [row for row in section["methods"][METHOD]["replay"] if row["bandwidth"] in sizes],
        "search": None,
    }
    return document


def trial_config(
    config: LoadedConfig, trial: Trial, *, epochs: float, folder: Path, hold_out: HoldOutConfig, world: int
) -> LoadedConfig:
    """Configuration of one training of a search.

    Args:
        config: with the search.
        trial: what is trained.
        epochs: of the baseline.
        folder: output of this training.
        hold_out: evaluated on instead of the held-out split.
        world: number of ranks.
    """
    document = scheduled(config, trial.sizes, trial.budget * epochs)
    section = document["efftrain"]
    section["run"]["output"] = str(folder)
    section["data"] |= {"val": None, "samples": None, "hold_out": hold_out.model_dump(mode="json")}
    section["checkpoint"] |= {"resume": True, "keep": 1}
    warmup, whole = parse_duration(section["optim"]["warmup"]), config.efftrain.run.epochs
    if warmup.unit != "%" and whole is not None and whole != epochs:  # the same share of a shorter training
        number = f"{warmup.value * epochs / whole:.6f}".rstrip("0").rstrip(".")
        section["optim"]["warmup"] = f"{number}{warmup.unit}"
    section["observe"] |= {"tensorboard": False, "wandb": None, "images_every": None, "eval_every": "100%"}
    return check_config(document, world=world)


def stage_end(config: LoadedConfig, trial: Trial) -> float:
    """Progress at which the last trained stage of a trial ends."""
    settings = config.methods[METHOD]
    assert isinstance(settings, EfficientTrainConfig)
    assert settings.search is not None
    return progress(Fraction(trial.last, settings.search.stages))


def cut_plan(plan: PricedPlan, until: float, tune: float | None = None) -> PricedPlan:
    """The part of a plan up to a place of its progress, and the tuning at what would come next.

    Stages keep their places in the budget, so the learning rate is that of the whole run; while tuning it falls to 0
    from the value it has there. A plan that is needed to its end is returned as it is.

    Args:
        plan: of a whole run.
        until: share of its budget at which to stop, in (0, 1].
        tune: share of its budget to go on at full resolution; None = do not.
    """
    if until >= 1 - _EPS:
        return plan
    kept: list[PricedStage] = []
    for priced in plan.stages:
        stage = priced.stage
        if stage.p_start >= until - _EPS:
            break
        if stage.p_end > until + _EPS:  # this size goes on behind the place
            share = (until - stage.p_start) / (stage.p_end - stage.p_start)
            steps = max(1, round(share * stage.steps))
            cost = priced.cost * steps // stage.steps
            stage = replace(stage, end_step=stage.start_step + steps, p_end=until)
            priced = replace(priced, stage=stage, cost=cost)
        kept.append(priced)
    end = kept[-1].stage.end_step
    if tune is not None:
        after = next(priced for priced in plan.stages if priced.stage.p_end > until + _EPS)
        spec = plan.schedule.spec
        steps = max(1, round(tune * spec.epochs * spec.samples / after.stage.batch))
        p_end = min(1.0, until + tune)
        stage = replace(
            after.stage,
            start_step=end,
            end_step=end + steps,
            p_start=until,
            p_end=p_end,
            lr_scale=0.0,
            lr_ramp=p_end - until,
        )
        kept.append(replace(after, stage=stage, cost=after.cost * steps // after.stage.steps))
    total = sum(priced.cost for priced in kept)
    kept = [
        replace(priced, stage=replace(priced.stage, index=i), share=priced.cost / total)
        for i, priced in enumerate(kept)
    ]
    schedule = Schedule(tuple(priced.stage for priced in kept), plan.schedule.spec, plan.schedule.pacing)
    return replace(plan, schedule=schedule, stages=tuple(kept))


class TrialTrainer(Trainer):
    """Trains in few words; evaluates at the end or not at all.

    Args:
        config: see `trial_config`.
        until: see `cut_plan`.
        tune: see `cut_plan`.
        evaluates: measure on the held-out part.
        name: for the screen.
    """

    def __init__(self, config: LoadedConfig, *, until: float, tune: float | None, evaluates: bool, name: str):
        self._until, self._tune, self._evaluates, self._name = until, tune, evaluates, name
        super().__init__(config, cut=lambda plan: cut_plan(plan, until, tune))

    def _evaluate(self) -> None:
        if self._evaluates:
            super()._evaluate()
        self._evaluation_due = False

    def _replan(self) -> None:
        super()._replan()
        self.plan = cut_plan(self.plan, self._until, self._tune)

    def _announce(self, stage: Stage) -> None:
        if self._old_stage is None or stage.index != self._old_stage.index:
            self._replan()
            self._old_stage = stage

    def _show_start(self, resumed: str | None) -> None:
        done, total = self.engine.step_index, self.schedule.total_steps
        going_on = f", going on behind step {done:,}" if resumed is not None else ""
        self.console.write(f"train    {self._name}: {total - done:,} steps{going_on}")

    def _finish(self) -> None:
        self._record("end", **self.results, seconds=sum(self.meter.stage_seconds.values()))


def begin_with(folder: Path, source: Path) -> None:
    """Let a training go on from the last checkpoint of another one, unless it has begun already. Collective.

    Raises:
        CheckpointError: the other one has none, or it cannot be copied.
    """

    def copy() -> None:
        target = folder / FOLDER
        if target.is_dir():
            return
        found = newest_good(source / FOLDER)
        if found is None:
            raise CheckpointError(f"{source / FOLDER}: no checkpoint to go on from")
        partial = folder / f"{FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # checkpoints are never written to, so that a link is as good as a copy, where links are possible
        shutil.copytree(found, partial / found.name, copy_function=_link)
        (partial / LATEST).write_text(found.name + "\n")
        partial.rename(target)

    try:
        from_first(copy)
    except OSError as error:
        raise CheckpointError(f"{folder}: the checkpoint of {source} cannot be copied ({error})") from error


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def run_part(make: Callable[[], TrialTrainer]) -> dict[str, float] | None:
    """Build a trainer, train to the end and free what was held for the next one. Collective.

    Returns:
        The evaluation, empty where there was none; None where the training diverged.

    Raises:
        EffTrainError: see `Trainer.run`.
    """
    trainer = make()
    results: dict[str, float] | None = None
    try:
        results = trainer.run()
    except DivergenceError as error:
        logger.warning("%s", error)
    access.tear_down(trainer.engine.deepspeed_engine)
    trainer.engine.ema = None
    del trainer
    gc.collect()  # engine and optimizer are in cycles
    get_accelerator().empty_cache()
    return results
