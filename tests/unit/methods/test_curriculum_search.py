"""The schedule searches as decisions, on toy accuracies whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

from efftrain_ds.core.errors import CheckpointError, DivergenceError, PlanError
from efftrain_ds.methods.efficienttrain.config import EfficientTrainConfig, SearchConfig
from efftrain_ds.methods.efficienttrain.search import BASELINE, Costs, CurriculumSearch, Trial
from efftrain_ds.methods.efficienttrain.search_rows import candidates_of, make_search, schedule_rows

SIZES = (96, 128, 160, 192, 224)
COSTS = Costs(224, {b: (b / 224) ** 2 for b in SIZES})


def drive(search: CurriculumSearch, accuracy: Callable[[Trial], float | None], steps: int = 10**6) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < steps and (trial := search.ask()) is not None:
        trials.append(trial)
        search.tell(trial.name, accuracy(trial))
    return trials


def make(limit: float | None = None, costs: Costs = COSTS, **config: Any) -> CurriculumSearch:
    return make_search(SearchConfig(**config), costs, limit)


def allowed(floors: Sequence[int]) -> Callable[[Trial], float]:
    """Accurate (0.8) where no stage is below its floor, else worse."""

    def accuracy(trial: Trial) -> float:
        if trial.sizes is None:
            return 0.8
        return 0.8 if all(b >= floor for b, floor in zip(trial.sizes, floors, strict=True)) else 0.79

    return accuracy


PUBLISHED = (160, 160, 160, 192, 224)


@pytest.mark.parametrize("prune", [True, False])
def test_greedy_finds_the_published_outcome(prune: bool) -> None:
    search = make(algorithm="et", prune=prune)
    trials = drive(search, allowed(PUBLISHED))
    assert search.outcome is not None
    assert search.outcome.sizes == PUBLISHED
    assert search.outcome.accuracy == search.outcome.baseline == 0.8
    assert search.outcome.complete
    assert search.outcome.cost == pytest.approx(sum(COSTS.work[b] for b in PUBLISHED) / 5)
    assert search.spent == pytest.approx(sum(trial.cost for trial in trials))
    assert len({trial.name for trial in trials}) == len(trials)
    if prune:  # 192 | 160 fails; then 160 for the stages before, and 128 fails at each
        assert [t.sizes for t in trials[1:4]] == [
            (192, 192, 192, 192, 224),
            (160, 160, 160, 160, 224),
            (160, 160, 160, 192, 224),
        ]
        assert len(trials) == 1 + 6


def test_greedy_is_monotone_and_within_its_price() -> None:
    for prune, floors in product((True, False), product(SIZES, repeat=3)):
        search = make(algorithm="et", stages=4, prune=prune)
        low, high = search.extent()
        trials = drive(search, allowed((*floors, 224)))
        outcome = search.outcome
        assert outcome is not None
        # what all stages up to one may be is the largest floor among them, under that of the stages behind
        wanted = tuple(max(floors[: i + 1]) for i in range(3)) + (224,)
        assert (outcome.sizes or (224,) * 4) == wanted
        assert (outcome.sizes is None) == (wanted == (224,) * 4)
        assert low - 1e-9 <= search.spent <= high + 1e-9
        if prune:
            assert len(trials) <= 1 + 3 + 4


def test_greedy_price_is_reached() -> None:
    """Both ends of the price are those of some course of the search."""
    for prune in (True, False):
        spent = []
        for floors in product(SIZES, repeat=3):
            search = make(algorithm="et", stages=4, prune=prune)
            drive(search, allowed((*sorted(floors), 224)))
            spent.append(search.spent)
        low, high = make(algorithm="et", stages=4, prune=prune).extent()
        assert (min(spent), max(spent)) == pytest.approx((low, high))


def test_greedy_tolerance_and_divergence() -> None:
    def noisy(trial: Trial) -> float | None:
        if trial.sizes is None:
            return 0.800
        if trial.sizes[0] < 160:
            return None
        return 0.797

    none = make(algorithm="et")
    drive(none, noisy)
    assert none.outcome is not None
    assert none.outcome.sizes is None
    assert none.outcome.cost == 1
    lenient = make(algorithm="et", tolerance=0.004)
    drive(lenient, noisy)
    assert lenient.outcome is not None
    assert lenient.outcome.sizes == (160, 160, 160, 160, 224)
    assert [d for d in lenient.decisions if d["event"] == "candidate" and d["accuracy"] is None]
    with pytest.raises(DivergenceError, match="baseline"):
        drive(make(algorithm="et"), lambda trial: None)


def test_greedy_within_a_limit_keeps_what_is_sure() -> None:
    search = make(algorithm="et", limit=3.0)
    trials = drive(search, allowed(PUBLISHED))
    assert search.spent <= 3.0
    assert search.outcome is not None
    assert not search.outcome.complete
    assert search.outcome.sizes == trials[1].sizes == (192, 192, 192, 192, 224)
    assert search.decisions[-2]["event"] == "limit"
    with pytest.raises(PlanError, match="max_epochs"):
        make(algorithm="et", limit=1.5)
    with pytest.raises(PlanError, match="max_epochs"):
        make(limit=1.7)


def best_at(wanted: Sequence[int], check: float = 0.81) -> Callable[[Trial], float]:
    """The wanted size of each stage is measured best, the further away the worse."""

    def accuracy(trial: Trial) -> float:
        if trial.sizes is None:
            return 0.8
        if not trial.tune:
            return check if trial.budget < 1 else 0.805
        stage = trial.last - 1
        return 0.5 - abs(SIZES.index(trial.sizes[stage]) - SIZES.index(wanted[stage])) / 100

    return accuracy


def test_sequential_finds_the_published_outcome() -> None:
    wanted = (96, 160, 160, 224, 224)
    search = make(algorithm="et++")
    low, high = search.extent()
    trials = drive(search, best_at(wanted))
    outcome = search.outcome
    assert outcome is not None
    assert outcome.sizes == wanted
    assert outcome.budget == pytest.approx(2 / 3)
    assert outcome.cost == pytest.approx(2 / 3)  # with work = (B/R)^2 every stage costs its share
    assert low <= search.spent <= high
    by_name = {trial.name: trial for trial in trials}
    assert [t.start for t in trials if t.last == 1] == [None] * 5
    assert {t.start for t in trials if t.last == 2 and t.tune} == {"stage1-B96"}
    assert {t.start for t in trials if t.last == 3 and t.tune} == {"stage2-B160"}
    assert [t.sizes[2] for t in trials if t.last == 3 and t.tune and t.sizes] == [160, 192, 224]  # never smaller again
    check = by_name["check"]  # goes on from the last choice, so it costs the last stage alone
    assert check.start == "stage4-B224"
    assert check.cost == pytest.approx(2 / 3 / 5)
    assert search.spent == pytest.approx(1 + (5 + 5 + 3 + 3) * (2 / 3) * (1 / 5 + 0.02) + 2 / 15)


def test_sequential_ties_take_the_smaller_size() -> None:
    def flat(trial: Trial) -> float:
        return 0.5 + (0.004 if trial.tune and trial.sizes and trial.sizes[trial.last - 1] == 224 else 0)

    exact, lenient = make(check=False, stages=3), make(check=False, stages=3, tolerance=0.005)
    drive(exact, flat)
    drive(lenient, flat)
    assert exact.outcome is not None
    assert lenient.outcome is not None
    assert exact.outcome.sizes == (224, 224, 224)
    assert lenient.outcome.sizes == (96, 96, 224)
    assert lenient.outcome.baseline is None
    assert BASELINE not in [name for name, _ in lenient.results]


def test_sequential_falls_back() -> None:
    whole = make(stages=3)
    trials = drive(whole, best_at((128, 160, 224), check=0.79))
    assert whole.outcome is not None
    assert whole.outcome.sizes == (128, 160, 224)
    assert whole.outcome.budget == 1
    assert whole.outcome.cost == pytest.approx(1)
    assert trials[-1].name == "check-whole-budget"
    assert trials[-1].start is None
    plain = make(stages=3, compute=1.0)
    trials = drive(plain, lambda t: 0.8 if t.sizes is None else 0.7)
    assert trials[-1].name == "check"  # its budget is the baseline's already
    assert plain.outcome is not None
    assert plain.outcome.sizes is None


DEAR = Costs(224, {96: 0.25, 224: 1.0})
"""96 px costs more than (96/224)^2, as a head does that costs the same at all sizes."""


@pytest.mark.parametrize("check", [0.7, 0.805])
def test_sequential_falls_back_to_no_more_than_the_baselines_cost(check: float) -> None:
    search = make(stages=3, costs=DEAR)
    low, high = search.extent()
    others = best_at((96, 96, 224), check=0.7)
    trials = drive(search, lambda t: check if t.name == "check-whole-budget" else others(t))
    mean = (2 * 0.25 * (224 / 96) ** 2 + 1) / 3
    assert trials[-1].name == "check-whole-budget"
    assert trials[-1].budget == pytest.approx(1 / mean)
    assert trials[-1].cost == pytest.approx(1)
    assert low <= search.spent <= high + 1e-9
    assert search.outcome is not None
    assert search.outcome.sizes == ((96, 96, 224) if check > 0.8 else None)
    assert search.outcome.cost <= 1 + 1e-6


@pytest.mark.parametrize("check", [True, False])
def test_sequential_with_all_of_the_budget_costs_no_more_than_the_baseline(check: bool) -> None:
    search = make(stages=3, costs=DEAR, compute=1.0, check=check)
    trials = drive(search, lambda t: 0.8 if t.sizes is None or t.sizes == (96, 96, 224) else 0.7)
    assert "check-whole-budget" not in [trial.name for trial in trials]
    assert search.outcome is not None
    assert search.outcome.sizes == (96, 96, 224)
    assert 0.9 < search.outcome.cost <= 1 + 1e-6


def test_sequential_refuses_when_everything_diverges() -> None:
    with pytest.raises(DivergenceError, match="stage 1"):
        drive(make(), lambda trial: 0.8 if trial.sizes is None else None)


def test_sequential_within_a_limit() -> None:
    search = make(limit=2.3)
    trials = drive(search, best_at((96, 160, 160, 224, 224)))
    assert search.spent <= 2.3
    assert search.outcome is not None
    assert not search.outcome.complete
    assert search.outcome.sizes == (96, 224, 224, 224, 224)  # one stage was decided, the rest is full, and checked
    assert trials[-1].name == "check"
    assert [d["event"] for d in search.decisions if d["event"] in ("stage", "limit")] == ["stage", "limit"]
    short = make(limit=2.3)
    drive(short, best_at((96, 160, 160, 224, 224), check=0.7))
    assert short.outcome is not None
    assert short.outcome.sizes is None
    assert "limit was reached before check-whole-budget" in short.outcome.why


@pytest.mark.parametrize("algorithm", ["et", "et++"])
@pytest.mark.parametrize("limit", [None, 4.0])
def test_stopped_anywhere_and_resumed_decides_the_same(algorithm: str, limit: float | None) -> None:
    accuracy = allowed(PUBLISHED) if algorithm == "et" else best_at((96, 160, 160, 224, 224))
    whole = make(algorithm=algorithm, limit=limit)
    trials = drive(whole, accuracy)
    for stop in range(len(trials) + 1):
        first = make(algorithm=algorithm, limit=limit)
        drive(first, accuracy, stop)
        again = make(algorithm=algorithm, limit=limit)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert again.needed == first.needed
        assert again.decisions == first.decisions
        assert [t.name for t in drive(again, accuracy)] == [t.name for t in trials[stop:]]
        assert again.outcome == whole.outcome
        assert again.decisions == whole.decisions


def test_states_of_other_searches_are_refused() -> None:
    search = make(algorithm="et")
    with pytest.raises(CheckpointError, match="waits for baseline"):
        search.load_state_dict({"results": [["stage1-B96", 0.5]]})
    drive(search, allowed(PUBLISHED))
    with pytest.raises(CheckpointError, match="nothing"):
        search.tell("check", 0.5)


def test_states_that_are_needed() -> None:
    search = make(stages=3)
    accuracy = best_at((128, 160, 224))
    kept = []
    while (trial := search.ask()) is not None:
        search.tell(trial.name, accuracy(trial))
        pending = search.ask()
        if pending is not None and pending.start is not None:
            assert pending.start in search.needed
        kept.append(len(search.needed))
    assert max(kept) == 1 + 4  # the state before, and the candidates of a stage
    assert kept[-1] == 0


def test_candidates() -> None:
    config = SearchConfig()
    assert candidates_of(config, 224, 32) == SIZES
    assert candidates_of(config, 28, 4) == (12, 16, 20, 24, 28)
    assert candidates_of(config, 32, 4) == (12, 20, 24, 28, 32)
    assert candidates_of(SearchConfig(candidates=[192, 112]), 224, 16) == (112, 192, 224)
    with pytest.raises(PlanError, match=r"100 is not a multiple of the model's stride 16; 256 is above"):
        candidates_of(SearchConfig(candidates=[112, 100, 256]), 224, 16)
    with pytest.raises(PlanError, match="15 is odd"):
        candidates_of(SearchConfig(candidates=[15]), 30, 3)
    with pytest.raises(PlanError, match="nothing to choose from"):
        candidates_of(SearchConfig(candidates=[224]), 224, 16)


def test_rows_of_a_schedule() -> None:
    et = schedule_rows(SearchConfig(algorithm="et"), PUBLISHED, magnitude=True)
    assert [(r["until"], r["bandwidth"], r["magnitude"]) for r in et] == [
        (0.2, 160, 1.0),
        (0.4, 160, 3.0),
        (0.6, 160, 5.0),
        (0.8, 192, 7.0),
        (1.0, 224, 9.0),
    ]
    rows = schedule_rows(SearchConfig(), (96, 160, 160, 224, 224), magnitude=True)
    assert [(r["bandwidth"], r["magnitude"]) for r in rows] == [
        (96, 0), (96, 1), (160, 2), (160, 3), (160, 4), (160, 5), (224, 6), (224, 7), (224, 8), (224, 9),
    ]  # fmt: skip
    thirds = schedule_rows(SearchConfig(stages=3), (96, 160, 224), magnitude=False)
    assert [r["bandwidth"] for r in thirds] == [96] * 4 + [160] * 4 + [224] * 4
    assert {r["magnitude"] for r in thirds} == {None}
    for found in (et, rows, thirds):
        EfficientTrainConfig.model_validate({"schedule": found})


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"tolerance": 0.2}, "less than or equal to 0.1"),
        ({"tolerance": -0.1}, "greater than or equal to 0"),
        ({"candidates": [96, 96]}, "different"),
        ({"tune": 0.3, "stages": 4}, "below the share 1/4"),
        ({"hold_out": {"share": 0.1, "per_class": 3}}, "not both"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SearchConfig.model_validate(config)
