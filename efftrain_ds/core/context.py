"""What a method may see of the run while it acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .batch import Batch
from .timeline import Schedule, Stage


def _no_record(event: str, **data: Any) -> None:
    return None


def _say_nothing(lines: str | list[str]) -> None:
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
        say: shows lines on the screen of rank 0 (no-op on other ranks and without a trainer).
        probe_batches: fixed training samples of this rank for measuring candidates, as
            ``probe_batches(total over all ranks)``; None without a trainer. Host batches of uint8 images with the
            evaluation's resize and crop, in micro-batches, equal at every call and equally many on every rank;
            rows beyond the end have ``valid=False``.
        variant: which of `Method.variants` an evaluation is of; None for the main one and outside of evaluations.
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
    say: Callable[[str | list[str]], None] = _say_nothing
    probe_batches: Callable[[int], list[Batch]] | None = None
    variant: str | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Merged settings of the current stage."""
        return self.stage.settings if self.stage is not None else {}

    @property
    def progress(self) -> float:
        """Share of the budget spent before the current step."""
        return self.schedule.progress(self.step) if self.schedule is not None else 0.0
