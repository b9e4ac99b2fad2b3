"""Plan against actual: what every stage was to cost and to take, and what it took.

Seconds are those of the optimizer steps alone, without evaluations, checkpoints and rebuilds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.text import short_settings
from .history import Event, finite, step_of
from .traces import Trace


@dataclass(frozen=True)
class StageRow:
    """One stage.

    Attributes:
        index: from 0.
        start: first optimizer step.
        steps: of the plan.
        done: steps of it that were done.
        planned: settings by plan.
        ran: settings it ran with; equal to `planned` unless they were chosen during the run.
        split: (batch, micro-batch, accumulation), None where unknown.
        share: share of the run's cost by plan.
        memory: estimated bytes of one rank, or None.
        predicted: seconds by a throughput profile, or None.
        actual: seconds it took so far; None before it began or where nothing was timed.
        exact: False where `actual` is interpolated between two times that were written down.
    """

    index: int
    start: int
    steps: int
    done: int
    planned: Mapping[str, Any]
    ran: Mapping[str, Any]
    split: tuple[int, int, int] | None
    share: float
    memory: float | None
    predicted: float | None
    actual: float | None
    exact: bool

    @property
    def label(self) -> str:
        """Settings in a few characters, e.g. "B128 m3"."""
        return short_settings(self.ran)

    @property
    def predicted_so_far(self) -> float | None:
        """Predicted seconds of the steps that were done."""
        return None if self.predicted is None else self.predicted * self.done / max(self.steps, 1)

    @property
    def off(self) -> float | None:
        """How much longer than predicted it took, e.g. 0.04; None where either is missing or no step was done."""
        predicted = self.predicted_so_far
        return self.actual / predicted - 1 if self.actual is not None and predicted else None


def plan_stages(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stages of plan.json with a place, a beginning, a length and a cost; [] where one of them has not."""
    found = plan.get("stages")
    stages = []
    for position, stage in enumerate(found if isinstance(found, list) else []):
        if not isinstance(stage, dict):
            return []
        values = {key: finite(stage.get(key)) for key in ("start_step", "steps", "cost_macs")}
        if any(v is None or not 0 <= v < 1e30 for v in values.values()):
            return []
        stages.append({**stage, **values, "index": position})
    return stages


def cost_points(plan: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps at the edges of the stages, and the training MACs before them; None without a plan."""
    stages = plan_stages(plan)
    if not stages:
        return None
    steps = np.array([0.0, *(s["start_step"] + s["steps"] for s in stages)])
    return steps, np.cumsum([0.0, *(s["cost_macs"] for s in stages)])


def stage_rows(
    plan: Mapping[str, Any], events: Sequence[Event], seconds: Trace | None, steps_done: int
) -> list[StageRow]:
    """Every stage of the plan.

    The seconds come from the "stages" of the "end" event where it has them, else from the training seconds that
    were written down at and between the stages' edges.

    Args:
        plan: plan.json.
        events: the history.
        seconds: training seconds over steps.
        steps_done: steps of the run that were done.
    """
    stages = plan_stages(plan)
    entered = {finite(e.get("index")): e for e in events if e.get("event") == "stage"}
    written = _written(events)
    edges = cost_points(plan)
    total = sum(s["cost_macs"] for s in stages) or 1
    rows = []
    for index, stage in enumerate(stages):
        start, steps = int(stage["start_step"]), int(stage["steps"])
        planned = stage.get("settings") if isinstance(stage.get("settings"), dict) else {}
        ran = entered.get(index, {}).get("settings")
        done = int(min(max(steps_done - start, 0), steps))
        actual, exact = None, True
        if index in written:
            actual = written[index]
        elif done and seconds is not None and edges is not None:
            actual, exact = _between(seconds, edges, start, start + done)
        rows.append(
            StageRow(
                index,
                start,
                steps,
                done,
                planned,
                ran if isinstance(ran, dict) else planned,
                _split(stage),
                stage["cost_macs"] / total,
                finite(stage.get("memory_bytes")),
                finite(stage.get("seconds")),
                actual,
                exact,
            )
        )
    return rows


def _split(stage: Mapping[str, Any]) -> tuple[int, int, int] | None:
    found = [finite(stage.get(key)) for key in ("batch", "micro_batch", "accumulation")]
    return None if None in found else (int(found[0]), int(found[1]), int(found[2]))  # type: ignore[arg-type]


def _written(events: Sequence[Event]) -> dict[int, float]:
    """Seconds of each stage as the "end" event tells them."""
    for event in reversed(events):
        rows = event.get("stages")
        if event.get("event") == "end" and isinstance(rows, list):
            pairs = [(finite(r.get("index")), finite(r.get("seconds"))) for r in rows if isinstance(r, dict)]
            return {int(i): s for i, s in pairs if i is not None and s is not None}
    return {}


def _between(seconds: Trace, edges: tuple[np.ndarray, np.ndarray], first: int, last: int) -> tuple[float | None, bool]:
    """Training seconds between two steps, and whether both were written down.

    Between two known times, time is taken to pass as cost does: a stage edge may lie anywhere between them.
    """
    if not len(seconds) or last > seconds.steps[-1]:
        last = int(seconds.steps[-1]) if len(seconds) else 0
        if last <= first:
            return None, False
    known = {0.0: 0.0, **dict(zip(seconds.steps.tolist(), seconds.values.tolist(), strict=True))}
    steps = np.array(sorted(known))
    costs, times = np.interp(steps, *edges), np.array([known[s] for s in steps])
    wanted = np.interp([first, last], *edges)
    begin, end = np.interp(wanted, costs, times)
    return float(end - begin), first in known and last in known


def entered_stages(events: Sequence[Event]) -> list[tuple[int, Event]]:
    """(step, event) of every stage that began, in order."""
    found = [(step_of(e), e) for e in events if e.get("event") == "stage"]
    return sorted(((s, e) for s, e in found if s is not None), key=lambda pair: pair[0])
