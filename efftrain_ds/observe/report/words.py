"""Decisions and faults of a journal in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...core.text import duration_text, number_text
from .history import Event, finite, step_of

QUIET = {"log", "eval", "checkpoint", "end", "start", "resume"}
"""Events that other parts of the report show."""

FAULTS = {
    "nonfinite": "non-finite loss or gradient",
    "stall": "stall",
    "checkpoint_failed": "checkpoint not written",
    "checkpoint_refused": "checkpoint refused",
    "checkpoint_fallback": "older checkpoint used",
    "preempted": "stopped by a signal",
    "disagreement": "ranks disagreed",
    "bad_samples": "unreadable samples",
    "config_changed": "configuration changed on resume",
    "crash": "crash",
    "diverged": "diverged",
}
"""Events that tell of trouble, with what they are called."""

_COMMON = {"time", "step", "event", "train_seconds"}


@dataclass(frozen=True)
class Words:
    """One decision or fault.

    Attributes:
        step: optimizer step, or None.
        kind: a word for the first column.
        text: one or two sentences.
        table: rows of cells, the first one the heading; [] for none.
        marked: row of `table` that was chosen, or None.
        detail: long text to be folded away, "" for none.
        lost: what followed was done again by a later session.
    """

    step: int | None
    kind: str
    text: str
    table: list[list[str]] = field(default_factory=list)
    marked: int | None = None
    detail: str = ""
    lost: bool = False


def value_text(value: Any, most: int = 240) -> str:
    """A value of a journal in a few words, at most `most` characters."""
    if isinstance(value, dict):
        text = ", ".join(f"{key} {value_text(v)}" for key, v in value.items())
    elif isinstance(value, list):
        text = ", ".join(value_text(v) for v in value)
    elif value is None or isinstance(value, bool):
        text = {None: "-", True: "yes", False: "no"}[value]
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def generic(event: Event, kind: str | None = None, lost: bool = False) -> Words:
    """Any event: its fields in their own words; everything in the detail where the line is not all of it."""
    rest = {key: value for key, value in event.items() if key not in _COMMON}
    text = "; ".join(f"{key.replace('_', ' ')}: {value_text(value)}" for key, value in rest.items())
    short = all(not isinstance(v, (dict, list)) and len(str(v)) < 200 for v in rest.values())
    detail = "" if short else json.dumps(rest, indent=1)
    name = kind or str(event.get("event")).replace("_", " ")
    return Words(step_of(event), name, text, detail=detail, lost=lost)


def decisions(events: Sequence[Event], stages: int) -> list[Words]:
    """Every decision of a history: stages, growth, searches, rebuilds, and events that are not known here.

    Args:
        events: the history.
        stages: number of stages of the plan, 0 where unknown.
    """
    words: list[Words] = []
    before: Event | None = None
    for event in events:
        name = event.get("event")
        if name in QUIET or name in FAULTS:
            continue
        try:
            if name == "stage":
                words.append(_stage(event, before, stages))
                before = event
            else:
                words.append(_WORDS.get(str(name), generic)(event))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            words.append(generic(event))  # another version wrote it
    return words


def faults(events: Sequence[tuple[Event, bool]]) -> list[Words]:
    """Faults in order: (event, whether the step was done again later) -> words."""
    words = []
    for event, gone in events:
        name = event.get("event")
        if name not in FAULTS:
            continue
        try:
            words.append(replace(_WORDS.get(name, generic)(event), kind=FAULTS[name], lost=gone))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            words.append(generic(event, FAULTS[name], gone))
    return words


def _stage(event: Event, before: Event | None, stages: int) -> Words:
    settings: Mapping[str, Any] = event["settings"]
    of = f" of {stages}" if stages else ""
    kind = f"stage {int(event['index']) + 1}{of}"
    if before is None:
        what = ", ".join(f"{key} {setting_text(v)}" for key, v in settings.items()) or "full model, full input"
    else:
        old: Mapping[str, Any] = before["settings"]
        keys = [*settings, *(k for k in old if k not in settings)]
        changed = [k for k in keys if k != "growth" and settings.get(k) != old.get(k)]
        what = ", ".join(f"{k} {setting_text(old.get(k))} -> {setting_text(settings.get(k))}" for k in changed)
    split, earlier = _split(event), _split(before or {})
    split = f"; micro-batch x accumulation {split}" if split and split != earlier else ""
    return Words(step_of(event), kind, (what or "no setting changes") + split)


def _split(event: Event) -> str:
    micro = event.get("micro_batch")
    return "" if micro is None else f"{micro} x {event.get('accumulation')}"


def setting_text(value: Any) -> str:
    """A setting's value: a switch is on or off, an absent one a dash."""
    if value is None or value is False:
        return "-"
    return "on" if value is True else f"{value:.4g}" if isinstance(value, float) else number_text(value)


