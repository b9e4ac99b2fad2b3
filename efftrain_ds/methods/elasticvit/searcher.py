"""What every search for the best sub-network within a budget shares: candidates out, scores in, and its state.

A search is asked for candidates and told their scores (`Searcher.ask`, `Searcher.tell`), so that many ranks can
evaluate at once, and counts what it spends in evaluations. Candidates of a generation are a pure function of the seed,
the generation and the scores so far: every rank gets the same ones, and a search goes on after a stop as if there had
been none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.errors import CheckpointError, ConfigError
from ...core.rng import numpy_rng
from ...models.elastic import Space
from .limits import Limit, inside

SCHEMA = 1
CHUNK = 8192
BARREN = 32
"""Chunks of random draws without anything new after which a generation stays smaller."""
Source = Callable[[np.random.Generator, int], np.ndarray]
"""(generator, n) to codes [n, D], e.g. `Table.draw_codes`; what is outside the limits is dropped."""


@dataclass(frozen=True)
class Evaluated:
    """A sub-network and its score.

    Attributes:
        config: of the space.
        score: larger is better; -inf where it was not finite.
        generation: in which it was asked for.
    """

    config: Any
    score: float
    generation: int


class Searcher(ABC):
    """A search: candidates out, scores in.

    Args:
        space: of the supernet.
        limits: all of them hold for every candidate.
        evaluations: budget; no more candidates are given out.
        seed: decides everything that the scores do not.
        seeds: sub-networks to begin with, e.g. of a memory bank; those outside the limits are left out.
        source: of random sub-networks near the limits; uniform draws of the space, those outside thrown away, if None.
        draws: most random draws for one generation.

    Attributes:
        evaluated: all that was told, in the order in which it was asked for, as soon as nothing before it is open.
        generation: of the candidates that were asked for last, from 0.

    Raises:
        ConfigError: a limit that no sub-network keeps, or no evaluations.
    """

    kind = ""

    def __init__(
        self,
        space: Space[Any],
        limits: Sequence[Limit],
        *,
        evaluations: int,
        seed: int = 0,
        seeds: Iterable[Any] = (),
        source: Source | None = None,
        draws: int = 20_000_000,
    ) -> None:
        if evaluations < 1:
            raise ConfigError(f"a search with {evaluations} evaluations; at least 1 is needed")
        for limit in limits:
            limit.check(space)
        self.space, self.limits, self.evaluations, self.seed = space, tuple(limits), evaluations, seed
        self.evaluated: list[Evaluated] = []
        self.generation = -1
        self._source, self._draws = source, draws
        self._seeds = [config for config in seeds if space.contains(config)]
        self._known: set[bytes] = set()
        self._open: list[np.ndarray] = []
        self._scores: dict[bytes, float] = {}
        self._exhausted = False

    # -- in and out --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether `ask` gives nothing any more: the budget is spent, or nothing new is found within the limits."""
        return not self._open and (self._exhausted or len(self.evaluated) >= self.evaluations)

    @property
    def best(self) -> Evaluated | None:
        """The best so far (the earliest of equal ones)."""
        return max(self.evaluated, key=lambda one: one.score, default=None)

    def ask(self, n: int | None = None) -> list[Any]:
        """Candidates that have no score yet; a new generation once the last one is told whole.

        Asking again before telling gives the same ones.

        Args:
            n: most to give; None for all of the generation.

        Returns:
            Different sub-networks within the limits; none if the search is over.

        Raises:
            ConfigError: nothing at all was found within the limits.
        """
        if not self._open and not self.done:
            left = self.evaluations - len(self.evaluated)
            self.generation += 1
            rng = numpy_rng(self.seed, "subnet search", self.kind, self.generation)
            self._open = self._propose(rng, left)[:left]
            self._known |= {row.tobytes() for row in self._open}
            self._exhausted = not self._open
            if not self._open and not self.evaluated:
                names = ", ".join(f"{one.name} from {one.low:,.6g} to {one.high:,.6g}" for one in self.limits)
                raise ConfigError(f"no sub-network found within the limits: {names}")
        waiting = [row for row in self._open if row.tobytes() not in self._scores]
        return [self.space.config(row) for row in (waiting if n is None else waiting[:n])]

    def tell(self, configs: Sequence[Any], scores: Sequence[float]) -> None:
        """Scores of candidates, in any order and number.

        Args:
            configs: from `ask`.
            scores: larger is better; one that is not finite counts as the worst.

        Raises:
            ValueError: a sub-network that was not asked for, or has its score already.
        """
        open_rows = {row.tobytes() for row in self._open}
        for config, score in zip(configs, scores, strict=True):
            key = self.space.codes(config).tobytes()
            if key not in open_rows or key in self._scores:
                raise ValueError(f"{config} was not asked for, or has a score already")
            self._scores[key] = float(score) if math.isfinite(score) else -math.inf
        while self._open and self._open[0].tobytes() in self._scores:
            row = self._open.pop(0)
            score = self._scores.pop(row.tobytes())
            self.evaluated.append(Evaluated(self.space.config(row), score, self.generation))

    def run(self, evaluate: Callable[[list[Any]], Sequence[float]]) -> Evaluated:
        """Ask and tell until the search is over; for one process.

        Args:
            evaluate: scores of a list of sub-networks.

        Returns:
            The best.
        """
        while not self.done:
            configs = self.ask()
            if configs:
                self.tell(configs, evaluate(configs))
        assert self.best is not None
        return self.best

    def history(self) -> list[tuple[int, float]]:
        """(evaluations, best score) behind each generation that has begun."""
        points: dict[int, tuple[int, float]] = {}
        best = -math.inf
        for count, one in enumerate(self.evaluated, 1):
            best = max(best, one.score)
            points[one.generation] = (count, best)
        return list(points.values())

    # -- candidates --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _propose(self, rng: np.random.Generator, left: int) -> list[np.ndarray]:
        """Rows of codes of a new generation, at most about `left`, none of them known."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What must be equal for a search to go on."""

    def _fresh(self, codes: np.ndarray, taken: set[bytes], want: int) -> list[np.ndarray]:
        """Up to `want` different legal rows within the limits that are neither known nor taken; these are then taken.

        Expensive limits are measured last and one by one, so that no more is measured than needed.
        """
        cheap = [limit for limit in self.limits if limit.cheap]
        dear = [limit for limit in self.limits if not limit.cheap]
        codes = codes[self.space.legal(codes)]
        rows: list[np.ndarray] = []
        for row in codes[inside(cheap, codes)]:
            if len(rows) >= want:
                break
            key = row.tobytes()
            if key in self._known or key in taken or not inside(dear, row[None])[0]:
                continue
            taken.add(key)
            rows.append(row.copy())
        return rows

    def _random(self, rng: np.random.Generator, taken: set[bytes], want: int) -> list[np.ndarray]:
        """Up to `want` new random rows within the limits."""
        rows: list[np.ndarray] = []
        drawn = barren = 0
        while len(rows) < want and drawn < self._draws and barren < BARREN:
            n = CHUNK if self._source is None else max(4 * (want - len(rows)), 64)
            codes = self.space.sample_codes(rng, n) if self._source is None else self._source(rng, n)
            found = self._fresh(codes, taken, want - len(rows))
            # as long as nothing at all was found, the whole budget of draws is spent
            barren = 0 if found or (self._source is None and not (rows or self._known)) else barren + 1
            rows += found
            drawn += n
        return rows

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file; also in the middle of a generation."""
        told = [[self.space.codes(one.config).tolist(), _plain(one.score), one.generation] for one in self.evaluated]
        waiting = [
            [row.tolist(), row.tobytes() in self._scores, _plain(self._scores.get(row.tobytes()))] for row in self._open
        ]
        return {
            "schema": SCHEMA,
            "settings": self._all_settings(),
            "generation": self.generation,
            "exhausted": self._exhausted,
            "evaluated": told,
            "open": waiting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: of another search (space, limits, seed, sizes of the generations). A larger budget is
                allowed where these sizes do not follow from it.
        """
        if state.get("schema") != SCHEMA:
            raise CheckpointError(f"search state of schema {state.get('schema')}; this version reads {SCHEMA}")
        own = self._all_settings()
        for key in sorted({*own, *state["settings"]}):
            if own.get(key) != state["settings"].get(key):
                raise CheckpointError(
                    f"the search was started with {key} {state['settings'].get(key)!r}, now it is {own.get(key)!r}"
                )
        self.generation, self._exhausted = state["generation"], state["exhausted"]
        self.evaluated = [
            Evaluated(self.space.config(np.array(codes, np.int8)), _score(score), generation)
            for codes, score, generation in state["evaluated"]
        ]
        self._open = [np.array(codes, np.int8) for codes, _, _ in state["open"]]
        self._scores = {
            row.tobytes(): _score(score)
            for row, (_, told, score) in zip(self._open, state["open"], strict=True)
            if told
        }
        self._known = {self.space.codes(one.config).tobytes() for one in self.evaluated}
        self._known |= {row.tobytes() for row in self._open}

    def _all_settings(self) -> dict[str, Any]:
        limits = [[one.name, one.unit, float(one.low), float(one.high)] for one in self.limits]
        seeds = [config.to_dict() for config in self._seeds]
        return {
            "kind": self.kind,
            "space": self.space.hash,
            "seed": self.seed,
            "limits": limits,
            "seeds": seeds,
            **self._settings(),
        }


def _plain(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else score


def _score(plain: float | None) -> float:
    return -math.inf if plain is None else float(plain)
