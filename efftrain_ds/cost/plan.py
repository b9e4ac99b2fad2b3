"""The priced plan: a schedule with the cost of every stage, before the run and for its progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import PlanError
from ..core.replay import capacity, fresh_samples, loaded, total_loaded
from ..core.timeline import Schedule, Stage
from .macs import TRAINING_FACTOR
from .memory import Memory, state_memory
from .throughput import Prediction, Throughput, profile_key


@dataclass(frozen=True)
class PricedStage:
    """One stage with its price.

    Attributes:
        stage: steps, settings and batch sizes.
        epochs: passes over the data in this stage (replayed samples do not count); None where the number of samples is
            unknown.
        macs: forward MACs of one image.
        factor: cost of a training step over that of one in which every layer trains (below 1 where some are frozen).
        cost: training MACs of the stage, all ranks.
        share: `cost` divided by that of the whole run.
        memory: estimated bytes of one rank.
        prediction: seconds of an optimizer step, or None without a throughput profile.
    """

    stage: Stage
    epochs: float | None
    macs: int
    cost: int
    share: float
    memory: Memory
    prediction: Prediction | None
    factor: float = 1.0

    @property
    def work(self) -> int:
        """Training MACs of one image divided by `TRAINING_FACTOR`: `macs` times `factor`."""
        return round(self.macs * self.factor)

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of the stage."""
        return None if self.prediction is None else self.prediction.seconds * self.stage.steps

    @property
    def work_key(self) -> tuple[int, int, int]:
        """Stages with equal keys take equally long for a step: (work, micro-batch, accumulation)."""
        return self.work, self.stage.micro_batch, self.stage.accumulation


@dataclass(frozen=True)
class PricedPlan:
    """A schedule with its price.

    The dense baseline trains the full model for `schedule.spec.epochs` epochs (or as many steps, where the user fixed
    them) of the same batch at full resolution.

    Attributes:
        schedule: stages in order.
        stages: the same stages, priced.
        model: name of the model.
        params: number of parameters of the full model.
        precision: "fp32", "bf16" or "fp16".
        zero_stage: 0 to 3.
        full_macs: forward MACs of one image through the full model at full resolution.
        methods: (name, one line) of each method in run order.
        source: where the predicted seconds come from, or None.
        range: (cheapest, dearest) cost divided by the baseline's, where a method chooses its stages during the run
            and `stages` are only its default; else None.
    """

    schedule: Schedule
    stages: tuple[PricedStage, ...]
    model: str
    params: int
    precision: str
    zero_stage: int
    full_macs: int
    methods: tuple[tuple[str, str], ...] = ()
    source: str | None = None
    range: tuple[float, float] | None = None

    @property
    def total_cost(self) -> int:
        """Training MACs of the whole run."""
        return sum(s.cost for s in self.stages)

    @property
    def baseline_cost(self) -> float:
        """Training MACs of the dense baseline."""
        spec = self.schedule.spec
        samples = self.schedule.total_samples if spec.steps is not None else spec.epochs * spec.samples
        return TRAINING_FACTOR * self.full_macs * samples

    @property
    def relative(self) -> float:
        """Cost of the run divided by that of the dense baseline."""
        return self.total_cost / self.baseline_cost

    @property
    def baseline_epochs(self) -> float | None:
        """Epochs at full resolution that cost as much as this run; None where the number of samples is unknown."""
        samples = self.schedule.spec.samples
        return self.total_cost / (TRAINING_FACTOR * self.full_macs * samples) if samples else None

    @property
    def data_epochs(self) -> float | None:
        """Passes over the data of the whole run, by samples loaded; None where the number of samples is unknown."""
        samples = self.schedule.spec.samples
        return total_loaded(self.schedule) / samples if samples else None

    @property
    def replay_bytes(self) -> int:
        """Pixels of the largest replay buffer of one rank; 0 where no stage replays."""
        spec = self.schedule.spec
        return max(capacity(stage, spec.world) for stage in self.schedule.stages) * 3 * spec.resolution**2

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of all steps, or None without a throughput profile."""
        return None if any(s.seconds is None for s in self.stages) else sum(s.seconds or 0.0 for s in self.stages)

    @property
    def peak_memory(self) -> int:
        """Largest estimate of all stages, in bytes of one rank."""
        return max(s.memory.total for s in self.stages)

    def epoch_at(self, step: int) -> float | None:
        """Passes over the data before optimizer step `step`; None where the number of samples is unknown."""
        samples = self.schedule.spec.samples
        return loaded(self.schedule, step) / samples if samples else None

    def cost_at(self, step: float) -> float:
        """Share of the run's cost that is done before optimizer step `step`, in [0, 1]."""
        done = 0.0
        for priced in self.stages:
            stage = priced.stage
            if step >= stage.end_step:
                done += priced.cost
            elif step > stage.start_step:
                done += priced.cost * (step - stage.start_step) / stage.steps
        return done / self.total_cost

    def costs_left(self, step: float) -> list[float]:
        """Share of the run's cost that each stage still has to pay at optimizer step `step`; sums to 1 - cost_at."""
        left = []
        for priced in self.stages:
            steps = min(max(priced.stage.end_step - step, 0), priced.stage.steps)
            left.append(priced.share * steps / priced.stage.steps)
        return left

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        spec = self.schedule.spec
        return {
            "model": self.model,
            "params": self.params,
            "precision": self.precision,
            "zero_stage": self.zero_stage,
            "world": spec.world,
            "batch": spec.batch,
            "resolution": spec.resolution,
            "samples": spec.samples,
            "epochs": spec.epochs,
            "pacing": self.schedule.pacing,
            "methods": [{"name": name, "line": line} for name, line in self.methods],
            "total_steps": self.schedule.total_steps,
            "total_samples": self.schedule.total_samples,
            "loaded_samples": total_loaded(self.schedule),
            "replay_bytes": self.replay_bytes,
            "data_epochs": self.data_epochs,
            "full_macs": self.full_macs,
            "total_cost_macs": self.total_cost,
            "baseline_cost_macs": self.baseline_cost,
            "relative_cost": self.relative,
            "range": None if self.range is None else list(self.range),
            "baseline_epochs": self.baseline_epochs,
            "peak_memory_bytes": self.peak_memory,
            "seconds": self.seconds,
            "source": self.source,
            "stages": [_stage_dict(s) for s in self.stages],
        }


