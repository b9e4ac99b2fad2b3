"""Plans of models whose depth and resolution change over the run."""

import json
from typing import Any, ClassVar

import pytest

from efftrain_ds.config.loader import LoadedConfig, build_methods, load_config
from efftrain_ds.core.errors import PlanError
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method, unregister_method
from efftrain_ds.core.strict import StrictModel
from efftrain_ds.core.timeline import PlanSpec, Segment, Timeline
from efftrain_ds.cost.macs import vit_macs
from efftrain_ds.cost.plan import bandwidth_of
from efftrain_ds.cost.render import plan_text
from efftrain_ds.observe.meters import StepMeter
from efftrain_ds.planning import make_plan, measured_throughput, time_left
from efftrain_ds.train_setup import shortened


class GrowConfig(StrictModel):
    """Equal stages of growing depth and side; `extremes` also gives other depths that may run instead."""

    depths: list[int] = [6, 8, 10, 12]
    sides: list[int] = [128, 160, 192, 224]
    extremes: bool = False


def equal_stages(depths: list[int], sides: list[int], **more: Any) -> Timeline:
    n = len(depths)
    return Timeline(
        tuple(
            Segment(i / n, (i + 1) / n, {"depth": d, "resolution": r, "drop_path": 0.1 * i, **more})
            for i, (d, r) in enumerate(zip(depths, sides, strict=True))
        )
    )


class Grow(Method):
    """Grows; counts its instances."""

    name: ClassVar[str] = "test_grow"
    Config: ClassVar[type[StrictModel]] = GrowConfig
    changes_parameters: ClassVar[bool] = True
    made: ClassVar[int] = 0

    def __init__(self, config: Any):
        super().__init__(config)
        type(self).made += 1

    def plan(self, spec: PlanSpec) -> Timeline:
        return equal_stages(self.config.depths, self.config.sides)

    def alternatives(self, spec: PlanSpec) -> dict[str, Timeline]:
        if not self.config.extremes:
            return {}
        n, depths, sides = len(self.config.depths), self.config.depths, self.config.sides
        cheapest = equal_stages([depths[0]] * (n - 1) + depths[-1:], [sides[0]] * (n - 1) + sides[-1:])
        return {"dearest": equal_stages([depths[-1]] * n, [sides[-1]] * n), "cheapest": cheapest}


class Also(Grow):
    """A second method that leaves its stages open."""

    name: ClassVar[str] = "test_also"


class Crop(Method):
    """Half of the budget at a bandwidth of 96."""

    name: ClassVar[str] = "test_crop"
    phase: ClassVar[str] = "data"

    def plan(self, spec: PlanSpec) -> Timeline:
        return Timeline((Segment(0.0, 0.5, {"bandwidth": 96}), Segment(0.5, 1.0, {"bandwidth": spec.resolution})))


@pytest.fixture(autouse=True)
def _methods() -> Any:
    for cls in (Grow, Also, Crop):
        register_method(cls)
    yield
    for cls in (Grow, Also, Crop):
        unregister_method(cls.name)


def load(methods: dict[str, Any], model: dict[str, Any] | None = None, resolution: int = 224) -> LoadedConfig:
    return load_config(
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 1},
            "efftrain": {
                "schema": 1,
                "run": {"epochs": 40},
                "model": {"name": "deit_small_patch16_224", "num_classes": 1000, **(model or {})},
                "data": {"samples": 64000, "resolution": resolution},
                "methods": methods,
            },
        }
    )


def test_uniform_growth_of_deit_small_costs_its_published_share() -> None:
    plan = make_plan(load({"test_grow": {}}), world=2)
    assert plan.relative == pytest.approx(0.523, abs=0.002)
    expected = [vit_macs(r, dim=384, depth=d) for d, r in ((6, 128), (8, 160), (10, 192), (12, 224))]
    assert [s.macs for s in plan.stages] == expected
    assert plan.full_macs == expected[-1]
    assert plan.range is None
    assert "searched" not in plan_text(plan)


