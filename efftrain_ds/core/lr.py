"""Learning rate as a continuous function of progress."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "constant")


def learning_rate(p: float, *, base: float, warmup: float, min_lr: float, schedule: str = "cosine") -> float:
    """Learning rate at progress `p`: linear warm-up from 0 to `base`, then the schedule.

    Cosine is ``min_lr + (base - min_lr) / 2 * (1 + cos(pi * (p - warmup) / (1 - warmup)))``, as in the
    EfficientTrain++ code, but with one warm-up length for the whole run (the code takes a new one at each stage and
    jumps there).

    Args:
        p: share of the budget spent; values outside [0, 1] count as the nearer end.
        base: rate at the end of the warm-up.
        warmup: share of the budget used for the warm-up, in [0, 1].
        min_lr: rate at p = 1 (cosine).
        schedule: one of `SCHEDULES`.

    Raises:
        ValueError: unknown schedule, or `warmup` outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}, found {schedule!r}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a share of the budget in [0, 1], found {warmup!r}")
    p = min(max(p, 0.0), 1.0)
    if p < warmup:
        return base * p / warmup
    if schedule == "constant" or warmup == 1:
        return base
    return min_lr + (base - min_lr) / 2 * (1 + math.cos(math.pi * (p - warmup) / (1 - warmup)))
