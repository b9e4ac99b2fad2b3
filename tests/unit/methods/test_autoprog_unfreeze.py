from dataclasses import replace

import pytest
import torch
from torch import nn

from efftrain_ds.core.batch import Batch
from efftrain_ds.core.compose import compose
from efftrain_ds.core.context import Context
from efftrain_ds.core.errors import ConfigError, ModelError, PlanError
from efftrain_ds.core.registry import get_method
from efftrain_ds.core.timeline import PlanSpec, Segment, Timeline, merge_timelines
from efftrain_ds.methods.autoprog.config import AutoProgZeroConfig
from efftrain_ds.methods.autoprog.unfreeze import AutoProgZero
from efftrain_ds.zero.blueprint import copy_blueprint, make_blueprint

SPEC = PlanSpec(seed=0, epochs=100, samples=1000, batch=10, micro_batch=10, world=1, resolution=256, stride=16)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)


class Vit(nn.Module):
    """The names of a ViT, nothing else."""

    def __init__(self, depth=12):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(4))
        self.pos_embed = nn.Parameter(torch.zeros(4))
        self.patch_embed = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Engine:
    """What the method sees of an engine."""

    def __init__(self, model):
        self.blueprint = make_blueprint(model)

    def apply(self, request):
        self.blueprint = request.surgery(copy_blueprint(self.blueprint))


def method(**config):
    return AutoProgZero(AutoProgZeroConfig(**config))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def blocks(names):
    return sorted({int(name.split(".")[1]) for name in names if name.startswith("blocks.")})


def context(model, spec=SPEC, others=(), zero=None, **config):
    zero = zero or method(**config)
    schedule = merge_timelines([zero.plan(spec), *others], spec)
    return zero, Context(engine=Engine(zero.prepare_model(model)), schedule=schedule, seed=0)


def enter(zero, ctx, stage):
    ctx.stage, ctx.step = stage, stage.start_step
    request = zero.on_stage_enter(ctx, stage)
    if request is not None:
        ctx.engine.apply(request)
    return request


# Plan


def test_registered_and_refused_beside_autoprog():
    from efftrain_ds.config.loader import load_config  # registers what is built in

    assert load_config({}) is not None
    assert get_method("autoprog_zero") is AutoProgZero
    other = type("Other", (AutoProgZero,), {"name": "autoprog", "conflicts_with": ()})
    with pytest.raises(ConfigError, match="autoprog_zero cannot run together with autoprog"):
        compose([method(), other(AutoProgZeroConfig())])


def test_plan_follows_the_ramp():
    timeline = method(resolution_step=64).plan(SPEC)
    assert timeline.pacing == "samples"
    assert [dict(s.settings) for s in timeline.segments] == [
        {"unfrozen": 1, "resolution": 64},
        {"unfrozen": 2, "resolution": 128},
        {"unfrozen": 3, "resolution": 192},
        {"unfrozen": 4, "resolution": 256},
    ]
    assert [s.start for s in timeline.segments] == [0, 0.25, 0.5, 0.75]
    assert all(s.pace == 1 for s in timeline.segments)


def test_edges():
    # whole epochs, also where they do not divide: floor(k E / K)
    starts = [s.start for s in method().plan(replace(SPEC, epochs=10)).segments]
    assert starts == pytest.approx([0, 0.2, 0.5, 0.7])
    by_steps = method(stages=3).plan(replace(SPEC, epochs=0, samples=0, steps=90))
    schedule = merge_timelines([by_steps], replace(SPEC, epochs=0, samples=0, steps=90))
    assert [s.start_step for s in schedule.stages] == [0, 30, 60]


def test_resolution_that_does_not_grow_is_left_out():
    timeline = method(resolution_start=None).plan(replace(SPEC, resolution=250))
    assert [dict(s.settings) for s in timeline.segments] == [{"unfrozen": k} for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("config", "spec", "text"),
    [
        ({}, {"epochs": 3}, r"autoprog_zero\.stages: 4 stages need at least 4 epochs"),
        ({}, {"epochs": 0, "steps": 3}, r"autoprog_zero\.stages: 4 stages need at least 4 steps.*found 3"),
        ({"stages": 8}, {"depth": 6}, r"autoprog_zero\.stages: 8 levels for 6 blocks; allowed: 1 to 6"),
        ({}, {"resolution": 250}, r"efftrain\.data\.resolution: 250 is not a multiple of the model's stride 16"),
        ({"resolution_step": 24}, {}, r"autoprog_zero\.resolution_step: must be a multiple.*stride 16.*found 24"),
    ],
)
def test_plan_refusals(config, spec, text):
    with pytest.raises(PlanError, match=text):
        method(**config).plan(replace(SPEC, **spec))


