"""Configuration of AutoProg and AutoProg-Zero: ``efftrain.methods.autoprog`` and ``efftrain.methods.autoprog_zero``."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from ...core.strict import StrictModel


class GrowthStageConfig(StrictModel):
    """One stage of a growth schedule of your own."""

    until: float = Field(gt=0, le=1)
    """Progress (share of the budget) at which the stage ends; the last stage ends at 1."""
    depth: int = Field(gt=0)
    """Number of blocks; the last stage has the full model's."""
    resolution: int | None = Field(None, gt=0)
    """Side of the images in pixels; null = the data section's."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth rate of the last block; null leaves the model section's."""
    magnitude: float | None = Field(None, ge=0, le=10)
    """RandAugment magnitude; null leaves the data section's."""
    erasing: float | None = Field(None, ge=0, le=1)
    """Probability of random erasing; null leaves the data section's."""


class SearchConfig(StrictModel):
    """Search for the size of each stage: a supernet trains all candidates, then the best one goes on."""

    epochs: float = Field(2.0, gt=0)
    """Epochs of supernet training at the start of each searched stage; they count as training."""
    probe_samples: int = Field(8192, gt=0)
    """Samples (over all ranks) of the batches on which every candidate's loss is measured."""
    cost: Literal["measured", "macs"] = "measured"
    """Cost of a candidate: measured seconds of forward and backward, or counted MACs (the same on every machine)."""
    force_depth_growth: bool = False
    """Make every search choose a larger depth, as the authors' code does."""


class AutoProgConfig(StrictModel):
    """Progressive training: depth, resolution and regularisation grow in stages, by a ramp or by a search."""

    stages: int = Field(4, ge=1)
    """Number of stages of equal length; the last one trains the full model at the full resolution."""
    schedule: list[GrowthStageConfig] | None = None
    """Stages of your own instead of the ramps; null = ramps."""
    depth_start: float | None = Field(0.5, gt=0, le=1)
    """Depth of the first stage relative to the full model; null = the depth does not grow."""
    resolution_start: float | None = Field(0.5, gt=0, le=1)
    """Resolution of the first stage relative to the data section's; null = the resolution does not grow."""
    resolution_step: int | None = Field(None, gt=0)
    """Resolutions are multiples of this, itself a multiple of the model's stride; null = 32 where it fits, else the
    stride."""
    magnitude_start: float | None = Field(0.5, ge=-1, le=1)
    """RandAugment magnitude of the first stage relative to the data section's (negative values keep it at 0 for
    longer); null leaves it to the data section or to another method."""
    drop_path_start: float | None = Field(0.0, ge=-1, le=1)
    """Drop-path rate of the first stage relative to the model section's; null = it does not change."""
    erasing_start: float | None = Field(0.0, ge=-1, le=1)
    """Erasing probability of the first stage relative to the data section's; null = it does not change."""
    operator: Literal["mogrow", "interpolation", "stacking", "random", "identity"] = "mogrow"
    """Where a deeper network's weights come from: "interpolation" copies each block behind itself, "mogrow" does so
    from the average of the weights, "stacking" repeats the whole list, "random" adds new blocks on top, "identity" is
    interpolation with copies that add nothing at first."""
    state: Literal["carry", "reset"] = "carry"
    """Optimizer state at a growth: every block takes that of its source, or all of it starts at zero."""
    search: SearchConfig | None = None
    """Search for the size of each stage but the last; null = the ramps."""

    @model_validator(mode="after")
    def _fits(self) -> AutoProgConfig:
        if self.schedule is not None:
            _check_schedule(self.schedule)
            if self.search is not None:
                raise ValueError('"search" finds the stages itself: give "search" or "schedule", not both')
            for key in (
                *("stages", "depth_start", "resolution_start", "resolution_step"),
                *("magnitude_start", "drop_path_start", "erasing_start"),
            ):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f'"{key}" belongs to the ramps: leave it out beside "schedule"')
        if self.search is not None:
            if self.operator in ("random", "stacking"):
                raise ValueError(
                    f'"search" grows by copies that can be left out again: "operator" is one of "mogrow", '
                    f'"interpolation", "identity", found "{self.operator}"'
                )
            if self.stages == 1:
                raise ValueError('"search" needs at least 2 stages, the last one is always the full model; found 1')
            if all(start in (None, 1.0) for start in (self.depth_start, self.resolution_start)):
                raise ValueError('"search" has nothing to choose: set "depth_start" or "resolution_start" below 1')
        return self


class UnfreezeSearchConfig(StrictModel):
    """Search for the unfreezing level and resolution of each stage by scores that need no training."""

    samples: int = Field(16, ge=2)
    """Samples (over all ranks) of one scoring batch."""
    ntk_batches: int = Field(2, ge=1)
    """Batches of the score by the condition of the tangent kernel."""
    zico_batches: int = Field(2, ge=2)
    """Batches of the score by the spread of the gradients."""
    time_batches: int = Field(6, ge=1)
    """Batches on which the time of forward and backward is measured."""


class AutoProgZeroConfig(StrictModel):
    """Progressive fine-tuning: blocks are unfrozen and the resolution grows in stages, by a ramp or by a search."""

    stages: int = Field(4, ge=1)
    """Number of stages of equal length and of unfreezing levels; the last one trains everything."""
    order: Literal["interleaved", "suffix"] = "interleaved"
    """Blocks that train first: every K-th block, or those next to the head."""
    freeze_embeddings: bool = False
    """Keep what comes before the blocks (patch and position embedding, class token) frozen before the last stage."""
    resolution_start: float | None = Field(0.25, gt=0, le=1)
    """Resolution of the first stage relative to the data section's; null = the resolution does not grow."""
    resolution_step: int | None = Field(None, gt=0)
    """Resolutions are multiples of this, itself a multiple of the model's stride; null = 32 where it fits, else the
    stride."""
    search: UnfreezeSearchConfig | None = None
    """Search for the level and resolution of each stage but the last; null = the ramps."""

    @model_validator(mode="after")
    def _fits(self) -> AutoProgZeroConfig:
        if self.search is not None and self.stages == 1:
            raise ValueError('"search" needs at least 2 stages, the last one always trains everything; found 1')
        return self


def _check_schedule(stages: list[GrowthStageConfig]) -> None:
    """Refuse stages that do not tile [0, 1] or that shrink.

    Raises:
        ValueError: with the values found.
    """
    ends = [stage.until for stage in stages]
    if not ends or ends[-1] != 1 or any(b <= a for a, b in pairwise(ends)):
        raise ValueError(f'"until" of the stages must increase and end at 1.0, found {ends}')
    depths = [stage.depth for stage in stages]
    if any(b < a for a, b in pairwise(depths)):
        raise ValueError(f'"depth" of the stages must not fall, found {depths}')
    # null is the full resolution, which nothing but the plan knows
    resolutions = [stage.resolution for stage in stages if stage.resolution is not None]
    if any(b < a for a, b in pairwise(resolutions)):
        raise ValueError(f'"resolution" of the stages must not fall, found {resolutions}')
