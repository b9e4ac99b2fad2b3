"""Levels of complexity: which there are, how training walks over them, and the smallest sub-network of each.

Sub-networks that share weights disturb each other the more, the more their costs differ. So all sub-networks of a
training step are of one level, the level moves to a neighbour at most from step to step, and each level has a smallest
sub-network that is contained in all others of the level (arXiv 2303.09730, and its published configuration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.errors import CheckpointError, ConfigError, ModelError
from ...core.rng import numpy_rng
from ...models.elastic import HybridSpace, Space

PUBLISHED_LEVELS = (
    *(100_000_000, 200_000_000, 300_000_000, 400_000_000),
    *(500_000_000, 700_000_000, 900_000_000, 1_200_000_000),
)
PUBLISHED_WINDOW = 20_000_000
MODES = ("adjacent", "random", "cyclic")
ENOUGH = 100
"""Sub-networks that a level should hold at least: a bank's worth."""


def macs_text(macs: float) -> str:
    """MACs for messages: ``"317.5 M"``, ``"1.2 G"``, ``"840 K"``."""
    unit, scale = ("G", 1e9) if macs >= 1e9 else ("M", 1e6) if macs >= 1e6 else ("K", 1e3)
    return f"{macs / scale:.4g} {unit}"


def shape_text(config: Any) -> str:
    """A sub-network in a line, sizes of stages or layers joined: ``"24 px, widths 8-12-24-48, depths 1-1-2-1"``."""
    words = [f"{config.resolution} px"]
    for name in ("widths", "depths", "width", "depth", "heads", "mlp"):
        value = getattr(config, name, None)
        if value is not None:
            sizes = value if isinstance(value, tuple) else (value,)
            words.append(f"{name} {'-'.join(f'{size:g}' for size in sizes)}")
    return ", ".join(words)


