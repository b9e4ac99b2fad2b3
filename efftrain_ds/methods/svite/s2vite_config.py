"""Configuration of S2ViTE: the value of ``efftrain.methods.s2vite``."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ...core.strict import StrictModel
from ...core.timeline import Segment, Timeline
from .schedule import check_interval, ramp_densities, ramp_edges

KEY = "efftrain.methods.s2vite"
LEVEL = "unit_level"
"""Stage setting: level of the ramp of counts, from 0."""


class RampConfig(StrictModel):
    """Begin with more units and give some of them up at the edges of stages."""

    start: float = Field(gt=0, le=1)
    """Density of heads and of neurons in the first stage."""
    levels: int = Field(4, ge=2)
    """Stages of the ramp, the first and the last included."""
    until: float = Field(0.5, gt=0, lt=1)
    """Share of the run after which the counts are those of `heads` and `neurons`."""


class S2ViTEConfig(StrictModel):
    """Train only a part of the attention heads and MLP neurons, and now and then exchange some of them."""

    heads: float = Field(0.6, gt=0, le=1)
    """Kept share of the heads of every block, rounded down, at least one head."""
    neurons: float = Field(0.6, gt=0, le=1)
    """Kept share of the MLP neurons of every block, rounded down, at least one."""
    revive: bool = True
    """True: dead units take no memory and no time, and a grown one starts with new weights and no effect.
    False: as the S2ViTE code does, with masks on full weights; its MLP neurons never change."""
    exclude: list[str] = []
    """Names of blocks that keep all their units, e.g. ["blocks.0"]."""
    ramp: RampConfig | None = None
    """Falling counts; null = the counts never change."""
    update_every: Annotated[str, AfterValidator(check_interval)] = "1%"
    """Interval of the exchanges, e.g. "20000st", "2ep", "1%"."""
    end: float = Field(0.8, gt=0, le=1)
    """Share of the run after which the units stay."""
    alpha: Literal["paper", "reference", "constant"] = "paper"
    """Course of the exchanged share: to 0 at the end of the exchanges, to 0.005 at the end of the run, or constant."""
    initial: float = Field(0.5, ge=0, le=1)
    """Exchanged share of a block's live units at step 0."""
    exclude_just_dropped: bool = False
    """Do not grow what the same update dropped (otherwise such a unit keeps its values; heads then move rarely)."""
    seed: int | None = None
    """Seed of the first units and of new weights; null = that of the run."""

    @model_validator(mode="after")
    def _fits(self) -> S2ViTEConfig:
        if self.exclude_just_dropped and not self.revive:
            raise ValueError('"exclude_just_dropped" does not apply with "revive": false, where all dead neurons tie')
        if self.ramp is None:
            return self
        if not self.revive:
            raise ValueError('"ramp" changes the number of stored units, which "revive": false does not')
        if self.ramp.start < max(self.heads, self.neurons):
            raise ValueError(
                f'"ramp.start" is {self.ramp.start:g}, below "heads" {self.heads:g} or "neurons" {self.neurons:g}; '
                "allowed: at least both"
            )
        return self

    @property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """(density of heads, density of neurons) of every level."""
        if self.ramp is None:
            return ((self.heads, self.neurons),)
        both = (ramp_densities(self.ramp.start, target, self.ramp.levels) for target in (self.heads, self.neurons))
        return tuple(zip(*both, strict=True))

    @property
    def edges(self) -> tuple[float, ...]:
        """Progress at which each level begins."""
        return (0.0,) if self.ramp is None else ramp_edges(self.ramp.until, self.ramp.levels)

    @property
    def timeline(self) -> Timeline:
        """One stage, or one for each level of the ramp."""
        if self.ramp is None:
            return Timeline((Segment(0.0, 1.0),))
        edges = [*self.edges, 1.0]
        return Timeline(tuple(Segment(a, b, {LEVEL: k}) for k, (a, b) in enumerate(pairwise(edges))))
