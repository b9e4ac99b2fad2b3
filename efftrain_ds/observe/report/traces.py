"""Curves over steps: from the journal where it has the values, else from the TensorBoard files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .history import Event, Session, lost, number, session_at, step_of

LOG = "log"
"""Event of the journal with the numbers of one run line."""

SOURCES: dict[str, tuple[str, float]] = {
    "loss": ("loss/train", 1.0),
    "lr": ("optim/lr", 1.0),
    "grad_norm": ("optim/grad_norm", 1.0),
    "images_per_s": ("speed/img_s", 1.0),
    "data_share": ("speed/data_pct", 0.01),
    "memory": ("speed/memory_gb", 2.0**30),
    "mfu": ("speed/mfu", 1.0),
    "train_seconds": ("cost/seconds_train", 1.0),
    "cost_done": ("cost/done", 1.0),
    "skipped_steps": ("health/skipped_steps", 1.0),
    "bad_samples": ("health/bad_samples", 1.0),
}
"""Name of a curve (also the field of a "log" event) -> TensorBoard tag and factor to the curve's unit."""


class Trace:
    """A curve: optimizer steps and values, steps rising.

    Args:
        points: (step, value); of equal steps the last one counts.
    """

    def __init__(self, points: Sequence[tuple[int, float]] = ()):
        unique = dict(points)
        order = sorted(unique)
        self.steps = np.array(order, dtype=np.float64)
        self.values = np.array([unique[s] for s in order], dtype=np.float64)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        """Last finite value."""
        values = self.values[np.isfinite(self.values)]
        return float(values[-1]) if len(values) else None

    def median(self) -> float | None:
        """Median of the finite values."""
        values = self.values[np.isfinite(self.values)]
        return float(np.median(values)) if len(values) else None

    def thinned(self, most: int = 600) -> Trace:
        """Means of neighbouring points, at most `most` of them."""
        if len(self) <= most:
            return self
        parts = np.array_split(np.arange(len(self)), most)
        thin = Trace()
        thin.steps = np.array([self.steps[p].mean() for p in parts])
        thin.values = np.array([self.values[p].mean() for p in parts])
        return thin


def journal_traces(events: Sequence[Event]) -> dict[str, Trace]:
    """Curves of the history: fields of the "log" events, and the training seconds of every event that has them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        step = step_of(event)
        if step is None:
            continue
        names = SOURCES if event.get("event") == LOG else ("train_seconds",)
        for name in names:
            value = number(event.get(name))
            if value is not None:
                points.setdefault(name, []).append((step, value))
        if event.get("event") == "end" and (seconds := number(event.get("seconds"))) is not None:
            points.setdefault("train_seconds", []).append((step, seconds))
    return {name: Trace(found) for name, found in points.items()}


def tensorboard_traces(folder: Path, sessions: Sequence[Session]) -> tuple[dict[str, Trace], str]:
    """Curves of the event files, without what a later session did again.

    Returns:
        The curves, and what is wrong with the files in words ("" where nothing is).
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}, ""
    try:
        from tensorboard.backend.event_processing import event_accumulator as ea

        sizes = {ea.SCALARS: 0, ea.IMAGES: 1, ea.TENSORS: 1, ea.HISTOGRAMS: 1, ea.COMPRESSED_HISTOGRAMS: 1, ea.AUDIO: 1}
        # what was repeated is told apart below, by the time of writing: the journal knows it for every session
        events = ea.EventAccumulator(str(folder), size_guidance=sizes, purge_orphaned_data=False).Reload()
        tags = set(events.Tags()["scalars"])
        found: dict[str, Trace] = {}
        for name, (tag, factor) in SOURCES.items():
            if tag in tags:
                kept = [
                    (int(e.step), float(e.value) * factor)
                    for e in events.Scalars(tag)
                    if not lost(sessions, session_at(sessions, e.wall_time), int(e.step))
                ]
                found[name] = Trace(kept)
    except Exception as error:  # any damage of files that are not ours to judge: the report goes on without them
        return {}, f"the TensorBoard files could not be read ({type(error).__name__}: {error})"
    return {name: trace for name, trace in found.items() if len(trace)}, ""


def merged(first: dict[str, Trace], second: dict[str, Trace]) -> dict[str, Trace]:
    """Both sets of curves; at equal steps the first counts."""
    together: dict[str, Trace] = {}
    for name in {**second, **first}:
        points: list[tuple[int, float]] = []
        for traces in (second, first):
            if name in traces:
                points += list(zip(traces[name].steps.astype(int).tolist(), traces[name].values.tolist(), strict=True))
        together[name] = Trace(points)
    return together
