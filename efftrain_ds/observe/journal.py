"""The journal: one JSON line for every decision and event of a run, appended and flushed at once."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.best_effort import BestEffort
from ..core.redact import redacted

KEPT = 1000
"""Events that wait in memory for a disk that is full."""


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
    """Append-only ``journal.jsonl``, without the secrets of URLs and commands.

    Where the disk is full, or the folder cannot be written any more, the last `KEPT` events are kept in memory and
    written as soon as that is possible again.

    Args:
        path: the file; its folder is made. A new `Journal` on an existing file goes on below the old lines.
        enabled: False makes every call do nothing (ranks other than 0).
        clock: seconds since the epoch.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path, enabled: bool = True, clock: Callable[[], float] = time.time):
        self.path = Path(path)
        self._clock = clock
        self._enabled = enabled
        self._file: FileIO | None = None
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._effort = BestEffort("events")
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> FileIO:
        if self._file is None:
            _end_torn_line(self.path)
            self._file = FileIO(self.path, "a")
        return self._file

    def write(self, event: str, *, step: int | None = None, **data: Any) -> None:
        """Append one event with its time and optimizer step; reaches the operating system before the call returns."""
        if not self._enabled:
            return
        line = {"time": round(self._clock(), 3), "step": plain(step), "event": event, **redacted(plain(data))}
        self._waiting.append((json.dumps(line) + "\n").encode())
        self._put()

    def _put(self) -> None:
        """Write what waits, whole lines only."""
        try:
            file = self._open()
            while self._waiting:
                _append(file, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:  # must not end the run that could still be saved elsewhere, or later
            self._effort.failure(self.path, error)
            self._shut()  # and opened anew: a network's handle may be stale, a disk mounted again
            while len(self._waiting) > KEPT:
                self._waiting.popleft()
                self._lost += 1
        else:
            self._effort.success(self.path, self._lost)
            self._lost = 0

    def resume(self, step: int, **data: Any) -> None:
        """Note that the run goes on from `step`; lines above with a larger step belong to work that was lost."""
        self.write("resume", step=step, **data)

    def _shut(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file; further writes do nothing."""
        if self._enabled and self._waiting:
            self._put()
        self._enabled = False
        self._shut()


def _append(file: FileIO, line: bytes) -> None:
    """Write a whole line at the end, or nothing."""
    start = file.seek(0, SEEK_END)
    done = 0
    try:
        while done < len(line):
            done += file.write(line[done:]) or 0
    except OSError:
        if done:
            with suppress(OSError):
                file.truncate(start)
        raise


def _end_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line: close it, so that the next one stays whole."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


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
