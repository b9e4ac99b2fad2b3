"""Named points where a test makes a process fail.

``point("save.before_manifest")`` stands in the code where a crash would hurt. It does nothing unless the environment
variable `VARIABLE` (or `arm`) names the point::

    EFFTRAIN_FAULTS="save.before_manifest:kill,rank=1,hit=2; eval.batch:term"

Actions: ``kill``, ``term``, ``int`` and ``stop`` send that signal to the process itself, ``oserror`` raises OSError
as a full disk does, ``error`` raises RuntimeError, ``sleep=SECONDS`` waits. ``rank`` limits it to one rank, ``hit`` to
the n-th time the point is passed (1 = the first, the default), ``always`` to every time from then on.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

VARIABLE = "EFFTRAIN_FAULTS"

POINTS = (
    "save.begin",
    "save.rank_file",
    "save.before_sync",
    "save.before_manifest",
    "save.before_rename",
    "save.replacing",
    "save.before_latest",
    "save.end",
    "load.begin",
    "stage.enter",
    "step.begin",
    "step.before_update",
    "step.end",
    "rebuild.teardown",
    "rebuild.create",
    "rebuild.restore",
    "eval.batch",
    "mask.update",
    "search.measure",
    "reader.read",
)
"""Every point of the package, in no particular order; a test compares it with the sources."""

_SIGNALS = {"kill": "SIGKILL", "term": "SIGTERM", "int": "SIGINT", "stop": "SIGSTOP"}


@dataclass
class Fault:
    """One armed point.

    Attributes:
        name: of the point.
        action: see the module's text.
        rank: rank it is for; None = all.
        hit: number of passes until it acts.
        always: act on every later pass too.
        seconds: of a ``sleep``.
        passed: passes so far.
    """

    name: str
    action: str
    rank: int | None = None
    hit: int = 1
    always: bool = False
    seconds: float = 0.0
    passed: int = 0


def parse(text: str) -> list[Fault]:
    """Faults of a specification.

    Raises:
        ValueError: an unknown point, action or option.
    """
    found = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, _, rest = part.partition(":")
        first, *options = (word.strip() for word in rest.split(","))
        action, _, value = first.partition("=")
        fault = Fault(name.strip(), action)
        if fault.name not in POINTS:
            raise ValueError(f"{VARIABLE}: no point {fault.name!r}; allowed: {', '.join(POINTS)}")
        if action == "sleep":
            fault.seconds = float(value)
        elif action not in (*_SIGNALS, "oserror", "error"):
            allowed = ", ".join([*_SIGNALS, "oserror", "error", "sleep=S"])
            raise ValueError(f"{VARIABLE}: no action {action!r}; allowed: {allowed}")
        for option in options:
            key, _, value = option.partition("=")
            if key == "always":
                fault.always = True
            elif key in ("rank", "hit"):
                setattr(fault, key, int(value))
            else:
                raise ValueError(f"{VARIABLE}: no option {key!r}; allowed: rank, hit, always")
        found.append(fault)
    return found


_armed: list[Fault] = parse(os.environ.get(VARIABLE, ""))


def arm(text: str) -> None:
    """Replace the armed faults of this process; an empty text disarms.

    Raises:
        ValueError: as `parse`.
    """
    _armed[:] = parse(text)


def point(name: str) -> None:
    """A place where a test may make the process fail; returns at once otherwise.

    Raises:
        OSError: where the armed action says so.
        RuntimeError: the same.
    """
    if _armed:
        _pass(name)


def _pass(name: str) -> None:
    for fault in _armed:
        if fault.name != name or (fault.rank is not None and fault.rank != int(os.environ.get("RANK", "0"))):
            continue
        fault.passed += 1
        if fault.passed == fault.hit or (fault.always and fault.passed > fault.hit):
            _act(fault)


def _act(fault: Fault) -> None:
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), getattr(signal, _SIGNALS[fault.action]))
    elif fault.action == "oserror":
        raise OSError(errno.ENOSPC, f"No space left on device (fault point {fault.name})")
    elif fault.action == "error":
        raise RuntimeError(f"fault point {fault.name}")
    else:
        time.sleep(fault.seconds)
