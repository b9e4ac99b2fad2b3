"""Durations with a unit: ``"500st"`` (optimizer steps), ``"2ep"`` (epochs), ``"10%"`` (of the budget), ``"30min"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = ("st", "ep", "%", "s", "min", "h")
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*(st|ep|%|s|min|h)\s*$")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Duration:
    """A number with one of `UNITS`."""

    value: float
    unit: str

    @property
    def seconds(self) -> float | None:
        """Seconds for wall-clock units, None otherwise."""
        return self.value * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def steps(self, steps_per_epoch: float, total_steps: int) -> int | None:
        """Optimizer steps for step-like units, None for wall-clock units."""
        if self.unit == "st":
            return round(self.value)
        if self.unit == "ep":
            return round(self.value * steps_per_epoch)
        if self.unit == "%":
            return round(self.value / 100 * total_steps)
        return None

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


def parse_duration(text: str) -> Duration:
    """Read a duration.

    Raises:
        ValueError: the text has no number or no known unit.
    """
    match = _PATTERN.match(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f'a duration is a number with a unit ("500st", "2ep", "10%", "30min"), found {text!r}')
    return Duration(float(match.group(1)), match.group(2))
