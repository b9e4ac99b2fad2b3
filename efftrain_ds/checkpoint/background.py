"""Finishing a checkpoint beside the training, by a thread of each rank: from a copy in host memory, or only the sync.

No collective runs in these threads. Each rank leaves a receipt in the folder when its files are on disk (or a refusal
when they are not); rank 0 waits for all receipts and seals the checkpoint, so ``latest`` moves only after every rank
succeeded.

A process that ends while its thread writes ends after it: the thread is no daemon, so the interpreter waits for it. But
no process may wait for ever for ranks that are gone, so from the moment at which the process is about to end (the main
thread has, or `leave` was called) the other ranks' receipts are waited for only as long as the own part has taken, and
`_GRACE` seconds at least.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .folder import receipt_name

logger = logging.getLogger(__name__)

_POLL = 0.05
_GRACE = 5.0
"""Least time in seconds that a process which is about to end waits for the parts of other ranks."""


class BackgroundSave:
    """One checkpoint being written.

    Args:
        partial: temporary folder, already there.
        final: what it becomes.
        write: brings the files of this rank to disk and gives their manifest entries.
        rank: this rank.
        world: number of ranks.
        seal: called on rank 0 with the manifest entries of all ranks.
    """

    def __init__(
        self,
        partial: Path,
        final: Path,
        write: Callable[[], list[dict[str, Any]]],
        rank: int,
        world: int,
        seal: Callable[[list[dict[str, Any]]], None],
    ):
        self.partial, self.final = partial, final
        self.rank, self.world = rank, world
        self.error: str | None = None
        self.seconds: float | None = None
        self._write: Callable[[], list[dict[str, Any]]] | None = write
        self._seal = seal
        self._stop, self._written, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._took = 0.0
        self._thread = threading.Thread(target=self._run, name=f"save {final.name}", daemon=False)
        self._thread.start()

    @property
    def running(self) -> bool:
        """True until this rank's part is done (on rank 0: until the checkpoint is sealed)."""
        return self._thread.is_alive()

    def wait_written(self) -> str | None:
        """Wait until the files of this rank are on disk; returns what went wrong with them, or None."""
        self._written.wait()
        return self.error

    def wait(self) -> str | None:
        """Wait for the end; returns what went wrong on this rank, or None."""
        self._thread.join()
        return self.error

    def abandon(self) -> None:
        """Stop waiting for other ranks (they are gone) and give the checkpoint up."""
        self._stop.set()
        self._thread.join()

    def leave(self) -> str | None:
        """Before a process ends by an error: see the checkpoint through if that can be done in a bounded time.

        No collective, as the other ranks may be gone. Rank 0 waits for their parts and seals; the others wait until it
        has, since a launcher ends all ranks once the first one has failed.

        Returns:
            What went wrong on this rank, or None; other ranks than 0 do not know how it ended there.
        """
        self._leaving.set()
        self._thread.join()
        patience = _Patience(self._took)
        while self.rank and self.error is None and self.partial.exists() and not patience.ended():
            time.sleep(_POLL)
        return self.error

    def _run(self) -> None:
        start = time.monotonic()
        try:
            assert self._write is not None
            entries = self._write()
            self._took = time.monotonic() - start
            self._leave({"entries": entries})
            self._written.set()
            if self.rank == 0:
                self._seal(self._collect())
        except Exception as error:  # reported by `wait`, and at once in the log
            self.error = f"{type(error).__name__}: {error}"
            logger.warning("rank %d: %s could not be written: %s", self.rank, self.final, self.error)
            self._refuse()
        finally:
            self._written.set()
            self._write = None  # and the memory it holds
            self.seconds = time.monotonic() - start

    def _refuse(self) -> None:
        try:
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            else:
                self._leave({"error": self.error})
        except OSError as error:  # a full disk has no room for the refusal either; an empty file says as much
            logger.warning("rank %d: %s", self.rank, error)

    def _leave(self, document: dict[str, Any]) -> None:
        path = self.partial / receipt_name(self.rank)
        try:
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(document))
            os.replace(aside, path)
        except OSError:
            path.touch()
            raise

    def _collect(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        patience: _Patience | None = None
        for rank in range(self.world):
            path = self.partial / receipt_name(rank)
            while not path.exists():
                if patience is None and (self._leaving.is_set() or not threading.main_thread().is_alive()):
                    patience = _Patience(self._took)
                if self._stop.wait(_POLL) or (patience is not None and patience.ended()):
                    raise RuntimeError(f"given up before rank {rank} had written its part")
            text = path.read_text()
            found = json.loads(text) if text else {"error": "no space left"}
            if "error" in found:
                raise RuntimeError(f"rank {rank}: {found['error']}")
            entries += found["entries"]
        for rank in range(self.world):
            (self.partial / receipt_name(rank)).unlink()
        return entries


class _Patience:
    """How long a process that is about to end waits for other ranks.

    Args:
        took: seconds that this rank's own part has taken; the others have as much to write.
    """

    def __init__(self, took: float):
        self._until = time.monotonic() + max(_GRACE, took)

    def ended(self) -> bool:
        """True once it has been long enough."""
        return time.monotonic() > self._until
