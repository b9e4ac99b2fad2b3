"""Larger global batches at small bandwidths, the learning rate there, and the plan with both."""

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import ConfigError, PlanError
from efftrain_ds.core.replay import capacity, step_after, total_loaded
from efftrain_ds.core.timeline import PlanSpec, Schedule, Segment, Timeline, merge_timelines
from efftrain_ds.embedded import embedded_schedule
from efftrain_ds.lr_schedule import ProgressLR
from efftrain_ds.methods.efficienttrain import EfficientTrain, EfficientTrainConfig
from efftrain_ds.methods.efficienttrain.schedules import area_pace, batch_scale, lr_scale
from efftrain_ds.planning import make_plan
from efftrain_ds.train_setup import _scheduler_factory

IMAGENET = 1_281_167
SPEC = PlanSpec(seed=0, epochs=200, samples=IMAGENET, batch=4096, micro_batch=64, world=8, resolution=224, stride=16)
ON: dict = {"large_batch": {}}


def planned(spec=SPEC, **config) -> Schedule:
    return merge_timelines([EfficientTrain(EfficientTrainConfig(**config)).plan(spec)], spec)


def rates(schedule, lr=1.0, **options):
    optimizer = SimpleNamespace(param_groups=[{"lr": lr}])
    scheduler = ProgressLR(optimizer, schedule, **{"warmup": 0.02, "min_lr": 0.0, "shape": "constant", **options})
    found = []
    for step in range(schedule.total_steps):
        scheduler.set_step(step)
        found.append(scheduler.get_lr()[0])
    return found


@pytest.mark.parametrize(
    ("bandwidth", "factor"), [(32, 4), (64, 4), (96, 4), (112, 4), (128, 2), (144, 2), (160, 1), (192, 1), (224, 1)]
)
def test_factor_is_the_power_of_two_below_one_over_the_cost(bandwidth, factor):
    pace = area_pace(bandwidth, 224)
    assert batch_scale(pace, 4) == factor == min(4, 2 ** math.floor(math.log2(1 / pace)))
    assert batch_scale(pace, 1) == 1
    assert batch_scale(Fraction(1, 16), 8) == 8
    assert batch_scale(Fraction(1, 16), 7) == 4


def test_rules():
    assert [lr_scale(4, rule) for rule in ("sqrt", "linear", "none")] == [2.0, 4.0, 1.0]
    assert lr_scale(2, "sqrt") == math.sqrt(2)


def test_batches_steps_and_samples_of_the_plan():
    plain, large = planned(), planned(**ON)
    sizes = {s.settings["bandwidth"]: s.batch for s in large.stages}
    assert sizes == {96: 4 * 4096, 160: 4096, 224: 4096}
    assert all(s.batch == 8 * s.micro_batch * s.accumulation for s in large.stages)
    for a, b in zip(plain.stages, large.stages, strict=True):
        assert (a.p_start, a.p_end, a.settings) == (b.p_start, b.p_end, b.settings)
        # steps_i = w_i E N / (G_i c_i), to the rounding of the two edges
        share = (b.p_end - b.p_start) * 200 * IMAGENET / (b.batch * b.pace)
        assert abs(b.steps - share) <= 1
        assert abs(a.steps * a.batch - b.steps * b.batch) <= a.batch + b.batch
    assert sum(s.pace * s.batch * s.steps for s in large.stages) == pytest.approx(200 * IMAGENET, rel=1e-3)
    middle = large.stages[1].start_step + 10
    assert step_after(large, large.consumed(middle)) == middle
    assert large.step_at(large.consumed(middle) + 1024) == middle + 1024 / 16384
    assert large.step_at(1e12) == large.total_steps


def test_micro_batch_grows_where_memory_allows():
    large, fixed = planned(**ON), planned(grow_micro_batch=False, **ON)
    assert (large.stages[0].micro_batch, large.stages[0].accumulation) == (256, 8)  # at most 64 x (224 / 96)^2
    assert (fixed.stages[0].micro_batch, fixed.stages[0].accumulation) == (64, 32)


