"""Numbers and settings in a few characters, the same everywhere on screen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_SHORT = {"bandwidth": "B", "ra_magnitude": "m", "resolution": "R", "depth": "d", "unfrozen": "u", "replay": "x"}
# follow from the stage and would only fill the line
_HIDDEN = frozenset({"drop_path", "erasing", "growth", "replay_steps"})


def short_settings(settings: Mapping[str, Any], *, leave: Collection[str] = ()) -> str:
    """Settings of a stage, e.g. ``"R160 d8 m3"``, without those named in `leave`; "full" where there are none.

    Regularisation rates are left out; a switch is shown by its name while it is on, a phase by its value.
    """
    words = (_word(key, value) for key, value in settings.items() if key not in leave and key not in _HIDDEN)
    return " ".join(word for word in words if word) or "full"


def _word(key: str, value: Any) -> str:
    """One setting; "" where there is nothing to show."""
    if value is None or isinstance(value, bool):
        return key if value else ""
    if key == "phase":
        return str(value)
    return f"{_SHORT[key]}{number_text(value)}" if key in _SHORT else f"{key}={number_text(value)}"


def number_text(value: Any) -> str:
    """A setting's value; floats without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit: ``"41 GB"``, ``"1.2 GB"``, ``"512 MB"``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.1f} {unit}" if value < 9.95 and unit in ("TB", "GB") else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def duration_text(seconds: float) -> str:
    """A length of time in its two largest units: ``"6h12m"``, ``"3d04h"``, ``"2m05s"``, ``"45s"``, ``"3.2s"``."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    for big, small, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if total >= size:
            rest = total % size * {"d": 24, "h": 60, "m": 60}[big] // size
            return f"{total // size}{big}{rest:02d}{small}"
    return f"{total}s"


def align(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Columns padded to equal width: to the right, those listed in `left` to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
