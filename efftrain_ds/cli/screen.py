"""Text on a terminal: width, marks, and rows with a name and words that wrap under themselves."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

_PLAIN_WIDTH = 120
_MARKS = {"ok": ("\u2713", "ok", "32"), "warn": ("!", "warn", "33"), "fail": ("\u2717", "FAIL", "31")}
_NO_MARK = ("-", "-", "2")


def on_terminal() -> bool:
    """True where people read along."""
    return sys.stdout.isatty()


def width() -> int:
    """Columns to fill: the terminal's, 60 to 120; 120 in a file or pipe."""
    if not on_terminal():
        return _PLAIN_WIDTH
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, _PLAIN_WIDTH))


def mark(status: str) -> str:
    """A tick, an exclamation mark or a cross, in colour on a terminal and as words elsewhere."""
    symbol, word, colour = _MARKS.get(status, _NO_MARK)
    if not on_terminal():
        return word.ljust(4)
    encoding = (sys.stdout.encoding or "ascii").lower()
    text = symbol if "utf" in encoding else word
    return text if os.environ.get("NO_COLOR") else f"\033[{colour}m{text}\033[0m"


def wrapped(head: str, text: str, *, indent: int, columns: int | None = None) -> list[str]:
    """`head`, then `text` from column `indent` on, in as many lines as it takes.

    Args:
        head: at the start of the first line; its printed length must be below `indent`.
        text: may hold line breaks.
        indent: column of the text.
        columns: of the whole line; None takes `width`.
    """
    room = max(20, (columns or width()) - indent)
    lines = [
        piece
        for line in text.splitlines() or [""]
        for piece in textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) or [""]
    ]
    return [(head if i == 0 else " " * indent) + line for i, line in enumerate(lines)]


def facts(rows: Sequence[tuple[str, str]], *, indent: int = 12) -> list[str]:
    """Rows of a name and words; a name that repeats is shown once."""
    lines, last = [], None
    for name, text in rows:
        lines += wrapped(f"{name if name != last else '':<{indent}}", text, indent=indent)
        last = name
    return [line.rstrip() for line in lines]
