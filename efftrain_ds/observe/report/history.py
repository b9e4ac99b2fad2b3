"""The journal as sessions and as one history.

A *session* is what one start or resume did. A run that goes on from step s repeats what came after s; the *history*
keeps only the last account of every step. All times are seconds since the epoch, all steps optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
HEADS = ("start", "resume")
_MOST_STEPS = 1e15  # anything above is damage
_LAST_WORDS = {"end": "finished", "search_end": "finished", "preempted": "preempted, state saved"}


def number(value: Any) -> float | None:
    """A finite or non-finite number of a file ("nan" and "inf" are written as text); None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def finite(value: Any) -> float | None:
    """As `number`, but None also where it is not finite."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


@dataclass
class Session:
    """One start or resume and what followed it.

    Attributes:
        kind: "start" or "resume".
        step: steps done when it began.
        head: the event that opened it (empty where the journal's beginning is missing).
        events: all events after the head.
    """

    kind: str
    step: int
    head: Event
    events: list[Event] = field(default_factory=list)

    @property
    def began(self) -> float | None:
        """Time of the first event."""
        return _first_time([self.head, *self.events])

    @property
    def ended(self) -> float | None:
        """Time of the last event."""
        return _first_time([*reversed(self.events), self.head])

    @property
    def last_step(self) -> int:
        """Largest step that an event names."""
        return max([self.step, *(s for s in map(step_of, self.events) if s is not None)])

    @property
    def outcome(self) -> str:
        """How it ended, in words; "" where the journal does not say (killed, or still running)."""
        return next((_LAST_WORDS[n] for e in reversed(self.events) if (n := e.get("event")) in _LAST_WORDS), "")

    def names_at(self, step: int) -> set[Any]:
        """Names of the events at a step."""
        return {e.get("event") for e in self.events if step_of(e) == step}


def _first_time(events: Iterable[Event]) -> float | None:
    return next((t for e in events if (t := finite(e.get("time"))) is not None), None)


def step_of(event: Event) -> int | None:
    """The optimizer step of an event, or None."""
    found = finite(event.get("step"))
    return None if found is None or not 0 <= found < _MOST_STEPS else int(found)


def split_sessions(events: Iterable[Event]) -> list[Session]:
    """Events in the order of the journal, cut at every start and resume."""
    sessions: list[Session] = []
    for event in events:
        name = event.get("event")
        if name in HEADS:
            sessions.append(Session(str(name), step_of(event) or 0, event))
            continue
        if not sessions:
            sessions.append(Session("start", 0, {}))
        sessions[-1].events.append(event)
    return sessions


def lost(sessions: Sequence[Session], index: int, step: int | None, name: Any = None) -> bool:
    """Whether what session `index` did at `step` was done again, or given up, by a later session.

    What happened at the very step of a resume may stand before the checkpoint or after it: it counts as lost where
    the later session has an event of that name at that step too.
    """
    for later in sessions[index + 1 :]:
        if later.kind == "start":
            return True
        if step is None:
            continue
        if step > later.step or (step == later.step and name is not None and name in later.names_at(step)):
            return True
    return False


def history(sessions: Sequence[Session]) -> list[Event]:
    """The last account of every step, in order."""
    return [e for i, s in enumerate(sessions) for e in s.events if not lost(sessions, i, step_of(e), e.get("event"))]


def session_at(sessions: Sequence[Session], time: float) -> int:
    """Index of the session that was running at a time."""
    found = 0
    for index, session in enumerate(sessions):
        if session.began is not None and session.began <= time:
            found = index
    return found


def lost_steps(sessions: Sequence[Session], index: int) -> int:
    """Steps of session `index` that the next one had to repeat or gave up; at least, as far as events tell."""
    if index + 1 >= len(sessions):
        return 0
    after, now = sessions[index + 1], sessions[index]
    return max(0, now.last_step - (after.step if after.kind == "resume" else 0))
