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
        return self
