"""Sections on what was decided and on what went wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ...core.text import bytes_text, duration_text
from . import html
from .history import Session, lost, lost_steps, step_of
from .run import RunData
from .words import FAULTS, Words, decisions, faults, value_text

STALE_SECONDS = 900.0
"""A run in progress that gave no sign of life for so long is called silent."""


def clock(seconds: float | None) -> str:
    """A point in time as UTC."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _words_table(rows: Sequence[Words], what: str) -> str:
    head = ["step", what, "what happened"]
    cells, classes = [], []
    for w in rows:
        inner = html.esc(w.text) + (" <i>(before a restart that repeats this step)</i>" if w.lost else "")
        if w.table:
            marks = ["mark" if i == w.marked else "" for i in range(len(w.table) - 1)]
            inner += html.table(w.table[0], w.table[1:], small=True, classes=marks)
        inner += html.folded("details", w.detail)
        step = f"{w.step:,}" if w.step is not None else "-"
        cells.append(
            f'<td>{step}</td><td class="l k">{html.esc(w.kind)}</td><td class="l w">{inner}</td></tr>',
        )
        classes.append(' class="lost"' if w.lost else "")
    body = "\n".join(f"<tr{name}>{text}" for name, text in zip(classes, cells, strict=True))
    line = f'<tr><th>{head[0]}</th><th class="l">{head[1]}</th><th class="l">{head[2]}</th></tr>'
    return f'<div class="wide"><table><thead>{line}</thead><tbody>\n{body}\n</tbody></table></div>'


def decisions_table(run: RunData) -> str:
    """Stages, growth, searches, rebuilds in words."""
    rows = decisions(run.events, len(run.stages))
    return _words_table(rows, "decision") if rows else ""


def restarts(run: RunData, now: float) -> str:
    """Sessions, then faults, bad samples and skipped steps."""
    head = ["session", "began (UTC)", "from step", "checkpoint", "ranks", "last step", "wall time", "how it ended"]
    head.append("steps lost")
    rows = []
    for i, s in enumerate(run.sessions):
        last = i == len(run.sessions) - 1
        wall = s.ended - s.began if s.ended is not None and s.began is not None else None
        rows.append(
            [
                f"{i + 1} {s.kind}",
                clock(s.began),
                f"{s.step:,}",
                str(s.head.get("checkpoint") or "-"),
                value_text(s.head.get("world")),
                f"{max(s.last_step, run.steps_done if last else 0):,}",
                duration_text(wall) if wall is not None else "-",
                s.outcome or (_open_end(s, now) if last else "no word: killed or crashed"),
                "-" if last else f"{lost_steps(run.sessions, i):,}",
            ]
        )
    parts = [html.table(head, rows, left=(0, 1, 3, 7))]
    events = [(e, lost(run.sessions, i, step_of(e), e.get("event"))) for i, e in run.all_named(*FAULTS)]
    trouble = faults(events)
    counts = _changes(run) + _counts(run)
    quiet = not trouble and not counts and len(run.sessions) == 1
    parts += [_words_table(trouble, "fault")] if trouble else []
    parts += [html.paragraph(text) for text in counts]
    parts += [html.folded("unreadable samples", _quarantine(run.folder))]
    left = _left_behind(run.folder)
    parts += [html.folded(f"{name}, written {clock(moment)} UTC", text) for name, moment, text in left]
    if quiet and not left:
        parts.append(html.paragraph("No restart, no fault, no skipped step, no unreadable sample.", "soft"))
    return "".join(parts)


def _left_behind(folder: Path, most: int = 8000) -> list[tuple[str, float, str]]:
    """(name, time, text) of what a fault left in the folder: stacks, crash reports, replay files."""
    found = []
    for pattern in ("watch/stall.json", "watch/stall.rank*.txt", "stall.rank*.txt", "crash.rank*.txt", "faults/*"):
        for path in sorted(folder.glob(pattern)):
            if path.is_symlink():  # a page that is handed on must not carry files from elsewhere
                continue
            try:
                size, moment = path.stat().st_size, path.stat().st_mtime
                text = f"{bytes_text(size)}, {path}"
                if path.suffix in (".txt", ".json"):
                    text = path.read_text(encoding="utf-8", errors="replace")[:most]
            except OSError as error:
                text, moment = str(error), 0.0
            found.append((path.relative_to(folder).as_posix(), moment, text))
    return found


def _open_end(session: Session, now: float) -> str:
    silent = session.ended is None or now - session.ended > STALE_SECONDS
    return "no word: killed, or stopped" if silent else "still running"


def _changes(run: RunData) -> list[str]:
    """Sentences on what a resume found changed in the configuration."""
    found = []
    for i, session in enumerate(run.sessions):
        changes = session.head.get("changes")
        if isinstance(changes, list) and changes:
            found.append(f"Session {i + 1} went on with a changed configuration: " + "; ".join(map(str, changes)) + ".")
    return found


def _counts(run: RunData) -> list[str]:
    """Sentences on skipped steps and unreadable samples."""
    found = []
    skipped = run.traces.get("skipped_steps")
    if skipped is not None and skipped.last:
        found.append(f"{skipped.last:,.0f} optimizer steps were skipped.")
    bad = run.end.get("bad_samples") if run.end else None
    if isinstance(bad, dict) and bad:
        found.append("Unreadable samples on rank 0, by reason: " + value_text(bad) + ".")
    elif (trace := run.traces.get("bad_samples")) is not None and trace.last:
        found.append(f"{trace.last:,.0f} unreadable samples on rank 0.")
    return found


def _quarantine(folder: Path, most: int = 50) -> str:
    """First lines of the ledgers of unreadable samples."""
    lines: list[str] = []
    for path in sorted(folder.glob("quarantine.rank*.jsonl")):
        try:
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            lines.append(f"{path.name}: {error}")
    more = f"\n... {len(lines) - most} more" if len(lines) > most else ""
    return "\n".join(lines[:most]) + more
