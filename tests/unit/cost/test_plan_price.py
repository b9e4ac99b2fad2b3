import json

import pytest

from efftrain_ds.core.errors import PlanError
from efftrain_ds.core.timeline import PlanSpec, Schedule, Segment, Timeline, merge_timelines
from efftrain_ds.cost.macs import vit_macs
from efftrain_ds.cost.plan import PricedPlan, price
from efftrain_ds.cost.throughput import Measured, Throughput


def conv(side: int) -> int:
    """MACs of a net whose cost follows the area exactly; 1 G at 224."""
    return side * side * 10**9 // 224**2


def vit_small(side: int) -> int:
    return vit_macs(side, dim=384, depth=12)


ETPP = [(0.0, 0.2, 96), (0.2, 0.6, 160), (0.6, 1.0, 224)]
ET = [(0.0, 0.6, 160), (0.6, 0.8, 192), (0.8, 1.0, 224)]


def schedule(stages: list[tuple[float, float, int]], pacing: str, **changes: object) -> Schedule:
    values: dict = dict(
        seed=0, epochs=200.0, samples=1_281_167, batch=4096, micro_batch=256, world=8, resolution=224, stride=16
    )
    spec = PlanSpec(**{**values, **changes})
    segments = tuple(
        Segment(a, b, {"bandwidth": side, "ra_magnitude": float(i)}, pace=(side / 224) ** 2)
        for i, (a, b, side) in enumerate(stages)
    )
    return merge_timelines([Timeline(segments, pacing)], spec)


def priced(plan: Schedule, macs=vit_small, **more: object) -> PricedPlan:
    sides = [s.settings["bandwidth"] for s in plan.stages]
    values: dict = dict(
        macs=[macs(b) for b in sides],
        full_macs=macs(224),
        activations=[1000 * b for b in sides],
        model="vit_small_patch16_224",
        params=22_050_664,
        precision="bf16",
        zero_stage=2,
    )
    return price(plan, **{**values, **more})


def test_etpp_costs_its_budget_on_a_conv_net_and_less_on_a_vit() -> None:
    plan = schedule(ETPP, "compute")
    on_conv, on_vit = priced(plan, conv), priced(plan)
    assert on_conv.relative == pytest.approx(1.0, abs=1e-4)
    assert [s.share for s in on_conv.stages] == pytest.approx([0.2, 0.4, 0.4], abs=1e-4)
    r96, r160 = vit_small(96) / vit_small(224), vit_small(160) / vit_small(224)
    by_hand = 0.2 * r96 * (224 / 96) ** 2 + 0.4 * r160 * (224 / 160) ** 2 + 0.4
    assert on_vit.relative == pytest.approx(by_hand, abs=1e-4)
    assert round(by_hand, 3) == 0.978
    assert on_vit.baseline_epochs == pytest.approx(200 * by_hand, abs=0.02)
    assert on_vit.data_epochs == pytest.approx(2.2729 * 200, abs=0.02)
    assert [s.epochs for s in on_vit.stages] == pytest.approx([217.8, 156.8, 80.0], abs=0.05)


def test_et_relative_cost() -> None:
    plan = priced(schedule(ET, "samples", epochs=300.0))
    assert plan.relative == pytest.approx(0.6 * 0.493 + 0.2 * 0.721 + 0.2, abs=5e-4)
    assert plan.data_epochs == pytest.approx(300, abs=0.01)


def test_dense_is_its_own_baseline() -> None:
    plan = priced(schedule([(0.0, 1.0, 224)], "samples"))
    assert plan.relative == pytest.approx(1.0, abs=1e-4)
    assert plan.total_cost == 3 * vit_small(224) * 4096 * plan.schedule.total_steps


def test_shares_and_progress_in_cost() -> None:
    plan = priced(schedule(ETPP, "compute"))
    assert sum(s.share for s in plan.stages) == pytest.approx(1.0, abs=1e-12)
    assert sum(s.cost for s in plan.stages) == plan.total_cost
    total = plan.schedule.total_steps
    assert plan.cost_at(0) == 0.0
    assert plan.cost_at(total) == plan.cost_at(total + 5) == 1.0
    first, second = plan.stages[0], plan.stages[1]
    assert plan.cost_at(first.stage.end_step) == pytest.approx(first.share)
    middle = second.stage.start_step + second.stage.steps / 2
    assert plan.cost_at(middle) == pytest.approx(first.share + second.share / 2)
    for step in (0, 1, first.stage.end_step, 70_000, total):
        assert sum(plan.costs_left(step)) == pytest.approx(1 - plan.cost_at(step))


def test_steps_fixed_by_the_user() -> None:
    plan = priced(schedule(ET, "samples", epochs=0.0, samples=0, steps=1000))
    assert plan.schedule.total_steps == 1000
    assert plan.relative == pytest.approx(0.6 * 0.493 + 0.2 * 0.721 + 0.2, abs=5e-4)
    assert plan.baseline_epochs is None
    assert plan.data_epochs is None
    assert plan.epoch_at(10) is None
    assert all(s.epochs is None for s in plan.stages)


def test_memory_and_epoch() -> None:
    plan = priced(schedule(ETPP, "compute"))
    p = 22_050_664
    states = 2 * p + (2 + 4 + 8) * (p // 8)
    assert plan.peak_memory == states + 224_000
    assert plan.stages[0].memory.total == states + 96_000
    assert plan.epoch_at(1000) == pytest.approx(1000 * 4096 / 1_281_167)


def test_to_dict_is_json() -> None:
    plan = priced(schedule(ETPP, "compute"), methods=[("efficienttrain", "B96 -> B224")])
    document = json.loads(json.dumps(plan.to_dict()))
    assert document["relative_cost"] == plan.relative
    assert [s["share"] for s in document["stages"]] == [s.share for s in plan.stages]
    assert document["stages"][1]["settings"] == {"bandwidth": 160, "ra_magnitude": 1.0}
    assert document["seconds"] is None


def profile(**changes: object) -> Throughput:
    entries = tuple(Measured(b, 256, 2, vit_small(b), 0.1 + vit_small(b) * 512 * 1e-12, 50) for b in (96, 224))
    values: dict = dict(
        machine="X", torch="2.15", world=8, key="vit_small_patch16_224 bf16 zero2", date="2026-01-02", entries=entries
    )
    return Throughput(**{**values, **changes})


def test_predicted_seconds() -> None:
    plan = priced(schedule(ETPP, "compute"), throughput=profile())
    how = [s.prediction.how for s in plan.stages if s.prediction]
    assert how == ["measured", "interpolated", "measured"]
    expected = 0.1 + vit_small(160) * 512 * 1e-12
    assert plan.stages[1].prediction is not None
    assert plan.stages[1].prediction.seconds == pytest.approx(expected)
    assert plan.seconds == pytest.approx(sum(s.stage.steps * s.prediction.seconds for s in plan.stages if s.prediction))
    assert plan.source == "measured 2026-01-02 on X, 8 ranks, torch 2.15"


def test_profile_of_other_ranks_or_models() -> None:
    plan = priced(schedule(ETPP, "compute"), throughput=profile(world=1))
    assert plan.source == "measured 2026-01-02 on X, 1 rank, torch 2.15 (this plan has 8)"
    with pytest.raises(PlanError, match='measured for "resnet50 fp32 zero0", this plan is "vit_small'):
        priced(schedule(ETPP, "compute"), throughput=profile(key="resnet50 fp32 zero0"))
    assert priced(schedule(ETPP, "compute"), throughput=profile(entries=())).seconds is None
