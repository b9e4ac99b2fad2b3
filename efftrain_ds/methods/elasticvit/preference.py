"""Performance-aware sampling: which sub-network of a level trains next.

With probability q a good sub-network is drawn from the memory bank again (exploitation). Otherwise a new one is
explored: of a few candidates the one that is the widest and shallowest in its transformer stages, which is what good
sub-networks have in common (arXiv 2303.09730).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ...models.elastic import Space
from .bank import DRAWS, MemoryBank
from .levels import Levels
from .tables import Table

PREFERENCES = ("wide_shallow", "uniform")
PUBLISHED_RISES = tuple(epoch / 610 for epoch in (99, 199, 299, 399, 499, 599))
CANDIDATES = 5


@dataclass(frozen=True)
class ExploitSchedule:
    """Probability of exploitation over a run; the defaults are the published ones (epochs 99, 199, ... of 610).

    Attributes:
        start: at first.
        rise: added at each of `at`, up to 1 in all.
        at: shares of the run.
    """

    start: float = 0.2
    rise: float = 0.15
    at: tuple[float, ...] = PUBLISHED_RISES

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1 or self.rise < 0 or list(self.at) != sorted(self.at):
            raise ConfigError(
                f"exploitation from {self.start:g} with rises of {self.rise:g} at {list(self.at)}; needed: a start "
                "from 0 to 1, a rise of at least 0, ascending shares of the run"
            )

    def value(self, progress: float) -> float:
        """Probability at a share of the run from 0 to 1."""
        return min(1.0, self.start + self.rise * sum(progress >= share for share in self.at))


NO_EXPLOITATION = ExploitSchedule(0.0, 0.0, ())


@dataclass(frozen=True)
class Drawn:
    """One drawn sub-network.

    Attributes:
        config: of the space.
        explored: not from the bank; to be offered to it after the step.
        preference: of the chosen candidate (see `preference_of`), None where there was no choice.
    """

    config: Any
    explored: bool
    preference: int | None = None


def preference_of(space: Space[Any], codes: np.ndarray, anchor: Any, formula: str = "exact") -> np.ndarray:
    """How deep rather than wide sub-networks are, beside an anchor: the smaller, the wider and shallower.

    The MACs with the widths of the anchor minus the MACs with its depths; both groups are the space's (`Space.groups`).

    Args:
        space: of the supernet.
        codes: [n, D] rows of sub-networks.
        anchor: the sub-network to compare with.
        formula: how MACs are counted.

    Returns:
        [n] int64.
    """
    narrow = space.macs_of(space.with_group(codes, "widths", anchor), formula)
    return narrow - space.macs_of(space.with_group(codes, "depths", anchor), formula)


class Sampler:
    """Draws the random sub-networks of a step.

    Args:
        space: of the supernet.
        levels: of the run.
        tables: one for each level.
        bank: None switches exploitation off; candidates are then always compared, beside the smallest sub-network.
        exploit: probability of exploitation.
        preference: "wide_shallow", or "uniform" to take the first candidate without looking.
        candidates: how many are compared.
        draw: how entries of the bank are drawn: "softmax", "uniform" or "best".
    """

    def __init__(
        self,
        space: Space[Any],
        levels: Levels,
        tables: Sequence[Table],
        bank: MemoryBank | None = None,
        *,
        exploit: ExploitSchedule | None = None,
        preference: str = "wide_shallow",
        candidates: int = CANDIDATES,
        draw: str = "softmax",
    ) -> None:
        if preference not in PREFERENCES:
            raise ConfigError(f'no preference "{preference}"; allowed: {", ".join(PREFERENCES)}')
        if draw not in DRAWS:
            raise ConfigError(f'no draw "{draw}" from the bank; allowed: {", ".join(DRAWS)}')
        if candidates < 1:
            raise ConfigError(f"{candidates} candidates; at least 1 is needed")
        if tuple(table.level for table in tables) != levels.macs:
            raise ConfigError(f"tables of levels {[t.level for t in tables]} for levels {list(levels.macs)}")
        self.space, self.levels, self.tables, self.bank = space, levels, tuple(tables), bank
        self.exploit = exploit or ExploitSchedule()
        self.preference, self.candidates, self.how = preference, candidates, draw
        self._least = space.min()

    def anchor(self, level: int) -> Any:
        """What candidates of a level are compared with: the best of the lowest level, for itself the smallest."""
        best = None if level == 0 or self.bank is None else self.bank.best(0)
        return self._least if best is None else best.config

    def sample(self, level: int, rng: np.random.Generator, progress: float = 0.0) -> Drawn:
        """Draw one sub-network of a level.

        Args:
            level: index.
            rng: private to the sampling and equal on all ranks, as the bank is.
            progress: share of the run that is over, from 0 to 1.
        """
        coin = rng.random()
        bank = self.bank
        if bank is not None and bank.more_than_half(level) and coin < self.exploit.value(progress):
            return Drawn(bank.draw(level, rng, self.how), False)
        table = self.tables[level]
        if self.preference == "uniform" or (bank is not None and bank.less_than_half(level)):
            return Drawn(table.draw(rng), True)
        codes = table.draw_codes(rng, self.candidates)
        values = preference_of(self.space, codes, self.anchor(level), self.levels.formula)
        chosen = int(np.argmin(values))
        return Drawn(self.space.config(codes[chosen]), True, int(values[chosen]))
