"""What a method may see of the run while it acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .timeline import Schedule, Stage


def _no_record(event: str, **data: Any) -> None:
    return None


@dataclass
class Context:
    """State of the run handed to every hook. Owned by the engine; methods read it and never keep a copy.

    Attributes:
        engine: the current `EfficientEngine` (its handle stays valid across rebuilds).
        schedule: all stages, or None in embedded use without a plan.
        seed: seed of the run; with `step` it determines every decision.
        step: optimizer steps begun so far (the index of the current step).
        stage: the current stage, or None without a plan.
        rank: data-parallel rank.
        world: number of data-parallel ranks.
        device: device of the model.
        record: writes one decision to the journal (no-op without one).
    """

    engine: Any
    schedule: Schedule | None
    seed: int
    step: int = 0
    stage: Stage | None = None
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    record: Callable[..., None] = _no_record

    @property
    def settings(self) -> Mapping[str, Any]:
        """Merged settings of the current stage."""
        return self.stage.settings if self.stage is not None else {}

    @property
    def progress(self) -> float:
        """Share of the budget spent before the current step."""
        return self.schedule.progress(self.step) if self.schedule is not None else 0.0
