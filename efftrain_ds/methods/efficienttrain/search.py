"""The schedule searches of EfficientTrain and EfficientTrain++ as decisions alone: ask for a training, tell its top-1.

No code of either search is published. Established of the ET search is its aim (the least cost at the baseline's
accuracy) and outcome, of the ET++ search the name, the aim (the best accuracy at a fixed compute) and the outcome; the
order of the steps here is a reconstruction that is consistent with the outcomes, and all constants are ours. See
docs/curriculum_search.md.

A search is a function of the accuracies that it is told, so these are its whole state.

Costs are shares of the baseline: training at full resolution for the configured epochs.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...core.errors import CheckpointError, DivergenceError, PlanError
from .config import KEY, SearchConfig

BASELINE = "baseline"
_EPS = 1e-9


@dataclass(frozen=True)
class Trial:
    """One training that a search asks for.

    Attributes:
        name: unique in the search; a folder name.
        sizes: bandwidth of every stage; None = the plain baseline.
        budget: of that schedule, as a share of the baseline's.
        last: stages that are trained, from the first on; the rest is left out.
        start: trial whose last state it goes on from (its stages are the same); None = from the start.
        tune: train at full resolution for a short while afterwards, before the accuracy is measured.
        cost: of what is trained here.
    """

    name: str
    sizes: tuple[int, ...] | None
    budget: float
    last: int
    start: str | None
    tune: bool
    cost: float


@dataclass(frozen=True)
class Outcome:
    """What a search has found.

    Attributes:
        sizes: bandwidth of every stage; None = no schedule is as good as the plain baseline.
        budget: of the schedule, as a share of the baseline's.
        cost: of the schedule by the model's MACs.
        accuracy: of its whole training; None where it was not trained whole.
        baseline: accuracy of the baseline; None where it was not trained.
        why: in words.
        complete: the limit of the search's cost did not end it.
    """

    sizes: tuple[int, ...] | None
    budget: float
    cost: float
    accuracy: float | None
    baseline: float | None
    why: str
    complete: bool


@dataclass(frozen=True)
class Costs:
    """What training at each size costs.

    Attributes:
        full: full resolution in pixels.
        work: forward MACs of an image of each size over those at full resolution, the full one included.
    """

    full: int
    work: Mapping[int, float]

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes, ascending."""
        return tuple(sorted(self.work))

    def pace(self, size: int) -> float:
        """Cost (size / full)^2 of a sample as EfficientTrain++ schedules it."""
        return (size / self.full) ** 2


Steps: TypeAlias = Generator[Trial, "float | None", Outcome]


class CurriculumSearch:
    """Base of the two searches.

    Args:
        config: of the search.
        costs: of the sizes to choose from.
        limit: most that the search may cost, as a share of the baseline; None = no limit.

    Raises:
        PlanError: the limit does not allow a single candidate.
    """

    def __init__(self, config: SearchConfig, costs: Costs, limit: float | None = None):
        self.config, self.costs, self.limit = config, costs, math.inf if limit is None else limit
        self.results: list[tuple[str, float | None]] = []
        self.decisions: list[dict[str, Any]] = []
        self.needed: set[str] = set()
        """Trials whose last state a later one may go on from."""
        self.spent = 0.0
        self.outcome: Outcome | None = None
        first = self.first_cost()
        if first > self.limit + _EPS:
            raise PlanError(
                f"{KEY}.search.max_epochs: the limit is {self.limit:.3g} times the baseline, but the cheapest start "
                f"(the baseline where it is needed, and one candidate) costs {first:.3g} times the baseline"
            )
        self._run = self._steps()
        self._pending: Trial | None = next(self._run)

    def ask(self) -> Trial | None:
        """The training to do now; None at the end."""
        return self._pending

    def tell(self, name: str, accuracy: float | None) -> None:
        """The top-1 (0 to 1) of the training that was asked for; None where it diverged.

        Raises:
            CheckpointError: another training was asked for.
            DivergenceError: the baseline, or all candidates of a stage, diverged.
        """
        trial = self._pending
        if trial is None or trial.name != name:
            raise CheckpointError(f"the search waits for {trial.name if trial else 'nothing'}, not for {name}")
        if name == BASELINE and accuracy is None:
            raise DivergenceError("the baseline of the search diverged: there is nothing to compare with")
        self.results.append((name, accuracy))
        self.spent += trial.cost
        try:
            self._pending = self._run.send(accuracy)
        except StopIteration as stop:
            self.outcome, self._pending = stop.value, None
            self.needed = set()

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"results": [list(result) for result in self.results]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; call on a fresh search.

        Raises:
            CheckpointError: the state is of another search.
        """
        for name, accuracy in state["results"]:
            self.tell(name, accuracy)

    def first_cost(self) -> float:
        """Cost of the baseline, where it is needed, and of the cheapest candidate."""
        raise NotImplementedError

    def extent(self) -> tuple[float, float]:
        """(least, most) that the search may cost without its limit."""
        raise NotImplementedError

    def prices(self) -> list[tuple[str, float]]:
        """Trainings that may be asked for, in words, each with its cost."""
        raise NotImplementedError

    def _steps(self) -> Steps:
        raise NotImplementedError

    def _affordable(self, cost: float) -> bool:
        return self.spent + cost <= self.limit + _EPS

    def _decide(self, event: str, **data: Any) -> None:
        self.decisions.append({"n": len(self.decisions), "event": event, **data})

    def _plain(self) -> Trial:
        return Trial(BASELINE, None, 1.0, self.config.stages, None, False, 1.0)

    def _full(self, small: Sequence[int]) -> tuple[int, ...]:
        """Sizes of all stages, full behind `small`."""
        return (*small, *[self.costs.full] * (self.config.stages - len(small)))

    def _nothing(self, baseline: float, why: str, complete: bool) -> Outcome:
        return Outcome(None, 1.0, 1.0, baseline, baseline, why, complete)
