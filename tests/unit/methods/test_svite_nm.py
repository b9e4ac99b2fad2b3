import math

import pytest
import torch

from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.methods.svite.densities import mask_rng
from efftrain_ds.methods.svite.nm import NMRule, _patterns, _switches, to_semi_structured, violation
from efftrain_ds.methods.svite.schedule import UpdateSchedule

NAME, SHAPE = "blocks.0.mlp.fc1.weight", (16, 24)
RULES = {
    "2:4": NMRule(),
    "2:4 by drop": NMRule(rank="drop"),
    "2:4 random": NMRule(grow="random"),
    "1:4": NMRule(1, 4),
    "3:8": NMRule(3, 8),
    "two-way": NMRule(two_way=True),
    "two-way by drop": NMRule(two_way=True, rank="drop"),
    "two-way random": NMRule(two_way=True, grow="random"),
}


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
        weight[::3], weight[1::3] = math.nan, math.inf
        gradient[:, ::2], gradient[::5] = math.inf, math.nan
    return weight, gradient


def first(rule, seed=0, shape=SHAPE):
    return rule.initial(NAME, shape, rule.fit_count(NAME, shape, 0), seed)


@pytest.mark.parametrize("name", RULES)
def test_50_updates_keep_every_group(name):
    rule = RULES[name]
    mask = first(rule)
    assert violation(mask, rule.n, rule.m, two_way=rule.two_way) is None
    weight = torch.randn(SHAPE, generator=generator(5)) * mask
    schedule = UpdateSchedule(1000, 15, 765)
    moved = 0
    for step in schedule.steps:
        w, g = tensors(step // 15)
        k = rule.swaps(schedule.fraction(step), mask)
        update = rule.update(torch.where(mask, w, torch.zeros(())), g, mask, k, mask_rng(0, NAME, step))
        assert violation(update.mask, rule.n, rule.m, two_way=rule.two_way) is None
        assert int(update.dropped.sum()) == int(update.grown.sum()) == (2 * k if rule.two_way else k)
        assert not bool((update.dropped & ~mask).any() or (update.grown & mask).any())
        assert torch.equal(update.zero, update.mask ^ mask)
        assert update.regrown_share == 0
        weight[update.zero] = 0
        assert not bool(weight[~update.mask].any())
        moved += k
        mask = update.mask
        weight = torch.where(mask, weight + 0.1, weight)
    assert moved > 0


def test_one_exchange_by_hand():
    weight = torch.tensor([[0.3, 0.1, 0.0, 0.0, 0.0, 0.2, 0.9, 0.0]])
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0]]).bool()
    gradient = torch.tensor([[9.0, 9.0, 1.0, -2.0, 4.0, 9.0, 9.0, 3.0]])
    update = NMRule().update(weight, gradient, mask, 1)
    assert update.dropped.nonzero().tolist() == [[0, 5]]  # the second group has the larger dead gradient
    assert update.grown.nonzero().tolist() == [[0, 4]]
    smallest = NMRule(rank="drop").update(weight, gradient, mask, 1)
    assert smallest.dropped.nonzero().tolist() == [[0, 1]]
    assert smallest.grown.nonzero().tolist() == [[0, 3]]
    both = NMRule().update(weight, gradient, mask, 2)
    assert both.mask.int().tolist() == [[1, 0, 0, 1, 1, 0, 1, 0]]


def test_ties_go_to_the_front():
    mask = torch.tensor([[0, 1, 1, 0] * 3]).bool()
    update = NMRule().update(torch.ones(1, 12) * mask, torch.zeros(1, 12), mask, 2)
    assert update.mask.int().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0]]