def test_alternatives_bound_the_search():
    assert method().alternatives(SPEC) == {}
    zero = method(search={}, resolution_step=64)
    found = zero.alternatives(SPEC)

    def sizes(timeline):
        return [(s.settings["unfrozen"], s.settings["resolution"]) for s in timeline.segments]

    assert sizes(found["cheapest"]) == [(1, 64), (1, 64), (1, 64), (4, 256)]
    assert sizes(found["dearest"]) == [(2, 128), (3, 192), (4, 256), (4, 256)]
    plan = zero.plan(SPEC)
    assert sizes(plan) == [(1, 64), (2, 128), (3, 192), (4, 256)]
    assert [s.settings.get("search") for s in plan.segments] == [True, True, True, None]
    zero.load_state_dict({"level": 2, "resolution": 192, "decided": [[0, 2, 128], [1, 2, 192]]})
    assert sizes(zero.plan(SPEC)) == [(2, 128), (2, 192), (3, 192), (4, 256)]


# Levels


def test_levels_of_twelve_blocks():
    zero, model = method(), Vit()
    zero.prepare_model(model)
    assert blocks(trainable(model)) == [0, 4, 8]
    assert blocks(zero.trained(model, 2)) == [0, 1, 4, 5, 8, 9]  # no 10 and no 11: names are compared whole
    assert zero.trained(model, 4) == {name for name, _ in model.named_parameters()}
    assert {"cls_token", "pos_embed", "patch_embed.weight", "norm.bias", "head.weight"} <= trainable(model)


def test_suffix_and_embeddings():
    zero, model = method(order="suffix", freeze_embeddings=True), Vit()
    zero.prepare_model(model)
    assert blocks(trainable(model)) == [9, 10, 11]
    for level in (1, 2, 3):
        others = {name for name in zero.trained(model, level) if not name.startswith("blocks.")}
        assert others == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert zero.trained(model, 4) == {name for name, _ in model.named_parameters()}


def test_what_arrives_frozen_stays_frozen():
    model = Vit()
    model.pos_embed.requires_grad_(False)
    model.blocks[0].fc.weight.requires_grad_(False)
    zero, ctx = context(model)
    for stage in ctx.schedule.stages:
        enter(zero, ctx, stage)
    left = {name for name, _ in model.named_parameters()} - trainable(ctx.engine.blueprint)
    assert left == {"pos_embed", "blocks.0.fc.weight"}


def test_model_refusals():
    with pytest.raises(ModelError, match="Linear has no list of blocks to unfreeze; allowed: models of the ViT family"):
        method().prepare_model(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"autoprog_zero\.stages: 4 levels for the 3 blocks of Vit; allowed: 1 to 3"):
        method().prepare_model(Vit(3))
    with pytest.raises(ModelError, match="the checkpoint is at level 5; allowed: 1 to 4"):
        method().shape_model(Vit(), {"level": 5})


def test_model_of_one_size():
    import timm

    make = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2}
    fixed = timm.create_model("vit_tiny_patch16_224", **make)
    with pytest.raises(ModelError, match=r"autoprog_zero\.resolution_start.*dynamic_img_size=True.*null"):
        method().prepare_model(fixed)
    method(resolution_start=None).prepare_model(fixed)
    assert blocks(trainable(fixed)) == [0]


# Stages


def test_each_level_asks_once():
    cut = Timeline((Segment(0, 0.4), Segment(0.4, 1)))
    zero, ctx = context(Vit(), others=(cut,))
    assert len(ctx.schedule.stages) == 5
    asked, seen = [], []
    for stage in ctx.schedule.stages:
        request = enter(zero, ctx, stage)
        asked.append(request.reason if request else None)
        if request:
            assert not request.maps
            assert not request.drops
        seen.append(blocks(trainable(ctx.engine.blueprint)))
        assert enter(zero, ctx, stage) is None  # as after a resume
    assert asked == [
        None,
        "unfreezing level 1 -> 2 of 4",
        None,
        *[f"unfreezing level {k} -> {k + 1} of 4" for k in (2, 3)],
    ]
    assert [len(s) for s in seen] == [3, 6, 6, 9, 12]
    assert zero.architecture() == {"level": 4}


def test_architecture_is_restored():
    zero, ctx = context(Vit())
    for stage in ctx.schedule.stages[:3]:
        enter(zero, ctx, stage)
    again, fresh = context(Vit())
    fresh.engine.blueprint = again.shape_model(make_blueprint(Vit()), zero.architecture())
    again.load_state_dict(zero.state_dict())
    assert trainable(fresh.engine.blueprint) == trainable(ctx.engine.blueprint)
    assert enter(again, fresh, ctx.schedule.stages[2]) is None
    assert again.state_dict() == zero.state_dict() == {"level": 3, "resolution": 192, "decided": []}


def test_describe_and_scalars():
    zero, ctx = context(Vit())
    enter(zero, ctx, ctx.schedule.stages[1])
    assert zero.describe(ctx.stage) == "u2 R128"
    assert zero.scalars(ctx) == {"stage/unfrozen": 2.0, "stage/resolution": 128.0}
    zero, ctx = context(Vit(), resolution_start=None)
    enter(zero, ctx, ctx.schedule.stages[2])
    assert zero.describe(ctx.stage) == "u3"
    assert zero.scalars(ctx) == {"stage/unfrozen": 3.0}


# Search


