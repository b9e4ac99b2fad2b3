import math
from dataclasses import replace

import pytest
import torch

from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.methods.svite.densities import exact_counts, layer_densities, mask_digest, mask_rng, random_mask
from efftrain_ds.methods.svite.nm import NMRule
from efftrain_ds.methods.svite.presets import FanInRule
from efftrain_ds.methods.svite.rules import (
    DROP_SCORES,
    ElementRule,
    Entries,
    drop_score,
    finite,
    grow_after_drop,
    initial_masks,
    layer_counts,
    random_order,
    top_k,
)
from efftrain_ds.methods.svite.schedule import UpdateSchedule

SHAPE = (24, 16)
RULES = {
    "gradient": ElementRule(),
    "random": ElementRule(grow="random"),
    "mixed": ElementRule(grow="mixed", random_share=0.3),
    "excluding": ElementRule(exclude_just_dropped=True),
    "excluding random": ElementRule(grow="random", exclude_just_dropped=True),
    "signed": ElementRule(drop="signed_magnitude", grow="random"),
    "sensitivity": ElementRule(drop="sensitivity"),
    "noise": ElementRule(noise=1e-5),
    "random drop": ElementRule(drop="random"),
    "mest": ElementRule(drop="magnitude_gradient", grow="random", factor=0.01),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(kind, step, shape=SHAPE):
    """Weights and gradients that make selection hard."""
    g = generator(step)
    weight, gradient = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    if kind == "equal weights":
        weight = torch.full(shape, -0.5)
    elif kind == "zero gradients":
        gradient = torch.zeros(shape)
    elif kind == "all tied":
        weight, gradient = torch.zeros(shape), torch.full(shape, -0.0)
    elif kind == "coarse":
        weight, gradient = weight.round(), gradient.round()
    elif kind == "not finite":
        weight[torch.rand(shape, generator=g) < 0.3] = math.nan
        gradient[torch.rand(shape, generator=g) < 0.5] = math.inf
        gradient[torch.rand(shape, generator=g) < 0.5] = math.nan
    return weight, gradient


KINDS = ("normal", "equal weights", "zero gradients", "all tied", "coarse", "not finite")


def by_hand(weight, gradient, mask, k, exclude=False):
    """The rule in plain Python: sort (score, flat index), take k."""
    w, g = weight.abs().flatten().tolist(), gradient.abs().flatten().tolist()
    live = {i for i, m in enumerate(mask.flatten().tolist()) if m}
    dropped = set(sorted(live, key=lambda i: (w[i], i))[:k])
    candidates = set(range(len(w))) - (live if exclude else live - dropped)
    grown = set(sorted(candidates, key=lambda i: (-g[i], i))[:k])
    return live - dropped | grown, dropped, grown


def places(mask):
    return set(mask.flatten().nonzero().flatten().tolist())


# Selection


def test_top_k_takes_ties_from_the_front():
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 0.0]])
    every = torch.ones(2, 3, dtype=torch.bool)
    assert places(top_k(scores, every, 3)) == {1, 2, 3}
    assert places(top_k(scores, every, 5)) == {0, 1, 2, 3, 4}
    candidates = torch.tensor([[True, False, False], [True, False, True]])
    assert places(top_k(scores, candidates, 2)) == {0, 3}
    assert places(top_k(scores, candidates, 0)) == set()
    with pytest.raises(ValueError, match="cannot choose 4 of 3"):
        top_k(scores, candidates, 4)


def test_top_k_takes_nan_last_and_infinity_first():
    scores = torch.tensor([math.nan, -math.inf, 0.0, math.inf, math.nan])
    every = torch.ones(5, dtype=torch.bool)
    assert [places(top_k(scores, every, k)) for k in (1, 2)] == [{3}, {2, 3}]
    assert places(top_k(scores, every, 5)) == {0, 1, 2, 3, 4}
    assert places(top_k(torch.full((5,), math.nan), every, 2)) == {0, 1}


def test_top_k_agrees_with_a_stable_sort():
    for seed in range(30):
        scores = torch.randint(0, 6, (200,), generator=generator(seed)).float()
        candidates = torch.rand(200, generator=generator(seed + 1)) < 0.7
        k = int(candidates.sum()) * seed // 30
        order = sorted(places(candidates), key=lambda i: (-scores[i].item(), i))
        assert places(top_k(scores, candidates, k)) == set(order[:k])


