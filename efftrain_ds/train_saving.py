"""When the reference loop saves, what it does when that fails, and how it goes on from a checkpoint."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .checkpoint import store
from .checkpoint.survey import FOLDER
from .config.loader import LoadedConfig
from .core.durations import parse_duration
from .core.errors import CheckpointError
from .core.ranks import agree, text_of, world_size
from .core.redact import redacted
from .core.timeline import Schedule
from .train_changes import Change, check, compare, past_stages

logger = logging.getLogger(__name__)


def steps_of(schedule: Schedule, text: str) -> int | None:
    """Optimizer steps of an interval; None for wall-clock units."""
    spec = schedule.spec
    per_epoch = spec.samples / spec.batch if spec.samples else schedule.total_steps
    return parse_duration(text).steps(per_epoch, schedule.total_steps)


def due(schedule: Schedule, text: str | None, step: int) -> bool:
    """True where a multiple of the interval ends at `step` (wall-clock units are not for this)."""
    every = steps_of(schedule, text) if text is not None else None
    return every is not None and step % max(every, 1) == 0


def checkpoint_of(config: LoadedConfig) -> Path | None:
    """The checkpoint that a resume takes, the newest one that verifies; rank 0 decides for all. Collective.

    None where there is none or the configuration forbids it.

    Raises:
        CheckpointError: there are checkpoints and none of them can be used.
    """
    section = config.efftrain
    return store.find(Path(section.run.output) / FOLDER) if section.checkpoint.resume else None


class Saver:
    """Checkpoints of one run.

    Args:
        engine: the `EfficientEngine`.
        config: the loaded file.
        schedule: stages of the run.
        client: collects the loop's own state.
        record: writes a journal event.
        warn: shows a line on the screen.
    """

    def __init__(
        self,
        engine: Any,
        config: LoadedConfig,
        schedule: Schedule,
        client: Callable[[], dict[str, Any]],
        record: Callable[..., None],
        warn: Callable[[str], None],
    ):
        self.engine, self.config, self.schedule = engine, config, schedule
        self.settings = config.efftrain.checkpoint
        self.folder = Path(config.efftrain.run.output) / FOLDER
        self._client, self._record, self._warn = client, record, warn
        self._last = time.monotonic()
        self.seconds: float | None = None
        """Pause of the last save."""

    def due(self, step: int) -> bool:
        """True where the configured interval ends at `step`; equal on all ranks."""
        text = self.settings.every
        if text is None:
            return False
        seconds = parse_duration(text).seconds
        if seconds is None:
            return due(self.schedule, text, step)
        # clocks differ between ranks: rank 0 decides, at log steps only, so that no other step pays for it
        if step % self.config.efftrain.observe.log_every:
            return False
        answer = torch.tensor([float(time.monotonic() - self._last >= seconds)], device=self.engine.device)
        dist.broadcast(answer, src=0)
        return bool(answer.item())

    def save(self, *, required: bool = False) -> bool:
        """Save now. Collective; False where it failed, which costs this checkpoint only.

        Args:
            required: the last chance to save: raise where it fails, and wait for a save in the background.

        Raises:
            CheckpointError: with `required`.
        """
        start, step = time.monotonic(), self.engine.step_index
        try:
            self.engine.finish_saving()
        except CheckpointError as error:
            self._failed(error)
        try:
            client = {
                "past": past_stages(self.schedule, step),
                "config": json.dumps(redacted(self.config.resolved())),
                **self._client(),
            }
            background = False if required else self.settings.background
            self.engine.save_checkpoint(
                self.folder, client_state=client, keep=self.settings.keep, background=background
            )
        except CheckpointError as error:
            if required:
                raise
            self._failed(error)
            return False
        finally:
            self._last = time.monotonic()
            self.seconds = self._last - start
        self._record("checkpoint", step=step, seconds=self.seconds, background=background)
        return True

    def leave(self) -> None:
        """At the end of a run, however it ends: see a save in the background through, if there is one left."""
        self.engine.leave_saving()

    def _failed(self, error: CheckpointError) -> None:
        self._warn(f"checkpoint not saved, the run goes on: {error}")
        self._record("checkpoint_failed", error=str(error))

    def resume(self, path: Path) -> tuple[dict[str, Any], list[Change]]:
        """Load a checkpoint; returns the loop's own state and what has changed since. Collective.

        Args:
            path: what `checkpoint_of` has found.

        Raises:
            CheckpointError: it cannot be read, or the configuration changed in a way that it may not.
        """
        found: tuple[dict[str, Any], list[Change]] | None = None
        problem = None
        try:
            found = self._compared(path)
        except Exception as error:  # one rank alone may fail to read; the others must not wait for it
            problem = text_of(error)
        agree(problem, CheckpointError)
        assert found is not None
        client, changes = found
        self.engine.load_verified(path)
        return client, changes

    def _compared(self, path: Path) -> tuple[dict[str, Any], list[Change]]:
        """The loop's own state in a checkpoint, and what is configured otherwise since; changes nothing."""
        client = store.read_extra(path)["client"]
        step, world = (store.read_document(path)[key] for key in ("step", "world"))
        if "config" not in client:
            raise CheckpointError(
                f"{path}: saved by another loop than launch/train.py; set efftrain.run.output to a new folder"
            )
        old = json.loads(client["config"])
        changes = compare(old, self.config.resolved(), past=client.get("past"), schedule=self.schedule, step=step)
        check(changes, str(path))
        now = world_size()
        return client, [Change("ranks", world, now), *changes] if world != now else changes
