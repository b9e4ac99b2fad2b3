"""What a run says on the terminal: a start block, run lines, stage lines, evaluations, and the plan against the truth.

The functions return text; `Console` writes it on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from ..core.best_effort import BestEffort
from ..core.redact import redacted
from ..core.text import align, bytes_text, duration_text, short_settings
from ..core.timeline import Stage


class Console:
    """Writes lines on rank 0 and nothing elsewhere, without the secrets of URLs and commands.

    A terminal that is gone, or a log file on a full disk, ends nothing.

    Args:
        rank: data-parallel rank.
        stream: where to; None takes the standard output of the moment.
    """

    def __init__(self, rank: int = 0, stream: TextIO | None = None):
        self._rank = rank
        self._stream = stream
        self._effort = BestEffort("lines")

    def write(self, text: str) -> None:
        """Write a block or line and flush it."""
        if self._rank == 0:
            with self._effort("standard output"):
                stream = self._stream or sys.stdout
                stream.write(redacted(text) + "\n")
                stream.flush()


@dataclass(frozen=True)
class StartInfo:
    """What the start block shows.

    Attributes:
        run_id: name of the run.
        resumed_from: checkpoint it goes on from, or None for a fresh run.
        resumed_step: optimizer steps done before, with `resumed_from`.
        model: name of the model.
        params: number of parameters.
        resolution: input side in pixels at full cost.
        zero_stage: 0 to 3.
        precision: "fp32", "bf16" or "fp16".
        world: number of ranks.
        device: kind of device, e.g. "cpu" or "NVIDIA H100".
        batch: global batch in samples.
        methods: (name, one line) in run order.
        plan: lines on the plan's total.
        data: where the training data lies.
        samples: training samples of one epoch.
        val_samples: samples of the held-out split, or None.
        output: output folder.
        tensorboard: command line, or None.
    """

    run_id: str
    resumed_from: str | None
    resumed_step: int
    model: str
    params: int
    resolution: int
    zero_stage: int
    precision: str
    world: int
    device: str
    batch: int
    methods: Sequence[tuple[str, str]]
    plan: Sequence[str]
    data: str
    samples: int
    val_samples: int | None
    output: str
    tensorboard: str | None


def start_block(info: StartInfo) -> str:
    """The block at the start of a run, about 12 lines."""
    how = f"resumed from {info.resumed_from} (step {info.resumed_step:,})" if info.resumed_from else "fresh start"
    ranks = f"{info.world} rank{'s' if info.world != 1 else ''}"
    rows = [
        ("run", f"{info.run_id}, {how}"),
        ("model", f"{info.model}, {info.params / 1e6:.2f} M parameters, {info.resolution} px"),
        ("engine", f"ZeRO-{info.zero_stage}, {info.precision}, {ranks} on {info.device}"),
    ]
    rows += [("method", f"{name}: {line}" if line else name) for name, line in info.methods] or [("method", "none")]
    rows += [("plan", line.strip()) for line in info.plan]
    held_out = f", {info.val_samples:,} held out" if info.val_samples is not None else ", no evaluation"
    rows += [
        ("data", f"{redacted(info.data)}: {info.samples:,} samples{held_out}, batch {info.batch:,}"),
        ("output", info.output),
    ]
    if info.tensorboard:
        rows.append(("watch", info.tensorboard))
    lines, last = [], ""
    for key, text in rows:
        lines.append(f"{key if key != last else '':<8}{text}")
        last = key
    return "\n".join(lines)


@dataclass(frozen=True)
class RunState:
    """Numbers of one run line; None leaves a field out.

    Attributes:
        step: optimizer steps done.
        total_steps: of the whole run.
        epoch: passes over the data done.
        epochs: of the whole run.
        stage: the current stage.
        stages: number of stages.
        label: words on the stage, e.g. "B128 m3".
        loss: mean training loss since the last line.
        lr: learning rate.
        grad_norm: norm of the gradients before clipping.
        images_per_s: training images a second of one rank.
        unit: "gpu" or "rank".
        data_share: share of the step's time spent waiting for data.
        memory: peak bytes of this rank.
        cost_done: share of the run's cost that is done.
        seconds_left: estimate.
        mfu: model FLOPs utilisation, where the device's peak is known.
    """

    step: int
    total_steps: int
    epoch: float | None
    epochs: float | None
    stage: int
    stages: int
    label: str
    loss: float
    lr: float
    grad_norm: float | None
    images_per_s: float | None
    unit: str
    data_share: float | None
    memory: float | None
    cost_done: float
    seconds_left: float | None
    mfu: float | None = None


def run_line(state: RunState) -> str:
    """One line every so many steps. Progress and time left are in cost too, because steps are not equal."""
    head = f"step {state.step:,}/{state.total_steps:,}"
    if state.epoch is not None and state.epochs is not None:
        head += f"  ep {state.epoch:.1f}/{_short(state.epochs)}"
    head += f"  stage {state.stage + 1}/{state.stages}" + (f" {state.label}" if state.label else "")
    fields = [head, f"loss {_loss(state.loss)}", f"lr {lr_text(state.lr)}"]
    if state.grad_norm is not None:
        fields.append(f"gnorm {state.grad_norm:.2f}")
    if state.images_per_s is not None:
        fields.append(f"{_rate(state.images_per_s)} img/s/{state.unit}")
    if state.mfu is not None:
        fields.append(f"{100 * state.mfu:.0f}% MFU")
    if state.data_share is not None:
        fields.append(f"data {100 * state.data_share:.0f}%")
    if state.memory is not None:
        fields.append(bytes_text(state.memory))
    fields.append(f"done {100 * state.step / state.total_steps:.1f}% of steps, {100 * state.cost_done:.1f}% of cost")
    if state.seconds_left is not None:
        fields.append(f"left {duration_text(state.seconds_left)}")
    return " | ".join(fields)


def lr_text(lr: float) -> str:
    """A learning rate with two digits: ``"9.8e-4"``."""
    if lr == 0:
        return "0"
    mantissa, exponent = f"{lr:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _loss(loss: float) -> str:
    return f"{loss:.3f}"


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 99.5 else f"{rate:.1f}"


def _value(value: Any) -> str:
    """A setting in words: a switch is on or off, rates without the digits of binary fractions."""
    if value is None or value is False:
        return "-"
    return "on" if value is True else f"{value:.4g}" if isinstance(value, float) else str(value)


def stage_lines(old: Stage | None, new: Stage, stages: int, *, why: str = "", world: int | None = None) -> str:
    """What changes at a stage edge.

    Args:
        old: the stage before, or None at the start.
        new: the stage that begins.
        stages: number of stages.
        why: reason, e.g. "40% of the budget spent"; left out where empty.
        world: number of ranks, to spell out the global batch.
    """
    head = f"--- stage {new.index + 1}/{stages} at step {new.start_step:,}, {new.steps:,} steps"
    lines = [head + (f" ({why})" if why else "")]
    if old is None:
        lines.append(f"    settings: {short_settings(new.settings)}")
    else:
        changes = []
        for key in [*new.settings, *(k for k in old.settings if k not in new.settings)]:
            if key == "growth":  # the number of the method's own stage says nothing to a reader
                continue
            before, after = old.settings.get(key), new.settings.get(key)
            if before != after:
                changes.append(f"{key} {_value(before)} -> {_value(after)}")
        lines.append(f"    changes: {', '.join(changes) or 'none'}")
    split = f"{new.micro_batch} x {new.accumulation}" + (f" x {world}" if world else "")
    names = "micro-batch x accumulation" + (" x ranks" if world else "")
    if old is not None and (old.micro_batch, old.accumulation) != (new.micro_batch, new.accumulation):
        split += f", before {old.micro_batch} x {old.accumulation}"
    lines.append(f"    batch {new.batch:,} = {split} ({names})")
    return "\n".join(lines)


def eval_line(
    step: int, results: Mapping[str, float], *, samples: int, seconds: float, best: Mapping[str, float] | None = None
) -> str:
    """One evaluation.

    Args:
        step: optimizer steps done.
        results: e.g. ``{"top1": 0.713, "loss": 1.21}``; names that begin with "top" are shares, shown in percent.
        samples: evaluated samples.
        seconds: time it took.
        best: best values so far, shown where they are given.
    """
    words = []
    for name, value in results.items():
        text = f"{name} {_result(name, value)}"
        if best is not None and name in best:
            text += f" (best {_result(name, best[name])})"
        words.append(text)
    return f"eval at step {step:,}: {', '.join(words)} | {samples:,} samples in {duration_text(seconds)}"


def _result(name: str, value: float) -> str:
    return f"{100 * value:.2f}%" if name.rpartition("_")[2].startswith("top") else _loss(value)


@dataclass(frozen=True)
class StageOutcome:
    """One stage of the final table.

    Attributes:
        label: settings, e.g. "B128 m3".
        steps: optimizer steps that were timed.
        predicted_share: share of the run's cost by plan.
        predicted_seconds: by a throughput profile, or None.
        seconds: what the steps took.
    """

    label: str
    steps: int
    predicted_share: float
    predicted_seconds: float | None
    seconds: float


def final_table(stages: Sequence[StageOutcome], others: Mapping[str, float] | None = None) -> str:
    """Plan against truth: for each stage its share of cost, its share of time, and predicted and actual seconds.

    Args:
        stages: in order.
        others: seconds of other activities, e.g. ``{"eval": 12.0}``, listed below the total.
    """
    total = sum(s.seconds for s in stages)
    timed = all(s.predicted_seconds is not None for s in stages)
    rows = [["stage", "settings", "steps", "cost (plan)", "time (actual)", "predicted", "actual", "off by"]]
    for i, s in enumerate(stages):
        share = s.seconds / total if total else 0.0
        rows.append(
            [
                str(i + 1),
                s.label,
                f"{s.steps:,}",
                f"{100 * s.predicted_share:.1f}%",
                f"{100 * share:.1f}%",
                *_times(s.predicted_seconds, s.seconds),
            ]
        )
    predicted = sum(s.predicted_seconds or 0.0 for s in stages) if timed else None
    share = sum(s.predicted_share for s in stages)
    steps = f"{sum(s.steps for s in stages):,}"
    rows.append(["total", "", steps, f"{100 * share:.1f}%", "100.0%", *_times(predicted, total)])
    if not timed:
        rows = [[c for i, c in enumerate(row) if i not in (5, 7)] for row in rows]
    table = align(rows, left=(0, 1))
    rule = "-" * max(len(line) for line in table)
    lines = ["plan against actual", table[0], rule, *table[1:-1], rule, table[-1]]
    if others:
        lines.append("beside the steps: " + ", ".join(f"{k} {duration_text(v)}" for k, v in others.items()))
    return "\n".join(lines)


def _times(predicted: float | None, actual: float) -> list[str]:
    if predicted is None:
        return ["-", duration_text(actual), "-"]
    off = f"{100 * (actual / predicted - 1):+.1f}%" if predicted else "-"
    return [duration_text(predicted), duration_text(actual), off]