def _stage_dict(priced: PricedStage) -> dict[str, Any]:
    stage, prediction = priced.stage, priced.prediction
    return {
        "index": stage.index,
        "start_step": stage.start_step,
        "steps": stage.steps,
        "epochs": priced.epochs,
        "settings": dict(stage.settings),
        "batch": stage.batch,
        "micro_batch": stage.micro_batch,
        "accumulation": stage.accumulation,
        "loaded_samples": fresh_samples(stage),
        "lr_scale": stage.lr_scale,
        "macs": priced.macs,
        "cost_factor": priced.factor,
        "cost_macs": priced.cost,
        "share": priced.share,
        "memory_bytes": priced.memory.total,
        "seconds": priced.seconds,
        "seconds_how": None if prediction is None else prediction.how,
    }


def bandwidth_of(settings: Mapping[str, Any], resolution: int) -> int:
    """Side in pixels of what the network sees under `settings`: the smaller of "bandwidth" and "resolution"."""
    sides = [settings[key] for key in ("bandwidth", "resolution") if settings.get(key) is not None]
    return int(min(sides, default=resolution))


def price(
    schedule: Schedule,
    *,
    macs: Sequence[int],
    full_macs: int,
    activations: Sequence[int],
    model: str,
    params: int,
    stage_params: Sequence[int] | None = None,
    factors: Sequence[float] | None = None,
    precision: str,
    zero_stage: int,
    ema: bool = False,
    offload_optimizer: bool = False,
    methods: Sequence[tuple[str, str]] = (),
    throughput: Throughput | None = None,
) -> PricedPlan:
    """Put a price on every stage.

    Args:
        schedule: the stages.
        macs: forward MACs of one image, for each stage.
        full_macs: the same for the full model at full resolution.
        activations: bytes of the activations of one micro-batch, for each stage.
        model: its name.
        params: number of parameters of the full model.
        stage_params: the same for each stage, where the model grows; None = `params` in all of them.
        factors: what a training step of each stage costs, over one in which every layer trains; None = 1.
        precision: "fp32", "bf16" or "fp16".
        zero_stage: 0 to 3.
        ema: an average of the weights is kept.
        offload_optimizer: the optimizer's state lives in host memory.
        methods: (name, one line) of each method in run order.
        throughput: measured profile for predicted seconds.

    Raises:
        PlanError: the profile was measured for another model, precision or ZeRO stage.
    """
    counts = [params] * len(schedule.stages) if stage_params is None else list(stage_params)
    shares = [1.0] * len(schedule.stages) if factors is None else list(factors)
    assert len(macs) == len(activations) == len(counts) == len(shares) == len(schedule.stages)
    spec, source = schedule.spec, None
    if throughput is not None:
        key = profile_key(model, precision, zero_stage)
        if throughput.key != key:
            raise PlanError(f'the throughput profile was measured for "{throughput.key}", this plan is "{key}"')
        source = throughput.source
        if throughput.world != spec.world:
            source += f" (this plan has {spec.world})"
    works = [round(m * factor) for m, factor in zip(macs, shares, strict=True)]
    costs = [TRAINING_FACTOR * w * s.batch * s.steps for w, s in zip(works, schedule.stages, strict=True)]
    stages = []
    for stage, m, work, factor, cost, bytes_, count in zip(
        schedule.stages, macs, works, shares, costs, activations, counts, strict=True
    ):
        prediction = None
        if throughput is not None:
            prediction = throughput.predict(
                bandwidth=bandwidth_of(stage.settings, spec.resolution),
                micro_batch=stage.micro_batch,
                accumulation=stage.accumulation,
                macs=work,
            )
        memory = state_memory(
            count,
            precision=precision,
            zero_stage=zero_stage,
            world=spec.world,
            ema=ema,
            offload_optimizer=offload_optimizer,
            activations=bytes_,
        )
        epochs = fresh_samples(stage) / spec.samples if spec.samples else None
        stages.append(PricedStage(stage, epochs, m, cost, cost / sum(costs), memory, prediction, factor))
    return PricedPlan(schedule, tuple(stages), model, params, precision, zero_stage, full_macs, tuple(methods), source)
