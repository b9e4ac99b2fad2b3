"""Configuration of EfficientTrain: the value of ``efftrain.methods.efficienttrain``."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from ...core.strict import StrictModel


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
