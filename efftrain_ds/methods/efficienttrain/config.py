"""Configuration of EfficientTrain: the value of ``efftrain.methods.efficienttrain``."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from ...core.strict import StrictModel
from ...data.holdout import HoldOutConfig

KEY = "efftrain.methods.efficienttrain"


class StageConfig(StrictModel):
    """One stage of a schedule of your own."""

    until: float = Field(gt=0, le=1)
    """Progress (share of the budget) at which the stage ends; the last stage ends at 1."""
    bandwidth: int = Field(gt=0)
    """Side B of the low-frequency crop in pixels: even and a multiple of the model's stride."""
    magnitude: float | None = Field(None, ge=0, le=10)
    """RandAugment magnitude; null leaves the data section's value."""
    pace: float | None = Field(None, gt=0)
    """Cost of one sample relative to full resolution; null = (bandwidth / resolution)^2."""


class ReplayConfig(StrictModel):
    """Replay buffer of the stages of one bandwidth: load a sample once, use it several times."""

    bandwidth: int = Field(gt=0)
    """Side B of the stages, as the plan shows it."""
    uses: int = Field(ge=2)
    """Mean number of uses r of a loaded sample: the loader is asked for batch / r new samples a step."""
    capacity: int = Field(gt=0)
    """Optimizer steps S whose samples the buffer holds: no sample is used S or more steps after it was loaded. One rank
    needs S * batch / (ranks * r) images of 3 * resolution^2 bytes."""

    @model_validator(mode="after")
    def _fits(self) -> ReplayConfig:
        if self.capacity < self.uses:
            raise ValueError(
                f'"capacity" {self.capacity} is below "uses" {self.uses}: a step repeats no sample, so the buffer must '
                "hold a whole batch"
            )
        return self


class LargeBatchConfig(StrictModel):
    """Larger global batches at small bandwidths, and what the learning rate does then.

    The published batches and rule are not known; the defaults are a reconstruction.
    """

    max_scale: int = Field(4, ge=1)
    """Upper limit of the factor on the global batch; the factor is 2^floor(log2(1 / pace)) below it."""
    lr: Literal["sqrt", "linear", "none"] = "sqrt"
    """Factor on the peak learning rate where the batch is k times larger: sqrt(k), k or 1."""
    ramp: float = Field(0.01, ge=0, le=0.5)
    """Share of the budget over which the factor changes after a switch (the warm-up covers the start)."""


class SearchConfig(StrictModel):
    """Search for a schedule of your own, see "efftrain search curriculum". All numbers without a source are ours."""

    algorithm: Literal["et", "et++"] = "et++"
    """"et": greedily the cheapest of equal epochs that is as accurate as the baseline; "et++": stage after stage the
    most accurate of equal compute."""
    stages: int = Field(5, ge=2, le=10)
    """Stages of the schedule; the last one has the full resolution."""
    candidates: list[int] | None = Field(None, min_length=1, max_length=8)
    """Bandwidths in pixels to choose from, besides the full resolution; null = 96, 128, 160 and 192 of 224 pixels,
    scaled to `data.resolution` and the model's stride."""
    epochs: float | None = Field(None, gt=0)
    """Length in full-resolution epochs of the trainings that are compared; null = run.epochs."""
    compute: float = Field(0.6666666666666666, gt=0, le=1)
    """"et++": budget of the schedule as a share of the baseline's (the published schedule: 200 of 300 epochs)."""
    tune: float = Field(0.02, gt=0, lt=0.5)
    """"et++": a candidate is measured after a short training at full resolution with a learning rate falling to 0; its
    length as a share of the schedule's budget."""
    tolerance: float = Field(0.0, ge=0, le=0.1)
    """Top-1 (0 to 1) that may be lost: against the baseline, and in "et++" against the best candidate of a stage."""
    prune: bool = True
    """"et": go down from the size of the stage behind and stop at the first failure; false = up from the smallest."""
    check: bool = True
    """"et++": train the whole schedule and the baseline, and fall back where it is less accurate."""
    max_epochs: float | None = Field(None, gt=0)
    """Most that the whole search may cost, in full-resolution epochs; what is undecided then stays at full resolution.
    null = no limit."""
    hold_out: HoldOutConfig | None = None
    """Part of the training shards on which accuracy is measured; null = `data.hold_out`, or 10% of each class."""
    average: bool = False
    """Compare the average of the weights (`model.ema`) instead of the weights."""

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        sides = self.candidates
        if sides is not None and (any(side < 1 for side in sides) or len(set(sides)) < len(sides)):
            raise ValueError(f'"candidates" are different numbers of pixels above 0, found {sides}')
        if self.algorithm == "et++" and self.tune >= 1 / self.stages:
            raise ValueError(f'"tune" {self.tune:g} must be below the share 1/{self.stages} of a stage')
        return self


class EfficientTrainConfig(StrictModel):
    """Frequency and augmentation curriculum of EfficientTrain and EfficientTrain++."""

    schedule: Literal["et", "et++", "et++deit"] | list[StageConfig] = "et++"
    """"et" (5 stages of equal epochs), "et++" and "et++deit" (10 stages of equal compute), or a list of stages."""
    pacing: Literal["samples", "compute"] | None = None
    """How a list of stages counts progress: by samples seen or by compute spent; null = "compute"."""
    lowpass: Literal["fourier", "lanczos", "bicubic"] = "fourier"
    """The reduction: the low-frequency crop, or an antialiased filter (the ET++ code uses Lanczos)."""
    align: Literal["center", "grid"] = "center"
    """Fourier only: match pixel centres, or the first samples as the authors' code does."""
    nyquist: bool = False
    """Fourier only: add the rank-one term that makes the crop equal to the paper's definition at even sizes
    (0.2 grey levels on natural images). Without it, "center" commutes exactly with flips."""
    magnitude: bool = True
    """Let the schedule set the RandAugment magnitude too."""
    grow_micro_batch: bool = True
    """Use larger micro-batches and less accumulation at small bandwidths; the global batch stays."""
    max_micro_batch: int | None = Field(None, gt=0)
    """Upper limit of the grown micro-batch; null = none."""
    replay: list[ReplayConfig] = []
    """Replay buffers for slow data pipelines, at most one for each bandwidth; [] = off. Used by launch/train.py."""
    large_batch: LargeBatchConfig | None = None
    """Larger global batches at small bandwidths, for many devices; null = off. Used by launch/train.py."""
    search: SearchConfig | None = None
    """Search for a schedule ("efftrain search curriculum"), which does not read `schedule`; a training reads `schedule`
    and not this."""

    @model_validator(mode="after")
    def _fits(self) -> EfficientTrainConfig:
        if isinstance(self.schedule, str):
            if self.pacing is not None:
                raise ValueError(f'"pacing" belongs to a list of stages, schedule "{self.schedule}" has its own')
        else:
            ends = [stage.until for stage in self.schedule]
            if not ends or ends[-1] != 1 or any(b <= a for a, b in pairwise(ends)):
                raise ValueError(f'"until" of the stages must increase and end at 1.0, found {ends}')
        if self.lowpass != "fourier" and (self.align != "center" or self.nyquist):
            raise ValueError(f'"align" and "nyquist" apply to lowpass "fourier" only, found "{self.lowpass}"')
        sides = [buffer.bandwidth for buffer in self.replay]
        if len(set(sides)) < len(sides):
            raise ValueError(f'"replay" may name each bandwidth once, found {sides}')
        return self
