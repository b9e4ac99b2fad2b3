import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError

from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import ConfigError, PlanError
from efftrain_ds.core.replay import (
    capacity,
    fresh_batch,
    fresh_samples,
    loaded,
    replays,
    step_after,
    total_loaded,
    warm_steps,
    window_start,
)
from efftrain_ds.core.text import short_settings
from efftrain_ds.core.timeline import PlanSpec, Schedule, Segment, Timeline, merge_timelines
from efftrain_ds.cost.plan import price
from efftrain_ds.cost.render import plan_text
from efftrain_ds.data import bundled
from efftrain_ds.data.augment import DeviceAugment
from efftrain_ds.data.loader import TrainLoader
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.replay import ReplayBuffer, ReplayFeed, distinct, fresh_spec, make_training_feed
from efftrain_ds.methods.efficienttrain import EfficientTrain, EfficientTrainConfig
from efftrain_ds.observe.meters import StepMeter

IMAGENET = 1_281_167


def schedule(*stages, batch=16, micro=4, world=1) -> Schedule:
    """Stages as (steps, r, S); r = 1 has no replay."""
    total, edges, segments = sum(steps for steps, *_ in stages), [0], []
    for index, (steps, uses, window) in enumerate(stages):
        edges.append(edges[-1] + steps)
        settings = {"part": index} | ({"replay": uses, "replay_steps": window} if uses > 1 else {})
        segments.append(Segment(edges[-2] / total, edges[-1] / total, settings))
    spec = PlanSpec(
        seed=7, epochs=0, samples=0, batch=batch, micro_batch=micro, world=world, resolution=28, stride=4, steps=total
    )
    made = merge_timelines([Timeline(tuple(segments))], spec)
    assert [s.steps for s in made.stages] == [steps for steps, *_ in stages]
    return made


class Numbers:
    """A loader whose samples are their own places in the order: images of one pixel, nothing is read."""

    def __init__(self, plan, rank=0):
        self.plan, self.rank, self.world = plan, rank, plan.spec.world
        self.consumed, self.seed, self.resolution, self.pin_memory = 0, plan.spec.seed, 1, False
        self.delivered = 0
        self.bad_samples: dict[str, int] = {}

    def batches_from(self, start):
        position = self.consumed if start is None else start
        while (spec := fresh_spec(self.plan, position)) is not None:
            places = torch.arange(position + self.rank, position + spec.batch, self.world)
            for part in places.split(spec.micro_batch):
                self.delivered += len(part)
                images = (part % 251).to(torch.uint8)[:, None, None, None].repeat(1, 3, 1, 1)
                valid = torch.ones(len(part), dtype=torch.bool)
                yield Batch(images=images, labels=part % 10, valid=valid, positions=part.clone(), ids=part)
            position += spec.batch

    def commit(self, n):
        self.consumed += n

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["consumed"]

    def close(self):
        pass


def run(feed, plan, steps=None):
    """Batches of each step, committed; `steps` of them."""
    found, batches = [], iter(feed)
    first = step_after(plan, feed.consumed)
    for step in range(first, plan.total_steps if steps is None else first + steps):
        stage = plan.stage_at(step)
        found.append([next(batches) for _ in range(stage.accumulation)])
        assert [len(batch) for batch in found[-1]] == [stage.micro_batch] * stage.accumulation
        feed.commit(stage.batch)
    return found


def column(step, name="ids"):
    return torch.cat([getattr(batch, name) for batch in step]).tolist()


# What is loaded, as arithmetic


def test_counts_of_loaded_samples_and_their_inverse():
    plan = schedule((10, 1, 0), (50, 4, 40), (20, 2, 6), (5, 1, 0), world=2)
    assert [warm_steps(s) for s in plan.stages] == [0, 2, 1, 0]  # ceil(S / 8r)
    assert [fresh_samples(s) for s in plan.stages] == [160, 2 * 16 + 48 * 4, 16 + 19 * 8, 80]
    assert [capacity(s, 2) for s in plan.stages] == [0, 80, 24, 0]  # of one of two ranks: S x fresh / 2
    counts = [fresh_batch(plan.stage_at(i), i) for i in range(plan.total_steps)]
    for step in range(plan.total_steps + 1):
        assert loaded(plan, step) == sum(counts[:step])
        assert step_after(plan, loaded(plan, step)) == step
    assert total_loaded(plan) == sum(counts)
    for wrong in (3, 160 + 1, 160 + 32 + 2, total_loaded(plan) + 1):
        with pytest.raises(PlanError, match=str(wrong)):
            step_after(plan, wrong)
    assert window_start(plan.stages[1], 15) == 10
    assert window_start(plan.stages[1], 55) == 15
    assert fresh_spec(plan, total_loaded(plan)) is None
    assert not replays(schedule((3, 1, 0)))


