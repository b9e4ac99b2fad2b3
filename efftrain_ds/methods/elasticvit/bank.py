"""Memory bank: the best sub-networks found so far, for each level.

Scores are minus a cross-entropy, larger is better. All ranks make the same changes from all-reduced scores, so that
their banks stay equal to the last bit; `MemoryBank.checksum` proves it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...core.errors import CheckpointError, ConfigError
from ...models.elastic import Space
from .levels import Levels

SCHEMA = 1
DRAWS = ("softmax", "uniform", "best")
Outcome = Literal["added", "replaced", "worse", "known", "outside", "not finite"]


def published_capacities(count: int) -> tuple[int, ...]:
    """Entries of the published bank: 150 in the lower half of the levels, 50 in the upper half."""
    return tuple(150 if index < (count + 1) // 2 else 50 for index in range(count))


@dataclass
class Entry:
    """A sub-network in the bank.

    Attributes:
        config: of the space.
        score: minus a cross-entropy.
        refreshed: how often it was scored again since it came in.
    """

    config: Any
    score: float
    refreshed: int = 0


class MemoryBank:
    """The bank of all levels. Entries of a level stand in the order in which they came.

    Args:
        space: of the supernet.
        levels: of the run; says what may enter.
        capacity: most entries of each level, or one number for all; the published ones if None.
        smoothing: weight of the earlier scores when entries are scored again, 0 for none (as published). Only the
            differences between entries are smoothed: the progress that they all make counts in full, and a first score,
            which comes from other images than the other entries', is replaced.

    Raises:
        ConfigError: capacities that do not fit the levels, or a smoothing outside 0 to 1.
    """

    def __init__(
        self,
        space: Space[Any],
        levels: Levels,
        capacity: int | Sequence[int] | None = None,
        smoothing: float = 0.9,
    ) -> None:
        if capacity is None:
            capacity = published_capacities(len(levels))
        self.capacity = (capacity,) * len(levels) if isinstance(capacity, int) else tuple(capacity)
        if len(self.capacity) != len(levels) or min(self.capacity) < 1:
            raise ConfigError(f"bank: capacities {list(self.capacity)} for {len(levels)} levels; at least 1 for each")
        if not 0 <= smoothing < 1:
            raise ConfigError(f"bank: smoothing {smoothing:g}; allowed: from 0 to below 1")
        self.space, self.levels, self.smoothing = space, levels, smoothing
        self._entries: list[list[Entry]] = [[] for _ in range(len(levels))]
        self._known: list[set[Any]] = [set() for _ in range(len(levels))]

    def __len__(self) -> int:
        return sum(map(len, self._entries))

    def size(self, level: int) -> int:
        """Entries of a level (by index)."""
        return len(self._entries[level])

    def entries(self, level: int) -> tuple[Entry, ...]:
        """Entries of a level, oldest first. Do not change them."""
        return tuple(self._entries[level])

    def configs(self, level: int) -> list[Any]:
        """Sub-networks of a level, oldest first: what `rescore` wants the scores of."""
        return [entry.config for entry in self._entries[level]]

    def best(self, level: int) -> Entry | None:
        """The entry with the best score (the oldest of equal ones); None if there is none."""
        return max(self._entries[level], key=lambda entry: entry.score, default=None)

    def more_than_half(self, level: int) -> bool:
        """Whether a level has more than half of its capacity: then sub-networks may be drawn from it."""
        return 2 * len(self._entries[level]) > self.capacity[level]

    def less_than_half(self, level: int) -> bool:
        """Whether a level has less than half of its capacity: then anything is explored, without preference."""
        return 2 * len(self._entries[level]) < self.capacity[level]

    def offer(self, level: int, config: Any, score: float) -> Outcome:
        """Put in an explored sub-network, if it is good enough.

        Below the capacity everything enters; at capacity a better one takes the place of the worst (the oldest of
        equal ones). Known sub-networks and those outside the level do not enter.

        Args:
            level: index.
            config: of the space.
            score: equal on all ranks.

        Returns:
            What became of it.
        """
        entries, known = self._entries[level], self._known[level]
        if not math.isfinite(score):
            return "not finite"
        if not self.levels.holds(level, self.space.macs(config, self.levels.formula)):
            return "outside"
        if config in known:
            return "known"
        outcome: Outcome = "added"
        if len(entries) >= self.capacity[level]:
            worst = min(range(len(entries)), key=lambda j: entries[j].score)
            if not entries[worst].score < score:
                return "worse"
            known.remove(entries.pop(worst).config)
            outcome = "replaced"
        entries.append(Entry(config, float(score)))
        known.add(config)
        return outcome

    def rescore(self, level: int, scores: Sequence[float]) -> None:
        """Score all entries of a level again, on one batch of images for all. Who is in does not change.

        Args:
            level: index.
            scores: of `configs`, equal on all ranks. One that is not finite leaves the entry as it is.
        """
        entries = self._entries[level]
        if len(scores) != len(entries):
            raise ValueError(f"{len(scores)} scores for {len(entries)} entries")
        good = [(entry, float(new)) for entry, new in zip(entries, scores, strict=True) if math.isfinite(new)]
        settled = [(entry.score, new) for entry, new in good if entry.refreshed]
        progress = math.fsum(new - old for old, new in settled) / len(settled) if settled else 0.0
        for entry, new in good:
            if entry.refreshed:
                new = self.smoothing * (entry.score + progress) + (1 - self.smoothing) * new
            entry.score, entry.refreshed = new, entry.refreshed + 1

    def weights(self, level: int, how: str = "softmax") -> np.ndarray:
        """Probabilities with which `draw` takes the entries of a level, [n] float64."""
        if how not in DRAWS:
            raise ConfigError(f'no draw "{how}" from the bank; allowed: {", ".join(DRAWS)}')
        scores = np.array([entry.score for entry in self._entries[level]], np.float64)
        if how == "best":
            return (np.arange(len(scores)) == np.argmax(scores)).astype(np.float64)
        weights = np.ones_like(scores) if how == "uniform" else np.exp(scores - scores.max())
        return weights / weights.sum()

    def draw(self, level: int, rng: np.random.Generator, how: str = "softmax") -> Any:
        """Draw an entry of a level, which must have one.

        Args:
            level: index.
            rng: equal on all ranks; one number is drawn.
            how: "softmax" over the scores, "uniform" or "best".
        """
        cumulated = np.cumsum(self.weights(level, how))
        place = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        return self._entries[level][min(place, len(cumulated) - 1)].config

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint (JSON; floats keep every bit)."""
        rows = [
            [{"codes": self.space.codes(e.config).tolist(), "score": e.score, "refreshed": e.refreshed} for e in level]
            for level in self._entries
        ]
        return {"schema": SCHEMA, "space": self.space.hash, "levels": self.levels.to_dict(), "entries": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved bank. Where the capacity is smaller now, the best entries stay.

        Raises:
            CheckpointError: of another space or other levels, or damaged.
        """
        if state.get("schema") != SCHEMA:
            raise CheckpointError(f"memory bank of schema {state.get('schema')}; this version reads {SCHEMA}")
        if state["space"] != self.space.hash:
            raise CheckpointError(f"the memory bank is of the space {state['space']}, this run has {self.space.hash}")
        if state["levels"] != self.levels.to_dict():
            raise CheckpointError(f"the memory bank has levels {state['levels']}, this run {self.levels.to_dict()}")
        loaded = []
        for level, rows in enumerate(state["entries"]):
            codes = np.array([row["codes"] for row in rows], np.int8).reshape(-1, len(self.space.dimensions))
            if not self.space.legal(codes).all():
                raise CheckpointError(f"the memory bank of level {level} has entries that are no sub-networks")
            entries = [
                Entry(self.space.config(code), float(row["score"]), int(row["refreshed"]))
                for code, row in zip(codes, rows, strict=True)
            ]
            while len(entries) > self.capacity[level]:
                entries.pop(min(range(len(entries)), key=lambda j: entries[j].score))
            loaded.append(entries)
        self._entries = loaded
        self._known = [{entry.config for entry in entries} for entries in loaded]

    def checksum(self) -> str:
        """16 hexadecimal digits; equal on two ranks only if their banks are equal to the last bit."""
        text = json.dumps(self.state_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
