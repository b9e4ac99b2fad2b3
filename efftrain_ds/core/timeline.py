"""The plan of a run as data: what each method asks for (`Timeline`) and what the steps become (`Schedule`).

Progress ``p`` in [0, 1] is the share of the run's *budget* that is spent. The budget is `epochs` epochs at the
baseline's per-sample cost. With ``pacing = "samples"`` every sample counts alike; with ``pacing = "compute"`` a
sample counts its `pace` (relative cost, 1 = baseline), so cheap stages see more samples (EfficientTrain++).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import PlanError

_EPS = 1e-9


@dataclass(frozen=True)
class PlanSpec:
    """What `Method.plan` may know: no device, no shard and no weight is needed to make one.

    Attributes:
        seed: seed of the run.
        epochs: budget in baseline epochs (0 where the user gave `steps`).
        samples: training samples of one epoch (0 where the user gave `steps`).
        batch: global batch in samples.
        micro_batch: samples of one rank in one forward at the baseline resolution.
        world: number of data-parallel ranks.
        resolution: input side in pixels at full cost.
        stride: the model's total stride in pixels; resolutions must be multiples of it.
        steps: total optimizer steps where the user's own loop fixes them, else None.
        model: registered model name ("" when unknown).
        depth: blocks of the full model (0 where it is not known or not a model of equal blocks).
        drop_path: configured stochastic depth rate of the last block.
        magnitude: configured RandAugment magnitude; None where RandAugment is off or the user's loop augments.
        erasing: configured probability of random erasing; None where the user's loop augments.
        width: of the blocks (0 where it is not known).
        prefix: tokens that are not patches.
        space: search space where the model is a supernet, else None.
        eval_resolution: side in pixels of evaluation images; 0 where the user's loop evaluates.
        mixing: probability that a batch is mixed (mixup, cutmix); 0 where that is off or the user's loop augments.
    """

    seed: int
    epochs: float
    samples: int
    batch: int
    micro_batch: int
    world: int
    resolution: int
    stride: int
    steps: int | None = None
    model: str = ""
    depth: int = 0
    drop_path: float = 0.0
    magnitude: float | None = None
    erasing: float | None = None
    width: int = 0
    prefix: int = 1
    space: Any = None
    eval_resolution: int = 0
    mixing: float = 0.0

    @property
    def baseline_steps(self) -> float:
        """Optimizer steps of the run at the baseline batch, before rounding."""
        return float(self.steps) if self.steps is not None else self.epochs * self.samples / self.batch


@dataclass(frozen=True)
class Segment:
    """One stage of one method: settings that hold while start <= p < end.

    Attributes:
        start: first progress value, in [0, 1).
        end: progress value at which the next segment begins.
        settings: plain values by name (see the vocabulary in docs/design.md), e.g. ``{"bandwidth": 160}``.
        pace: relative per-sample cost used for pacing (1 = baseline).
        micro_scale: the micro-batch may grow by this factor (memory per sample falls by it).
        batch_scale: the global batch is this whole multiple of the run's; the number of steps falls with it.
        lr_scale: factor on the peak learning rate.
        lr_ramp: progress over which the learning rate goes from the segment before's factor to `lr_scale`.
    """

    start: float
    end: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    pace: float = 1.0
    micro_scale: float = 1.0
    batch_scale: int = 1
    lr_scale: float = 1.0
    lr_ramp: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """A method's plan: segments that tile [0, 1] and how progress is counted ("samples" or "compute")."""

    segments: tuple[Segment, ...]
    pacing: str = "samples"

    def __post_init__(self) -> None:
        edges = [s.start for s in self.segments] + [self.segments[-1].end] if self.segments else [0.0]
        tiled = all(abs(a.end - b.start) < _EPS for a, b in zip(self.segments, self.segments[1:], strict=False))
        if (
            not tiled
            or abs(edges[0]) > _EPS
            or abs(edges[-1] - 1) > _EPS
            or any(b <= a for a, b in zip(edges, edges[1:], strict=False))
        ):
            raise PlanError(f"a timeline's segments must tile [0, 1] in order, found edges {edges}")
        if self.pacing not in ("samples", "compute"):
            raise PlanError(f'pacing is "samples" or "compute", found {self.pacing!r}')

    def at(self, p: float) -> Segment:
        """The segment in force at progress `p`."""
        return self.segments[bisect_right([s.start for s in self.segments], p + _EPS) - 1]


