"""Learning rate as a function of progress, in the form DeepSpeed expects of a scheduler."""

from __future__ import annotations

from typing import Any

from .core.lr import learning_rate
from .core.timeline import Schedule


class ProgressLR:
    """Warm-up and decay over the share of the budget that is spent (EfficientTrain++ code release, lr(p)).

    The rate of step i is taken in the middle of the step, and is set by `set_step` before it; DeepSpeed's own call of
    `step` after each applied step does nothing, so a skipped step (fp16 overflow) does not shift the schedule.

    Args:
        optimizer: its groups' ``lr`` are the peak values; a group's ``lr_scale`` (see `models.layer_decay`) is in its
            peak already and also multiplies `min_lr`, so that the rates of two groups keep their ratio.
        schedule: stages of the run; its `lr_scale` multiplies the peak values, not `min_lr`.
        warmup: share of the budget in [0, 1).
        min_lr: rate at the end.
        shape: "cosine" or "constant".
    """

    def __init__(self, optimizer: Any, schedule: Schedule, *, warmup: float, min_lr: float, shape: str):
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup, self.min_lr, self.shape = warmup, min_lr, shape
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.floors = [
            min(min_lr * float(group.get("lr_scale", 1.0)), base)
            for group, base in zip(optimizer.param_groups, self.base_lrs, strict=True)
        ]
        self.current = 0
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Write the rate of optimizer step `step` into the groups."""
        self.current = step
        p = self.schedule.progress(step + 0.5)
        scale = self.schedule.lr_scale(p)
        for group, base, floor in zip(self.optimizer.param_groups, self.base_lrs, self.floors, strict=True):
            group["lr"] = learning_rate(p, base=scale * base, warmup=self.warmup, min_lr=floor, schedule=self.shape)

    def step(self, *_: Any, **__: Any) -> None:
        """Nothing: see the class."""

    def get_lr(self) -> list[float]:
        """Rates of the groups."""
        return [group["lr"] for group in self.optimizer.param_groups]

    get_last_lr = get_lr

    def state_dict(self) -> dict[str, Any]:
        """The step; the rest comes from the configuration."""
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a step."""
        self.set_step(state["current"])