def _rebuild(event: Event) -> Words:
    before, after = event["parameters"]
    parts = ", ".join(f"{name} {duration_text(s)}" for name, s in event.get("parts", {}).items() if s >= 0.05)
    text = (
        f"{event['reason'] or 'parameters changed'}: {before / 1e6:.4g} M -> {after / 1e6:.4g} M trainable parameters "
        f"in {event['seconds']:.2f} s" + (f" ({parts})" if parts else "")
    )
    return Words(step_of(event), "rebuild", text)


def _growth(event: Event) -> Words:
    before, after = event["depth"]
    lines = event.get("map") or []
    text = f"depth {before} -> {after} by {event['operator']}; the map of {len(lines)} tensors is below"
    return Words(step_of(event), "growth", text, detail="\n".join(map(str, lines)))


def _supernet(event: Event) -> Words:
    options = event["options"]
    text = f"stage {event['stage']}: {len(options)} candidates (depth, side): " + ", ".join(
        f"({d or '-'}, {r or '-'})" for d, r in options
    )
    return Words(step_of(event), "search begins", text)


def _growth_search(event: Event) -> Words:
    rows, macs = event["table"], event.get("cost") == "macs"
    table = [["depth", "side", "loss", "MACs" if macs else "ms", "score", ""]]
    for row in rows:
        cost = f"{row['cost']:.3g}" if macs else f"{1e3 * row['cost']:.1f}"
        cells = [str(row["depth"] or "-"), str(row["resolution"] or "-"), _figures(row["loss"], ".4f"), cost]
        table.append([*cells, _figures(row["score"], ".4g"), "chosen" if row["chosen"] else ""])
    text = f"stage {event['stage']}: {len(rows)} candidates, alpha {_figures(event['alpha'], '.4f')}"
    return Words(step_of(event), "growth search", text, table, _chosen(rows))


def _unfreeze_search(event: Event) -> Words:
    rows = event["table"]
    table = [["level", "side", "ms", "NTK", "ZiCo", "votes", ""]]
    for row in rows:
        cells = [str(row["level"]), str(row["resolution"]), f"{1e3 * row['seconds']:.1f}"]
        cells += [_figures(row["ntk"], ".4g"), _figures(row["zico"], ".1f"), _figures(row["votes"], "g")]
        table.append([*cells, "chosen" if row["chosen"] else ""])
    text = f"stage {event['stage']}: {len(rows)} candidates measured in {duration_text(event['seconds'])}"
    return Words(step_of(event), "unfreezing search", text, table, _chosen(rows))


def _search_end(event: Event) -> Words:
    rows = event["schedule"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = [keys, *([setting_text(row.get(key)) for key in keys] for row in rows)]
    return Words(step_of(event), "schedule found", f"{len(rows)} stages", table)


def _nonfinite(event: Event) -> Words:
    parts = []
    for found in event["findings"]:
        samples = ", ".join(map(str, found["ids"][:8])) + (", ..." if len(found["ids"]) > 8 else "")
        text = f"rank {found['rank']}: {found['what']} is {found['value']}" + (
            f", samples {samples}" if samples else ""
        )
        parts.append(text + (f", replay {found['replay']}" if found.get("replay") else ""))
    text = f"{'; '.join(parts) or 'no rank is named'}; the step was applied on no rank; {event['consecutive']} in a row"
    return Words(step_of(event), "nonfinite", text, detail=json.dumps(event["findings"], indent=1))


def _preempted(event: Event) -> Words:
    seconds = finite(event.get("seconds"))
    return Words(
        step_of(event), "preempted", "saved" + (f" in {duration_text(seconds)}" if seconds is not None else "")
    )


def _figures(value: Any, form: str) -> str:
    found = finite(value)
    return str(value) if found is None else format(found, form)


def _chosen(rows: Sequence[Mapping[str, Any]]) -> int | None:
    return next((i for i, row in enumerate(rows) if row.get("chosen")), None)


_WORDS: dict[str, Callable[[Event], Words]] = {
    "rebuild": _rebuild,
    "growth": _growth,
    "growth_supernet": _supernet,
    "growth_search": _growth_search,
    "unfreeze_search": _unfreeze_search,
    "search_end": _search_end,
    "nonfinite": _nonfinite,
    "preempted": _preempted,
}
