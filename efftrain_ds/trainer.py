"""The reference loop of launch/train.py. It knows no method by name."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .config.loader import LoadedConfig
from .core import faults
from .core.batch import Batch
from .core.best_effort import BestEffort
from .core.errors import CheckpointError, Preempted
from .core.timeline import Stage
from .cost.plan import PricedPlan
from .cost.render import total_lines
from .data.augment import mixed_cross_entropy
from .data.replay import ReplayFeed
from .observe.console import (
    Console,
    RunState,
    StartInfo,
    eval_line,
    final_table,
    run_line,
    stage_lines,
    start_block,
)
from .observe.meters import Chrono, StepMeter
from .observe.pictures import batch_picture, zoomed
from .planning import make_plan, measured_throughput, outcomes, time_left
from .train_eval import evaluate
from .train_logs import RunLogs
from .train_saving import Saver, due, steps_of
from .train_setup import build, memory_bytes, schedule_digest
from .train_signals import StopSignals

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one configuration.

    Args:
        config: the loaded file.
        measure_steps: instead of training, time this many steps of every kind of stage and store the profile.
        cut: changes the plan before the run is built from it, e.g. `train_search.only_searches`.

    Raises:
        EffTrainError: see `train_setup.build`.
    """

    def __init__(
        self,
        config: LoadedConfig,
        *,
        measure_steps: int | None = None,
        cut: Callable[[PricedPlan], PricedPlan] | None = None,
    ):
        self.config = config
        self.measuring = measure_steps is not None
        self.output = Path(config.efftrain.run.output)
        self.logs: RunLogs | None = None
        self.run_parts = build(config, self.output, self._record, measure_steps=measure_steps, cut=cut)
        run = self.run_parts
        self.engine, self.plan, self.schedule = run.engine, run.plan, run.schedule
        self.console = Console(run.rank)
        self.meter = StepMeter(window=config.efftrain.observe.log_every)
        self.chrono = Chrono()
        self.best: dict[str, float] = {}
        self.results: dict[str, float] = {}
        self.logs = RunLogs(
            config,
            rank=run.rank,
            world=run.world,
            write=not self.measuring,
            train_seconds=lambda: sum(self.meter.stage_seconds.values()),
        )
        self._loss_sum = torch.zeros((), device=run.device)
        self._loss_steps = 0
        self._evaluation_due = False
        self._changes: list[str] = []
        assert self.engine.guard is not None
        self.guard = self.engine.guard
        self.guard.sample_names = self._sample_names
        self._signals = StopSignals(self.guard.request_stop, self._stop_note)
        self.saver = Saver(
            self.engine, config, self.schedule, self._client_state, self._record, lambda text: self.console.write(text)
        )
        self._old_stage: Stage | None = None
        self.engine.context.say = self._say
        self.engine.context.probe_batches = self._probe_batches

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last evaluation.

        Raises:
            ShardError: too many unreadable samples, or a held-out sample is unreadable.
            CheckpointError: a checkpoint cannot be written or does not belong to this run.
        """
        handled = self.config.efftrain.checkpoint.on_signal and not self.measuring
        with self._signals if handled else nullcontext():
            try:
                return self._run()
            finally:
                self.chrono.switch(None)
                self._close()

    def _run(self) -> dict[str, float]:
        if not self.measuring:
            self.guard.watch(self.output / "watch")
        resumed = self._resume()
        assert self.logs is not None
        self.logs.open(self.plan, step=self.engine.step_index, resumed=resumed, changes=self._changes)
        self._show_start(resumed)
        self._tell_init(resumed)
        self.engine.train()
        self.chrono.switch("train")
        if self._evaluation_due:  # the run before was stopped at it
            self._evaluate()
        batches = self._batches()
        while self.engine.step_index < self.schedule.total_steps:
            self._train_step(batches)
        if self.measuring:
            self._store_throughput()
            return {}
        if not self.results:
            self._evaluate()
        self._finish()
        return self.results

    def _batches(self) -> Iterator[Batch]:
        """The micro-batches from here on; after a resume this reads again what a replay buffer held."""
        loader, step = self.run_parts.loader, self.engine.step_index
        if isinstance(loader, ReplayFeed):
            loader.tick = lambda: self.guard.watchdog.beat("data", step) if self.guard.watchdog is not None else None
        with self.chrono.during("refill"), self.guard.phase("data"):
            return iter(loader)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        run, engine = self.run_parts, self.engine
        step = engine.step_index
        faults.point("step.begin")
        set_step = getattr(engine.lr_scheduler, "set_step", None)  # ours; a rebuild replaces it
        if set_step is not None:
            set_step(step)
        # changes of parameters and the measurements of a search; next to nothing in the other steps
        with self.chrono.during("growth"):
            engine.begin_step()
        self.meter.begin()
        stage = engine.context.stage
        assert stage is not None
        self._announce(stage)
        with self.meter.part("data"), self.guard.phase("data"):  # a remote shard may take minutes
            micro = [next(batches).to(run.device) for _ in range(stage.accumulation)]
        denominator = self._valid_share(micro)
        picture_due = self._due(self.config.efftrain.observe.images_every, step) and run.rank == 0
        magnitude = stage.settings.get("ra_magnitude")
        loss_sum = torch.zeros_like(self._loss_sum)  # kept where the step is applied, so it is finite
        with self.meter.part("compute"):
            for index, batch in enumerate(micro):
                shown = batch.images[:6].clone() if picture_due and index == 0 else None
                batch = run.augment.before(batch, magnitude)
                batch = engine.prepare_batch(batch)
                batch = run.augment.after(batch, step, index, stage.settings.get("erasing"))
                batch.denominator = denominator
                for number in engine.each_pass():
                    logits = engine(batch.images)
                    loss = engine.loss(logits.float(), batch, lambda out, b: self._loss(out, b, denominator))
                    engine.backward(loss)
                    loss_sum += loss.detach() / (stage.accumulation * engine.passes**2)  # the mean of the passes
                    if (index + 1, number + 1) != (len(micro), engine.passes):
                        engine.step()
                if shown is not None:
                    self._show_picture(shown, batch, step)
        faults.point("step.before_update")
        with self.meter.part("step"):
            engine.step()
        faults.point("step.end")
        if engine.was_step_applied():
            self._loss_sum += loss_sum
            self._loss_steps += 1
        run.loader.commit(stage.batch)
        self.meter.end(stage.index, stage.batch // run.world)
        if picture_due and self.logs is not None:
            self.logs.pictures(engine.methods, engine.context, step)
        self._after_step(step + 1, stage)

    def _loss(self, logits: torch.Tensor, batch: Batch, denominator: torch.Tensor) -> torch.Tensor:
        return mixed_cross_entropy(logits, batch, self.config.efftrain.optim.label_smoothing, denominator)

    def _valid_share(self, micro: list[Batch]) -> torch.Tensor:
        """Divisor of a micro-batch's summed loss, so that the step's gradient is the mean over all valid samples."""
        count = sum((batch.valid.sum() for batch in micro), torch.zeros((), device=self.run_parts.device)).float()
        if self.run_parts.world > 1:
            dist.all_reduce(count)
        return count.clamp(min=1) / (self.run_parts.world * len(micro))

    def _after_step(self, done: int, stage: Stage) -> None:
        observe = self.config.efftrain.observe
        last = done == self.schedule.total_steps
        self.results = {}
        if done % observe.log_every == 0 or last:
            self._log(done, stage)
        if self.measuring:
            return
        self._evaluation_due = self.run_parts.val_loader is not None and (last or self._eval_due(done))
        if self.guard.stop_agreed:
            self._stop()
        if self._evaluation_due:
            self._evaluate()
        if last or self.saver.due(done):
            self._save(required=last)

    # -- intervals, saving -------------------------------------------------------------------------------------

    def _due(self, text: str | None, step: int) -> bool:
        return not self.measuring and due(self.schedule, text, step)

    def _eval_due(self, step: int) -> bool:
        """As `_due`, but not so near the end that the last evaluation repeats it."""
        text = self.config.efftrain.observe.eval_every
        return self._due(text, step) and self.schedule.total_steps - step >= (steps_of(self.schedule, text) or 0) // 2

    def _resume(self) -> str | None:
        path = self.run_parts.checkpoint
        if path is None:
            return None
        client, changes = self.saver.resume(path)
        self.run_parts.loader.load_state_dict(client["data"])
        self.meter.load_state_dict(client["meter"])
        self.chrono.load_state_dict(client["chrono"])
        self.best = client["best"]
        self._evaluation_due = client.get("evaluation_due", False)
        self._changes = [str(change) for change in changes]
        return path.name

    def _client_state(self) -> dict[str, Any]:
        return {
            "plan": schedule_digest(self.schedule),
            "data": self.run_parts.loader.state_dict(),
            "meter": self.meter.state_dict(),
            "chrono": self.chrono.state_dict(),
            "best": self.best,
            "evaluation_due": self._evaluation_due,
        }

    def _save(self, *, required: bool = False) -> None:
        with self.chrono.during("checkpoint"):
            saved = self.saver.save(required=required)
        if saved and self.logs is not None:
            self.logs.scalars({"ckpt/save_s": self.saver.seconds or 0.0}, self.engine.step_index)

    def _stop(self) -> None:
        """Save and end, as some rank was asked to.

        Raises:
            Preempted: when everything is saved, or saving has failed and the checkpoint before must do.
        """
        step = self.engine.step_index
        try:
            self._save(required=True)
            said = f"saved at step {step:,} in {self.saver.seconds or 0:.1f} s"
        except CheckpointError as error:
            said = f"the last save failed, so the steps since the one before are lost ({error})"
        self._signals.ignore()
        self._record("preempted", step=step, seconds=self.saver.seconds, said=said)
        resumes = self.config.efftrain.checkpoint.resume
        how = "Go on with the same command" if resumes else "Go on with efftrain.checkpoint.resume set to true"
        raise Preempted(f"asked to stop: {said}. {how}")

    def _stop_note(self, name: str) -> str:
        about = f" (about {self.saver.seconds:.0f} s)" if self.saver.seconds is not None else ""
        return f"{name}: saving at the end of step {self.engine.step_index + 1:,}{about} - press again to abort"

    # -- evaluation --------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        run = self.run_parts
        if run.val_loader is None or run.val_manifest is None:
            return
        start = time.monotonic()
        with self.chrono.during("eval"), self.guard.phase("evaluation"):
            args = (
                self.engine,
                run.val_loader,
                lambda b: run.augment.evaluate(b.to(run.device)),
                run.val_manifest.kept,
            )
            results: dict[str, float] | None = {}
            missed: list[int] = []
            # shards to train on may have unreadable images, as the training counts and leaves out
            lenient: dict[str, Any] = {"strict": self.config.efftrain.data.hold_out is None, "missed": missed.append}
            kinds = [False] if self.engine.ema is None else [False, True]
            variants = [None, *(name for method in self.engine.methods for name in method.variants)]
            for variant, ema in itertools.product(variants, kinds):
                found = evaluate(*args, ema=ema, variant=variant, stop=self.guard.poll, **lenient)
                if found is None or results is None:
                    results = None
                    break
                results |= found
        if results is None:
            self._stop()
        for name, value in results.items():
            pick = min if name.endswith("loss") else max
            self.best[name] = pick(self.best.get(name, value), value)
        self.results = results
        self._evaluation_due = False
        step, seconds = self.engine.step_index, time.monotonic() - start
        samples = run.val_manifest.kept - max(missed, default=0)
        self.console.write(eval_line(step, results, samples=samples, seconds=seconds, best=self.best))
        self._record("eval", step=step, **results, **({"missing": missed[0]} if missed else {}))
        if self.logs is not None:
            self.logs.scalars({f"eval/{name}": value for name, value in results.items()}, step)

    # -- what is shown -----------------------------------------------------------------------------------------

    def _record(self, event: str, step: int | None = None, **data: Any) -> None:
        if self.logs is None:
            return
        self.logs.record(event, step=self.engine.step_index if step is None else step, **data)
        if event == "rebuild":
            before, after = data["parameters"]
            counts = f"{before / 1e6:.3g} M -> {after / 1e6:.3g} M trainable parameters"
            self.console.write(f"rebuild  {data['reason']}: {counts} in {data['seconds']:.2f} s")

    def _sample_names(self, ids: list[int]) -> list[str]:
        """Where samples lie: shard and offset, as the index says."""
        manifest = self.run_parts.train_manifest
        rows = manifest.table[ids]
        return [f"{manifest.shards[int(row[0])].name}@{int(row[1])}" for row in rows]

    def _show_start(self, resumed: str | None) -> None:
        run, data = self.run_parts, self.config.efftrain.data
        if self.measuring:
            self.console.write(
                f"measuring {self.schedule.total_steps} steps, {len(self.schedule.stages) // 2} kinds of stage"
            )
            return
        device = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
        board = self.logs.board if self.logs is not None else None
        command = board.command if board is not None and self.config.efftrain.observe.tensorboard else None
        info = StartInfo(
            run_id=self.output.name,
            resumed_from=resumed,
            resumed_step=self.engine.step_index,
            model=self.config.efftrain.model.name,
            params=self.plan.params,
            resolution=data.resolution,
            zero_stage=self.plan.zero_stage,
            precision=self.plan.precision,
            world=run.world,
            device=device,
            batch=self.schedule.spec.batch,
            methods=self.plan.methods,
            plan=total_lines(self.plan),
            data=data.train,
            samples=run.train_manifest.kept,
            val_samples=run.val_manifest.kept if run.val_manifest is not None else None,
            output=str(self.output),
            tensorboard=command,
        )
        self.console.write(start_block(info))
        for change in self._changes:
            self.console.write(f"changed since the checkpoint  {change}")

    def _tell_init(self, resumed: str | None) -> None:
        """What the run started from, on screen and in the journal; after a resume it has no effect any more."""
        init = self.run_parts.init
        if init is None or resumed is not None or self.measuring:
            return
        self.console.write(f"weights  {init.text()}")
        self._record("init", **asdict(init))

    def _label(self, stage: Stage) -> str:
        return " ".join(word for word in (m.describe(stage) for m in self.engine.methods) if word)

    def _say(self, lines: str | list[str]) -> None:
        self.console.write(lines if isinstance(lines, str) else "\n".join(lines))

    def _probe_batches(self, samples: int) -> list[Batch]:
        """Fixed training samples for methods that measure, see `core.context.Context`."""
        augment = self.run_parts.augment
        batches = self.run_parts.probe_batches(samples)
        for batch in batches:
            batch.mean, batch.std = augment.mean, augment.std
        return batches

    def _replan(self) -> None:
        """Price the plan anew: a method may have chosen what earlier was only assumed."""
        if self.measuring or not any(m.changes_parameters for m in self.engine.methods):
            return
        self.plan = make_plan(
            self.config,
            world=self.run_parts.world,
            samples=self.run_parts.train_manifest.kept,
            throughput=self.run_parts.throughput,
            methods=self.engine.methods,
        )
        if self.logs is not None:
            self.logs.write_plan(self.plan)

    def _announce(self, stage: Stage) -> None:
        stage = self.plan.schedule.stages[stage.index]
        if self._old_stage is not None and stage.index == self._old_stage.index:
            return
        self._replan()
        stage = self.plan.schedule.stages[stage.index]
        if not self.measuring and len(self.schedule.stages) > 1:
            why = f"{100 * stage.p_start:.0f}% of the budget spent"
            self.console.write(
                stage_lines(self._old_stage, stage, len(self.schedule.stages), why=why, world=self.run_parts.world)
            )
        self._old_stage = stage

    def _log(self, done: int, stage: Stage) -> None:
        run = self.run_parts
        loss = self._loss_sum / max(self._loss_steps, 1)
        if run.world > 1:
            dist.all_reduce(loss)
            loss = loss / run.world
        self._loss_sum.zero_()
        self._loss_steps = 0
        if self.measuring:
            return
        rates = self.meter.rates()
        norm = self.engine.get_global_grad_norm()
        state = RunState(
            step=done,
            total_steps=self.schedule.total_steps,
            epoch=self.plan.epoch_at(done),
            epochs=self.plan.data_epochs,
            stage=stage.index,
            stages=len(self.schedule.stages),
            label=self._label(stage),
            loss=float(loss),
            lr=float(self.engine.get_lr()[0]),
            grad_norm=float(norm) if norm is not None else None,
            images_per_s=rates.images_per_s if rates is not None else None,
            unit="gpu" if run.device.type == "cuda" else "rank",
            data_share=rates.shares.get("data") if rates is not None else None,
            memory=memory_bytes(run.device),
            cost_done=self.plan.cost_at(done),
            seconds_left=time_left(self.plan, done, self.meter),
        )
        self.console.write(run_line(state))
        self._scalars(state, done)
        self._record(
            "log",
            step=done,
            loss=state.loss,
            lr=state.lr,
            grad_norm=state.grad_norm,
            images_per_s=state.images_per_s,
            data_share=state.data_share,
            memory=state.memory,
            cost_done=state.cost_done,
            skipped_steps=self.engine.skipped_steps,
            bad_samples=sum(run.loader.bad_samples.values()),
            **{tag.removeprefix("data/"): value for tag, value in self._replay_scalars(state).items()},
        )

    def _replay_scalars(self, state: RunState) -> dict[str, float]:
        """Counts of loaded and replayed samples, where there is replay."""
        loader = self.run_parts.loader
        return loader.scalars(state.step, state.images_per_s) if isinstance(loader, ReplayFeed) else {}

    def _scalars(self, state: RunState, done: int) -> None:
        values = {
            "loss/train": state.loss,
            "optim/lr": state.lr,
            "cost/done": state.cost_done,
            "cost/seconds_train": sum(self.meter.stage_seconds.values()),
            "stage/index": float(state.stage),
            "stage/micro_batch": float(self.schedule.stages[state.stage].micro_batch),
            "health/skipped_steps": float(self.engine.skipped_steps),
            "health/nonfinite_steps": float(self.guard.count),
            "health/bad_samples": float(sum(self.run_parts.loader.bad_samples.values())),
            "speed/memory_gb": (state.memory or 0.0) / 2**30,
        }
        optional = {
            "optim/grad_norm": state.grad_norm,
            "speed/img_s": state.images_per_s,
            "speed/data_pct": 100 * state.data_share if state.data_share is not None else None,
            "cost/predicted_s": self.plan.seconds,
        }
        values |= {tag: value for tag, value in optional.items() if value is not None}
        values |= self._replay_scalars(state)
        for method in self.engine.methods:
            values |= method.scalars(self.engine.context)
        if self.logs is not None:
            self.logs.scalars(values, done)

    def _show_picture(self, original: torch.Tensor, batch: Batch, step: int) -> None:
        data = self.config.efftrain.data
        picture = batch_picture(
            original.cpu(), batch.images[: len(original)].detach().float().cpu(), data.mean, data.std
        )
        picture = zoomed(picture, original.shape[-1])
        if self.logs is not None:
            self.logs.picture("batch/original_seen_spectrum", picture, step, "batch")

    # -- the end -----------------------------------------------------------------------------------------------

    def _store_throughput(self) -> None:
        """Write the median step time of every kind of stage, which later plans take their hours from."""
        if self.run_parts.rank == 0:
            path = self.output / "throughput.json"
            measured_throughput(self.plan, self.meter).save(path)
            self.console.write(f"step times written to {path}")

    def _finish(self) -> None:
        stages = outcomes(self.plan, self.meter)
        others = {name: seconds for name, seconds in self.chrono.seconds.items() if name != "train" and seconds > 0.05}
        self.console.write(final_table(stages, others))
        with BestEffort("step times")(self.output / "throughput.json"):
            self._store_throughput()
        self._record(
            "end",
            **self.results,
            seconds=sum(stage.seconds for stage in stages),
            predicted_seconds=self.plan.seconds,
            stages=[
                {"index": i, "steps": n, "seconds": self.meter.stage_seconds[i]}
                for i, n in sorted(self.meter.stage_steps.items())
            ],
            bad_samples=self.run_parts.loader.bad_samples,
            others=others,
        )

    def _close(self) -> None:
        self.saver.leave()  # an error may have come while a checkpoint was being written in the background
        self.run_parts.loader.close()
        if self.run_parts.val_loader is not None:
            self.run_parts.val_loader.close()
        self.guard.close()
        if self.logs is not None:
            self.logs.close()
