"""Everything a report tells of one run, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ...core.redact import redacted
from ..journal import read_journal
from .history import Event, Session, finite, history, split_sessions, step_of
from .stages import StageRow, cost_points, stage_rows
from .traces import Trace, journal_traces, merged, tensorboard_traces

JOURNAL, PLAN, CONFIG = "journal.jsonl", "plan.json", "config.json"


@dataclass
class RunData:
    """A run folder.

    Attributes:
        folder: where it lies.
        name: shown in tables and legends.
        sessions: every start and resume, in order.
        events: the history: the last account of every step.
        plan: plan.json, {} where it is missing.
        config: config.json, {} where it is missing.
        traces: curves by name, see `traces.SOURCES`.
        notes: what could not be read, in words.
    """

    folder: Path
    name: str
    sessions: list[Session]
    events: list[Event]
    plan: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def named(self, *names: str) -> list[Event]:
        """Events of the history with one of these names."""
        return [e for e in self.events if e.get("event") in names]

    def all_named(self, *names: str) -> list[tuple[int, Event]]:
        """(number of the session, event) of all sessions, what was repeated later included."""
        return [(i, e) for i, s in enumerate(self.sessions) for e in s.events if e.get("event") in names]

    def section(self, name: str) -> dict[str, Any]:
        """A part of the configuration's "efftrain" section; {} where it is missing."""
        section = self.config.get("efftrain")
        found = section.get(name) if isinstance(section, dict) else None
        return found if isinstance(found, dict) else {}

    @cached_property
    def end(self) -> Event | None:
        """The event that closed the last session, or None: the run stopped or is still running."""
        closing = [e for e in self.sessions[-1].events if e.get("event") in ("end", "search_end")]
        return closing[-1] if closing else None

    @cached_property
    def steps_done(self) -> int:
        """Steps of the history, as far as events and curves tell."""
        steps = [s for s in map(step_of, self.events) if s is not None]
        steps += [int(t.steps[-1]) for t in self.traces.values() if len(t)]
        return max(steps, default=self.sessions[-1].step)

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the plan."""
        found = finite(self.plan.get("total_steps"))
        return None if found is None else int(found)

    @cached_property
    def evaluations(self) -> list[Event]:
        """Evaluations of the history in order of steps, the last of equal steps."""
        by_step = {step: e for e in self.named("eval") if (step := step_of(e)) is not None}
        return [by_step[s] for s in sorted(by_step)]

    def evaluated(self, name: str) -> Trace:
        """One result of the evaluations, e.g. "top1", as a curve."""
        found = [(step_of(e), finite(e.get(name))) for e in self.evaluations]
        return Trace([(s, v) for s, v in found if s is not None and v is not None])

    @cached_property
    def best(self) -> tuple[float, int, str] | None:
        """Best top-1 as (share, step, "top1" or "ema_top1"); None without an evaluation."""
        found = []
        for name in ("top1", "ema_top1"):
            trace = self.evaluated(name)
            if len(trace):
                at = int(np.argmax(trace.values))
                found.append((float(trace.values[at]), int(trace.steps[at]), name))
        return max(found, key=lambda f: f[0]) if found else None

    @cached_property
    def stages(self) -> list[StageRow]:
        """Plan against actual, stage by stage; [] without a plan."""
        return stage_rows(self.plan, self.events, self.traces.get("train_seconds"), self.steps_done)

    def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Training seconds when these steps were done; nan beyond what was timed, None where nothing was."""
        trace = self.traces.get("train_seconds")
        if trace is None or not len(trace):
            return None
        x, y = np.concatenate([[0.0], trace.steps]), np.concatenate([[0.0], trace.values])
        return np.interp(steps, x, y, right=np.nan)

    def cost_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Training MACs when these steps were done, by plan; None without a plan."""
        points = cost_points(self.plan)
        return None if points is None else np.interp(steps, *points)

    @cached_property
    def cost_done(self) -> float | None:
        """Training MACs of the steps done, by plan."""
        found = self.cost_at(np.array([self.steps_done]))
        return None if found is None else float(found[0])

    @cached_property
    def train_seconds(self) -> float | None:
        """Seconds of the optimizer steps of the history."""
        trace = self.traces.get("train_seconds")
        return trace.last if trace is not None else None

    @cached_property
    def wall_seconds(self) -> float:
        """Seconds from first to last sign of life, summed over all sessions, what was lost included."""
        spans = [(s.began, s.ended) for s in self.sessions]
        return sum(max(0.0, b - a) for a, b in spans if a is not None and b is not None)


def read_run(folder: str | Path, name: str | None = None) -> RunData:
    """Read a run folder; a run still in progress works too.

    Args:
        folder: output folder of a run (``efftrain.run.output``).
        name: to show; None takes the folder's.

    Raises:
        ConfigError: there is no journal with at least one event; the text names what was looked for.
    """
    folder = Path(folder)
    journal = folder / JOURNAL
    try:
        # a line without a name is no event
        lines = map(redacted, read_journal(journal)) if journal.is_file() else ()
        events = [line for line in lines if isinstance(line.get("event"), str)]
    except OSError as error:
        raise ConfigError(f"{journal} cannot be read: {error}") from error
    if not events:
        raise ConfigError(_not_a_run(folder))
    notes: list[str] = []
    plan, config = _json(folder / PLAN, notes), _json(folder / CONFIG, notes)
    sessions = split_sessions(events)
    kept = history(sessions)
    curves, problem = tensorboard_traces(folder / "tensorboard", sessions)
    if problem:
        notes.append(problem)
    traces = merged(journal_traces(kept), curves)
    if "loss" not in traces:
        notes.append("no curve of the loss: neither the journal nor TensorBoard files have it")
    return RunData(folder, name or folder.resolve().name, sessions, kept, plan, config, traces, notes)


def _not_a_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give the output folder of a run (efftrain.run.output)"
    wanted = ", ".join(f"{n} ({'found' if (folder / n).is_file() else 'missing'})" for n in (JOURNAL, PLAN, CONFIG))
    text = f"{folder} is not a run folder: looked for {wanted}; {JOURNAL} with at least one event is needed"
    below = sorted(p.parent for p in folder.glob(f"*/{JOURNAL}"))[:5]
    return text + (f". Runs below it: {', '.join(map(str, below))}" if below else "")


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read ({error})")
    else:
        if isinstance(found, dict):
            return redacted(found)
        notes.append(f"{path.name} does not hold an object")
    return {}
