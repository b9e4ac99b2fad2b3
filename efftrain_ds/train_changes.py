"""What differs between the configuration of a checkpoint and that of the run that goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .core.errors import CheckpointError
from .core.redact import redacted
from .core.timeline import Schedule

_PAST = "it has shaped the steps so far"
_FORBIDDEN: tuple[tuple[str, str], ...] = (
    ("efftrain.run.seed", "sample order, augmentation and decisions come from it"),
    ("efftrain.run.epochs", _PAST),
    ("efftrain.run.steps", _PAST),
    ("efftrain.model.ema", ""),
    ("efftrain.model", "the weights belong to that model"),
    ("efftrain.data.train", ""),
    ("efftrain.data.shuffle_block", "the order of the samples comes from it"),
    ("efftrain.data.resolution", "the weights belong to that size"),
    ("efftrain.optim.label_smoothing", ""),
    ("efftrain.optim.min_lr", ""),
    ("efftrain.optim", _PAST),
    ("optimizer", "the state belongs to that optimizer, and its groups come from the checkpoint"),
    ("scheduler", _PAST),
)
"""First matching prefix decides; an empty reason allows. Keys that match nothing may change."""
_METHODS = "efftrain.methods"


@dataclass(frozen=True)
class Change:
    """One key with another value; `reason` says why it may not change, empty where it may."""

    key: str
    old: Any
    new: Any
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.key}: {_short(redacted(self.old))} -> {_short(redacted(self.new))}"
        return f"{text} ({self.reason})" if self.reason else text


def past_stages(schedule: Schedule, step: int) -> list[list[Any]]:
    """Plain rows of the stages that have begun before optimizer step `step`: [start, batch, settings].

    The end of a stage is left out: it lies in the future of a stage that is running.
    """
    return [[s.start_step, s.batch, sorted(s.settings.items())] for s in schedule.stages if s.start_step < step]


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], *, past: Sequence[Any] | None, schedule: Schedule, step: int
) -> list[Change]:
    """All differences between two resolved configurations.

    Args:
        old: of the checkpoint.
        new: of this run.
        past: `past_stages` as the checkpoint has them, or None where it has none.
        schedule: of this run.
        step: optimizer steps of the checkpoint.
    """
    same_past = past is None or _plain(past) == _plain(past_stages(schedule, step))
    found = []
    # without secrets: a new token is no change, and what the data is, the loader knows by the manifest's hash
    a, b = dict(_flat(redacted(dict(old)))), dict(_flat(redacted(dict(new))))
    for key in sorted({*a, *b}):
        before, after = a.get(key, "not given"), b.get(key, "not given")
        if before == after:
            continue
        reason = _reason(key)
        if key.startswith(_METHODS) and not same_past:
            reason = "the stages so far would have been others"
        found.append(Change(key, before, after, reason))
    if not same_past and not any(change.reason for change in found):
        was, now = _first_difference(_plain(past), _plain(past_stages(schedule, step)))
        found.append(Change("stages up to now [start, batch, settings]", was, now, "the past of a run stays as it is"))
    return found


def check(changes: Sequence[Change], where: str) -> None:
    """Refuse what may not change.

    Raises:
        CheckpointError: with every such key, its old and its new value.
    """
    refused = [change for change in changes if change.reason]
    if refused:
        lines = "\n  ".join(str(change) for change in refused)
        raise CheckpointError(
            f"{where} was made with another configuration:\n  {lines}\nNothing was changed. Undo these changes, or set "
            "efftrain.run.output to a new folder, or efftrain.checkpoint.resume to false"
        )


def _reason(key: str) -> str:
    for prefix, reason in _FORBIDDEN:
        if key == prefix or key.startswith(prefix + "."):
            return reason
    return ""


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, _plain(value)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, Any]:
    for old, new in zip(a, b, strict=False):
        if old != new:
            return old, new
    return f"{len(a)} stages", f"{len(b)} stages"


def _short(value: Any) -> str:
    text = value if value == "not given" else json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
