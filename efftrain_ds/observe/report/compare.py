"""Runs side by side: cost, time and accuracy, and what it took to reach the same accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .run import RunData


@dataclass(frozen=True)
class Numbers:
    """What is compared; None where the files do not tell.

    Attributes:
        name: of the run.
        finished: it reached its end.
        steps: optimizer steps done.
        images: training images of these steps.
        cost_macs: training MACs of these steps, by plan.
        relative_cost: cost of the whole plan over the dense baseline's.
        train_seconds: of the optimizer steps.
        predicted_seconds: of the whole plan.
        wall_seconds: of all sessions.
        best_top1: share, the better of model and average.
        best_step: where it was reached.
        final_top1: of the model, last evaluation.
        target_cost_macs: cost until `target` was reached, see `reached`.
        target_seconds: training time until then.
    """

    name: str
    finished: bool
    steps: int
    images: int | None
    cost_macs: float | None
    relative_cost: float | None
    train_seconds: float | None
    predicted_seconds: float | None
    wall_seconds: float
    best_top1: float | None
    best_step: int | None
    final_top1: float | None
    target_cost_macs: float | None = None
    target_seconds: float | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def target(runs: Sequence[RunData]) -> float | None:
    """The best top-1 that every run reached: the lowest of their bests; None where a run has no evaluation."""
    bests = [run.best for run in runs]
    return None if any(b is None for b in bests) else min(b[0] for b in bests if b is not None)


def reached(run: RunData, top1: float) -> int | None:
    """First evaluated step at which the run's model or average had this top-1."""
    steps = []
    for name in ("top1", "ema_top1"):
        trace = run.evaluated(name)
        at = np.flatnonzero(trace.values >= top1 - 1e-12)
        if len(at):
            steps.append(int(trace.steps[at[0]]))
    return min(steps, default=None)


def numbers(run: RunData, top1: float | None = None) -> Numbers:
    """The numbers of one run.

    Args:
        run: read from its folder.
        top1: accuracy to reach, for the last two fields.
    """
    from .history import finite

    batch, best, final = finite(run.plan.get("batch")), run.best, run.evaluated("top1")
    step = reached(run, top1) if top1 is not None else None
    at = np.array([step]) if step is not None else None
    cost, seconds = (None, None) if at is None else (run.cost_at(at), run.seconds_at(at))
    return Numbers(
        name=run.name,
        finished=run.end is not None,
        steps=run.steps_done,
        images=None if batch is None else int(batch) * run.steps_done,
        cost_macs=run.cost_done,
        relative_cost=finite(run.plan.get("relative_cost")),
        train_seconds=run.train_seconds,
        predicted_seconds=finite(run.plan.get("seconds")),
        wall_seconds=run.wall_seconds,
        best_top1=None if best is None else best[0],
        best_step=None if best is None else best[1],
        final_top1=final.last,
        target_cost_macs=None if cost is None else finite(float(cost[0])),
        target_seconds=None if seconds is None else finite(float(seconds[0])),
    )