# Counts and first masks of a model


def test_counts_and_first_masks():
    shapes = {"patch": (64, 3, 8, 8), "qkv": (192, 64), "head": (10, 64)}
    counts = layer_counts(ElementRule(), shapes, 0.5)
    assert counts == exact_counts(shapes, layer_densities(shapes, 0.5))
    assert layer_counts(ElementRule(), shapes, 0.5, "uniform") == {"patch": 6144, "qkv": 6144, "head": 320}
    masks = initial_masks(ElementRule(), shapes, counts, seed=1)
    assert {n: int(m.sum()) for n, m in masks.items()} == counts
    assert {n: tuple(m.shape) for n, m in masks.items()} == shapes
    assert mask_digest(masks) == mask_digest(initial_masks(ElementRule(), shapes, counts, seed=1))
    assert mask_digest(masks) != mask_digest(initial_masks(ElementRule(), shapes, counts, seed=2))
    matrices = {"qkv": (192, 64), "proj": (64, 64)}
    assert layer_counts(NMRule(), matrices, 0.3) == {"qkv": 6144, "proj": 2048}
    assert layer_counts(FanInRule(), matrices, 0.3, "uniform") == {"qkv": 192 * 19, "proj": 64 * 19}
    with pytest.raises(ModelError, match="patch"):
        layer_counts(NMRule(), shapes, 0.5)


# One update


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("exclude", [False, True])
def test_update_agrees_with_the_rule_by_hand(kind, exclude):
    rule = ElementRule(exclude_just_dropped=exclude)
    for seed in range(10):
        weight, gradient = tensors(kind, seed)
        mask = random_mask(SHAPE, 150, generator(seed))
        k = rule.swaps(0.3, mask)
        assert k == 45
        update = rule.update(weight, gradient, mask, k)
        new, dropped, grown = by_hand(weight, gradient, mask, k, exclude)
        assert (places(update.mask), places(update.dropped), places(update.grown)) == (new, dropped, grown)
        assert places(update.zero) == (dropped - grown) | (grown - places(mask))
        assert update.regrown_share == pytest.approx(len(dropped & grown) / k)
        if exclude:
            assert update.regrown_share == 0


def test_swaps_are_limited_by_what_is_not_live():
    rule = ElementRule()
    mask = random_mask((10, 10), 90, generator())
    assert rule.swaps(0.5, mask) == 10
    assert rule.swaps(0.05, mask) == 4
    assert rule.swaps(0.5, torch.ones(10, 10, dtype=torch.bool)) == 0
    assert rule.swaps(0.0, mask) == 0


def test_a_dense_layer_never_changes():
    mask = torch.ones(SHAPE, dtype=torch.bool)
    for name, rule in RULES.items():
        update = rule.update(*tensors("coarse", 0), mask, rule.swaps(0.5, mask), generator())
        assert bool(update.mask.all()), name
        assert not bool(update.zero.any()), name


@pytest.mark.parametrize(
    ("name", "kinds"), [(name, KINDS) for name in RULES] + [(name, ("all tied",)) for name in list(RULES)[:3]]
)
def test_counts_never_move_in_50_updates(name, kinds):
    rule = RULES[name]
    mask = rule.initial("blocks.0.mlp.fc1.weight", SHAPE, 201, seed=5)
    schedule = UpdateSchedule(1000, 15, 765)
    stored = torch.randn(SHAPE, generator=generator(99)) * mask
    moments = torch.rand(SHAPE, generator=generator(98)) * mask
    assert len(schedule.steps) == 50
    moved = 0
    for i, step in enumerate(schedule.steps):
        weight, gradient = tensors(kinds[i % len(kinds)], step)
        weight = torch.where(mask, weight, torch.zeros(()))  # as training leaves them
        k = rule.swaps(schedule.fraction(step), mask)
        update = rule.update(weight, gradient, mask, k, mask_rng(0, "layer", step))
        assert int(update.mask.sum()) == 201
        assert int(update.dropped.sum()) == int(update.grown.sum()) == k
        assert not bool((update.dropped & ~mask).any())
        assert not bool((update.grown & mask & ~update.dropped).any())
        assert torch.equal(update.zero, update.mask ^ mask)
        # what changed sides is 0 afterwards, everything else keeps its bits
        before = stored.clone()
        stored[update.zero] = 0
        moments[update.zero] = 0
        assert not bool(stored[update.grown & ~mask].any())
        assert not bool(stored[update.dropped & ~update.mask].any())
        untouched = mask & update.mask
        assert torch.equal(stored[untouched], before[untouched])
        assert int((stored != 0).sum()) <= 201
        assert not bool(moments[~update.mask].any())
        moved += int(update.zero.sum())
        mask = update.mask
        stored = torch.where(mask, stored + 0.1, stored)
        moments = torch.where(mask, moments + 0.1, moments)
    # where everything ties, growth by gradient brings back the front of what it dropped, or a dead entry before it
    assert moved > 0


