"""``efftrain search growth``: AutoProg's searches without the training between them, for a schedule to be used later.

The real trainer runs on a plan that keeps every search whole and leaves out what comes after it. Each search sees the
learning rate of its place in the real run, but starts from what the searches before it trained, not from a stage that
was trained to its end: the schedule is an estimate of what the searched run itself would choose.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config.loader import LoadedConfig, build_methods
from .core.errors import ConfigError
from .core.timeline import PlanSpec, Schedule
from .cost.plan import PricedPlan, PricedStage
from .methods.autoprog.candidates import Candidate
from .methods.autoprog.config import AutoProgConfig
from .methods.autoprog.method import AutoProg
from .methods.autoprog.timeline import KEY, ramp_levels, stage_settings, stage_starts
from .trainer import Trainer

logger = logging.getLogger(__name__)

_NAMES = {"depth": "depth", "resolution": "resolution", "drop_path": "drop_path"}
_NAMES |= {"magnitude": "ra_magnitude", "erasing": "erasing"}
"""Keys of a stage in the configuration, and of the plan's settings that they become."""


def check_searches(config: LoadedConfig) -> AutoProgConfig:
    """The configuration of the searched method.

    Raises:
        ConfigError: the file searches no growth schedule, or a method that belongs to it cannot run.
    """
    settings = config.methods.get("autoprog")
    if not isinstance(settings, AutoProgConfig) or settings.search is None:
        found = (
            '"search": null' if isinstance(settings, AutoProgConfig) else f"methods {sorted(config.methods) or 'none'}"
        )
        raise ConfigError(
            f'{KEY}.search: there is no growth search to run, found {found}; add "search": {{}} to {KEY} '
            f'(for example --set "{KEY}.search={{}}")'
        )
    build_methods(config)
    return settings


def only_searches(plan: PricedPlan) -> PricedPlan:
    """The stages of a plan that search, and one step of what follows the last of them, at which its choice is made.

    Stages keep their settings and their places in the budget, so the learning rate of a search is that of the real
    run. A plan that was cut already is returned as it is.
    """
    searches = [i for i, priced in enumerate(plan.stages) if priced.stage.settings.get("search")]
    kept = [plan.stages[i] for i in (*searches, searches[-1] + 1)]
    stages: list[PricedStage] = []
    for index, priced in enumerate(kept):
        first = stages[-1].stage.end_step if stages else 0
        steps = 1 if index == len(searches) else priced.stage.steps
        stage = replace(priced.stage, index=index, start_step=first, end_step=first + steps)
        cost = priced.cost * steps // priced.stage.steps
        stages.append(replace(priced, stage=stage, cost=cost))
    total = sum(priced.cost for priced in stages)
    stages = [replace(priced, share=priced.cost / total) for priced in stages]
    schedule = Schedule(tuple(s.stage for s in stages), plan.schedule.spec, plan.schedule.pacing)
    return replace(plan, schedule=schedule, stages=tuple(stages))


def growth_schedule(
    config: AutoProgConfig, spec: PlanSpec, decided: Mapping[int, Candidate]
) -> list[dict[str, float | int | None]]:
    """What was chosen, as ``efftrain.methods.autoprog.schedule``: one object a stage, the last one full size.

    Args:
        config: with the search.
        spec: what the run is.
        decided: (depth, resolution) of the stages that were chosen; 0 where a dimension does not grow.

    Raises:
        ConfigError: a stage is not chosen, or the result is not a valid schedule.
    """
    last = config.stages - 1
    missing = [k for k in range(last) if k not in decided]
    if missing:
        raise ConfigError(f"{KEY}.search: stages {missing} were not chosen, only {sorted(decided)}")
    found = ramp_levels(config, spec)
    ends = (*stage_starts(config.stages, spec)[1:], 1.0)
    rows: list[dict[str, float | int | None]] = []
    for k, end in enumerate(ends):
        size = decided[k] if k < last else found.nominal(last)
        settings = stage_settings(found, k, size)
        settings["depth"] = size[0] or spec.depth
        row: dict[str, float | int | None] = {"until": round(end, 12)}
        for key, name in _NAMES.items():
            value = settings.get(name)
            row[key] = round(value, 6) if isinstance(value, float) else value
        rows.append(row)
    try:
        AutoProgConfig.model_validate({"schedule": rows})
    except ValueError as error:
        raise ConfigError(f"the searched schedule is not valid: {error}") from error
    return rows


