"""The journal: one JSON line for every decision and event of a run, appended and flushed at once."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """`value` as JSON types: tensors and arrays become numbers or lists, non-finite floats become strings."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return plain(value.item() if value.ndim == 0 else value.tolist())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan; "nan" keeps the line readable by every parser
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


class Journal:
    """Append-only ``journal.jsonl``.

    Args:
        path: the file; its folder is made. A new `Journal` on an existing file goes on below the old lines.
        enabled: False makes every call do nothing (ranks other than 0).
        clock: seconds since the epoch.
    """

    def __init__(self, path: str | Path, enabled: bool = True, clock: Callable[[], float] = time.time):
        self.path = Path(path)
        self._clock = clock
        self._file = None
        self._complained = False
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._end_torn_line()
            self._file = self.path.open("a", encoding="utf-8")

    def _end_torn_line(self) -> None:
        """A process killed while writing leaves half a line: close it, so that the next one stays whole."""
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return
        with self.path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def write(self, event: str, *, step: int | None = None, **data: Any) -> None:
        """Append one event with its time and optimizer step; reaches the operating system before the call returns."""
        if self._file is None:
            return
        line = {"time": round(self._clock(), 3), "step": plain(step), "event": event, **plain(data)}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end the run that could still be saved elsewhere, or later
            if not self._complained:
                logger.warning("%s: events are lost: %s", self.path, error)
            self._complained = True

    def resume(self, step: int, **data: Any) -> None:
        """Note that the run goes on from `step`; lines above with a larger step belong to work that was lost."""
        self.write("resume", step=step, **data)

    def close(self) -> None:
        """Close the file; further writes do nothing."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                logger.warning("%s: %s", self.path, error)
            self._file = None


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """Events of a journal in order; lines torn by a kill are left out."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event
