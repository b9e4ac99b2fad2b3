"""Writing what a run can do without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


class BestEffort:
    """Guards the writing of one kind of file that a run can do without: pictures, the plan, a ledger.

    A full disk, or a folder that cannot be written any more, costs such a file and nothing else: one rank alone must
    not leave a run over it, and there may be room again for the next checkpoint. The first failure in a row is one
    warning that names the file, and so is the first success after it.

    Args:
        what: plural of what is written, for the warnings.
    """

    def __init__(self, what: str):
        self.what = what
        self.failed = 0

    @contextmanager
    def __call__(self, path: str | Path) -> Iterator[None]:
        """Write `path` inside; an OSError ends the block and goes no further."""
        try:
            yield
        except OSError as error:
            self.failure(path, error)
        else:
            self.success(path)

    def failure(self, path: str | Path, error: Exception) -> None:
        """Count a failure; the first one in a row is told."""
        if not self.failed:
            logger.warning("%s: %s cannot be written, the run goes on without: %s", path, self.what, error)
        self.failed += 1

    def success(self, path: str | Path, lost: int | None = None) -> None:
        """It was written; the first time after failures is told, with how many were lost (None: those failures)."""
        if self.failed:
            lost = self.failed if lost is None else lost
            logger.warning("%s: %s can be written again%s", path, self.what, f"; lost: {lost:,}" if lost else "")
        self.failed = 0
