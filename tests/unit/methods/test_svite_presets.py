import math

import pytest
import torch

from efftrain_ds.core.errors import ConfigError
from efftrain_ds.methods.svite.densities import exact_counts, exploration, layer_densities, mask_rng, random_mask
from efftrain_ds.methods.svite.presets import (
    PRESETS,
    FanInRule,
    TopKastRule,
    granet,
    itop,
    mest,
    rigl,
    row_top,
    set_,
    srigl,
    svite,
    svite_reference,
    topkast,
)
from efftrain_ds.methods.svite.rules import ElementRule

NAME, SHAPE = "blocks.0.mlp.fc1.weight", (24, 16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(step, shape=SHAPE):
    """Ordinary, all equal, all zero, coarse, not finite in turn."""
    g = generator(step)
    weight, gradient = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    kind = step % 5
    if kind == 1:
        weight, gradient = torch.full(shape, -0.5), torch.full(shape, 0.5)
    elif kind == 2:
        weight, gradient = torch.zeros(shape), torch.zeros(shape)
    elif kind == 3:
        weight, gradient = weight.round(), gradient.round()
    elif kind == 4:
        weight[::3], gradient[::5], gradient[:, ::2] = math.nan, math.nan, math.inf
    return weight, gradient


def places(mask):
    return set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("name", PRESETS)
def test_50_updates_keep_the_count(name):
    preset = PRESETS[name]()
    rule = preset.rule
    mask = rule.initial(NAME, SHAPE, rule.fit_count(NAME, SHAPE, 201), seed=5)
    live = int(mask.sum())
    assert abs(live - 201) <= SHAPE[0] // 2
    moved = 0
    for step in range(50):
        weight, gradient = tensors(step)
        if name != "topkast":
            weight = torch.where(mask, weight, torch.zeros(()))
        gradient = gradient if rule.needs_gradient else None
        k = rule.swaps(preset.initial, mask)
        update = rule.update(weight, gradient, mask, k, mask_rng(0, NAME, step), live)
        assert int(update.mask.sum()) == live
        assert not bool((update.dropped & ~mask).any())
        assert not bool((update.grown & mask & ~update.dropped).any())
        if not update.keeps_values:
            assert torch.equal(update.zero, update.mask ^ mask)
        moved += int((update.mask ^ mask).sum())
        mask = update.mask
    assert moved > 0


@pytest.mark.parametrize("name", PRESETS)
def test_schedules_fit_a_run(name):
    preset = PRESETS[name]()
    schedule = preset.schedule(total=60_000, steps_per_epoch=500)
    assert schedule.total == 60_000
    assert len(schedule.steps) > 2
    course = preset.density(0.4, 60_000)
    assert course.at(60_000) == 0.4
    assert course.at(0) == (0.5 if name == "granet" else 0.4)


# One preset at a time: what is its own


def test_rigl():
    preset = rigl()
    schedule = preset.schedule(1000, 10)
    assert (list(schedule.steps), schedule.fraction(0)) == ([100, 200, 300, 400, 500, 600, 700], 0.3)
    assert schedule.fraction(750) == 0
    assert preset.moments == "reset"
    weight, gradient = tensors(0)
    mask = random_mask(SHAPE, 150, generator())
    noisy = preset.rule.update(weight, gradient, mask, 40, generator())
    assert torch.equal(noisy.mask, ElementRule().update(weight, gradient, mask, 40).mask)  # noise breaks ties only
    tied = [preset.rule.update(weight * 0 + 1, gradient, mask, 40, generator(s)).dropped for s in range(2)]
    assert not torch.equal(*tied)


def test_set():
    preset = set_()
    schedule = preset.schedule(1000, 100)
    assert list(schedule.steps) == list(range(100, 1000, 100))
    assert {schedule.fraction(t) for t in schedule.steps} == {0.3}
    assert not preset.rule.needs_gradient
    weight, _ = tensors(0)
    weight = torch.where(weight > 0, weight * 100, weight)  # by magnitude alone only negatives would go
    mask = random_mask(SHAPE, 200, generator())
    k = preset.rule.swaps(0.3, mask)
    update = preset.rule.update(weight, None, mask, k, generator(1))
    for sign in (1, -1):
        here = mask & (weight * sign > 0)
        assert abs(int((update.dropped & here).sum()) - 0.3 * int(here.sum())) <= 1
        assert (weight * sign)[update.dropped & here].max() <= (weight * sign)[here & ~update.dropped].min()


def test_itop_reaches_nearly_everything():
    preset = itop()
    schedule = preset.schedule(100_000, 1000)
    assert schedule.steps[-1] == 92_000
    assert schedule.initial == 0.5
    for grow in ("gradient", "random"):
        rule = itop(grow).rule
        mask = random_mask(SHAPE, 96, generator())
        union, history = mask.clone(), []
        for step in range(40):
            g = generator(step)
            weight, gradient = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
            update = rule.update(weight * mask, gradient, mask, 40, g)
            mask = update.mask
            union |= mask
            history.append(exploration({NAME: union}))
        assert history == sorted(history)
        assert history[-1] > 0.95


def test_granet_prunes_then_prunes_and_grows():
    preset = granet(0.5, every=100)
    shapes = {"a": (32, 48), "b": (64, 16), "c": (10, 16)}
    total = 2000
    schedule, course = preset.schedule(total, 10), preset.density(0.2, total)
    counts = exact_counts(shapes, layer_densities(shapes, course.at(0)))
    masks = {n: preset.rule.initial(n, s, counts[n], seed=0) for n, s in shapes.items()}
    seen = []
    for step in schedule.steps:
        counts = exact_counts(shapes, layer_densities(shapes, course.at(step)))
        for name, shape in shapes.items():
            g = generator(step)
            weight, gradient = torch.randn(shape, generator=g) * masks[name], torch.randn(shape, generator=g)
            before, count = int(masks[name].sum()), counts[name]
            k = preset.rule.swaps(schedule.fraction(step), masks[name], count)
            assert k == min(math.floor(schedule.fraction(step) * count), masks[name].numel() - before)
            update = preset.rule.update(weight, gradient, masks[name], k, None, count)
            assert int(update.dropped.sum()) == before - count + k
            assert int(update.grown.sum()) == k
            masks[name] = update.mask
            assert int(masks[name].sum()) == count
        seen.append(sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()))
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(course.at(schedule.steps[-1]), abs=2e-3)
    assert course.at(1600) == 0.2
    with pytest.raises(ConfigError, match="density 0.6 is above the density 0.5"):
        preset.density(0.6, total)


