"""Configuration of SViTE+'s token selection: the value of ``efftrain.methods.svite_tokens``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...core.strict import StrictModel
from .schedule import ramp_densities, ramp_edges

KEY = "efftrain.methods.svite_tokens"
SETTING = "keep_ratio"
"""Stage setting: kept share of the tokens."""


class KeepRampConfig(StrictModel):
    """Begin with another share of the tokens and come to the last one in equal steps."""

    start: float = Field(1.0, gt=0, le=1)
    """Kept share in the first stage."""
    levels: int = Field(4, ge=2)
    """Stages of the ramp, the first and the last included; compiled code is compiled again for each."""
    until: float = Field(0.5, gt=0, lt=1)
    """Share of the run after which `keep` holds."""


class TauConfig(StrictModel):
    """Temperature of the softmax that brings the scorer its gradient, linear over the steps of the run."""

    start: float = Field(10.0, gt=0)
    """At the first step. The SViTE code rose from 0.1 to 10 before it was mended."""
    end: float = Field(0.1, gt=0)
    """At the end of the run."""


class NoiseConfig(StrictModel):
    """Size of the Gumbel noise on the scores in training, linear over the steps of the run."""

    start: float = Field(1.0, ge=0)
    """At the first step. 1 makes the choice a draw by the softmax of the scores."""
    end: float = Field(0.0, ge=0)
    """At the end of the run. 0: training ends with the choice that evaluations make; 1 as the SViTE code does."""


class SViTETokensConfig(StrictModel):
    """Let a learned scorer choose the tokens of every image that the blocks see."""

    keep: float = Field(0.9, gt=0, le=1)
    """Kept share of all tokens, class token and the like included; of 197 tokens 0.9 keeps 177. Rounded half up."""
    select: Literal["gather", "mask"] = "gather"
    """"gather" shortens the sequence, in training and evaluation. "mask" zeroes the other tokens and saves nothing, as
    the SViTE code does."""
    ramp: KeepRampConfig | None = None
    """A share that changes in the first part of the run; null = always `keep`."""
    tau: TauConfig = TauConfig()
    """Temperature."""
    noise: NoiseConfig = NoiseConfig()
    """Noise on the scores."""
    seed: int | None = None
    """Seed of the scorer's first weights; null = that of the run."""

    @model_validator(mode="after")
    def _fits(self) -> SViTETokensConfig:
        if self.ramp is not None and self.ramp.start == self.keep:
            raise ValueError(f'"ramp.start" and "keep" are both {self.keep:g}; leave the ramp out')
        return self

    @property
    def keeps(self) -> tuple[float, ...]:
        """Kept share of every level."""
        return (self.keep,) if self.ramp is None else ramp_densities(self.ramp.start, self.keep, self.ramp.levels)

    @property
    def edges(self) -> tuple[float, ...]:
        """Progress at which each level begins."""
        return (0.0,) if self.ramp is None else ramp_edges(self.ramp.until, self.ramp.levels)

    def tau_at(self, step: int, total: int) -> float:
        """Temperature of step `step` of `total`."""
        return _linear(self.tau, step, total)

    def noise_at(self, step: int, total: int) -> float:
        """Size of the noise in step `step` of `total`."""
        return _linear(self.noise, step, total)


def _linear(course: TauConfig | NoiseConfig, step: int, total: int) -> float:
    return course.start + (course.end - course.start) * min(step, total) / max(1, total)
