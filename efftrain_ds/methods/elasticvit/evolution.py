"""Search for the best sub-network within a budget: evolution, and random search in the same form (see `searcher`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ...core.pareto import pareto
from ...models.elastic import Space
from .limits import Limit
from .searcher import Evaluated, Searcher

__all__ = ["Evaluated", "Evolution", "RandomSearch", "Rates", "Searcher", "pareto"]


@dataclass(frozen=True)
class Rates:
    """Probabilities of mutation.

    Attributes:
        depths: all depths are drawn again together.
        rest: any other dimension, each by itself; resolution and widths included.
    """

    depths: float = 0.4
    rest: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.depths <= 1 and 0 < self.rest <= 1):
            raise ConfigError(
                f"mutation rates {self.depths:g} (depths) and {self.rest:g}; allowed: 0 to 1, the second above 0"
            )


class RandomSearch(Searcher):
    """Random sub-networks within the limits: what a search has to beat.

    Args:
        space: see `Searcher`, as the further arguments.
        limits: all of them hold for every candidate.
        batch: candidates of a generation.
        **options: `evaluations`, `seed`, `source`, `draws`; it has no seeds, which would not be random.
    """

    kind = "random"

    def __init__(self, space: Space[Any], limits: Sequence[Limit], *, batch: int = 128, **options: Any) -> None:
        super().__init__(space, limits, **options)
        self.batch = batch

    def _propose(self, rng: np.random.Generator, left: int) -> list[np.ndarray]:
        return self._random(rng, set[bytes](), min(self.batch, left))

    def _settings(self) -> dict[str, Any]:
        return {"batch": self.batch}


class Evolution(Searcher):
    """Evolution: the best found so far are mutated and crossed.

    The defaults are the published search's: 512 at first, the best 256 as parents, 128 mutants and 128 crossovers a
    generation, with smaller numbers in the same ratios where the budget is small. Unlike there, a mutation draws
    uniformly and can change the resolution. Generations that do not find enough new children are filled up at random.

    Args:
        space: see `Searcher`, as the further arguments.
        limits: all of them hold for every candidate.
        population: of the first generation; None for 512, at most a sixth of the evaluations.
        parents: best ones that have children; None for half of `population`.
        mutants: a generation; None for a quarter of `population`.
        crossovers: likewise.
        rates: of mutation.
        tries: rounds in which as many children as needed are made, until enough of them are within the limits.
        **options: `evaluations`, `seed`, `seeds`, `source`, `draws`.
    """

    kind = "evolution"

    def __init__(
        self,
        space: Space[Any],
        limits: Sequence[Limit],
        *,
        population: int | None = None,
        parents: int | None = None,
        mutants: int | None = None,
        crossovers: int | None = None,
        rates: Rates | None = None,
        tries: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(space, limits, **options)
        self.population = min(512, max(4, self.evaluations // 6)) if population is None else population
        self.parents = max(1, self.population // 2) if parents is None else parents
        self.mutants = max(1, self.population // 4) if mutants is None else mutants
        self.crossovers = max(1, self.population // 4) if crossovers is None else crossovers
        self.rates, self.tries = rates or Rates(), tries
        if min(self.population, self.parents, self.tries) < 1 or self.mutants + self.crossovers < 1:
            raise ConfigError(
                f"evolution: population {self.population}, parents {self.parents}, mutants {self.mutants}, crossovers "
                f"{self.crossovers}, tries {self.tries}; at least 1 of each is needed (mutants or crossovers may be 0)"
            )
        kinds = [dimension.kind for dimension in space.dimensions]
        self._kinds = [np.flatnonzero([kind == one for kind in kinds]) for one in dict.fromkeys(kinds)]
        self._depths = np.array([kind == "depth" for kind in kinds])

    def _propose(self, rng: np.random.Generator, left: int) -> list[np.ndarray]:
        taken: set[bytes] = set()
        if self.generation == 0:
            want = min(self.population, left)
            rows: list[np.ndarray] = []
            if self._seeds:
                rows = self._fresh(np.stack([self.space.codes(config) for config in self._seeds]), taken, want)
            return rows + self._random(rng, taken, want - len(rows))
        ranked = sorted(self.evaluated, key=lambda one: -one.score)[: self.parents]  # stable: the earliest first
        pool = np.stack([self.space.codes(one.config) for one in ranked])
        rows = self._children(rng, pool, taken, min(self.mutants, left), self._mutate)
        want = min(self.mutants + self.crossovers, left)
        rows += self._children(rng, pool, taken, want - len(rows), self._cross)
        return rows + self._random(rng, taken, want - len(rows))

    def _children(
        self,
        rng: np.random.Generator,
        pool: np.ndarray,
        taken: set[bytes],
        want: int,
        make: Callable[[np.random.Generator, np.ndarray, int], np.ndarray],
    ) -> list[np.ndarray]:
        rows: list[np.ndarray] = []
        for _ in range(self.tries):
            if len(rows) >= want:
                break
            children = self.space.settled(make(rng, pool, max(want, 16)))
            rows += self._fresh(children, taken, want - len(rows))
        return rows

    def _mutate(self, rng: np.random.Generator, pool: np.ndarray, n: int) -> np.ndarray:
        """Copies of parents in which some dimensions take the values of fresh uniform draws."""
        codes = pool[rng.integers(len(pool), size=n)]
        change = rng.random(codes.shape) < self.rates.rest
        change[:, self._depths] = (rng.random(n) < self.rates.depths)[:, None]
        values = np.stack(
            [rng.integers(len(dimension.choices), size=n, dtype=np.int8) for dimension in self.space.dimensions], 1
        )
        # layers that are left out stay so, unless the depth grows: then `settled` fills them
        return np.where(change & (codes >= 0), values, codes)

    def _cross(self, rng: np.random.Generator, pool: np.ndarray, n: int) -> np.ndarray:
        """Children of two parents: all dimensions of one kind come from one of them."""
        first, second = (pool[rng.integers(len(pool), size=n)] for _ in range(2))
        children = first.copy()
        for columns in self._kinds:
            other = rng.random(n) < 0.5
            children[np.ix_(other, columns)] = second[np.ix_(other, columns)]
        return children

    def _settings(self) -> dict[str, Any]:
        return {
            "population": self.population,
            "parents": self.parents,
            "mutants": self.mutants,
            "crossovers": self.crossovers,
            "rates": asdict(self.rates),
            "tries": self.tries,
        }
