"""When the masks change, by how much, and how dense the model is meanwhile.

Steps are optimizer steps. The first step that may be an update is `every`, the last lies before `end`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

from ...core.context import Context
from ...core.durations import parse_duration
from ...core.errors import ConfigError, NoEffectWarning, PlanError
from ...core.timeline import PlanSpec, Schedule

ALPHAS = ("paper", "reference", "constant")


def scaled_interval(every: int, total: int, new_total: int) -> int:
    """The interval that keeps the number of updates when a run of `total` steps becomes one of `new_total`."""
    return max(1, math.floor(Fraction(every * new_total, total) + Fraction(1, 2)))


def check_interval(text: str) -> str:
    """The text itself, for the configuration's models.

    Raises:
        ValueError: it is no interval in steps, epochs or percent.
    """
    duration = parse_duration(text)
    if duration.seconds is not None or not duration.value:
        raise ValueError(f'an interval is in steps, epochs or percent ("500st", "2ep", "1%") above 0, found {text!r}')
    return text


def interval_steps(text: str, spec: PlanSpec, total: int) -> int:
    """An interval in optimizer steps of a run of `total` steps, at least one."""
    per_epoch = spec.samples / spec.batch if spec.samples else float(total)
    return max(1, parse_duration(text).steps(per_epoch, total) or 0)


def refuse_without_updates(key: str, text: str | None, every: int, total: int) -> None:
    """Refuse an interval `text` of `every` steps in which a run of `total` steps would never be updated.

    Raises:
        PlanError: naming ``<key>.update_every``.
    """
    if every >= total:
        raise PlanError(
            f"{key}.update_every: {text} is {every} steps, but the run has {total}; allowed: less than the run"
        )


def run_schedule(key: str, ctx: Context) -> Schedule:
    """The schedule of the run that a method takes part in.

    Raises:
        PlanError: the length of the run is not known.
    """
    if ctx.schedule is None:
        raise PlanError(f"{key} needs the length of the run: set efftrain.run.steps")
    return ctx.schedule


def end_step(total: int, share: float) -> int:
    """First step at or after the `share` of a run of `total` steps (the share taken as the decimal it is written as).

    Raises:
        ConfigError: share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"end share of the topology updates is {share}, allowed: above 0, at most 1")
    return math.ceil(Fraction(str(share)) * total)


def ramp_densities(start: float, target: float, levels: int) -> tuple[float, ...]:
    """Densities of the levels of a ramp: equal steps from `start` down to `target`."""
    first, last = Fraction(str(start)), Fraction(str(target))
    return tuple(float(first + (last - first) * Fraction(k, levels - 1)) for k in range(levels))


def ramp_edges(until: float, levels: int) -> tuple[float, ...]:
    """Progress at which each level begins; the last begins at `until`."""
    return tuple(until * k / (levels - 1) for k in range(levels))


@dataclass(frozen=True)
class UpdateSchedule:
    """Steps and strength of topology updates.

    Attributes:
        total: optimizer steps T of the run.
        every: interval in steps.
        end: no update at this step or later.
        alpha: course of the update fraction, one of `ALPHAS`.
        initial: update fraction at step 0.
        floor: where the course "reference" ends.
    """

    total: int
    every: int
    end: int
    alpha: str = "paper"
    initial: float = 0.5
    floor: float = 0.005

    def __post_init__(self) -> None:
        if self.alpha not in ALPHAS:
            raise ConfigError(f'course of the update fraction is "{self.alpha}", allowed: {", ".join(ALPHAS)}')
        if self.every < 1 or not 0 <= self.end <= self.total:
            raise ConfigError(f"updates every {self.every} steps until {self.end} do not fit {self.total} steps")
        if not 0 <= self.initial <= 1:
            raise ConfigError(f"update fraction is {self.initial}, allowed: 0 to 1")

    @property
    def steps(self) -> range:
        """The steps of all updates: multiples of `every` strictly between 0 and `end`."""
        return range(self.every, self.end, self.every)

    def warn_if_empty(self, key: str) -> None:
        """Warn (`NoEffectWarning`) where no update falls into the run of the method at `key`."""
        if not self.steps:
            text = f"{key}: no update falls into {self.total} steps (every {self.every}, until {self.end})"
            warnings.warn(text, NoEffectWarning, 3)

    def is_update(self, step: int) -> bool:
        """True where an update is scheduled at `step`."""
        return 0 < step < self.end and step % self.every == 0

    def due(self, step: int, last: int) -> bool:
        """True where an update is scheduled at `step`, or was at an earlier step and did not take place.

        Scores that are not finite postpone an update to the next step.

        Args:
            step: the current step.
            last: step of the latest update that took place, 0 before the first.
        """
        return 0 < step < self.end and step // self.every * self.every > last

    def fraction(self, step: int) -> float:
        """Share of the live entries to exchange at `step`.

        "paper" falls as a half cosine to 0 at `end` (RigL's course); "reference" falls to `floor` at the end of the
        run, so it is still well above 0 at the last update (the SViTE code); "constant" stays.
        """
        if self.alpha == "constant":
            return self.initial
        if self.alpha == "reference":
            half = 0.5 * (1 + math.cos(math.pi * min(step, self.total) / self.total))
            return self.floor + (self.initial - self.floor) * half
        return 0.5 * self.initial * (1 + math.cos(math.pi * min(step, self.end) / self.end)) if self.end else 0.0


@dataclass(frozen=True)
class DensitySchedule:
    """Density of the model over the steps: ``final + (initial - final) (1 - (t - start) / (end - start))^power``.

    Power 3 is the gradual pruning of GraNet (Liu et al. 2021, after Zhu and Gupta 2017); equal ends are a constant.

    Attributes:
        initial: density until `start`.
        final: density from `end` on.
        start: first step of the change.
        end: last step of the change.
        power: of the course.
    """

    initial: float
    final: float
    start: int = 0
    end: int = 1
    power: float = 3.0

    def __post_init__(self) -> None:
        if not (0 < self.initial <= 1 and 0 < self.final <= 1):
            raise ConfigError(f"density goes from {self.initial} to {self.final}, allowed: above 0, at most 1")
        if self.end <= self.start:
            raise ConfigError(f"density changes from step {self.start} to {self.end}, which is not later")

    def at(self, step: int) -> float:
        """Density that the masks have after an update at `step`."""
        left = 1 - min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.final + (self.initial - self.final) * left**self.power