def test_dropped_and_grown_again_keeps_its_value():
    weight = torch.tensor([0.1, 0.2, 3.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, False, False, False])
    gradient = torch.tensor([9.0, 0.0, 0.0, 1.0, 5.0, 0.0])
    update = ElementRule().update(weight, gradient, mask, 2)
    assert (places(update.dropped), places(update.grown)) == ({0, 1}, {0, 4})
    assert update.regrown_share == 0.5
    assert places(update.zero) == {1, 4}
    strict = ElementRule(exclude_just_dropped=True).update(weight, gradient, mask, 2)
    assert (places(strict.grown), strict.regrown_share) == ({3, 4}, 0.0)


@pytest.mark.parametrize("name", RULES)
def test_the_outcome_is_a_function_of_its_inputs(name):
    weight, gradient = tensors("normal", 1)
    mask = random_mask(SHAPE, 150, generator(1))
    updates = [RULES[name].update(weight.clone(), gradient, mask, 40, mask_rng(3, "a", 7)) for _ in range(2)]
    assert torch.equal(updates[0].mask, updates[1].mask)
    other = RULES[name].update(weight, gradient, mask, 40, mask_rng(4, "a", 7))
    drawn = "random" in name or RULES[name].grow != "gradient"
    assert torch.equal(updates[0].mask, other.mask) is not drawn


def test_scaling_the_loss_changes_nothing():
    weight, gradient = tensors("normal", 2)
    mask = random_mask(SHAPE, 150, generator(1))
    first = ElementRule().update(weight, gradient, mask, 40)
    assert torch.equal(first.mask, ElementRule().update(weight, gradient * 1024, mask, 40).mask)


def test_changing_density():
    rule = ElementRule()
    weight, gradient = tensors("normal", 3)
    mask = random_mask(SHAPE, 200, generator(1))
    k = rule.swaps(0.1, mask, 150)
    assert k == 15
    update = rule.update(weight, gradient, mask, k, None, 150)
    assert (int(update.mask.sum()), int(update.dropped.sum()), int(update.grown.sum())) == (150, 65, 15)
    assert places(update.dropped) == by_hand(weight, gradient, mask, 65)[1]
    more = rule.update(weight, gradient, mask, rule.swaps(0.9, mask, 220), None, 220)
    assert (int(more.mask.sum()), int(more.grown.sum() - more.dropped.sum())) == (220, 20)
    strict = replace(rule, exclude_just_dropped=True)
    for count in (100, 200, 300, math.prod(SHAPE)):
        assert (
            int(strict.update(weight, gradient, mask, strict.swaps(1.0, mask, count), None, count).mask.sum()) == count
        )


# Growth and scores


def test_random_growth_is_uniform():
    mask = torch.zeros(40, dtype=torch.bool)
    mask[:20] = True
    dropped = torch.zeros(40, dtype=torch.bool)
    dropped[:4] = True
    hits = torch.zeros(40)
    for seed in range(800):
        hits += grow_after_drop(mask, dropped, 20, None, generator(seed)).grown
    assert not bool(hits[4:20].any())
    share = torch.cat([hits[:4], hits[20:]]) / 800
    assert (share - 4 / 24).abs().max() < 5 * math.sqrt(1 / 6 * 5 / 6 / 800)


