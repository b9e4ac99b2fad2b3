"""Weights & Biases, where the configuration asks for it; written by rank 0 beside TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigError
from ..core.redact import redacted

logger = logging.getLogger(__name__)
KEY = "efftrain.observe.wandb"
ID_FILE = "wandb.json"
"""File in the run folder that keeps the run's id, so that a resume goes on with the same W&B run."""


class WandB:
    """The interface of `tensorboard.TensorBoard`, written to Weights & Biases.

    The optimizer step is a value of its own ("step") and the horizontal axis of everything else, because steps repeat
    after a resume and W&B's own step may only rise. A failure while writing is logged once and ends the writing; the
    run goes on.

    Args:
        folder: of the run; W&B's files go below it.
        project: of W&B.
        entity: user or team; None takes the account's default.
        mode: "online", "offline" (no network; send later with ``wandb sync``) or "disabled".
        name: of the run; None takes the folder's.
        config: resolved configuration.
        rank: data-parallel rank; ranks other than 0 write nothing.
        resumed: go on with the run of an earlier process.

    Raises:
        ConfigError: the package is not installed (on every rank), or the run cannot be opened.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str,
        entity: str | None = None,
        mode: str = "online",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        rank: int = 0,
        resumed: bool = False,
    ):
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f'{KEY}: the package "wandb" is not installed; pip install "efftrain-ds[wandb]", or set it to null'
            )
        self.folder = Path(folder)
        self._run: Any = None
        self._online = mode == "online"
        if rank != 0:
            return
        import wandb

        self._wandb: Any = wandb
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                mode=mode,
                dir=str(self.folder),
                id=self._id(resumed),
                resume="allow",
                name=name or self.folder.resolve().name,
                config=redacted(dict(config or {})),
                settings={"console": "off", "quiet": True},  # the terminal belongs to the run lines
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # its own error types, of login, network or project
            raise ConfigError(
                f'{KEY}: cannot open a run of project "{project}" ({type(error).__name__}: {error}); "mode": "offline" '
                "needs neither network nor login"
            ) from error

    def _id(self, resumed: bool) -> str:
        path = self.folder / ID_FILE
        if resumed and path.is_file():
            try:
                return str(json.loads(path.read_text())["id"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s cannot be read: W&B gets a new run", path)
        found = uuid.uuid4().hex[:12]
        path.write_text(json.dumps({"id": found}) + "\n")
        return found

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._run is not None

    @property
    def command(self) -> str:
        """Address of the run, or the command line that sends what was written without network."""
        url = self._run.url if self._run is not None and self._online else None
        return str(url) if url else f"wandb sync {self.folder / 'wandb' / 'offline-run-*'}"

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **values})
        except Exception as error:  # nothing that W&B does may stop a run
            logger.warning("W&B writes no more: %s: %s", type(error).__name__, error)
            self._run = None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag, e.g. ``{"loss/train": 4.8, "speed/img_s": 2914}``."""
        self._log({tag: float(value) for tag, value in values.items()}, step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        if self._run is not None:
            self._log({tag: self._wandb.Image(picture)}, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure."""
        if self._run is not None:
            self._log({tag: self._wandb.Image(figure)}, step)

    def text(self, tag: str, text: str, step: int = 0, *, fixed: bool = True) -> None:
        """Write text, without the secrets of URLs and commands; `fixed` keeps its line breaks and columns."""
        if self._run is not None:
            from html import escape

            text = redacted(text)
            body = f"<pre>{escape(text)}</pre>" if fixed else escape(text)
            self._log({tag: self._wandb.Html(body)}, step)

    def flush(self) -> None:
        """Nothing to do: W&B's own process writes as values come."""

    def close(self) -> None:
        """Finish the run; further writes do nothing."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                logger.warning("W&B could not be closed: %s: %s", type(error).__name__, error)
            self._run = None


class Boards:
    """Several writers behind the interface of one.

    Args:
        boards: writers in order; the first one's `command` is shown.
    """

    def __init__(self, boards: Sequence[Any]):
        self.boards = tuple(boards)

    @property
    def enabled(self) -> bool:
        """Whether any of them writes."""
        return any(board.enabled for board in self.boards)

    @property
    def command(self) -> str:
        """How to look at the first one that writes."""
        return next((board.command for board in self.boards if board.enabled), "")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag to all of them."""
        for board in self.boards:
            board.scalars(values, step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [H, W, 3], to all of them."""
        for board in self.boards:
            board.image(tag, picture, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure to all of them."""
        for board in self.boards:
            board.figure(tag, figure, step)

    def text(self, tag: str, text: str, step: int = 0, *, fixed: bool = True) -> None:
        """Write text to all of them."""
        for board in self.boards:
            board.text(tag, text, step, fixed=fixed)

    def flush(self) -> None:
        """Put everything on disk."""
        for board in self.boards:
            board.flush()

    def close(self) -> None:
        """Flush and close all of them."""
        for board in self.boards:
            board.close()