@dataclass(frozen=True)
class Stage:
    """A stretch of optimizer steps with constant settings (the merge of all methods' segments).

    Attributes:
        index: position in the schedule, from 0.
        start_step: first optimizer step.
        end_step: first optimizer step of the next stage.
        p_start: progress at `start_step`.
        p_end: progress at `end_step`.
        settings: merged settings of all methods.
        pace: product of the methods' relative per-sample costs.
        batch: global batch in samples.
        micro_batch: samples of one rank in one forward.
        accumulation: micro-batches of one optimizer step.
        lr_scale: factor on the peak learning rate.
        lr_ramp: progress over which the factor goes there from what it was before.
    """

    index: int
    start_step: int
    end_step: int
    p_start: float
    p_end: float
    settings: Mapping[str, Any]
    pace: float
    batch: int
    micro_batch: int
    accumulation: int
    lr_scale: float = 1.0
    lr_ramp: float = 0.0

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.end_step - self.start_step


@dataclass(frozen=True)
class Schedule:
    """All stages of a run in order. Pure data: equal on every rank."""

    stages: tuple[Stage, ...]
    spec: PlanSpec
    pacing: str

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].end_step

    @property
    def total_samples(self) -> int:
        """Training samples that the whole run consumes."""
        return sum(s.steps * s.batch for s in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of optimizer step `step` (the last stage from `total_steps` on)."""
        index = bisect_right([s.start_step for s in self.stages], step) - 1
        return self.stages[max(index, 0)]

    def progress(self, step: float) -> float:
        """Share of the budget spent before step `step`, in [0, 1]."""
        stage = self.stage_at(int(step))
        if step >= stage.end_step:
            return stage.p_end
        return stage.p_start + (stage.p_end - stage.p_start) * (step - stage.start_step) / stage.steps

    def lr_scale(self, p: float) -> float:
        """Factor on the peak learning rate at progress `p`: piecewise linear, without jumps where stages have ramps."""
        value = self.stages[0].lr_scale
        for stage in self.stages[1:]:
            if p < stage.p_start:
                break
            # a stage that is shorter than its ramp hands on what was reached
            share = (min(p, stage.p_end) - stage.p_start) / stage.lr_ramp if stage.lr_ramp > 0 else 1.0
            value += (stage.lr_scale - value) * min(share, 1.0)
        return value

    def consumed(self, step: int) -> int:
        """Samples consumed before step `step`."""
        return sum((min(step, s.end_step) - s.start_step) * s.batch for s in self.stages if step > s.start_step)

    def step_at(self, samples: float) -> float:
        """Optimizer steps that consume so many samples, a part of a step included; at most all of them."""
        for stage in self.stages:
            if samples < stage.steps * stage.batch:
                return stage.start_step + samples / stage.batch
            samples -= stage.steps * stage.batch
        return float(self.total_steps)


def merge_timelines(timelines: Sequence[Timeline], spec: PlanSpec, *, max_micro_batch: int | None = None) -> Schedule:
    """Merge the methods' timelines into one schedule of optimizer steps.

    Stage edges are the union of all edges; settings are merged (two methods that set one name clash); paces multiply.
    Step counts follow the budget: ``steps_i = w_i * epochs * samples / (batch_i * pace_i)`` with pacing "compute" and
    without the pace otherwise (EfficientTrain++ code release 2024; rounding is carried over, so the total is exact to
    one step); ``batch_i`` is `spec.batch` times the segments' `batch_scale`. When `spec.steps` is set the same
    proportions are scaled to that total.

    Args:
        timelines: one per active method, in run order; empty means one plain stage.
        spec: what the run is.
        max_micro_batch: upper limit of the grown micro-batch (None = `spec.batch / world`).

    Raises:
        PlanError: clashing settings, or batch sizes that do not multiply.
    """
    timelines = list(timelines) or [Timeline((Segment(0.0, 1.0),))]
    pacing = "compute" if any(t.pacing == "compute" for t in timelines) else "samples"
    edges: list[float] = []
    for value in sorted({s.start for t in timelines for s in t.segments} | {1.0}):
        if not edges or value - edges[-1] > _EPS:
            edges.append(value)
    raw = []
    for start, end in zip(edges, edges[1:], strict=False):
        settings: dict[str, Any] = {}
        pace = micro_scale = 1.0
        batch, lr_scale, lr_ramp = spec.batch, 1.0, 0.0
        for timeline in timelines:
            segment = timeline.at(start)
            for key, value in segment.settings.items():
                if key in settings and settings[key] != value:
                    raise PlanError(f"two methods set {key!r}: {settings[key]!r} and {value!r}")
                settings[key] = value
            pace *= segment.pace
            micro_scale *= segment.micro_scale
            batch *= segment.batch_scale
            lr_scale *= segment.lr_scale
            lr_ramp = max(lr_ramp, segment.lr_ramp)
        micro, accumulation = split_batch(spec, micro_scale, max_micro_batch, batch=batch)
        raw.append(
            Stage(0, 0, 0, start, end, settings, pace, batch, micro, accumulation, lr_scale=lr_scale, lr_ramp=lr_ramp)
        )

    divisor = [(s.pace if pacing == "compute" else 1.0) * (s.batch / spec.batch) for s in raw]
    weights = [(s.p_end - s.p_start) / d for s, d in zip(raw, divisor, strict=True)]
    if spec.steps is not None:
        scale = spec.steps / sum(weights)
    else:
        scale = spec.epochs * spec.samples / spec.batch
    stages: list[Stage] = []
    exact, first = 0.0, 0
    for stage, weight in zip(raw, weights, strict=True):
        exact += weight * scale
        last = round(exact)
        if last > first:
            stages.append(replace(stage, index=len(stages), start_step=first, end_step=last))
        elif stages:  # too short for one step: its share of progress goes to the stage before
            stages[-1] = replace(stages[-1], p_end=stage.p_end)
        first = last
    if not stages:
        raise PlanError(
            f"the budget of {spec.epochs:g} epochs x {spec.samples} samples is below one step of {spec.batch} samples"
        )
    if stages[0].p_start > 0:
        stages[0] = replace(stages[0], p_start=0.0)
    return Schedule(tuple(stages), spec, pacing)


def split_batch(
    spec: PlanSpec, micro_scale: float = 1.0, max_micro_batch: int | None = None, batch: int | None = None
) -> tuple[int, int]:
    """Micro-batch and accumulation for a fixed global batch when memory allows `micro_scale` times more samples.

    The micro-batch is the largest divisor of ``batch / world`` that is at most ``micro_batch * micro_scale`` and
    `max_micro_batch`, and never below `spec.micro_batch`. `batch` is a multiple of `spec.batch`; None = that.

    Raises:
        PlanError: ``batch`` is not a multiple of ``world * micro_batch``.
    """
    if spec.batch % (spec.world * spec.micro_batch):
        raise PlanError(
            f"train_batch_size {spec.batch} is not a multiple of world {spec.world} x "
            f"train_micro_batch_size_per_gpu {spec.micro_batch}"
        )
    local = (spec.batch if batch is None else batch) // spec.world
    limit = int(spec.micro_batch * micro_scale + _EPS)
    if max_micro_batch is not None:
        limit = min(limit, max_micro_batch)
    micro = max(d for d in range(1, local + 1) if local % d == 0 and (d <= limit or d == spec.micro_batch))
    return micro, local // micro