def test_search_walks_the_candidates(monkeypatch):
    offered = []

    def choose(ctx, stage, found, trained, search):
        offered.append((stage, found))
        return found[{0: 2, 1: 0, 2: -1}[stage]]

    monkeypatch.setattr("efftrain_ds.methods.autoprog.unfreeze.search_candidates", choose)
    cut = Timeline((Segment(0, 0.4), Segment(0.4, 1)))
    zero, ctx = context(Vit(), others=(cut,), search={}, resolution_step=64)
    levels = []
    for stage in ctx.schedule.stages:
        enter(zero, ctx, stage)
        levels.append((zero.architecture()["level"], zero.state_dict()["resolution"]))
    assert offered == [
        (0, ((1, 64), (2, 64), (1, 128), (2, 128))),
        (1, ((1, 128), (2, 128), (1, 192), (2, 192))),  # the cut at 0.4 asks for no second search
        (2, ((1, 128), (2, 128), (1, 192), (2, 192))),
    ]
    assert levels == [(1, 128), (1, 128), (1, 128), (2, 192), (4, 256)]
    assert zero.describe(ctx.schedule.stages[3]) == "u2 R192"


def test_single_candidate_is_taken_unmeasured():
    zero, ctx = context(Vit(), search={}, resolution_step=64)
    zero.load_state_dict({"level": 4, "resolution": 256, "decided": [[0, 4, 256]]})
    enter(zero, ctx, ctx.schedule.stages[1])
    assert zero.state_dict()["decided"] == [[0, 4, 256], [1, 4, 256]]


def test_search_without_samples():
    zero, ctx = context(Vit(), search={})
    with pytest.raises(ConfigError, match=r"autoprog_zero\.search: .*launch/train\.py, pass probe_batches="):
        zero.on_stage_enter(ctx, ctx.schedule.stages[0])


def test_no_search_while_measuring():
    """The trainer leaves the setting "search" out when it times the stages: they run as planned."""
    zero, ctx = context(Vit(), search={}, resolution_step=64)
    for stage in ctx.schedule.stages[1:]:
        settings = {k: v for k, v in stage.settings.items() if k != "search"}
        enter(zero, ctx, replace(stage, settings=settings))
        assert zero.state_dict()["level"] == settings["unfrozen"]
    assert zero.state_dict()["decided"] == []
    back = enter(zero, ctx, replace(ctx.schedule.stages[0], settings={"unfrozen": 1, "resolution": 64}))
    assert back is not None  # a second round over the stages freezes again
    assert blocks(trainable(ctx.engine.blueprint)) == [0, 4, 8]


# Batch


def images(side, dtype=torch.uint8):
    x = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(side))
    return x.to(torch.uint8) if dtype == torch.uint8 else (x / 255).to(dtype)


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        # two thirds for forward and the gradient of the inputs, then the share of trained blocks
        ({}, [(2 + u / 4) / 3 for u in (1, 2, 3, 4)]),
        # the backward pass ends at the first trained block
        ({"order": "suffix", "freeze_embeddings": True}, [(1 + u / 4 + u / 4) / 3 for u in (1, 2, 3, 4)]),
        ({"order": "suffix", "freeze_embeddings": False}, [(2 + u / 4) / 3 for u in (1, 2, 3, 4)]),
    ],
)
def test_frozen_blocks_lower_the_price_of_a_step(config, factors):
    zero = method(stages=4, **config)
    spec = replace(SPEC, depth=12)
    stages = merge_timelines([zero.plan(spec)], spec).stages
    assert [zero.cost_factor(spec, stage) for stage in stages] == pytest.approx(factors)


@pytest.fixture
def at_half():
    zero, ctx = context(Vit(), replace(SPEC, resolution=32), resolution_start=0.5, resolution_step=16)
    enter(zero, ctx, ctx.schedule.stages[0])
    return zero, ctx


def test_images_are_halved(at_half):
    x = images(32)
    y = at_half[0].on_batch(at_half[1], Batch(x, mean=MEAN, std=STD)).images
    # bilinear at half the size without antialiasing: the mean of each 2 x 2 square
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(y, (nn.functional.avg_pool2d(x.float(), 2) / 255 - mean) / std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_images_keep_dtype_and_values(at_half, dtype):
    x = images(32, dtype)
    y = at_half[0].on_batch(at_half[1], Batch(x)).images
    assert y.dtype == dtype
    torch.testing.assert_close(y, nn.functional.avg_pool2d(x.float(), 2).to(dtype))


def test_smaller_images_and_full_resolution_are_left_alone(at_half):
    zero, ctx = at_half
    for side in (16, 12):
        x = images(side)
        assert zero.on_batch(ctx, Batch(x)).images is x
    enter(zero, ctx, ctx.schedule.stages[-1])
    x = images(32)
    assert zero.on_batch(ctx, Batch(x)).images is x


def test_batch_refusals(at_half):
    zero, ctx = at_half
    with pytest.raises(ConfigError, match="uint8 images arrived without mean and std"):
        zero.on_batch(ctx, Batch(images(32)))
    with pytest.raises(PlanError, match="images of 16 x 32 pixels arrived"):
        zero.on_batch(ctx, Batch(images(32)[:, :, :16]))
