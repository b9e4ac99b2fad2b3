"""Bad training samples: written to a ledger, counted by reason, and fatal above an allowed share."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.best_effort import BestEffort
from ..core.errors import ShardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """One sample that was replaced by a zero image.

    Attributes:
        reason: ``"read"``, ``"decode"``, ``"label"`` or ``"size"``.
        shard: name of the shard file.
        row: row of the index.
        offset: first byte of the payload in the shard.
        position: place in the endless training order.
        digest: first 16 hex digits of the payload's SHA-256, empty when it could not be read.
        error: text of the exception.
    """

    reason: str
    shard: str
    row: int
    offset: int
    position: int
    digest: str
    error: str


class Quarantine:
    """Ledger and counters of one rank. A ledger that cannot be written costs its lines, not the run.

    A run may go on while ``bad <= max(1, max_fraction * max(seen, expected))``: an epoch's allowance is granted from
    the start, so that two neighbouring bad samples do not stop a long run in its first step, and one bad sample is
    tolerated however small the data set. With ``max_fraction=0`` the first bad sample stops the run.

    Args:
        path: JSON-lines file to append to, or None.
        max_fraction: tolerated share of bad samples.
        expected: samples this rank sees in one epoch.
    """

    def __init__(self, path: Path | None, max_fraction: float, expected: int):
        self.path = path
        self.max_fraction = max_fraction
        self.expected = expected
        self.counts: Counter[str] = Counter()
        self.seen = 0
        self._effort = BestEffort("bad samples")
        self._torn = False

    def update(self, seen: int, bad: list[BadSample], rank: int) -> None:
        """Account for one micro-batch of `seen` samples, of which `bad` were replaced.

        Raises:
            ShardError: more bad samples than allowed; the text counts them by reason and shows the latest.
        """
        self.seen += seen
        if not bad:
            return
        self.counts.update(sample.reason for sample in bad)
        for sample in bad:
            logger.warning("bad sample: %s row %d (%s): %s", sample.shard, sample.row, sample.reason, sample.error)
        if self.path is not None:
            with self._effort(self.path):
                self._note(self.path, bad, rank)
        total = sum(self.counts.values())
        allowed = max(1.0, self.max_fraction * max(self.seen, self.expected)) if self.max_fraction > 0 else 0.0
        if total > allowed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
            last = bad[-1]
            raise ShardError(
                f"{total} bad samples of {self.seen} read by rank {rank} ({reasons}); data.max_bad_fraction "
                f"{self.max_fraction:g} allows {int(allowed)}. Latest: {last.shard} row {last.row}, offset "
                f"{last.offset}: {last.error}. Ledger: {self.path if self.path is not None else 'none'}"
            )

    def _note(self, path: Path, bad: list[BadSample], rank: int) -> None:
        lines = "\n" * self._torn + "".join(json.dumps({**asdict(sample), "rank": rank}) + "\n" for sample in bad)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending, so that the lines of several ranks do not mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            written = os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)
        self._torn = written < len(lines.encode())
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