def test_srigl_keeps_the_fan_in():
    rule = srigl().rule
    mask = rule.initial(NAME, SHAPE, rule.fit_count(NAME, SHAPE, 150), seed=1)
    assert mask.sum(1).tolist() == [6] * 24
    for step in range(50):
        weight, gradient = tensors(step)
        update = rule.update(weight * mask, gradient, mask, rule.swaps(0.3, mask))
        assert update.mask.sum(1).tolist() == [6] * 24
        mask = update.mask
    assert rule.fit_count(NAME, SHAPE, 1) == 24
    assert rule.fit_count(NAME, SHAPE, 10_000) == 384
    conv = rule.initial("patch", (8, 3, 4, 4), 8 * 5, seed=0)
    assert conv.shape == (8, 3, 4, 4)
    assert conv.flatten(1).sum(1).tolist() == [5] * 8
    update = rule.update(torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4), conv, 10)
    assert update.mask.flatten(1).sum(1).tolist() == [5] * 8
    with pytest.raises(ValueError, match="100 live entries do not spread evenly over 24 rows"):
        rule.initial(NAME, SHAPE, 100, seed=0)
    with pytest.raises(ValueError, match="grows by gradient"):
        rule.update(weight, None, mask, 3)


def test_srigl_fills_rows_by_gradient():
    weight = torch.tensor([[0.1, 0.2, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
    mask = weight != 0
    gradient = torch.tensor([[0.0, 0.0, 2.0, 1.0], [9.0, 9.0, 0.0, 0.0]])
    update = FanInRule().update(weight, gradient, mask, 2)
    # both dropped entries lie in the first row, so only that row has room, whatever the other's gradients
    assert update.mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert update.regrown_share == 0


def test_srigl_ablates_rows_and_hands_on_their_entries():
    weight, gradient = torch.ones(4, 8), torch.zeros(4, 8)
    weight[0] = 0.01  # nothing of the first row survives the cut, and its gradients are small
    gradient[1:] = 1.0
    mask = FanInRule().initial(NAME, (4, 8), 12, seed=0)
    rule = FanInRule(ablation=0.5)
    update = rule.update(weight * mask, gradient, mask, 3, None, 12)
    assert update.mask.sum(1).tolist() == [0, 4, 4, 4]
    again = rule.update(weight * update.mask, gradient + 1, update.mask, 3, None, 12)
    assert again.mask.sum(1).tolist() == [0, 4, 4, 4]  # ablated for good
    assert FanInRule(ablation=0.0).update(weight * mask, gradient, mask, 3).mask.sum(1).tolist() == [3, 3, 3, 3]
    # rows that are needed to hold the budget stay, even when none of them counts as salient
    full = torch.ones(4, 8).bool()
    assert FanInRule(1.0).update(torch.ones(4, 8), gradient, full, 0, None, 32).mask.all()
    mask = FanInRule().initial(NAME, SHAPE, 24 * 6, seed=1)
    for step in range(50):
        weight, gradient = tensors(step)
        mask = rule.update(weight * mask, gradient, mask, rule.swaps(0.3, mask), None, 144).mask
        fan_in = set(mask.sum(1).tolist()) - {0}
        rows = int(mask.any(1).sum())
        assert len(fan_in) == 1
        assert fan_in == {144 // rows}
        assert 144 - rows < int(mask.sum()) <= 144


def test_row_top():
    scores = torch.tensor([[1.0, 1, 1, 1], [0, math.nan, 2, 3], [5, 6, 7, 8]])
    candidates = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    chosen = row_top(scores, candidates, torch.tensor([2, 3, 0]))
    assert chosen.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert row_top(scores, candidates, torch.tensor([9, 2, 1])).int().tolist() == [
        [0, 1, 1, 1],
        [1, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_topkast_sets():
    rule = topkast(extra=0.25).rule
    weight, _ = tensors(0)
    update = rule.update(weight, None, random_mask(SHAPE, 96, generator()), 0)
    order = sorted(range(384), key=lambda i: (-weight.abs().flatten()[i].item(), i))
    assert places(update.mask) == set(order[:96])
    assert places(update.backward) == set(order[: 96 + 96])
    assert not bool(update.zero.any())  # weights outside stay and can come back
    assert not rule.needs_gradient
    for step in range(50):  # ties too: the forward set is part of the backward set
        update = rule.update(tensors(step)[0], None, update.mask, 0)
        assert int(update.mask.sum()) == 96
        assert int(update.backward.sum()) == 192
        assert not bool((update.mask & ~update.backward).any())
    wide = TopKastRule(0.9).update(weight, None, update.mask, 0)
    assert bool(wide.backward.all())
    assert int(rule.update(weight, None, update.mask, 0, None, 30).mask.sum()) == 30


def test_mest_scores_and_elastic_density():
    weight = torch.tensor([0.10, 0.11, 0.50, 0.0])
    gradient = torch.tensor([2.0, 0.0, 0.0, 9.0])
    mask = torch.tensor([True, True, True, False])
    assert places(mest().rule.update(weight, gradient, mask, 1, generator()).dropped) == {1}  # .10 + .02 against .11
    assert places(mest(factor=0.0).rule.update(weight, None, mask, 1, generator()).dropped) == {0}
    assert (mest().rule.needs_gradient, mest().rule.needs_dense_gradient) == (True, False)
    dead = gradient.masked_fill(~mask, math.nan)  # what dead entries would get is not looked at
    assert places(mest().rule.update(weight, dead, mask, 1, generator()).dropped) == {1}
    preset = mest(extra_density=0.2)
    assert preset.schedule(1000, 10).every == 50
    course = preset.density(0.5, 1000)
    assert [round(course.at(t), 9) for t in (0, 400, 800, 1000)] == [0.6, 0.55, 0.5, 0.5]


def test_svite_and_its_reference():
    ours, reference = svite(grow="mixed"), svite_reference()
    assert (ours.moments, ours.alpha, ours.rule.grow) == ("reset", "paper", "mixed")
    assert (reference.moments, reference.alpha, reference.rule) == ("dense", "reference", ElementRule())
    total = 1_501_200
    schedules = [p.schedule(total, 2502) for p in (ours, reference)]
    assert [len(s.steps) for s in schedules] == [80, 80]
    last = schedules[0].steps[-1]
    assert schedules[0].fraction(last) < 1e-4
    assert schedules[1].fraction(last) == pytest.approx(0.0526, abs=2e-4)


def test_errors():
    for make in (lambda: FanInRule(1.5), lambda: TopKastRule(1.0)):
        with pytest.raises(ConfigError, match="allowed: 0 to"):
            make()