def test_a_short_stage_holds_no_more_than_it_loads():
    plan = schedule((12, 4, 1000))
    assert warm_steps(plan.stages[0]) == 12  # never filled far enough: nothing is repeated
    plan = schedule((20, 4, 40))
    assert capacity(plan.stages[0], 1) == fresh_samples(plan.stages[0]) == 2 * 16 + 18 * 4


def test_distinct_draws_are_different_and_even():
    for n, k in [(1, 1), (5, 5), (40, 30), (1000, 3), (7680, 48)]:
        drawn = np.stack([distinct(3, "x", step, n, k) for step in range(200)])
        assert all(len(set(row)) == k for row in drawn.tolist())
        assert drawn.min() >= 0
        assert drawn.max() < n
        assert abs(drawn.mean() - (n - 1) / 2) < 5 * n / np.sqrt(12 * drawn.size) + 1e-9
    assert not np.array_equal(distinct(3, "x", 0, 50, 10), distinct(3, "x", 1, 50, 10))
    assert not np.array_equal(distinct(3, "x", 0, 50, 10), distinct(3, "y", 0, 50, 10))
    with pytest.raises(ValueError, match="6"):
        distinct(0, "x", 0, 5, 6)


# The buffer


def test_the_ring_keeps_the_newest_in_order():
    ring, order = ReplayBuffer(7, (3, 1, 1)), []
    assert len(ring.images) == 7
    for step, n in enumerate([3, 2, 4, 7, 1, 5]):
        places = torch.arange(len(order), len(order) + n)
        images = places.to(torch.uint8)[:, None, None, None].repeat(1, 3, 1, 1)
        ring.push(Batch(images, places, torch.ones(n, dtype=torch.bool), places, places), step)
        order += [(int(p), step) for p in places]
        held = order[-7:][::-1]
        assert ring.count == len(held)
        rows = ring.rows(np.arange(ring.count))
        assert [(int(ring.positions[r]), int(ring.steps[r])) for r in rows] == held
        taken = ring.take(rows)
        assert taken.images[:, 0, 0, 0].tolist() == taken.ids.tolist() == [place for place, _ in held]
    ring.clear(2)
    assert ring.count == 0


# Mean uses, age and bound with r = 4, S = 8


