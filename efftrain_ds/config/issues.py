"""One thing that is wrong with a configuration, and the text that shows all of them."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..core.redact import redacted

_MAX_KEY_WIDTH = 60


@dataclass(frozen=True)
class Issue:
    """What is wrong (`text`) with the value at the dotted path `key`."""

    key: str
    text: str


class ConfigIssues(ConfigError):
    """A `ConfigError` that keeps its issues apart, for machine-readable output."""

    def __init__(self, issues: Sequence[Issue], where: str, command: str = ""):
        super().__init__(report(issues, where, command))
        self.issues = tuple(issues)


def close_hint(key: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """``' Did you mean "density"?'`` for the nearest of `known`, or the empty string."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
    return f' Did you mean "{close[0]}"?' if close else ""


def table(issues: Sequence[Issue]) -> str:
    """The issues in two columns, one line each."""
    width = max((len(issue.key) for issue in issues if len(issue.key) <= _MAX_KEY_WIDTH), default=0)
    return "\n".join(f"  {issue.key:<{width}}   " + "; ".join(issue.text.splitlines()) for issue in issues)


def report(issues: Sequence[Issue], where: str, command: str = "") -> str:
    """The whole error text: a headline, one line an issue, and what to do next.

    Args:
        issues: at least one.
        where: name of the file, or words for a dictionary.
        command: the command that checks again; empty where there is no file.
    """
    count = f"{len(issues)} error" + ("s" if len(issues) > 1 else "")
    last = "Nothing was started." + (f" Check again with: {command}" if command else "")
    return f"efftrain config: {count} in {where}\n{table(issues)}\n{last}"


def validate_command(path: Path, overrides: Sequence[str] = (), world: int | None = None) -> str:
    """The shell command that validates `path` with the same overrides (without secrets) and world size."""
    words = ["efftrain", "validate", str(path)]
    for override in overrides:
        words += ["--set", redacted(override)]
    if world is not None:
        words += ["--world", str(world)]
    return shlex.join(words)
