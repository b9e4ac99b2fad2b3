"""The greedy schedule search of EfficientTrain, reconstructed; see `search` and docs/curriculum_search.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from .search import CurriculumSearch, Outcome, Steps, Trial


class GreedySearch(CurriculumSearch):
    """ET (reconstructed): the least cost at which the final accuracy is not below the baseline's.

    From the last stage but one to the first, the smallest size is sought that all stages up to this one may have. Every
    candidate is a whole training. With `prune` a stage goes down from the size of the stage behind it, which is known
    to be accurate, and stops at the first failure, so that at most (stages - 1) + (sizes - 1) trainings follow the
    baseline's.
    """

    def cost(self, sizes: Sequence[int]) -> float:
        """Of a whole training: stages have equal numbers of samples."""
        return sum(self.costs.work[b] for b in sizes) / len(sizes)

    def first_cost(self) -> float:
        """See `CurriculumSearch`."""
        return 1.0 + self.cost(self._prefix(self._options(self.costs.full)[0], self.config.stages - 2, self._full(())))

    def prices(self) -> list[tuple[str, float]]:
        """See `CurriculumSearch`."""
        last = self.config.stages - 2
        rows = [
            (f"all stages but the last at {b} px", self.cost(self._prefix(b, last, self._full(()))))
            for b in self.costs.sizes[:-1]
        ]
        return [("baseline", 1.0), *rows]

    def extent(self) -> tuple[float, float]:
        """See `CurriculumSearch`."""

        @cache
        def walk(stage: int, behind: tuple[int, ...]) -> tuple[float, float]:
            """(least, most) from the decision of `stage` on, where the stages behind it have these sizes."""
            if stage < 0:
                return 0.0, 0.0
            options = self._options(behind[0])
            spent = [0.0, *accumulate(self.cost((*[b] * (stage + 1), *behind)) for b in options)]
            ends = [(behind[0], spent[1 if self.config.prune and options else -1])]
            for k, b in enumerate(options, start=1):  # this one is what remains
                trained = min(k + 1, len(options)) if self.config.prune else k
                ends.append((b, spent[trained]))
            found = [(cost, walk(stage - 1, (b, *behind))) for b, cost in ends]
            return min(cost + low for cost, (low, _) in found), max(cost + high for cost, (_, high) in found)

        low, high = walk(self.config.stages - 2, (self.costs.full,))
        return 1.0 + low, 1.0 + high

    def _options(self, behind: int) -> list[int]:
        """Sizes to try, in order, at a stage that is accurate at the size of the stage behind it."""
        smaller = [b for b in self.costs.sizes if b < behind]
        return smaller[::-1] if self.config.prune else smaller

    def _prefix(self, size: int, stage: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """`size` in all stages up to `stage`."""
        return (*[size] * (stage + 1), *sizes[stage + 1 :])

    def _steps(self) -> Steps:
        baseline = yield self._plain()
        assert baseline is not None
        needed = baseline - self.config.tolerance
        self._decide("baseline", accuracy=baseline, needed=needed)
        sizes, accuracy, complete = self._full(()), None, True
        for stage in range(self.config.stages - 2, -1, -1):
            for b in self._options(sizes[stage]):
                wanted = self._prefix(b, stage, sizes)
                trial = Trial(f"stage{stage + 1}-B{b}", wanted, 1.0, self.config.stages, None, False, self.cost(wanted))
                if not self._affordable(trial.cost):
                    complete = False
                    self._decide("limit", stage=stage + 1, bandwidth=b, cost=trial.cost, spent=self.spent)
                    break
                found = yield trial
                good = found is not None and found >= needed
                self._decide(
                    "candidate",
                    stage=stage + 1,
                    bandwidth=b,
                    schedule=list(wanted),
                    accuracy=found,
                    needed=needed,
                    cost=trial.cost,
                    accepted=good,
                )
                if good:
                    sizes, accuracy = wanted, found
                if good is not self.config.prune:
                    break
            if not complete:
                break
            self._decide("stage", stage=stage + 1, bandwidth=sizes[stage])
        if accuracy is None:
            why = "no candidate is as accurate as the baseline" if complete else "the limit was reached before"
            outcome = self._nothing(baseline, why, complete)
        else:
            why = "its whole training is as accurate as the baseline"
            outcome = Outcome(sizes, 1.0, self.cost(sizes), accuracy, baseline, why, complete)
        self._decide("result", schedule=outcome.sizes and list(outcome.sizes), budget=outcome.budget, why=outcome.why)
        return outcome
