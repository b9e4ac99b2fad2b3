"""SIGTERM and SIGINT: the first one asks for an orderly end, another one some seconds later ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE_S = 3.0
"""Seconds after the first signal in which further ones are taken for the same request."""


class StopSignals:
    """Handlers for the time of a run; use as a context.

    A launcher signals its ranks one after another, a terminal or a scheduler all at once, a person perhaps a single
    one. So a signal is only a request here; the ranks agree on it in their next exchange.

    Args:
        ask: called in the handler at the first signal; must only set a flag.
        note: what to print then, given the signal's name.
    """

    def __init__(self, ask: Callable[[], None], note: Callable[[str], str]):
        self._ask, self._note = ask, note
        self._before: dict[int, Any] = {}
        self._first = 0.0
        self.count = 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python installs no handlers
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def ignore(self) -> None:
        """From now on signals do nothing: everything is saved, and a launcher may still send them to stragglers."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        name, now = signal.Signals(number).name, time.monotonic()
        if self.count == 1:
            self._first = now
        elif now - self._first < PATIENCE_S:  # the launcher passes on what the whole group has got already
            return
        else:
            os.write(sys.stderr.fileno(), f"{name} again: ending at once\n".encode())
            os._exit(128 + number)
        self._ask()
        os.write(sys.stderr.fileno(), (self._note(name) + "\n").encode())
