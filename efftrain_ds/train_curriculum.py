"""``efftrain search curriculum``: a schedule of EfficientTrain for a model and data of one's own.

The decisions are made in `methods.efficienttrain.search`; here each training that they ask for is run by the real
trainer, on the training shards without a held-out part of each class, on which it is measured. The folder of the search
keeps what was measured, so that a search that was killed goes on, and decides, as if it had not been.
"""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint.survey import FOLDER
from .config.deepspeed_keys import batch_sizes
from .config.loader import LoadedConfig, build_methods, check_config
from .core.errors import CheckpointError, ConfigError, PlanError
from .core.files import write_whole
from .core.method import Method
from .core.ranks import from_first
from .core.text import align
from .core.timeline import Schedule
from .data.holdout import HoldOutConfig
from .data.remote import open_data
from .methods.efficienttrain.config import KEY, EfficientTrainConfig, SearchConfig
from .methods.efficienttrain.search import Costs, CurriculumSearch, Outcome, Trial
from .methods.efficienttrain.search_rows import candidates_of, make_search
from .methods.efficienttrain.search_sequential import SequentialSearch
from .observe.console import Console
from .observe.journal import Journal, read_journal
from .planning import image_macs, make_plan, plan_spec, with_labels
from .train_changes import compare
from .train_curriculum_report import decision_line, decision_table, outcome_text, read_state, report_of
from .train_setup import check_scheduler, start_processes
from .train_trial import METHOD, TrialTrainer, begin_with, run_part, scheduled, stage_end, trial_config

logger = logging.getLogger(__name__)

STATE, RESULT, BASELINE = "state.json", "curriculum.json", "baseline.json"
REPORT, JOURNAL = "search.json", "journal.jsonl"
TRIALS = "trials"
_FREE = (
    *("efftrain.run.output", "efftrain.checkpoint", "efftrain.observe", "efftrain.guard", "efftrain.plugins"),
    *("efftrain.data.val", "efftrain.data.samples", "efftrain.data.workers", "efftrain.data.prefetch"),
    *("efftrain.data.decoded_cache_mb", "efftrain.data.cache_dir", "efftrain.data.cache_gb"),
    *("efftrain.data.allow_pipe", "efftrain.data.eval_batch", "efftrain.data.max_bad_fraction"),
    *(f"{KEY}.schedule", f"{KEY}.pacing", "steps_per_print", "wall_clock_breakdown"),
)
"""Keys that no decision depends on: they may change between a search and its continuation."""


def check_curriculum_search(config: LoadedConfig) -> SearchConfig:
    """The configuration of the search.

    Raises:
        ConfigError: nothing to search, or what the search cannot run with.
    """
    settings = config.methods.get(METHOD)
    if not isinstance(settings, EfficientTrainConfig) or settings.search is None:
        found = '"search": null' if isinstance(settings, EfficientTrainConfig) else f"methods {sorted(config.methods)}"
        raise ConfigError(
            f"{KEY}.search: there is no search for a schedule, found {found}; add one to {KEY}, for example "
            f'--set "{KEY}.search={{}}"'
        )
    search, section, wrong = settings.search, config.efftrain, []
    if section.run.epochs is None:
        wrong.append("efftrain.run.epochs: not given; the search compares budgets in epochs, not in steps")
    if search.average and section.model.ema is None:
        wrong.append(f"{KEY}.search.average: true, but efftrain.model.ema is null, so there is no average")
    if section.data.hold_out is not None and search.hold_out is not None:
        wrong.append(f"{KEY}.search.hold_out: efftrain.data.hold_out is given, too; the search takes that one")
    if search.algorithm == "et++":
        if others := sorted(set(config.methods) - {METHOD}):
            wrong.append(f'{KEY}.search.algorithm: "et++" trains stage by stage, without other methods: found {others}')
        if "scheduler" in config.deepspeed:
            wrong.append('scheduler: the learning rate of "et++" follows the search, leave DeepSpeed\'s scheduler out')
    if wrong:
        raise ConfigError("\n".join(wrong))
    for method in build_methods(config):
        if method.owns_loss and type(method).evaluate is not Method.evaluate:
            raise ConfigError(
                f"{KEY}.search: compares top-1, which efftrain.methods.{method.name} does not measure; leave one out"
            )
    return search