def test_all_two_way_tiles_and_their_exchanges():
    patterns = _patterns()
    assert tuple(patterns.shape) == (90, 4, 4)
    assert bool((patterns.sum(1) == 2).all() and (patterns.sum(2) == 2).all())
    assert len({tuple(p.flatten().tolist()) for p in patterns}) == 90
    out, into = _switches()
    assert tuple(out.shape) == (72, 16)
    flat = patterns.view(90, 1, 16)
    possible = ((flat & out) == out).all(2) & ~(flat & into).any(2)
    assert int(possible.sum(1).min()) >= 4
    for p, s in possible.nonzero().tolist():
        tile = ((flat[p, 0] & ~out[s]) | into[s]).view(4, 4)
        assert bool((tile.sum(0) == 2).all() and (tile.sum(1) == 2).all())


def test_two_way_drops_the_least_magnitude():
    rule = NMRule(two_way=True)
    mask = first(rule, 3, (4, 4))
    out, into = _switches()
    for seed in range(20):
        weight, gradient = tensors(5 * seed, (4, 4))
        update = rule.update(weight * mask, gradient, mask, 1)
        best = min(
            (float(weight.abs().view(-1)[o].double().sum()), i)
            for i, (o, n) in enumerate(zip(out, into, strict=True))
            if bool(mask.view(-1)[o].all()) and not bool(mask.view(-1)[n].any())
        )[1]
        assert torch.equal(update.dropped.view(-1), out[best])
        assert torch.equal(update.grown.view(-1), into[best])


def test_first_masks():
    for rule in RULES.values():
        assert torch.equal(first(rule, 1), first(rule, 1))
        assert not torch.equal(first(rule, 1), first(rule, 2))
        assert first(rule).float().mean() == rule.density
    counts = torch.stack([first(NMRule(), s, (4, 4)) for s in range(600)]).float().mean(0)
    assert (counts - 0.5).abs().max() < 5 * math.sqrt(0.25 / 600)
    assert NMRule().swaps(0.5, first(NMRule())) == 48
    assert NMRule(two_way=True).swaps(0.5, first(NMRule())) == 12


def test_violation_names_the_group():
    mask = first(NMRule())
    mask[3, 9] ^= True
    assert violation(mask) == (3, 2)
    one_way = torch.tensor([[1, 1, 0, 0]] * 4).bool()
    assert violation(one_way) is None
    assert violation(one_way, two_way=True) == (0, 0)


def test_export_says_what_it_needs():
    mask = first(NMRule(), shape=(64, 64))
    weight = torch.randn(64, 64)
    with pytest.raises(ModelError, match="fc1: torch's 2:4 tensors need a CUDA device .* found torch.float32 on cpu"):
        to_semi_structured(weight, mask, name="fc1")
    broken = mask.clone()
    broken[5, 0:4] = True
    with pytest.raises(ModelError, match="fc1: row 5, group 0 does not keep exactly 2 of 4"):
        to_semi_structured(weight.half(), broken, name="fc1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 2:4 tensor cores")
def test_export_on_a_gpu():
    mask = first(NMRule(), shape=(128, 128)).cuda()
    weight = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x, weight * mask)
    assert torch.allclose(torch.nn.functional.linear(x, to_semi_structured(weight, mask)), wanted, atol=0.25, rtol=0.02)


def test_errors():
    for arguments in ({"n": 4}, {"n": 0}, {"n": 1, "two_way": True}, {"grow": "mixed"}, {"rank": "size"}):
        with pytest.raises(ConfigError):
            NMRule(**arguments)
    with pytest.raises(ModelError, match=r"fc1.weight \[16, 18\]: 2:4 needs a matrix with an input side in multiples"):
        NMRule().unit_shape(NAME, (16, 18))
    with pytest.raises(ModelError, match="sides in multiples of 4"):
        NMRule(two_way=True).unit_shape(NAME, (18, 16))
    with pytest.raises(ModelError, match="2:4 keeps 192 entries, not 100"):
        NMRule().initial(NAME, SHAPE, 100, 0)
    mask = first(NMRule())
    with pytest.raises(ValueError, match="needs the dense gradient"):
        NMRule().update(torch.ones(SHAPE), None, mask, 1)
    with pytest.raises(ValueError, match="keeps 192 entries, not 100"):
        NMRule().update(torch.ones(SHAPE), torch.ones(SHAPE), mask, 1, None, 100)