@dataclass(frozen=True)
class Levels:
    """Levels of a run. A sub-network belongs to level L if L <= MACs <= L + window.

    Attributes:
        macs: lower ends in MACs of one image, ascending.
        window: width of each in MACs.
        formula: how MACs are counted (`Space.macs`): "exact" or "reference".
    """

    macs: tuple[int, ...] = PUBLISHED_LEVELS
    window: int = PUBLISHED_WINDOW
    formula: str = "exact"

    def __post_init__(self) -> None:
        if not self.macs or list(self.macs) != sorted(set(self.macs)) or self.macs[0] <= 0 or self.window < 0:
            raise ConfigError(
                f"levels {list(self.macs)} with window {self.window}; needed: different positive MACs, ascending, and "
                "a window of at least 0"
            )

    def __len__(self) -> int:
        return len(self.macs)

    def holds(self, index: int, macs: int) -> bool:
        """Whether a sub-network of so many MACs belongs to a level."""
        return self.macs[index] <= macs <= self.macs[index] + self.window

    def gap(self, i: int, j: int) -> int:
        """Most by which the MACs of sub-networks of two levels can differ."""
        return abs(self.macs[i] - self.macs[j]) + self.window

    def check(self, space: Space[Any]) -> None:
        """Refuse levels that a space cannot fill.

        Raises:
            ConfigError: a level below the smallest sub-network or above the largest.
        """
        least, most = space.macs(space.min(), self.formula), space.macs(space.max(), self.formula)
        for level in self.macs:
            if level + self.window < least:
                raise ConfigError(
                    f"level {macs_text(level)} MACs lies below the smallest sub-network of the space, which has "
                    f"{macs_text(least)}"
                )
            if level > most:
                raise ConfigError(
                    f"level {macs_text(level)} MACs lies above the largest sub-network of the space, which has "
                    f"{macs_text(most)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"macs": list(self.macs), "window": self.window, "formula": self.formula}


def spread_levels(space: Space[Any], count: int = 8, formula: str = "exact") -> Levels:
    """Levels for any space, at the places that the published ones have in theirs.

    They lie in equal ratios from 2 % to 37 % of the way from the smallest to the largest sub-network, but not below the
    smallest 1/1000 of random sub-networks, and up to their median at least. The window is 1/160 of that way, or half
    the smallest gap where that is less. In a space of few sub-networks it is wider, so that every level holds some
    `ENOUGH` of them, up to the smallest gap.

    Args:
        space: of the supernet.
        count: how many.
        formula: how MACs are counted.

    Raises:
        ConfigError: fewer than one level, or more than the space has room for.
    """
    if count < 1:
        raise ConfigError(f"{count} levels; at least 1 is needed")
    least, most = space.macs(space.min(), formula), space.macs(space.max(), formula)
    way = most - least
    drawn = space.macs_of(space.sample_codes(numpy_rng(0, "levels", space.hash), 16384), formula)
    low = max(least + 0.02 * way, float(np.quantile(drawn, 0.001)))
    high = max(least + 0.37 * way, float(np.quantile(drawn, 0.5)))
    macs = [round(low * (high / low) ** (j / max(count - 1, 1))) for j in range(count)]
    gaps = [b - a for a, b in zip(macs, macs[1:], strict=False)]
    if gaps and min(gaps) < 2:
        raise ConfigError(f"{count} levels from {macs_text(low)} to {macs_text(high)} MACs: too many for this space")
    window = min([int(way) // 160, *(gap // 2 for gap in gaps)])
    hits = math.ceil(ENOUGH / space.count() * len(drawn))
    ordered = np.append(np.sort(drawn), [most] * hits)
    needed = max(int(ordered[np.searchsorted(ordered, level) + hits - 1]) - level for level in macs)
    return Levels(tuple(macs), max(window, min([needed, *(gap - 1 for gap in gaps)])), formula)


class Walk:
    """The level of each training step.

    "adjacent" moves the index by -1, 0 or +1 with equal chances; at an end it stays with 2/3 and moves inwards with
    1/3, which visits all levels equally often in the long run. "random" takes any level ("random" of the published
    code draws one for each sub-network instead of each step: call `next` for each). "cyclic" goes down and starts again
    at the top.

    Args:
        levels: how many there are.
        mode: one of `MODES`.

    Attributes:
        index: level of the last step; 0 before the first.
    """

    def __init__(self, levels: int, mode: str = "adjacent") -> None:
        if mode not in MODES:
            raise ConfigError(f'no walk "{mode}" over the levels; allowed: {", ".join(MODES)}')
        if levels < 1:
            raise ConfigError(f"{levels} levels; at least 1 is needed")
        self.levels, self.mode, self.index = levels, mode, 0

    def next(self, rng: np.random.Generator) -> int:
        """Move on; once in a step.

        Args:
            rng: private to the sampling and equal on all ranks. One number is drawn in every mode.

        Returns:
            Index of the level of this step.
        """
        uniform = rng.random()
        if self.mode == "random":
            self.index = int(uniform * self.levels)
        elif self.mode == "cyclic":
            self.index = (self.index - 1) % self.levels
        else:
            self.index = min(max(self.index + int(uniform * 3) - 1, 0), self.levels - 1)
        return self.index

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint (JSON)."""
        return {"index": self.index, "levels": self.levels, "mode": self.mode}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Another mode than then is allowed, other levels are not.

        Raises:
            CheckpointError: another number of levels.
        """
        if state["levels"] != self.levels:
            raise CheckpointError(f"the checkpoint has {state['levels']} levels, this run {self.levels}")
        self.index = int(state["index"])


@dataclass(frozen=True)
class Smallest:
    """A smallest sub-network and the levels that it serves.

    Attributes:
        config: of the space.
        up_to: its last level in MACs (and one window more); None for all above.
    """

    config: Any
    up_to: int | None


class SmallestSubnets:
    """The smallest sub-network of each level: one for the lowest levels, larger ones higher up.

    Args:
        space: of the supernet.
        entries: ascending; the last one also serves all levels above its own.
        levels: of the run.

    Attributes:
        entries: as given.
        by_level: index of the entry of each level.
    """

    def __init__(self, space: Space[Any], entries: Sequence[Smallest], levels: Levels) -> None:
        if not entries:
            raise ConfigError("smallest sub-networks: at least one is needed")
        ends = [math.inf if entry.up_to is None else entry.up_to for entry in entries]
        if any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ConfigError(f"smallest sub-networks: last levels {[e.up_to for e in entries]}; they must ascend")
        self.space, self.entries, self.levels = space, tuple(entries), levels
        last = len(entries) - 1
        self.by_level = tuple(
            next((j for j, end in enumerate(ends) if level <= end + levels.window), last) for level in levels.macs
        )
        for level, j in zip(levels.macs, self.by_level, strict=True):
            try:
                macs = space.macs(entries[j].config, levels.formula)
            except ModelError as error:
                raise ConfigError(f"smallest sub-networks: entry {j}: {error}") from error
            if macs > level + levels.window:
                raise ConfigError(
                    f"smallest sub-network {j} has {macs_text(macs)} MACs, more than level {macs_text(level)} that it "
                    "serves"
                )

    def __len__(self) -> int:
        return len(self.entries)

    def of(self, level: int) -> Any:
        """Configuration of the smallest sub-network of a level (by index)."""
        return self.entries[self.by_level[level]].config

    def to_list(self) -> list[dict[str, Any]]:
        """For a JSON file; `read_smallest` reads it."""
        return [{"up_to": entry.up_to, "config": entry.config.to_dict()} for entry in self.entries]


def read_smallest(data: Any, space: Space[Any], levels: Levels, where: str = "smallest") -> SmallestSubnets:
    """Smallest sub-networks from their JSON form.

    Raises:
        ConfigError: names the entry that is wrong.
    """
    if not isinstance(data, list) or not all(isinstance(one, Mapping) for one in data):
        raise ConfigError(f'{where}: a list of {{"up_to": MACs or null, "config": {{...}}}} is needed')
    entries = []
    for j, one in enumerate(data):
        if set(one) != {"up_to", "config"}:
            raise ConfigError(f"{where}[{j}] has {', '.join(map(str, one)) or 'nothing'}; needed: up_to, config")
        up_to = one["up_to"]
        if up_to is not None and (isinstance(up_to, bool) or not isinstance(up_to, int)):
            raise ConfigError(f"{where}[{j}].up_to is {up_to!r}; an integer (MACs) or null is needed")
        entries.append(Smallest(space.parse(one["config"], f"{where}[{j}].config"), up_to))
    return SmallestSubnets(space, entries, levels)


def published_smallest(space: Space[Any], levels: Levels | None = None) -> SmallestSubnets:
    """The three smallest sub-networks of the published training, for levels 100-200, 300-400 and from 500 M MACs.

    Args:
        space: the published one (of any number of classes).
        levels: of the run; the published ones if None.

    Raises:
        ConfigError: the space does not have them, or they are too large for the levels.
    """
    chosen = (
        (128, (16, 16, 16, 48, 80, 144, 160), (1, 2, 2, 1, 1, 1, 1), 2, 200_000_000),
        (176, (16, 24, 32, 48, 96, 176, 224), (1, 3, 3, 2, 2, 2, 2), (2, 3, 2, 2), 400_000_000),
        (224, (16, 24, 32, 64, 96, 192, 256), (1, 3, 3, 2, 2, 2, 2), 2, 800_000_000),
    )
    try:
        if not isinstance(space, HybridSpace):
            raise ModelError(f"it is a {type(space).__name__}")
        entries = [Smallest(space.make(r, widths, depths, mlp=mlp), end) for r, widths, depths, mlp, end in chosen]
    except ModelError as error:
        raise ConfigError(f"this space does not have the published smallest sub-networks: {error}") from error
    return SmallestSubnets(space, entries, levels or Levels())


def smallest_within(space: Space[Any], macs: float, formula: str = "exact") -> Any:
    """A sub-network of at most so many MACs that is enlarged evenly in resolution, widths and depths.

    From the least of everything one choice is raised at a time, in turns, so that all these dimensions stand at about
    the same share of their choices; the others keep their least. Results for growing budgets contain each other.

    Raises:
        ConfigError: the smallest sub-network of the space has more MACs.
    """
    columns = {c for c, d in enumerate(space.dimensions) if d.kind in ("resolution", "width", "depth")}
    columns |= set(space.groups["widths"])
    sizes = {column: len(space.dimensions[column].choices) - 1 for column in columns}
    turns = sorted(((k + 0.5) / sizes[column], column) for column in columns for k in range(sizes[column]))
    codes = np.zeros((len(turns) + 1, len(space.dimensions)), np.int8)
    for row, (_, column) in enumerate(turns, 1):
        codes[row:, column] += 1
    # a larger share of the choices need not be a larger width than that of the stage before
    before = np.full(len(codes), -np.inf)
    for column in space.ascending:
        choices = np.asarray(space.dimensions[column].choices, float)
        codes[:, column] = np.maximum(codes[:, column], np.searchsorted(choices, before))
        before = choices[codes[:, column]]
    codes = space.settled(codes)
    fits = np.flatnonzero(space.macs_of(codes, formula) <= macs)
    if not len(fits):
        least = space.macs(space.min(), formula)
        raise ConfigError(f"no sub-network within {macs_text(macs)} MACs; the smallest has {macs_text(least)}")
    return space.config(codes[fits[-1]])


def build_smallest(space: Space[Any], levels: Levels, count: int = 3, share: float = 0.5) -> SmallestSubnets:
    """Smallest sub-networks for any space: the levels in `count` groups of neighbours, one for each group.

    The first is the smallest of the space; the MACs of the others lie at `share` of the way from there to the lowest
    level of their group (0.47 and 0.54 in the published training).

    Args:
        space: of the supernet.
        levels: of the run.
        count: how many; no more than there are levels.
        share: of that way.

    Raises:
        ConfigError: no such groups, or a level below the smallest sub-network.
    """
    if not 1 <= count <= len(levels):
        raise ConfigError(f"{count} smallest sub-networks for {len(levels)} levels; allowed: 1 to {len(levels)}")
    if not 0 <= share <= 1:
        raise ConfigError(f"share {share:g} of the way to the lowest level; allowed: 0 to 1")
    levels.check(space)
    least = space.macs(space.min(), levels.formula)
    entries = []
    for j, group in enumerate(np.array_split(np.arange(len(levels)), count)):
        budget = least + share * max(levels.macs[group[0]] - least, 0)
        config = space.min() if j == 0 else smallest_within(space, budget, levels.formula)
        entries.append(Smallest(config, None if j == count - 1 else levels.macs[group[-1]]))
    return SmallestSubnets(space, entries, levels)
