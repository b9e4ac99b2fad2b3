"""What a run writes for later: journal, TensorBoard, Weights & Biases, the plan and the resolved configuration."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config.loader import LoadedConfig
from .core.best_effort import BestEffort
from .core.context import Context
from .core.errors import ConfigError
from .core.files import write_whole
from .core.method import Method
from .core.ranks import agree
from .core.redact import redacted
from .cost.plan import PricedPlan
from .observe.environment import environment
from .observe.journal import Journal
from .observe.pictures import save_png
from .observe.tensorboard import TensorBoard
from .observe.wandb import Boards, WandB

_logger = logging.getLogger(__name__)

_SHOWN = (
    *("rebuild", "growth", "growth_search", "unfreeze_search"),
    *("mask_update", "unit_update", "units_removed", "attention_update", "nonfinite"),
)
"""Events of the journal that TensorBoard shows as text."""


class RunLogs:
    """The files of one run, without the secrets of URLs and commands. Only rank 0 writes, and not while measuring.

    Once the run has begun, nothing here ends it: where the disk is full, what cannot be written is left out with one
    warning.

    Args:
        config: the loaded file.
        rank: of this process.
        world: number of ranks.
        write: False writes nothing.
        train_seconds: training time so far, put into every event.
    """

    def __init__(self, config: LoadedConfig, *, rank: int, world: int, write: bool, train_seconds: Callable[[], float]):
        self.config, self.rank, self.world = config, rank, world
        self.output = Path(config.efftrain.run.output)
        self.journal: Journal | None = None
        self.board: Boards | None = None
        self._write, self._enabled = write, write and rank == 0
        self._train_seconds = train_seconds
        self._pictures, self._plan = BestEffort("pictures"), BestEffort("plans")

    def open(self, plan: PricedPlan, *, step: int, resumed: str | None, changes: list[str]) -> None:
        """Open everything at the start of a run. Collective.

        Args:
            plan: shown and stored.
            step: optimizer steps done.
            resumed: name of the checkpoint that the run goes on from, or None.
            changes: what is configured otherwise than in that checkpoint.

        Raises:
            ConfigError: the output folder cannot be written, or Weights & Biases refuses.
        """
        document = json.dumps(redacted(self.config.resolved()), indent=1)
        problem = None
        facts: dict[str, Any] = {"argv": redacted(sys.argv), "torch": torch.__version__, "world": self.world}
        try:
            if self._enabled:
                self.output.mkdir(parents=True, exist_ok=True)
                write_whole(self.output / "config.json", document + "\n")
                facts |= environment()
                self._put_plan(plan)
            self.journal = Journal(self.output / "journal.jsonl", enabled=self._enabled)
        except OSError as error:
            problem = f"efftrain.run.output: {self.output} cannot be written ({error})"
        agree(problem, ConfigError)
        assert self.journal is not None
        if resumed is not None:
            self.journal.resume(step, checkpoint=resumed, changes=changes, **facts)
        else:
            self.journal.write("start", step=step, **facts)
        observe = self.config.efftrain.observe
        tensorboard = self._enabled and observe.tensorboard
        purge = step if resumed else None
        folder = self.output / "tensorboard"
        boards: list[Any] = [TensorBoard(folder, enabled=tensorboard, rank=self.rank, purge_step=purge)]
        if observe.wandb is not None and self._write:
            boards.append(self._wandb(observe.wandb.model_dump(), resumed is not None))
        self.board = Boards(boards)
        if self._enabled:
            self.board.text("plan", json.dumps(plan.to_dict(), indent=1), step)
            self.board.text("config", document, step)

    def _wandb(self, settings: dict[str, Any], resumed: bool) -> WandB | None:
        found, problem = None, None
        try:
            found = WandB(self.output, **settings, config=self.config.resolved(), rank=self.rank, resumed=resumed)
        except Exception as error:  # wandb has many of its own
            problem = str(error)
        agree(problem, ConfigError)
        return found

    def record(self, event: str, *, step: int, **data: Any) -> None:
        """Write one event to the journal, and to the boards where it is worth a look."""
        if self.journal is not None:
            self.journal.write(event, step=step, **{"train_seconds": self._train_seconds(), **data})
        if self.board is not None and event in _SHOWN:
            self.board.text(event, json.dumps(data, indent=1, default=str), step)
            if event == "rebuild":
                values = {"rebuild/seconds": data["seconds"], "rebuild/parameters": data["parameters"][1]}
                self.board.scalars(values, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers for the boards."""
        if self.board is not None:
            self.board.scalars(values, step)

    def pictures(self, methods: Sequence[Method], ctx: Context, step: int) -> None:
        """Pictures of the methods' state, for the boards and as ``pictures/<tag>-step-<step>.png``; rank 0 only."""
        if not self._enabled:
            return
        for method in methods:
            try:
                for tag, picture in method.pictures(ctx).items():
                    self.picture(tag, picture.permute(1, 2, 0).contiguous().cpu().numpy(), step)
            except Exception as error:  # one rank alone must not leave the run over a picture
                _logger.warning("no picture of %s at step %d: %s: %s", method.name, step, type(error).__name__, error)

    def picture(self, tag: str, pixels: np.ndarray, step: int, name: str | None = None) -> None:
        """One picture [H, W, 3] uint8, for the boards and as ``pictures/<name or tag>-step-<step>.png``; of rank 0."""
        if not self._enabled:
            return
        if self.board is not None:
            self.board.image(tag, pixels, step)
        path = self.output / "pictures" / f"{name or tag.replace('/', '-')}-step-{step:08d}.png"
        with self._pictures(path):
            save_png(pixels, path)

    def write_plan(self, plan: PricedPlan) -> None:
        """Keep the plan as it is now: a search may have chosen other stages than were assumed."""
        if self._enabled:
            with self._plan(self.output / "plan.json"):
                self._put_plan(plan)

    def _put_plan(self, plan: PricedPlan) -> None:
        write_whole(self.output / "plan.json", json.dumps(redacted(plan.to_dict()), indent=1) + "\n")

    def close(self) -> None:
        """Close all files."""
        for log in (self.journal, self.board):
            if log is not None:
                log.close()