class CurriculumRun:
    """A search from start to end. Collective.

    Args:
        config: the loaded file; `check_curriculum_search` holds.
        output: folder of the search; None takes "curriculum" in the run's output.

    Raises:
        EffTrainError: whatever is wrong with configuration, data or model; nothing was trained.
    """

    def __init__(self, config: LoadedConfig, output: str | Path | None = None):
        self.config, self.settings = config, check_curriculum_search(config)
        section = config.efftrain
        self.rank, self.world, _ = start_processes(config)
        self.console = Console(self.rank)
        self.folder = Path(output) if output is not None else Path(section.run.output) / "curriculum"
        assert section.run.epochs is not None
        self.epochs = self.settings.epochs or section.run.epochs
        self.hold_out = section.data.hold_out or self.settings.hold_out or HoldOutConfig()
        self.train = self._manifest(held_out=False)
        self.held = self._manifest(held_out=True)
        self.search = self._make_search()
        self.journal: Journal | None = None

    def _manifest(self, *, held_out: bool) -> Any:
        data = self.config.efftrain.data
        data = data.model_copy(update={"val": None, "hold_out": self.hold_out})
        remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "allow_pipe": data.allow_pipe}
        return with_labels(open_data(data.train, **remote), data, held_out=held_out)

    def _make_search(self) -> CurriculumSearch:
        """The search with its costs.

        Raises:
            PlanError: candidates that the model cannot take, stages without a step, a limit below one candidate, or
                what the trainer refuses in one of the trainings.
            ConfigError: DeepSpeed's own scheduler, and a candidate that changes the learning rate.
            ModelError: the model takes one image size only.
        """
        search, samples = self.settings, self.train.kept
        classes = self.config.efftrain.model.num_classes or len(self.train.classes)
        spec = plan_spec(self.config, world=self.world, samples=samples, num_classes=classes)
        sizes = candidates_of(search, spec.resolution, spec.stride)
        budget = search.compute if search.algorithm == "et++" else 1.0
        steps = budget * self.epochs * samples / spec.batch / search.stages
        if steps < 1:
            raise PlanError(
                f"{KEY}.search: a stage has {steps:.2g} optimizer steps ({budget * self.epochs:g} epochs of "
                f"{samples:,} images, {search.stages} stages, batch {spec.batch}); give more epochs or fewer stages"
            )
        macs = image_macs(self.config, sizes)
        self.full_macs = macs[spec.resolution]
        costs = Costs(spec.resolution, {b: macs[b] / self.full_macs for b in sizes})
        limit = search.max_epochs / self.epochs if search.max_epochs is not None else None
        found = make_search(search, costs, limit)
        self._schedule(None)
        for b in sizes[:-1]:  # what the trainer would refuse hours later, behind the baseline
            self._schedule(
                (*[b] * (search.stages - 1), spec.resolution),
                found.compute if isinstance(found, SequentialSearch) else 1.0,
            )
        return found

    def _schedule(self, sizes: tuple[int, ...] | None, budget: float = 1.0) -> Schedule:
        """Of the whole training with these bandwidths, as the trainer would plan it; None is the baseline.

        Raises:
            EffTrainError: the trainer would refuse it.
        """
        trial = Trial("plan", sizes, budget, self.settings.stages, None, False, 0.0)
        config = self._config(trial, trial.name)
        schedule = make_plan(config, world=self.world, samples=self.train.kept).schedule
        check_scheduler(config, schedule)
        return schedule

    def _config(self, trial: Trial, name: str) -> LoadedConfig:
        """Of a training, with an output folder of this name."""
        folder = self.folder / TRIALS / name
        return trial_config(
            self.config, trial, epochs=self.epochs, folder=folder, hold_out=self.hold_out, world=self.world
        )

    # -- before the start --------------------------------------------------------------------------------------

    def price_text(self) -> str:
        """What is searched and what it costs."""
        search, costs = self.search, self.search.costs
        low, high = search.extent()
        rows = [["training", "epochs", "PMACs"]]
        for name, cost in search.prices():
            rows.append([name, f"{cost * self.epochs:.2f}", f"{self._pmacs(cost):.4g}"])
        kind = "greedy" if self.settings.algorithm == "et" else "sequential"
        lines = [
            f"search   {self.settings.algorithm} ({kind}), {self.settings.stages} stages of "
            f"{', '.join(map(str, costs.sizes))} px; trainings of {self.epochs:g} epochs, tolerance "
            f"{100 * self.settings.tolerance:g} % of top-1",
            f"data     {self.train.kept:,} images to train on, {self.held.kept:,} held out to measure on "
            f"({self.hold_out.text()})",
            f"cost     in epochs at {costs.full} px:",
            *(f"         {line}" for line in align(rows, left=(0,))),
        ]
        total = (
            f"{low * self.epochs:.4g} to {high * self.epochs:.4g} epochs, {low:.3g} to {high:.3g} times the baseline"
        )
        if search.limit < high:
            total += f"; stops at search.max_epochs {search.limit * self.epochs:g}"
        return "\n".join([*lines, f"         all of it, by what is found: {total}"])

    def _pmacs(self, cost: float) -> float:
        return 3 * self.full_macs * cost * self.epochs * self.train.kept / 1e15

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Search and write the result; returns it, equal on all ranks.

        Raises:
            CheckpointError: the folder holds another search.
            DivergenceError: the baseline, or all candidates of a stage, diverged.
            Preempted: asked to stop; the same command goes on.
        """
        known = self._load()
        if known:
            spent = self.search.spent * self.epochs
            self.console.write(f"resumed  {known} trainings are done ({spent:.4g} epochs), from {self.folder}")
        from_first(lambda: self._open_journal(known))
        while (trial := self.search.ask()) is not None:
            accuracy = self._train(trial)
            before = len(self.search.decisions)
            self.search.tell(trial.name, accuracy)
            from_first(lambda trial=trial: self._told(trial))
            for decision in self.search.decisions[before:]:
                if line := decision_line(decision):
                    self.console.write(line)
        outcome = self.search.outcome
        assert outcome is not None
        from_first(lambda: self._finish(outcome))
        if self.journal is not None:
            self.journal.close()
        return outcome

    def _train(self, trial: Trial) -> float | None:
        """Top-1 of a training on the held-out part; None where it diverged."""
        folder = self.folder / TRIALS / trial.name
        if trial.start is not None:
            begin_with(folder, self.folder / TRIALS / trial.start)
        until = stage_end(config=self.config, trial=trial)
        parts: list[tuple[LoadedConfig, float | None]] = [(self._config(trial, trial.name), None)]
        if trial.tune:
            parts.append((self._config(trial, self._tuning(trial.name).name), self.settings.tune))
        results: dict[str, float] | None = None
        for number, (part, tune) in enumerate(parts):
            if tune is not None:
                begin_with(self._tuning(trial.name), folder)
            last = number == len(parts) - 1
            text = trial.name + (f", tuned at {self.search.costs.full} px" if tune is not None else "")
            results = run_part(
                partial(TrialTrainer, part, until=until, tune=tune, evaluates=last, name=text),
            )
            if results is None:
                return None
        assert results is not None
        return results["ema_top1" if self.settings.average else "top1"]

    def _tuning(self, name: str) -> Path:
        return self.folder / TRIALS / f"{name}-tune"

    # -- what is kept ------------------------------------------------------------------------------------------

    def _origin(self) -> dict[str, Any]:
        """The configuration as far as decisions depend on it."""
        return {
            "config": self.config.resolved(),
            "hold_out": self.hold_out.model_dump(mode="json"),
            "global_batch": batch_sizes(self.config.deepspeed, self.world).batch,
        }

    def _load(self) -> int:
        """Go on from what is in the folder; the number of trainings that are done.

        Raises:
            CheckpointError: it is of another configuration or of other data.
        """
        path = self.folder / STATE
        state = from_first(lambda: read_state(path))
        if state is None:
            return 0
        origin, found = self._origin(), state["origin"]
        # of the baseline, as the file's own schedule is never trained and need not fit
        changes = compare(found, origin, past=None, schedule=self._schedule(None), step=0)
        keys = {change.key.removeprefix("config."): change for change in changes}
        wrong = [str(change) for key, change in keys.items() if not key.startswith(_FREE)]
        if state["data"] != self.train.digest:
            wrong.append(f"training data: digest {state['data'][:12]} -> {self.train.digest[:12]}")
        if wrong:
            raise CheckpointError(
                f"{path}: the search there has another configuration:\n  " + "\n  ".join(wrong) + "\n"
                "Undo these changes, remove the folder, or name another one"
            )
        try:
            self.search.load_state_dict(state["search"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}; remove the folder, or name another one") from error
        return len(self.search.results)

    def _open_journal(self, known: int) -> None:
        if self.rank:
            return
        low, high = self.search.extent()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_state()
            written = self._written()
            self.journal = Journal(self.folder / JOURNAL)
        except OSError as error:
            raise ConfigError(f"--output: {self.folder} cannot be written ({error})") from error
        facts = {"epochs": self.epochs, "least": low * self.epochs, "most": high * self.epochs}
        facts |= {"sizes": self.search.costs.sizes, "work": self.search.costs.work, "world": self.world}
        facts |= {"train": self.train.kept, "held_out": self.held.kept, "done": known}
        self.journal.write("search_resume" if known else "search_start", step=known, **facts)
        self._note(written)

    def _written(self) -> int:
        """Decisions that the journal has; they are numbered, so that each is there once however often it was killed."""
        path = self.folder / JOURNAL
        rows = read_journal(path) if path.is_file() else ()
        return max((row["n"] + 1 for row in rows if isinstance(row.get("n"), int)), default=0)

    def _note(self, first: int) -> None:
        assert self.journal is not None
        for decision in self.search.decisions[first:]:
            self.journal.write(
                decision["event"],
                step=len(self.search.results),
                **{key: value for key, value in decision.items() if key != "event"},
            )

    def _told(self, trial: Trial) -> None:
        """State first, then the journal: what is missing in it after a kill is written by the continuation."""
        assert self.journal is not None
        first = self._written()
        self._write_state()
        self._note(first)
        self._tidy()

    def _tidy(self) -> None:
        """Delete the checkpoints that no later training goes on from."""
        for name, _ in self.search.results:
            if name not in self.search.needed:
                shutil.rmtree(self.folder / TRIALS / name / FOLDER, ignore_errors=True)
            shutil.rmtree(self._tuning(name) / FOLDER, ignore_errors=True)

    def _write_state(self) -> None:
        document = {"origin": self._origin(), "data": self.train.digest, "search": self.search.state_dict()}
        write_whole(self.folder / STATE, json.dumps(document) + "\n")

    def _finish(self, outcome: Outcome) -> None:
        """Write the schedule as configurations that can be started, and all decisions; show them."""
        self._tidy()  # a kill may have come between the last state and this
        output = Path(self.config.efftrain.run.output)
        assert self.config.efftrain.run.epochs is not None
        epochs = self.config.efftrain.run.epochs
        found = scheduled(self.config, outcome.sizes, outcome.budget * epochs)
        found["efftrain"]["run"]["output"] = str(output / "searched")
        plain = scheduled(self.config, None, epochs)
        plain["efftrain"]["run"]["output"] = str(output / "baseline")
        costs = []
        for document in (found, plain):  # what is written can be loaded and planned
            data = document["efftrain"]["data"]
            if data["hold_out"] is not None:  # its share was for shorter trainings in the search
                data["hold_out"]["train_share"], data["samples"] = 1.0, None
            plan = make_plan(check_config(document, world=self.world), world=self.world)
            costs.append(plan.total_cost)
        facts = {"budget_epochs": outcome.budget * epochs, "relative_cost": costs[0] / costs[1]}
        facts |= {"spent_epochs": self.search.spent * self.epochs}
        report = report_of(self.search, outcome, **facts, train=self.train.kept, held_out=self.held.kept)
        try:
            write_whole(self.folder / RESULT, json.dumps(found, indent=1) + "\n")
            write_whole(self.folder / BASELINE, json.dumps(plain, indent=1) + "\n")
            write_whole(self.folder / REPORT, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--output: {self.folder} cannot be written ({error})") from error
        self.console.write("\n".join(decision_table(self.search.decisions)))
        self.console.write(
            f"result   {outcome_text(outcome, self.search.costs.full)}; x{report['relative_cost']:.3f} of the cost of "
            f"the baseline; {outcome.why}\n"
            f"search   cost {report['spent_epochs']:.4g} epochs"
            + ("" if outcome.complete else ", ended by its limit")
            + f"\nwritten  {self.folder}: {RESULT} (start it with --ds_config), {BASELINE}, {REPORT}, {JOURNAL}"
        )


def run_curriculum_search(
    config: LoadedConfig, output: str | Path | None = None, *, dry_run: bool = False
) -> Outcome | None:
    """Print what a search costs, search, and write what was found. Collective; see `CurriculumRun`.

    Args:
        config: the loaded file.
        output: folder of the search; None takes "curriculum" in the run's output.
        dry_run: stop behind the costs.

    Returns:
        What was found; None with `dry_run`.

    Raises:
        EffTrainError: see `CurriculumRun`.
    """
    run = CurriculumRun(config, output)
    run.console.write(run.price_text())
    return None if dry_run else run.run()