def test_parameters_and_memory_follow_the_depth_of_the_stage() -> None:
    plan = make_plan(load({"test_grow": {}}), world=2)
    block = 12 * 384**2 + 13 * 384
    assert plan.params == make_plan(load({}), world=2).params
    assert [(plan.params - s.memory.parameters // 4) // block for s in plan.stages] == [6, 4, 2, 0]
    assert plan.stages[0].memory.moments == 8 * ((plan.params - 6 * block + 1) // 2)
    full = make_plan(load({"test_grow": {"depths": [12] * 4}}), world=2)
    half = plan.stages[0].memory.activations / full.stages[0].memory.activations
    assert half == pytest.approx(0.5, abs=0.02)
    assert plan.peak_memory == full.peak_memory


def test_the_network_sees_the_smaller_side_of_two_methods() -> None:
    assert bandwidth_of({"bandwidth": 96, "resolution": 160}, 224) == 96
    assert bandwidth_of({"bandwidth": 224, "resolution": 160}, 224) == 160
    assert bandwidth_of({"resolution": 160}, 224) == 160
    assert bandwidth_of({}, 224) == 224
    plan = make_plan(load({"test_grow": {}, "test_crop": {}}), world=2)
    sides = [(96, 6), (96, 8), (192, 10), (224, 12)]
    assert [s.macs for s in plan.stages] == [vit_macs(r, dim=384, depth=d) for r, d in sides]


def test_a_depth_the_model_does_not_have() -> None:
    with pytest.raises(PlanError, match=r"13 blocks, deit_small_patch16_224 has 12"):
        make_plan(load({"test_grow": {"depths": [6, 8, 10, 13]}}), world=2)


def test_range_of_a_schedule_searched_at_run_time() -> None:
    plan = make_plan(load({"test_grow": {"extremes": True}}), world=2)
    small, full = vit_macs(128, dim=384, depth=6), plan.full_macs
    assert plan.range == (pytest.approx((0.75 * small + 0.25 * full) / full, abs=1e-3), pytest.approx(1.0, abs=1e-6))
    assert plan.relative == pytest.approx(0.523, abs=0.002)
    line = "searched at run time: between x0.37 and x1.00 of the baseline; the table shows the uniform schedule"
    assert line in plan_text(plan)
    assert max(map(len, plan_text(plan).splitlines())) <= 120
    assert json.loads(json.dumps(plan.to_dict()))["range"] == list(plan.range or ())
    assert make_plan(load({}), world=2).to_dict()["range"] is None


def test_alternatives_run_together_with_the_plans_of_the_others() -> None:
    both = make_plan(load({"test_grow": {"extremes": True}, "test_crop": {}}), world=2)
    alone = make_plan(load({"test_grow": {"extremes": True}}), world=2)
    assert both.range is not None
    assert alone.range is not None
    half = 0.5 * vit_macs(96, dim=384, depth=12) / both.full_macs
    assert both.range[1] == pytest.approx(half + 0.5, abs=1e-3)
    assert both.range[0] < alone.range[0]
    with pytest.raises(PlanError, match="only one method .* found test_also, test_grow"):
        make_plan(load({"test_grow": {"extremes": True}, "test_also": {"extremes": True}}), world=2)


def test_methods_that_exist_are_planned_again() -> None:
    config = load({"test_grow": {}})
    methods = build_methods(config)
    made = Grow.made
    before = make_plan(config, world=2, methods=methods)
    methods[0].config = GrowConfig(depths=[12] * 4, sides=[224] * 4)  # as a method that has chosen
    after = make_plan(config, world=2, methods=methods)
    assert Grow.made == made
    assert (before.relative, after.relative) == (pytest.approx(0.523, abs=0.002), pytest.approx(1.0, abs=1e-6))


SMALL_VIT = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}


def test_a_built_model_is_cut_to_the_depth() -> None:
    pytest.importorskip("efftrain_ds.models.stacks")
    growth = {"test_grow": {"depths": [1, 2, 3, 4], "sides": [16, 20, 24, 32]}}
    built, closed = (
        make_plan(load(growth, {"name": "vit_tiny_patch16_224", "kwargs": kwargs}, 32), world=2)
        for kwargs in ({**SMALL_VIT, "qkv_bias": True}, SMALL_VIT)  # the first is not in the closed form
    )
    assert [s.macs for s in built.stages] == [s.macs for s in closed.stages]
    assert [s.memory.parameters for s in built.stages] == [s.memory.parameters for s in closed.stages]
    assert (built.relative, built.params) == (closed.relative, closed.params)
    activations = [s.memory.activations for s in built.stages]
    assert activations == sorted(activations)
    assert len(set(activations)) == 4


def timed(meter: StepMeter, now: list[float], stage: int, count: int, seconds: float) -> None:
    for _ in range(count):
        meter.begin()
        now[0] += seconds
        meter.end(stage, 32)


def test_profiles_tell_depths_apart() -> None:
    growth = {"test_grow": {"sides": [224] * 4}}
    plan = make_plan(load(growth), world=2)
    now = [0.0]
    meter = StepMeter(clock=lambda: now[0])
    for stage, seconds in enumerate((1.0, 1.4, 1.7, 2.2)):
        timed(meter, now, stage, 3, seconds)
    profile = measured_throughput(plan, meter)
    assert [(e.bandwidth, e.macs, e.seconds) for e in profile.entries] == [
        (224, s.macs, pytest.approx(t)) for s, t in zip(plan.stages, (1.0, 1.4, 1.7, 2.2), strict=True)
    ]
    again = make_plan(load(growth), world=2, throughput=profile)
    assert [s.prediction.how for s in again.stages if s.prediction] == ["measured"] * 4
    other = make_plan(load({"test_grow": {"depths": [6, 7, 10, 12], "sides": [224] * 4}}), world=2, throughput=profile)
    prediction = other.stages[1].prediction
    assert prediction is not None
    assert prediction.how == "interpolated"
    assert 1.0 < prediction.seconds < 1.4


def test_time_left_does_not_mix_depths() -> None:
    plan = make_plan(load({"test_grow": {"depths": [6, 12, 6, 12], "sides": [224] * 4}}), world=2)
    now = [0.0]
    meter = StepMeter(clock=lambda: now[0])
    timed(meter, now, 0, 2, 1.0)
    timed(meter, now, 1, 2, 5.0)
    ends = [s.stage.end_step for s in plan.stages]
    left = (ends[1] - ends[0] - 2) * 5.0 + (ends[2] - ends[1]) * 1.0 + (ends[3] - ends[2]) * 5.0
    assert time_left(plan, ends[0] + 2, meter) == pytest.approx(left)


def test_a_growing_model_is_measured_in_one_pass() -> None:
    plan = make_plan(load({"test_grow": {"depths": [6, 6, 12, 12], "sides": [192, 224, 224, 224]}}), world=2)
    short = shortened(plan, 10)
    rows = [(s.stage.settings["depth"], s.stage.settings["resolution"], s.stage.steps) for s in short.stages]
    assert rows == [(6, 192, 5), (6, 192, 10), (6, 224, 5), (6, 224, 10), (12, 224, 5), (12, 224, 10)]
    assert [s.stage.start_step for s in short.stages] == [0, 5, 15, 20, 30, 35]
    assert short.schedule.total_steps == 45
    back = make_plan(load({"test_grow": {"depths": [12, 6], "sides": [224, 224]}}), world=2)
    assert [s.stage.settings["depth"] for s in shortened(back, 2).stages] == [6, 6, 12, 12]


def test_a_model_of_one_depth_is_measured_in_two_rounds_and_never_searches() -> None:
    config = load({"test_grow": {}})
    methods = build_methods(config)
    methods[0].plan = lambda spec: equal_stages([12, 12], [160, 224], search=True)  # type: ignore[method-assign]
    plan = make_plan(config, world=2, methods=methods)
    assert plan.stages[0].stage.settings["search"] is True
    short = shortened(plan, 10)
    assert [(s.stage.settings["resolution"], s.stage.steps) for s in short.stages] == [
        (160, 5),
        (224, 5),
        (160, 10),
        (224, 10),
    ]
    assert not any("search" in s.stage.settings for s in short.stages)