@pytest.mark.parametrize("steps", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mean_uses_age_and_bound(steps):
    plan = schedule((steps, 4, 8), batch=8, micro=8)
    loader = Numbers(plan)
    feed = ReplayFeed(loader, plan)
    uses, born, last = Counter(), {}, -1
    for step, batches in enumerate(run(feed, plan)):
        ids = column(batches)
        assert len(set(ids)) == 8  # no sample twice in a step
        for place in ids:
            if place > last:
                born[place] = step
            assert step - born[place] < 8
        last = max(last, *ids)
        uses.update(ids)
        assert feed.buffer.count <= feed.buffer.limit == len(feed.buffer.images) == 16
    assert sorted(uses) == list(range(loader.delivered)) == list(range(total_loaded(plan)))  # each is used
    assert np.mean(list(uses.values())) == pytest.approx(4, rel=0.02)
    settled = [uses[p] for p in range(100, len(uses) - 100)]
    assert np.mean(settled) == pytest.approx(4, rel=0.02)
    assert min(settled) >= 1
    assert np.var(settled) == pytest.approx(7 * 6 / 14 * 8 / 14, rel=0.1)  # seven steps that take 6 of 14 others


def test_the_first_batch_of_a_stage_is_not_repeated():
    plan = schedule((30, 1, 0), (60, 4, 64), (60, 2, 16))
    found = run(ReplayFeed(Numbers(plan), plan), plan)
    for stage in plan.stages[1:]:
        own = [column(s) for s in found[stage.start_step : stage.end_step]]
        warm = warm_steps(stage)
        begin = loaded(plan, stage.start_step)
        assert sum(own[:warm], []) == list(range(begin, begin + warm * 16))
        assert all(len(set(ids)) == 16 for ids in own)
        assert min(min(ids) for ids in own) == begin  # nothing from the stage before: the buffer was emptied


def test_steps_batches_and_progress_are_those_without_replay():
    stages = [(10, 1, 0), (60, 4, 20), (30, 2, 8)]
    with_, without = schedule(*stages), schedule(*[(n, 1, 0) for n, *_ in stages])
    for a, b in zip(with_.stages, without.stages, strict=True):
        assert (a.start_step, a.end_step, a.batch, a.micro_batch) == (b.start_step, b.end_step, b.batch, b.micro_batch)
    assert [with_.progress(i) for i in range(101)] == [without.progress(i) for i in range(101)]
    replayed, plain = run(ReplayFeed(Numbers(with_), with_), with_), run(Numbers2(without), without)
    # places in the stream of batches, which every draw of the augmentation is keyed by
    assert [column(s, "positions") for s in replayed] == [column(s, "positions") for s in plain]


class Numbers2(Numbers):
    """Without a feed, as the trainer uses the loader."""

    def __iter__(self):
        return self.batches_from(None)


def test_no_replay_leaves_the_loader_alone():
    plan = schedule((4, 1, 0))
    loader = Numbers(plan)
    assert make_training_feed(loader, plan, device="cpu", record=print) is loader


def test_ranks_load_different_samples_and_draw_by_themselves():
    plan = schedule((200, 2, 32), world=2)
    found = [run(ReplayFeed(Numbers(plan, rank), plan), plan) for rank in (0, 1)]
    seen = [Counter(i for step in one for i in column(step)) for one in found]
    assert not set(seen[0]) & set(seen[1])
    assert sorted({*seen[0], *seen[1]}) == list(range(total_loaded(plan)))
    positions = [column(a, "positions") + column(b, "positions") for a, b in zip(*found, strict=True)]
    assert all(sorted(p) == list(range(16 * i, 16 * i + 16)) for i, p in enumerate(positions))
    ages = [[max(column(s)) - p for p in column(s)] for one in found for s in one[100:101]]
    assert ages[0] != ages[1]


def test_a_rank_with_two_micro_batches_and_an_odd_share():
    plan = schedule((40, 3, 12), batch=36, micro=6, world=2)  # 18 a rank, 6 of them new, in 3 micro-batches
    loader = Numbers(plan, 1)
    found = run(ReplayFeed(loader, plan), plan)
    assert len(found) == 40
    assert loader.delivered * 2 == total_loaded(plan)
    newest = [sum(p >= loaded(plan, i) for p in column(s)) for i, s in enumerate(found)]
    assert newest == [18] + [6] * 39


# Resume


def same(a, b):
    names = ("images", "labels", "valid", "ids", "positions")
    pairs = [(x, y, name) for x, y in zip(a, b, strict=True) for name in names]
    return all(torch.equal(getattr(x, name), getattr(y, name)) for x, y, name in pairs)


def note(events, name, **data):
    events.append((name, data))


def test_resume_at_any_step_goes_on_exactly():
    plan = schedule((6, 1, 0), (40, 4, 12), (20, 2, 5), (4, 1, 0), world=2)
    whole = run(ReplayFeed(Numbers(plan, 1), plan), plan)
    for stop in (0, 5, 6, 7, 8, 20, 45, 46, 47, 60, 66, 69, 70):
        first = ReplayFeed(Numbers(plan, 1), plan)
        run(first, plan, steps=stop)
        state = json.loads(json.dumps(first.state_dict()))
        events: list = []
        second = ReplayFeed(Numbers(plan, 1), plan, record=partial(note, events))
        second.load_state_dict(state)
        rest = run(second, plan)
        assert len(rest) == plan.total_steps - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True)), stop
        stage = plan.stage_at(stop)
        if stop < plan.total_steps and stop > stage.start_step and "replay" in stage.settings:
            again = loaded(plan, stop) - loaded(plan, window_start(stage, stop))
            assert [(name, data["samples"]) for name, data in events] == [("replay_refill", again // 2)]
        else:
            assert not events


def test_another_iteration_starts_again_at_the_position():
    plan = schedule((40, 4, 12))
    feed = ReplayFeed(Numbers(plan), plan)
    old = iter(feed)
    next(old)
    run(feed, plan, steps=20)
    assert next(old, None) is None
    whole = run(ReplayFeed(Numbers(plan), plan), plan)
    assert all(same(a, b) for a, b in zip(run(feed, plan), whole[20:], strict=True))


def test_the_buffer_is_freed_after_the_last_replay():
    plan = schedule((4, 1, 0), (10, 4, 8), (4, 1, 0), (10, 2, 4), (4, 1, 0))
    feed, held, batches = ReplayFeed(Numbers(plan), plan), [], None
    batches = iter(feed)
    for step in range(plan.total_steps):
        for _ in range(plan.stage_at(step).accumulation):
            next(batches)
        feed.commit(16)
        held.append(feed.buffer is not None)
    assert held == [False] * 4 + [True] * 24 + [False] * 4


# With shards, pixels and augmentation


@pytest.fixture(scope="module")
def manifest():
    return load_manifest(bundled.resolve("bundled:fashion_mnist/train"))


@pytest.fixture
def shard_feed(manifest):
    """Feeds that are closed at the end, whatever happens: a loader process outlives a test that fails."""
    made = []
    yield lambda *args, **more: made.append(_feed(manifest, *args, **more)) or made[-1]
    for feed in made:
        feed.close()


def _feed(manifest, plan, workers=0, **more):
    loader = TrainLoader(
        manifest,
        seed=7,
        rank=0,
        world=1,
        spec_at=lambda consumed: fresh_spec(plan, consumed),
        resolution=28,
        workers=workers,
        streams=8,
        **more,
    )
    return ReplayFeed(loader, plan)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_resume_in_mid_stage_with_the_same_pixels(shard_feed, tmp_path, workers):
    plan = schedule((3, 1, 0), (20, 4, 8), (3, 1, 0))
    whole = run(shard_feed(plan), plan)
    assert whole[12][0].images.shape == (4, 3, 28, 28)
    first = shard_feed(plan, workers)
    run(first, plan, steps=14)
    second = shard_feed(plan, workers, quarantine=tmp_path / "bad.jsonl")
    second.load_state_dict(first.state_dict())
    assert first.consumed == second.consumed == loaded(plan, 14)
    rest = run(second, plan)
    assert all(same(a, b) for a, b in zip(rest, whole[14:], strict=True))
    assert second.loader.quarantine.seen == total_loaded(plan) - loaded(plan, 14)  # not what was read again


def test_every_use_is_augmented_anew(shard_feed):
    plan = schedule((60, 4, 8))
    feed = shard_feed(plan)
    augment = DeviceAugment(seed=7, randaugment={"magnitude": 9.0}, erasing=0, mixup=0, cutmix=0)
    shown = {}
    for step in run(feed, plan):
        for batch in step:
            kept = batch.images.clone()
            pictures = augment.before(batch, 9.0).images
            for id_, raw, picture in zip(batch.ids.tolist(), kept, pictures, strict=True):
                shown.setdefault(id_, []).append((raw.numpy().tobytes(), picture.numpy().tobytes()))
    repeated = [uses for uses in shown.values() if len(uses) >= 4]
    assert len(repeated) > 50
    assert all(len({raw for raw, _ in uses}) == 1 for uses in repeated)  # the buffer holds what was loaded
    assert np.mean([len({picture for _, picture in uses}) / len(uses) for uses in repeated]) > 0.6


# What is said


def test_fresh_and_replayed_samples_are_reported_apart():
    plan = schedule((10, 1, 0), (50, 4, 40))
    feed = ReplayFeed(Numbers(plan), plan)
    assert feed.scalars(10, 100.0) == {
        "data/fresh": 160,
        "data/replayed": 0,
        "data/fresh_share": 1.0,
        "data/loader_img_s_needed": 100.0,
    }
    values = feed.scalars(60, 100.0)
    assert values["data/fresh"] == total_loaded(plan)
    assert values["data/fresh"] + values["data/replayed"] == plan.total_samples
    assert (values["data/fresh_share"], values["data/loader_img_s_needed"]) == (0.25, 25.0)
    assert "data/loader_img_s_needed" not in feed.scalars(60, None)
    with pytest.raises(ValueError, match="32"):
        feed.commit(32)


def test_memory_is_checked_before_the_first_step(monkeypatch):
    plan = schedule((3000, 4, 1920), batch=1024, micro=64)
    loader = Numbers(plan)
    loader.resolution = 224
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2e12))
    feed = ReplayFeed(loader, plan)
    assert feed.rows == 1920 * 256
    assert feed.bytes == feed.rows * (3 * 224 * 224 + 33)
    assert feed.buffer is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    with pytest.raises(ConfigError, match="74 GB .491,520 images of 224 px.*8.0 GB free.*capacity"):
        ReplayFeed(loader, plan)


