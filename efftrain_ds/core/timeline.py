"""The plan of a run as data: what each method asks for (`Timeline`) and what the steps become (`Schedule`).

Progress ``p`` in [0, 1] is the share of the run's *budget* that is spent. The budget is `epochs` epochs at the
baseline's per-sample cost. With ``pacing = "samples"`` every sample counts alike; with ``pacing = "compute"`` a
sample counts its `pace` (relative cost, 1 = baseline), so cheap stages see more samples (EfficientTrain++).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Segment:
    """One stage of one method: settings that hold while start <= p < end.

    Attributes:
        start: first progress value, in [0, 1).
        end: progress value at which the next segment begins.
        settings: plain values by name (see the vocabulary in docs/design.md), e.g. ``{"bandwidth": 160}``.
        pace: relative per-sample cost used for pacing (1 = baseline).
        micro_scale: the micro-batch may grow by this factor (memory per sample falls by it).
    """

    start: float
    end: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    pace: float = 1.0
    micro_scale: float = 1.0


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

    def consumed(self, step: int) -> int:
        """Samples consumed before step `step`."""
        return sum((min(step, s.end_step) - s.start_step) * s.batch for s in self.stages if step > s.start_step)

    def step_of(self, consumed: int) -> int:
        """Optimizer step that starts after `consumed` samples.

        Raises:
            PlanError: `consumed` is not at a step boundary of this schedule.
        """
        left, step = consumed, 0
        for stage in self.stages:
            if left < stage.steps * stage.batch or stage is self.stages[-1]:
                if left % stage.batch:
                    raise PlanError(f"{consumed} samples is not a step boundary of this schedule")
                return step + left // stage.batch
            left -= stage.steps * stage.batch
            step = stage.end_step
        raise AssertionError("unreachable")


def merge_timelines(timelines: Sequence[Timeline], spec: PlanSpec, *, max_micro_batch: int | None = None) -> Schedule:
    """Merge the methods' timelines into one schedule of optimizer steps.

    Stage edges are the union of all edges; settings are merged (two methods that set one name clash); paces multiply.
    Step counts follow the budget: ``steps_i = w_i * epochs * samples / (batch * pace_i)`` with pacing "compute" and
    without the pace otherwise (EfficientTrain++ code release 2024; rounding is carried over, so the total is exact to
    one step). When `spec.steps` is set the same proportions are scaled to that total.

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
        for timeline in timelines:
            segment = timeline.at(start)
            for key, value in segment.settings.items():
                if key in settings and settings[key] != value:
                    raise PlanError(f"two methods set {key!r}: {settings[key]!r} and {value!r}")
                settings[key] = value
            pace *= segment.pace
            micro_scale *= segment.micro_scale
        raw.append((start, end, settings, pace, micro_scale))

    divisor = [pace if pacing == "compute" else 1.0 for _, _, _, pace, _ in raw]
    weights = [(end - start) / d for (start, end, *_), d in zip(raw, divisor, strict=True)]
    if spec.steps is not None:
        scale = spec.steps / sum(weights)
    else:
        scale = spec.epochs * spec.samples / spec.batch
    stages: list[Stage] = []
    exact, first = 0.0, 0
    for (start, end, settings, pace, micro_scale), weight in zip(raw, weights, strict=True):
        exact += weight * scale
        last = round(exact)
        if last > first:
            micro, accumulation = split_batch(spec, micro_scale, max_micro_batch)
            stages.append(Stage(len(stages), first, last, start, end, settings, pace, spec.batch, micro, accumulation))
        elif stages:  # too short for one step: its share of progress goes to the stage before
            stages[-1] = Stage(**{**stages[-1].__dict__, "p_end": end})
        first = last
    if not stages:
        raise PlanError(
            f"the budget of {spec.epochs:g} epochs x {spec.samples} samples is below one step of {spec.batch} samples"
        )
    if stages[0].p_start > 0:
        stages[0] = Stage(**{**stages[0].__dict__, "p_start": 0.0})
    return Schedule(tuple(stages), spec, pacing)


def split_batch(spec: PlanSpec, micro_scale: float = 1.0, max_micro_batch: int | None = None) -> tuple[int, int]:
    """Micro-batch and accumulation for a fixed global batch when memory allows `micro_scale` times more samples.

    The micro-batch is the largest divisor of ``batch / world`` that is at most ``micro_batch * micro_scale`` and
    `max_micro_batch`, and never below `spec.micro_batch`.

    Raises:
        PlanError: ``batch`` is not a multiple of ``world * micro_batch``.
    """
    if spec.batch % (spec.world * spec.micro_batch):
        raise PlanError(
            f"train_batch_size {spec.batch} is not a multiple of world {spec.world} x "
            f"train_micro_batch_size_per_gpu {spec.micro_batch}"
        )
    local = spec.batch // spec.world
    limit = int(spec.micro_batch * micro_scale + _EPS)
    if max_micro_batch is not None:
        limit = min(limit, max_micro_batch)
    micro = max(d for d in range(1, local + 1) if local % d == 0 and (d <= limit or d == spec.micro_batch))
    return micro, local // micro
