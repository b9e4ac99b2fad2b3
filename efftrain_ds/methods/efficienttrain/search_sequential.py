"""The computation-constrained sequential search of EfficientTrain++, reconstructed; see `search`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

from ...core.errors import DivergenceError
from .search import CurriculumSearch, Outcome, Steps, Trial

_EPS = 1e-6


class SequentialSearch(CurriculumSearch):
    """ET++ (reconstructed): stages of equal compute, decided from the first to the last.

    Every size from the last stage's on is trained for this stage, goes on at full resolution for a short while, and is
    measured; the best one stays (among those within the tolerance the smallest), and the next stage goes on from its
    state before that while. The last stage has the full size. Then the schedule is trained to its end, which costs its
    remaining stages only, and compared with the baseline (`check`): where it is less accurate, it is trained with the
    baseline's whole budget, and where that is less accurate too, the baseline is the result. No schedule costs more
    than the baseline: where sizes are dearer by their MACs than as they are scheduled, the budget is that much smaller.
    """

    @cached_property
    def compute(self) -> float:
        """Budget of the schedule as a share of the baseline's: as configured, but no sizes cost more than it."""
        return min(self.config.compute, *(self._most([b] * self.config.stages) for b in self.costs.sizes))

    def cost(self, sizes: Sequence[int], budget: float, first: int = 0) -> float:
        """Of the stages from `first` on: stages have equal compute as it is scheduled, by (size / full)^2."""
        share = budget / self.config.stages
        return sum(share * self.costs.work[b] / self.costs.pace(b) for b in sizes[first:])

    def _candidate(self, small: Sequence[int], start: str | None) -> Trial:
        """Training of the last of the stages `small`, and the tuning."""
        compute, stage = self.compute, len(small) - 1
        cost = self.cost(small, compute, stage) + compute * self.config.tune
        name = f"stage{stage + 1}-B{small[-1]}"
        return Trial(name, self._full(small), compute, len(small), start, True, cost)

    def first_cost(self) -> float:
        """See `CurriculumSearch`; all candidates of the first stage are needed to decide it."""
        return float(self.config.check) + sum(self._candidate([b], None).cost for b in self.costs.sizes) + self._rest(1)

    def _rest(self, stages: int) -> float:
        """Most that the schedule's training costs behind so many stages, where it is checked."""
        if not self.config.check:
            return 0.0
        return max(self.cost([b] * self.config.stages, self.compute, stages) for b in self.costs.sizes)

    def prices(self) -> list[tuple[str, float]]:
        """See `CurriculumSearch`."""
        rows = [(f"one stage at {b} px, tuned and measured", self._candidate([b], None).cost) for b in self.costs.sizes]
        if self.config.check:
            compute, none = self.compute, self._full(())
            rows = [("baseline", 1.0), *rows, ("the rest of the schedule", self.cost(none[-1:], compute))]
            if self.config.compute < 1:
                rows.append(("where that is not enough, the schedule with the baseline's budget", self.cost(none, 1)))
        return rows

    def extent(self) -> tuple[float, float]:
        """See `CurriculumSearch`."""
        stages, compute, check = self.config.stages, self.compute, self.config.check

        @cache
        def walk(sizes: tuple[int, ...]) -> tuple[float, float]:
            options = [b for b in self.costs.sizes if not sizes or b >= sizes[-1]]
            if len(sizes) == stages - 1 or len(options) == 1:
                whole = self._full(sizes)
                low = self.cost(whole, compute, len(sizes)) if check else 0.0
                again = self.cost(whole, self._most(whole)) if check and self._again(whole) else 0.0
                return low, low + again
            trained = sum(self._candidate([*sizes, b], None).cost for b in options)
            found = [walk((*sizes, b)) for b in options]
            return trained + min(low for low, _ in found), trained + max(high for _, high in found)

        low, high = walk(())
        return float(check) + low, float(check) + high

    def _again(self, sizes: Sequence[int]) -> bool:
        """Whether the schedule can be trained with a larger budget that is not above the baseline's cost."""
        return self.config.compute < 1 and self._most(sizes) > self.compute + _EPS

    def _most(self, sizes: Sequence[int]) -> float:
        """Largest budget, up to the baseline's, with which these sizes cost no more than the baseline by their MACs."""
        cost = self.cost(sizes, 1.0)
        return 1.0 if cost <= 1 + _EPS else 1.0 / cost

    def _steps(self) -> Steps:
        config, baseline = self.config, None
        if config.check:
            baseline = yield self._plain()
            assert baseline is not None
            self._decide("baseline", accuracy=baseline, needed=baseline - config.tolerance)
        small: list[int] = []
        start: str | None = None
        complete = True
        for stage in range(config.stages - 1):
            options = [b for b in self.costs.sizes if not small or b >= small[-1]]
            if len(options) == 1:
                break
            trials = [self._candidate([*small, b], start) for b in options]
            cost = sum(trial.cost for trial in trials)
            if not self._affordable(cost + self._rest(stage + 1)):
                complete = False
                self._decide("limit", stage=stage + 1, cost=cost, spent=self.spent)
                break
            found: dict[int, float | None] = {}
            for b, trial in zip(options, trials, strict=True):
                self.needed.add(trial.name)
                found[b] = yield trial
                self._decide(
                    "candidate",
                    stage=stage + 1,
                    bandwidth=b,
                    schedule=[*small, b],
                    accuracy=found[b],
                    cost=trial.cost,
                )
            finite = {b: accuracy for b, accuracy in found.items() if accuracy is not None}
            if not finite:
                raise DivergenceError(f"every candidate of stage {stage + 1} of the search diverged: {options}")
            best = max(finite.values())
            chosen = min(b for b, accuracy in finite.items() if accuracy >= best - config.tolerance)
            small.append(chosen)
            start = trials[options.index(chosen)].name
            self.needed = {start}
            self._decide("stage", stage=stage + 1, bandwidth=chosen, accuracy=finite[chosen], best=best)
        sizes = self._full(small)
        outcome = Outcome(
            sizes, self.compute, self.cost(sizes, self.compute), None, None, "the whole was not trained", complete
        )
        if baseline is not None:
            outcome = yield from self._check(sizes, len(small), start, baseline, complete)
        self._decide("result", schedule=outcome.sizes and list(outcome.sizes), budget=outcome.budget, why=outcome.why)
        return outcome

    def _check(self, sizes: tuple[int, ...], done: int, start: str | None, baseline: float, complete: bool) -> Steps:
        """Train the whole schedule, if need be with the baseline's budget, and compare."""
        config, needed = self.config, baseline - self.config.tolerance
        tries = [Trial("check", sizes, self.compute, config.stages, start, False, self.cost(sizes, self.compute, done))]
        if self._again(sizes):
            most = self._most(sizes)
            whole = self.cost(sizes, most)
            tries.append(Trial("check-whole-budget", sizes, most, config.stages, None, False, whole))
        for trial in tries:
            if not self._affordable(trial.cost):
                self._decide("limit", check=trial.name, cost=trial.cost, spent=self.spent)
                return self._nothing(baseline, f"the limit was reached before {trial.name}", False)
            accuracy = yield trial
            good = accuracy is not None and accuracy >= needed
            self._decide("check", budget=trial.budget, accuracy=accuracy, needed=needed, cost=trial.cost, accepted=good)
            if good:
                cost, why = self.cost(sizes, trial.budget), "its whole training is as accurate as the baseline"
                return Outcome(sizes, trial.budget, cost, accuracy, baseline, why, complete)
        return self._nothing(baseline, "the schedule that was found is less accurate than the baseline", complete)