# The method's part

SPEC = PlanSpec(seed=0, epochs=200, samples=IMAGENET, batch=4096, micro_batch=64, world=8, resolution=224, stride=16)


def planned(schedule_name, *buffers, spec=SPEC):
    config = EfficientTrainConfig(
        schedule=schedule_name, replay=[dict(zip(("bandwidth", "uses", "capacity"), b, strict=True)) for b in buffers]
    )
    return merge_timelines([EfficientTrain(config).plan(spec)], spec)


@pytest.mark.parametrize(
    ("name", "buffers", "passes"),
    [
        ("et++deit", [(96, 4, 1920), (160, 2, 256)], 228),
        ("et++", [(96, 4, 1920), (160, 2, 256)], 213),
        ("et++", [(96, 2, 1024)], 345),
    ],
)
def test_passes_over_imagenet_are_those_of_the_released_scripts(name, buffers, passes):
    """The loader epochs at 200 equivalent epochs that follow from the scripts' r: DeiT-S, ResNet-50, Swin-T."""
    plan = planned(name, *buffers)
    assert total_loaded(plan) / IMAGENET == pytest.approx(passes, abs=1.1)
    assert plan.total_samples == planned(name).total_samples
    one = [s for s in plan.stages if s.settings["bandwidth"] == 96][0]
    assert capacity(one, 8) == buffers[0][2] * 4096 // buffers[0][1] // 8