class SearchTrainer(Trainer):
    """Runs the searches of one configuration; makes no checkpoint, resumes from none and evaluates nothing.

    The journal, with the table of every search, goes to the folder "search" in the run's output.

    Args:
        config: the loaded file.

    Raises:
        EffTrainError: see `check_searches` and `train_setup.build`.
    """

    def __init__(self, config: LoadedConfig):
        self.settings = check_searches(config)
        run = config.efftrain.run
        run = run.model_copy(update={"output": str(Path(run.output) / "search")})
        observe = config.efftrain.observe.model_copy(update={"tensorboard": False, "images_every": None, "wandb": None})
        checkpoint = config.efftrain.checkpoint.model_copy(update={"on_signal": False, "resume": False})
        changed = config.efftrain.model_copy(update={"run": run, "observe": observe, "checkpoint": checkpoint})
        super().__init__(replace(config, efftrain=changed), cut=only_searches)
        self.found: list[dict[str, float | int | None]] = []

    def search(self) -> list[dict[str, float | int | None]]:
        """Run all searches; returns the schedule, equal on all ranks, see `growth_schedule`.

        Raises:
            DivergenceError: no candidate of a search has a finite loss.
            ShardError: too many unreadable samples.
        """
        self.run()
        return self.found

    def _save(self, *, required: bool = False) -> None:
        return None

    def _evaluate(self) -> None:
        return None

    def _replan(self) -> None:
        super()._replan()
        self.plan = only_searches(self.plan)

    def _show_start(self, resumed: str | None) -> None:
        spec = self.schedule.spec
        epochs = f" ({self.schedule.total_samples / spec.samples:.2g} epochs)" if spec.samples else ""
        self.console.write(
            f"search   {self.settings.stages - 1} searches of {self.settings.search.epochs:g} epochs, "  # type: ignore[union-attr]
            f"{self.schedule.total_steps:,} steps{epochs}; journal in {self.output}"
        )

    def _finish(self) -> None:
        method = next(m for m in self.engine.methods if isinstance(m, AutoProg))
        self.found = growth_schedule(self.settings, self.schedule.spec, method.decided)
        seconds = sum(self.meter.stage_seconds.values())
        self._record("search_end", schedule=self.found, seconds=seconds)
        self.console.write(
            f"search   done in {seconds:.1f} s of steps and {self.chrono.seconds.get('growth', 0.0):.1f} s of changes"
        )


def schedule_text(rows: list[dict[str, float | int | None]]) -> str:
    """JSON of a schedule, one stage a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]"


def run_search(config: LoadedConfig, output: str | Path | None = None) -> list[dict[str, Any]]:
    """Search, print the schedule on rank 0, and write it. Collective.

    Args:
        config: the loaded file.
        output: JSON file of the schedule; None takes ``growth.json`` beside the journal.

    Returns:
        The schedule.

    Raises:
        ConfigError: there is nothing to search, or the file cannot be written.
        EffTrainError: see `SearchTrainer`.
    """
    trainer = SearchTrainer(config)
    found = trainer.search()
    if trainer.run_parts.rank == 0:
        path = Path(output) if output is not None else trainer.output / "growth.json"
        text = schedule_text(found)
        trainer.console.write(f'"{KEY}.schedule", instead of "search":\n{text}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output: cannot write {path}: {error}") from error
        trainer.console.write(f"written to {path}")
    return found