def test_off_by_default_nothing_changes():
    assert EfficientTrainConfig().large_batch is None
    plain, one = planned(), planned(large_batch={"max_scale": 1})
    assert [(s.batch, s.steps, s.lr_scale) for s in plain.stages] == [(4096, s.steps, 1.0) for s in one.stages]
    assert {s.lr_scale for s in planned(large_batch={"lr": "none"}).stages} == {1.0}
    assert planned(large_batch={"lr": "none"}).stages[0].batch == 16384


def test_steps_given_keep_their_number():
    spec = replace(SPEC, epochs=0, samples=0, steps=1000)
    large = planned(spec, **ON)
    assert large.total_steps == 1000
    per_share = [s.steps * s.batch * s.pace / (s.p_end - s.p_start) for s in large.stages]
    assert max(per_share) / min(per_share) == pytest.approx(1, rel=0.1)


# Learning rate


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)])
def test_rate_follows_the_rule_and_is_ramped_after_the_switch(rule, factor):
    schedule = planned(replace(SPEC, samples=IMAGENET // 40), large_batch={"lr": rule})
    found = rates(schedule)
    p = [schedule.progress(i + 0.5) for i in range(schedule.total_steps)]
    for progress, rate in zip(p, found, strict=True):
        if progress < 0.02:
            assert rate == pytest.approx(factor * progress / 0.02)
        elif progress < 0.2:
            assert rate == pytest.approx(factor)
        elif progress < 0.21:
            assert rate == pytest.approx(factor + (1 - factor) * (progress - 0.2) / 0.01)
        else:
            assert rate == pytest.approx(1.0)
    ramp = [a - b for a, b in zip(found, found[1:], strict=False) if a > b + 1e-9]
    assert len(ramp) == 0 if rule == "none" else len(ramp) >= 4  # over several steps, no jump
    assert max(ramp, default=0) < 0.3 * factor


def test_a_ramp_longer_than_its_stage_goes_on_in_the_next_one():
    segments = [
        Segment(0.0, 0.5, {"a": 1}, lr_scale=3.0),
        Segment(0.5, 0.505, {"a": 2}, lr_scale=1.0, lr_ramp=0.01),
        Segment(0.505, 1.0, {"a": 3}, lr_scale=2.0, lr_ramp=0.01),
    ]
    spec = replace(SPEC, epochs=0, samples=0, steps=10_000)
    schedule = merge_timelines([Timeline(tuple(segments))], spec)
    values = {p: schedule.lr_scale(p) for p in (0.0, 0.4999, 0.5, 0.5025, 0.50499, 0.505, 0.51, 0.515, 0.6, 1.0)}
    assert values[0.0] == values[0.4999] == values[0.5] == 3.0
    assert values[0.5025] == pytest.approx(2.5)
    assert values[0.505] == pytest.approx(2.0)
    assert values[0.50499] == pytest.approx(2.0, abs=0.01)
    assert [values[p] for p in (0.51, 0.6, 1.0)] == pytest.approx([2.0] * 3)
    jumps = [abs(schedule.lr_scale(i / 1e4) - schedule.lr_scale((i + 1) / 1e4)) for i in range(10_000)]
    assert max(jumps) < 0.03
    no_ramp = merge_timelines([Timeline((segments[0], replace(segments[1], end=1.0, lr_ramp=0.0)))], spec)
    assert (no_ramp.lr_scale(0.49999), no_ramp.lr_scale(0.5)) == (3.0, 1.0)


def test_the_end_of_the_cosine_is_the_smallest_rate():
    schedule = planned(replace(SPEC, epochs=20, samples=IMAGENET // 20), **ON)
    found = rates(schedule, lr=4e-3, min_lr=1e-6, shape="cosine")
    plain = rates(planned(replace(SPEC, epochs=20, samples=IMAGENET // 20)), lr=4e-3, min_lr=1e-6, shape="cosine")
    assert found[-1] == plain[-1] < 1.1e-4
    assert max(found) == pytest.approx(2 * max(plain), rel=0.05)


def test_warm_up_in_epochs_counts_samples():
    config = SimpleNamespace(
        efftrain=SimpleNamespace(optim=SimpleNamespace(warmup="20ep", min_lr=0, schedule="cosine"))
    )
    for options in ({}, ON):
        schedule = planned(**options)
        optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
        warmup = _scheduler_factory(config, schedule, schedule)(optimizer).warmup
        # 20 passes at 96 px of 200 equivalent epochs
        assert warmup == pytest.approx(20 * (96 / 224) ** 2 / 200, rel=1e-3)


# Together with the rest


def configured(tmp_path, **changes):
    document = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "efftrain": {
            "run": {"epochs": 4, "output": str(tmp_path)},
            "model": {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2}},
            "data": {"train": "bundled:fashion_mnist/train", "resolution": 28, "samples": 6000},
            "methods": {"efficienttrain": {"schedule": "et++", **changes}},
        },
    }
    return load_config(document, world=1)


def test_the_priced_plan_costs_the_same_and_says_the_batches(tmp_path):
    from efftrain_ds.cost.render import plan_text

    plain = make_plan(configured(tmp_path), world=1)
    large = make_plan(configured(tmp_path, **ON), world=1)
    assert large.relative == pytest.approx(plain.relative, rel=0.01)
    assert large.data_epochs == pytest.approx(plain.data_epochs, rel=0.01)
    assert large.schedule.total_steps < plain.schedule.total_steps
    assert "steps of 64 / 16 images" in plan_text(large)
    first = large.to_dict()["stages"][0]
    assert (first["batch"], first["lr_scale"]) == (64, 2.0)


def test_with_replay_the_loaded_share_is_that_of_the_larger_batch(tmp_path):
    replay = [{"bandwidth": 12, "uses": 4, "capacity": 8}]
    plan = make_plan(configured(tmp_path, replay=replay, **ON), world=1)
    stage = plan.schedule.stages[0]
    assert (stage.batch, capacity(stage, 1)) == (64, 8 * 16)
    assert total_loaded(plan.schedule) < 0.65 * plan.schedule.total_samples
    assert plan.data_epochs == total_loaded(plan.schedule) / 6000
    # four samples of a rank do not divide by three, sixteen neither
    with pytest.raises(PlanError, match=r"replay\.0\.uses"):
        make_plan(configured(tmp_path, replay=[{"bandwidth": 12, "uses": 3, "capacity": 8}], **ON), world=1)
    # eight times as many do not make up for what one batch lacks elsewhere: the smallest batch of that side decides
    with pytest.raises(PlanError, match="16 samples"):
        make_plan(configured(tmp_path, replay=[{"bandwidth": 12, "uses": 32, "capacity": 64}]), world=1)
    make_plan(configured(tmp_path, replay=[{"bandwidth": 12, "uses": 32, "capacity": 64}], **ON), world=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [(ON, "global batch"), ({"replay": [{"bandwidth": 12, "uses": 2, "capacity": 4}]}, "replay")],
)
def test_a_loop_of_ones_own_is_told_that_it_cannot(tmp_path, changes, words):
    from efftrain_ds.config.loader import build_methods
    from efftrain_ds.models.adapters import create_model

    config = configured(tmp_path, **changes)
    model = create_model("vit_tiny_patch16_224", resolution=28, num_classes=10, patch_size=4, embed_dim=24, depth=1)
    with pytest.raises(ConfigError, match=words):
        embedded_schedule(config, build_methods(config), model, world=1)


@pytest.mark.parametrize("wrong", [{"max_scale": 0}, {"lr": "cubic"}, {"ramp": -0.1}, {"ramp": 0.9}, {"scale": 4}])
def test_bad_configurations(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EfficientTrainConfig(large_batch=wrong)