def test_mixed_growth_takes_the_best_first():
    weight, gradient = tensors("normal", 4)
    mask = random_mask(SHAPE, 150, generator(1))
    mixed = ElementRule(grow="mixed", random_share=0.25).update(weight, gradient, mask, 40, generator())
    candidates = set(range(mask.numel())) - places(mask & ~mixed.dropped)
    best = sorted(candidates, key=lambda i: -gradient.abs().flatten()[i])[:30]
    assert places(mixed.grown) >= set(best)
    assert int(mixed.grown.sum()) == 40
    exact = ElementRule(grow="mixed", random_share=0.0).update(weight, gradient, mask, 40, generator())
    assert places(exact.grown) == by_hand(weight, gradient, mask, 40)[2]
    loose = ElementRule(grow="mixed", random_share=1.0).update(weight, gradient, mask, 40, generator())
    assert torch.equal(loose.mask, ElementRule(grow="random").update(weight, None, mask, 40, generator()).mask)


def test_signed_magnitude_drops_the_same_share_of_each_sign():
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, -1.0, -2.0, -3.0, -4.0, 9.0, -9.0])
    mask = torch.ones(10, dtype=torch.bool)
    mask[8:] = False
    update = ElementRule(drop="signed_magnitude", grow="random").update(weight, None, mask, 2, generator())
    assert places(update.dropped) == {0, 4}
    assert places(ElementRule(grow="random").update(weight, None, mask, 2, generator()).dropped) == {0, 1}


def test_which_rules_need_which_gradient():
    needs = {name: (rule.needs_gradient, rule.needs_dense_gradient) for name, rule in RULES.items()}
    assert {n for n, (any_, _) in needs.items() if not any_} == {"random", "excluding random", "signed"}
    assert {n for n, (any_, dense) in needs.items() if any_ and not dense} == {"mest"}
    assert not replace(RULES["mest"], factor=0.0).needs_gradient
    mask = random_mask(SHAPE, 150, generator(1))
    weight, _ = tensors("normal", 0)
    for name, rule in RULES.items():
        if rule.needs_gradient:
            with pytest.raises(ValueError, match="needs the dense gradient"):
                rule.update(weight, None, mask, 5, generator())
        else:
            assert int(rule.update(weight, None, mask, 5, generator()).mask.sum()) == 150, name


def test_random_choices_need_a_generator():
    mask = random_mask(SHAPE, 150, generator(1))
    for name in ("random", "mixed", "noise", "random drop"):
        with pytest.raises(ValueError, match="generator that is equal on all ranks"):
            RULES[name].update(*tensors("normal", 0), mask, 5)


def test_own_drop_scores():
    @drop_score("oldest", gradient=True)
    def oldest(entries: Entries):
        return random_order(entries.mask, generator()) * 0 + torch.arange(entries.mask.numel()).view(entries.mask.shape)

    try:
        mask = random_mask(SHAPE, 150, generator(1))
        rule = ElementRule(drop="oldest", grow="random")
        assert rule.needs_gradient
        assert not rule.needs_dense_gradient
        update = rule.update(*tensors("normal", 0), mask, 3, generator())
        assert places(update.dropped) == set(sorted(places(mask))[:3])
    finally:
        del DROP_SCORES["oldest"]


def test_finite_guard():
    weight, gradient = tensors("normal", 0)
    assert finite(weight, gradient, None)
    gradient[3, 3] = math.inf
    assert not finite(weight, gradient)
    assert not finite(torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"drop": "size"}, 'drop score "size" is unknown, allowed: magnitude'),
        ({"grow": "momentum"}, "allowed: gradient, random, mixed"),
        ({"grow": "mixed", "random_share": 1.5}, "random share of the growth is 1.5"),
    ],
)
def test_rule_errors(arguments, text):
    with pytest.raises(ConfigError, match=text):
        ElementRule(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_low_precision(dtype):
    weight, gradient = tensors("normal", 6)
    mask = random_mask(SHAPE, 150, generator(1))
    update = ElementRule().update(weight, gradient.to(dtype), mask, 40)
    assert places(update.mask) == by_hand(weight, gradient.to(dtype).float(), mask, 40)[0]
