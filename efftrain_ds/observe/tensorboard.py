"""TensorBoard files of a run, written by rank 0."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..core.best_effort import BestEffort
from ..core.redact import redacted

WAITING = 2000
"""Events that may wait for the disk."""
PATIENCE_S = 1.0
"""Wait where so many do already, once; then events are left out until half of them are written."""
RETRY_S = 60.0
"""Pause after a failure, before a new file is begun."""
CLOSE_S = 20.0
"""Longest wait for the disk at the end of a run."""
_PREFIX = "events.out.tfevents."


class TensorBoard:
    """Event files with the summaries of ``torch.utils.tensorboard``; does nothing where off or the rank is not 0.

    A thread writes. Where the disk is full or the folder cannot be written, curves are left out with one warning, and a
    new file is begun as soon as that is possible, tried every `RETRY_S`; where the disk is too slow, what exceeds
    `WAITING` events is left out. ``SummaryWriter`` would pass a failure on to the training loop, and stop it where its
    queue is full.

    Args:
        folder: where the event files go.
        enabled: False switches it off.
        rank: data-parallel rank.
        purge_step: first step of this process after a resume; what an earlier process wrote from there on is hidden.
    """

    def __init__(self, folder: str | Path, enabled: bool = True, rank: int = 0, purge_step: int | None = None):
        self.folder = Path(folder)
        self._summary: Any = None
        if enabled and rank == 0:
            from torch.utils.tensorboard import summary  # imports slowly, and not needed when off

            self._summary = summary
            self._events: queue.Queue[Any] = queue.Queue(WAITING)
            self._files = _Files(self.folder, purge_step)
            self._slow = BestEffort("values")
            self._thread = threading.Thread(target=self._files.run, args=(self._events,), name="board", daemon=True)
            self._thread.start()

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._summary is not None

    @property
    def command(self) -> str:
        """Command line that shows these files."""
        return f"tensorboard --logdir {self.folder}"

    def _put(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(summary=summary, step=int(step), wall_time=time.time())
        try:
            self._events.put(event.SerializeToString(), timeout=0.0 if self._slow.failed else PATIENCE_S)
        except queue.Full:
            self._slow.failure(self.folder, TimeoutError(f"the disk is too slow, {WAITING:,} wait for it"))
        else:
            if self._slow.failed and self._events.qsize() < WAITING // 2:
                self._slow.success(self.folder)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag, e.g. ``{"loss/train": 4.8, "speed/img_s": 2914}``."""
        if self._summary is not None:
            for tag, value in values.items():
                self._put(self._summary.scalar(tag, float(value)), step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        if self._summary is not None:
            self._put(self._summary.image(tag, picture, dataformats="HWC"), step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure."""
        if self._summary is not None:
            from PIL import Image

            with BytesIO() as file:
                figure.savefig(file, format="png")
                self.image(tag, np.asarray(Image.open(file).convert("RGB")), step)

    def text(self, tag: str, text: str, step: int = 0, *, fixed: bool = True) -> None:
        """Write text, without the secrets of URLs and commands; `fixed` keeps its line breaks and columns."""
        if self._summary is not None:
            text = redacted(text)
            body = "\n".join("    " + line for line in text.splitlines()) if fixed else text
            self._put(self._summary.text(tag, body), step)

    def flush(self) -> None:
        """Wait until everything is written, or given up, for at most `CLOSE_S`."""
        if self._summary is not None:
            done = threading.Event()
            with suppress(queue.Full):
                self._events.put(done, timeout=CLOSE_S)
                done.wait(CLOSE_S)

    def close(self) -> None:
        """Flush and close; further writes do nothing."""
        if self._summary is not None:
            self._summary = None
            until = time.monotonic() + CLOSE_S
            with suppress(queue.Full):
                self._events.put(None, timeout=CLOSE_S)
                self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():  # it ends with the process
                self._files.effort.failure(self.folder, TimeoutError(f"not done after {CLOSE_S:g} s"))


class _Files:
    """The event files of one process, one after another where writing fails in between."""

    def __init__(self, folder: Path, purge_step: int | None):
        self.folder, self.effort = folder, BestEffort("TensorBoard files")
        self._purge_step = purge_step
        self._file: FileIO | None = None
        self._records: Any = None
        self._again = 0.0
        self._lost = 0

    def run(self, events: queue.Queue[Any]) -> None:
        """Write what comes: an event as bytes, something to `set` as a mark, or None as the end."""
        while True:
            event = events.get()
            if isinstance(event, threading.Event):
                event.set()
            elif event is not None:
                self._write(event)
            else:
                return self._shut()

    def _write(self, event: bytes) -> None:
        if self._file is None and time.monotonic() < self._again:
            self._lost += 1
            return
        try:
            self._open()
            self._records.write(event)
        except Exception as error:  # a thread that ended would fill the queue
            self.effort.failure(self.folder, error)
            self._lost += 1
            self._again = time.monotonic() + RETRY_S
            self._shut()  # the end of that file is torn: what came after it could not be read
        else:
            self.effort.success(self.folder, self._lost)
            self._lost = 0

    def _open(self) -> None:
        """Begin a file; its first event says of what form it is, the second what earlier files had too much."""
        if self._file is not None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        path, now = self._path(), time.time()
        first = [Event(wall_time=now, file_version="brain.Event:2")]
        if self._purge_step is not None:
            first.append(Event(wall_time=now, step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._file = FileIO(path, "x")
        self._records = RecordWriter(_Whole(self._file))
        try:
            for event in first:
                self._records.write(event.SerializeToString())
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise
        self._purge_step = None

    def _path(self) -> Path:
        """A name behind all that are there: TensorBoard reads them in this order, however the clock was set."""
        stamps = [path.name.removeprefix(_PREFIX).partition(".")[0] for path in self.folder.glob(f"{_PREFIX}*")]
        last = max((int(stamp) for stamp in stamps if stamp.isdigit()), default=-1)
        return self.folder / f"{_PREFIX}{max(int(time.time()), last + 1):010d}.{socket.gethostname()}.{os.getpid()}"

    def _shut(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


class _Whole:
    """A file that writes all bytes or raises; `FileIO` may write some of them."""

    def __init__(self, file: FileIO):
        self._file = file

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]
