"""Where the time goes: parts of a step, stages of the plan, activities of the run."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]
_KEPT = 256  # step times of a stage that its median is taken from


class Chrono:
    """Wall time by activity ("train", "eval", "checkpoint", ...): exactly one runs, entering another pauses it."""

    def __init__(self, clock: Clock = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._current: str | None = None
        self._since = 0.0

    def switch(self, activity: str | None) -> str | None:
        """Charge the time so far to the running activity and go on with `activity`; returns the one before."""
        now, before = self._clock(), self._current
        if before is not None:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._current, self._since = activity, now
        return before

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Run `activity` inside, then go on with the one before."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by activity, those before a resume included."""
        self.switch(self._current)
        return dict(self._seconds)

    def state_dict(self) -> dict[str, float]:
        """Seconds by activity."""
        return self.seconds

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the seconds of an earlier process; what this one measured so far is dropped."""
        self._seconds = {str(k): float(v) for k, v in state.items()}
        self._since = self._clock()


@dataclass(frozen=True)
class Rates:
    """Means over the window of recent steps.

    Attributes:
        steps: number of steps in the window.
        step_seconds: seconds of a step.
        images_per_s: training images a second of one rank.
        shares: share of the step's time in each part, e.g. ``{"data": 0.03}``.
    """

    steps: int
    step_seconds: float
    images_per_s: float
    shares: dict[str, float]


class StepMeter:
    """Time of the optimizer steps, split into parts, over a window and for each stage.

    On an accelerator the parts are what the host waited for; the time of a whole step is right over a window because
    the host cannot run far ahead.

    Args:
        window: recent steps that `rates` averages; a new stage starts a new window.
        clock: seconds.
    """

    def __init__(self, window: int = 50, clock: Clock = time.perf_counter):
        self._clock = clock
        self._window: deque[tuple[float, int, dict[str, float]]] = deque(maxlen=window)
        self._stage: int | None = None
        self._began: float | None = None
        self._parts: dict[str, float] = {}
        self._outside = 0.0
        self.stage_seconds: dict[int, float] = {}
        self.stage_steps: dict[int, int] = {}
        self._recent: dict[int, deque[float]] = {}

    def begin(self) -> None:
        """An optimizer step begins (before its first batch is fetched)."""
        self._began, self._parts, self._outside = self._clock(), {}, 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the time inside to the part `name` ("data", "compute", "step") of the current step."""
        start = self._clock()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + self._clock() - start

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Leave the time inside (evaluation, checkpoint) out of the current step."""
        start = self._clock()
        try:
            yield
        finally:
            self._outside += self._clock() - start

    def end(self, stage: int, images: int) -> float:
        """The optimizer step is over.

        Args:
            stage: index of its stage.
            images: training images of this rank in the step.

        Returns:
            Seconds of the step.
        """
        assert self._began is not None, "end() without begin()"
        seconds = self._clock() - self._began - self._outside
        if stage != self._stage:
            self._window.clear()
            self._stage = stage
        self._window.append((seconds, images, self._parts))
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds
        self.stage_steps[stage] = self.stage_steps.get(stage, 0) + 1
        self._recent.setdefault(stage, deque(maxlen=_KEPT)).append(seconds)
        self._began = None
        return seconds

    @property
    def stage(self) -> int | None:
        """Index of the stage that the window belongs to; None before the first step."""
        return self._stage

    def rates(self) -> Rates | None:
        """Means over the window; None before the first step of a stage is over."""
        if not self._window:
            return None
        seconds = sum(s for s, _, _ in self._window)
        images = sum(n for _, n, _ in self._window)
        names = {name for _, _, parts in self._window for name in parts}
        shares = {name: sum(p.get(name, 0.0) for _, _, p in self._window) / seconds for name in sorted(names)}
        return Rates(len(self._window), seconds / len(self._window), images / seconds, shares)

    def stage_median(self, stage: int) -> tuple[float, int] | None:
        """Median seconds of a step of a stage and how many steps it is taken from; None where none was timed."""
        recent = self._recent.get(stage)
        return (statistics.median(recent), len(recent)) if recent else None

    def state_dict(self) -> dict[str, Any]:
        """Seconds, steps and recent step times of each stage."""
        stages = sorted(self.stage_seconds)
        return {
            "stages": stages,
            "seconds": [self.stage_seconds[i] for i in stages],
            "steps": [self.stage_steps[i] for i in stages],
            "recent": [list(self._recent.get(i, ())) for i in stages],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an earlier process; the window starts empty."""
        stages = [int(i) for i in state["stages"]]
        self.stage_seconds = dict(zip(stages, map(float, state["seconds"]), strict=True))
        self.stage_steps = dict(zip(stages, map(int, state["steps"]), strict=True))
        self._recent = {i: deque(r, maxlen=_KEPT) for i, r in zip(stages, state["recent"], strict=True)}
        self._window.clear()
        self._stage = None


def seconds_left(
    costs_left: Sequence[float],
    stage_costs: Sequence[float],
    stage_steps: Sequence[int],
    keys: Sequence[Hashable],
    *,
    stage: int,
    step_seconds: float | None,
    timed_seconds: Mapping[int, float],
    timed_steps: Mapping[int, int],
) -> float | None:
    """Seconds until the last step: remaining cost x seconds per cost, stage by stage.

    The current stage takes the rate of its recent steps. Another stage takes the rate of the timed stages that do the
    same work in a step (equal key), else the current stage's.

    Args:
        costs_left: cost that each stage still has to pay (any unit, e.g. shares of the run).
        stage_costs: whole cost of each stage in the same unit.
        stage_steps: optimizer steps of each stage.
        keys: equal for stages that do the same work in a step.
        stage: index of the current stage.
        step_seconds: seconds of a recent step of the current stage, or None before one was timed.
        timed_seconds: seconds spent in each stage so far.
        timed_steps: steps timed in each stage so far.

    Returns:
        Seconds, or None while no step at all was timed.
    """
    step_cost = [c / s for c, s in zip(stage_costs, stage_steps, strict=True)]
    seen: dict[Hashable, tuple[float, float]] = {}
    for i, seconds in timed_seconds.items():
        total, cost = seen.get(keys[i], (0.0, 0.0))
        seen[keys[i]] = (total + seconds, cost + timed_steps[i] * step_cost[i])
    rates = {key: seconds / cost for key, (seconds, cost) in seen.items() if cost > 0}
    if step_seconds is not None:
        rates[keys[stage]] = step_seconds / step_cost[stage]
    current = rates.get(keys[stage])
    if current is None and rates:
        current = sum(s for s, _ in seen.values()) / sum(c for _, c in seen.values())
    if current is None:
        return None
    return sum(left * rates.get(key, current) for left, key in zip(costs_left, keys, strict=True))
