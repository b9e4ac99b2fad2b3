"""Advisory locks on files: they end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05


class FileLock:
    """One held lock; released by `release` or with the process.

    Forked children inherit the descriptor. Unlocking takes the lock away from all of them, closing alone would not.
    """

    def __init__(self, descriptor: int):
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def try_lock(path: Path, *, shared: bool = False) -> FileLock | None:
    """Take a lock if it is free, else None. The file is made where it is missing and is never removed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return FileLock(descriptor)


@contextmanager
def exclusive(
    path: Path, stop: threading.Event, meanwhile: Callable[[], bool] = lambda: False
) -> Iterator[FileLock | None]:
    """Wait for a lock and hold it; yields None where it was given up.

    Args:
        path: lock file.
        stop: ends the wait when it is set.
        meanwhile: asked while waiting; True ends the wait.
    """
    lock = try_lock(path)
    while lock is None and not meanwhile() and not stop.wait(_POLL_S):
        lock = try_lock(path)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()
