"""Which methods may run together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError
from .method import PHASES, Method


def compose(methods: Sequence[Method]) -> list[Method]:
    """Order methods by phase (data < model < loss < gradient < weight, then name) and check that they fit.

    Raises:
        ConfigError: a conflict, a missing partner, or two owners of the loss; all findings in one text.
    """
    ordered = sorted(methods, key=lambda m: (PHASES.index(m.phase), m.name))
    names = {m.name for m in ordered}
    found: list[str] = []
    for method in ordered:
        found += [
            f"efftrain.methods.{method.name} cannot run together with {other}"
            for other in method.conflicts_with
            if other in names
        ]
        found += [
            f"efftrain.methods.{method.name} needs {other}, which is not configured"
            for other in method.needs
            if other not in names
        ]
    owners = [m.name for m in ordered if m.owns_loss]
    if len(owners) > 1:
        found.append(f"efftrain.methods: only one method may own the loss, found {', '.join(owners)}")
    if found:
        raise ConfigError("\n".join(found))
    return ordered