def test_the_plan_shows_loaded_passes_and_memory():
    plan = planned("et++", (96, 4, 1920))
    n = len(plan.stages)
    priced = price(
        plan,
        macs=[1] * n,
        full_macs=1,
        activations=[0] * n,
        model="m",
        params=1,
        precision="fp32",
        zero_stage=0,
    )
    assert priced.data_epochs == pytest.approx(total_loaded(plan) / IMAGENET)
    assert priced.epoch_at(plan.total_steps) == pytest.approx(priced.data_epochs)
    assert sum(s.epochs for s in priced.stages) == pytest.approx(priced.data_epochs)
    assert priced.replay_bytes == 245_760 * 3 * 224 * 224
    text = plan_text(priced)
    assert "37 GB a rank" in text
    assert f"{priced.data_epochs:.1f} passes over 1,281,167" in text
    assert "B96 m0 x4" in text
    assert max(map(len, text.splitlines())) <= 120
    assert priced.to_dict()["loaded_samples"] == total_loaded(plan)
    assert short_settings(plan.stages[0].settings) == "B96 m0 x4"
    assert StepMeter().rates() is None


@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        ((112, 4, 64), ["replay.0.bandwidth", "112", "96, 160, 224"]),
        ((96, 3, 64), ["replay.0.uses", "512", "3"]),
    ],
)
def test_what_does_not_fit_is_refused(buffer, words):
    with pytest.raises(PlanError) as found:
        planned("et++", buffer)
    assert all(word in str(found.value) for word in words), found.value


@pytest.mark.parametrize(
    ("buffers", "words"),
    [
        ([{"bandwidth": 96, "uses": 4, "capacity": 3}], "capacity"),
        ([{"bandwidth": 96, "uses": 1, "capacity": 3}], "uses"),
        ([{"bandwidth": 96, "uses": 2, "capacity": 3}, {"bandwidth": 96, "uses": 4, "capacity": 8}], "once"),
    ],
)
def test_bad_configurations(buffers, words):
    with pytest.raises(ValidationError, match=words):
        EfficientTrainConfig(replay=buffers)
