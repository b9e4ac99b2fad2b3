"""S2ViTE's decisions: counts, first units, exchanges with ties, which slot holds what, draws, ramps."""

import math
import random

import pytest
import torch

from efftrain_ds.core.errors import ConfigError
from efftrain_ds.methods.svite import s2vite_slots as slots
from efftrain_ds.methods.svite.s2vite_units import LiveUnits
from efftrain_ds.models.units import BlockUnits


@pytest.mark.parametrize(
    ("units", "density", "live"),
    [
        *((heads, 0.7, live) for heads, live in ((3, 2), (6, 4), (12, 8))),
        *((heads, 0.4, live) for heads, live in ((3, 1), (6, 2), (12, 4))),
        (6, 0.5, 3),
        (4, 0.1, 1),  # at least one
        (1536, 0.6, 921),
        (1536, 0.7, 1075),
        (768, 0.5, 384),
        (100, 0.29, 29),  # not 28: the density is the decimal that it is written as
        (10, 0.7, 7),
        (5, 1, 5),
    ],
)
def test_counts_are_rounded_down(units, density, live):
    assert slots.live_count(units, density) == live


@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan])
def test_a_density_out_of_range(density):
    with pytest.raises(ConfigError, match="density is"):
        slots.live_count(4, density)


def test_swaps_are_rounded_up():
    assert [slots.swap_count(a, 4) for a in (0.0, 0.01, 0.25, 0.26, 0.5, 1.0)] == [0, 1, 1, 2, 2, 4]
    assert slots.swap_count(0.1 * 3, 10) == 3  # 0.30000000000000004


def test_first_units_are_seeded_and_uniform():
    assert slots.first_units(12, 8, 1, "blocks.0", "heads") == slots.first_units(12, 8, 1, "blocks.0", "heads")
    drawn = {slots.first_units(12, 8, *where) for where in ((1, "a", "x"), (2, "a", "x"), (1, "b", "x"), (1, "a", "y"))}
    assert len(drawn) == 4
    counts = torch.zeros(6)
    for seed in range(600):
        units = slots.first_units(6, 2, seed, "blocks.0", "heads")
        assert list(units) == sorted(set(units))
        counts[list(units)] += 1
    assert counts.min() > 150
    assert counts.max() < 250


def check(before, done, count, prune, grow):
    """What holds for every exchange, from the definition."""
    units = grow.numel()
    assert len(done.slots) == len(set(done.slots)) == len(before)
    assert len(done.dropped) == count
    score = {unit: float(prune[i]) for i, unit in enumerate(before)}
    kept = set(before) - set(done.dropped)
    assert not kept or not done.dropped or max(score[u] for u in done.dropped) <= min(score[u] for u in kept)
    candidates = set(range(units)) - kept
    new = set(done.slots) - kept
    assert len(new) == count
    assert new <= candidates
    rest = candidates - new
    assert not rest or not new or min(float(grow[u]) for u in new) >= max(float(grow[u]) for u in rest)
    for i, (old, now) in enumerate(zip(before, done.slots, strict=True)):
        assert (old == now) == (i not in done.written)
    assert set(done.regrown) == set(done.dropped) & set(done.slots)
    assert set(done.grown) == set(done.slots) - set(before)


def test_an_exchange():
    before = (7, 2, 5, 0)
    prune = torch.tensor([0.1, 4.0, 0.2, 3.0])  # units 7 and 5 go
    grow = torch.tensor([9.0, 0, 9, 3, 1, 2, 9, 0])  # 6 and 3 are the best of 1, 3, 4, 5, 6, 7
    done = slots.exchange(before, prune, grow, 2)
    assert done == slots.Exchange((3, 2, 6, 0), (7, 5), (), (0, 2))
    check(before, done, 2, prune, grow)


def test_what_is_dropped_and_grown_again_stays_where_it_is():
    before = (7, 2, 5, 0)
    prune = torch.tensor([0.1, 4.0, 0.2, 3.0])
    grow = torch.tensor([0.0, 0, 0, 3, 1, 2, 0, 8])  # 7 comes back, 3 takes the slot of 5
    done = slots.exchange(before, prune, grow, 2)
    assert done == slots.Exchange((7, 2, 3, 0), (7, 5), (7,), (2,))
    grow = torch.tensor([0.0, 0, 0, 3, 1, 9, 0, 8])
    assert slots.exchange(before, prune, grow, 2) == slots.Exchange(before, (7, 5), (7, 5), ())


def test_what_was_dropped_can_be_left_out():
    before, prune = (7, 2, 5, 0), torch.tensor([0.1, 4.0, 0.2, 3.0])
    grow = torch.tensor([0.0, 0, 0, 3, 1, 9, 0, 8])
    done = slots.exchange(before, prune, grow, 2, exclude_dropped=True)
    assert done == slots.Exchange((3, 2, 4, 0), (7, 5), (), (0, 2))
    done = slots.exchange((7, 6, 5, 4, 3, 2), torch.arange(6.0), grow, 4, exclude_dropped=True)
    assert done == slots.Exchange((0, 1, 5, 4, 3, 2), (7, 6), (), (0, 1)), "two were dead"
    assert slots.exchange((1, 0), torch.ones(2), torch.ones(2), 2, exclude_dropped=True).slots == (1, 0)


def test_equal_scores_go_by_the_unit_not_by_the_slot():
    flat = torch.ones(4)
    grow = torch.ones(8)
    found = set()
    for order in ((7, 2, 5, 0), (0, 2, 5, 7), (5, 0, 7, 2)):
        done = slots.exchange(order, flat, grow, 2)
        assert done.dropped == (0, 2)
        found.add(tuple(sorted(done.slots)))
        check(order, done, 2, flat, grow)
    assert found == {(0, 1, 5, 7)}
    assert slots.keep_best((7, 2, 5, 0), flat, 2) == [0, 2]
    assert slots.keep_best((7, 2, 5, 0), torch.tensor([4.0, 1, 2, 3]), 3) == [0, 2, 3]
    assert slots.keep_best((7, 2), torch.tensor([4.0, 1]), 2) == [0, 1]


@pytest.mark.parametrize("ties", ["equal", "zero", "two", "none", "huge"])
def test_fifty_updates_never_move_a_count(ties):
    rng = random.Random(ties)
    torch.manual_seed(0)
    live = slots.first_units(24, 9, 3, "blocks.0", "neurons")
    union = set(live)
    for _ in range(50):
        count = rng.choice((0, 1, slots.swap_count(0.5, 9), 9))
        prune, grow = {
            "equal": lambda: (torch.ones(9), torch.ones(24)),
            "zero": lambda: (torch.zeros(9), torch.zeros(24)),
            "two": lambda: (torch.randint(0, 2, (9,)).float(), torch.randint(0, 2, (24,)).float()),
            "none": lambda: (torch.rand(9), torch.rand(24)),
            "huge": lambda: (torch.full((9,), 3e38), torch.full((24,), 3e38)),
        }[ties]()
        done = slots.exchange(live, prune, grow, count)
        check(live, done, count, prune, grow)
        live = done.slots
        union |= set(live)
    assert len(live) == 9
    if ties == "none":
        assert len(union) == 24, "some units never had a chance"


def test_a_full_block_and_a_single_head():
    assert slots.exchange((0,), torch.ones(1), torch.tensor([0.0, 1.0]), 1).slots == (1,)
    assert slots.exchange((1, 0), torch.ones(2), torch.ones(2), 1) == slots.Exchange((1, 0), (0,), (0,), ())


def test_draws_belong_to_the_unit():
    few, many = (slots.neuron_draws(n, 8, 1, 20, "blocks.0") for n in (6, 6))
    assert torch.equal(few, many)
    other = [slots.neuron_draws(6, 8, *where) for where in ((2, 20, "blocks.0"), (1, 21, "blocks.0"), (1, 20, "b"))]
    assert not any(torch.equal(few, o) for o in other)
    wide = slots.neuron_draws(400, 64, 1, 20, "blocks.0")
    assert wide.std() == pytest.approx(0.02, rel=0.02)
    heads = slots.head_draws(6, 16, 64, 1, 20, "blocks.0")
    assert heads.query_key.shape == (6, 2, 16, 64)
    assert heads.proj.shape == (6, 64, 16)
    assert heads.query_key.std() == pytest.approx(0.02, rel=0.03)
    assert not torch.equal(heads.query_key.flatten()[: heads.proj.numel()], heads.proj.flatten())


def two_blocks():
    units = LiveUnits({"blocks.0": BlockUnits(4, 16, 12, 64), "blocks.1": BlockUnits(4, 16, 12, 64)})
    units.draw(units.counts_at((0.5, 0.5), ["blocks.1"]), 7)
    units.explore()
    return units


def test_an_update_of_all_blocks():
    units = two_blocks()
    assert units.counts() == {"blocks.0": {"heads": 2, "neurons": 6}, "blocks.1": {"heads": 4, "neurons": 12}}
    assert units.dead("blocks.1") == {"heads": [], "neurons": []}
    assert units.facts() == {"heads": 0.75, "explored_heads": 0.75, "neurons": 0.75, "explored_neurons": 0.75}
    before = units.slots
    prune = {b: {k: torch.ones(len(v)) for k, v in of.items()} for b, of in before.items()}
    dead = units.dead("blocks.0")
    grow = {b: {"heads": torch.zeros(4), "neurons": torch.zeros(12)} for b in before}
    grow["blocks.0"]["heads"][dead["heads"]] = 1.0
    grow["blocks.0"]["neurons"][dead["neurons"]] = 1.0
    done = units.decide(prune, grow, 0.5)
    assert units.slots == before
    units.adopt(done)
    assert units.before == before
    assert units.slots["blocks.1"] == before["blocks.1"], "nothing is dead there"
    assert len(set(before["blocks.0"]["heads"]) & set(units.slots["blocks.0"]["heads"])) == 1
    assert len(set(before["blocks.0"]["neurons"]) & set(units.slots["blocks.0"]["neurons"])) == 3
    assert units.facts()["explored_neurons"] == (12 + 9) / 24
    state = units.state_dict()
    again = LiveUnits(units.full)
    again.load_state_dict(state)
    assert (again.slots, again.before, again.digest()) == (units.slots, units.before, units.digest())
    assert all(torch.equal(again.union[b][k], m) for b, of in units.union.items() for k, m in of.items())
    assert set(units.maps()) == {"heads", "neurons"}


@pytest.mark.parametrize("side", ["prune", "grow"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_decide_nothing(side, value):
    units = two_blocks()
    scores = {
        "prune": {b: {k: torch.ones(len(v)) for k, v in of.items()} for b, of in units.slots.items()},
        "grow": {b: {"heads": torch.zeros(4), "neurons": torch.zeros(12)} for b in units.slots},
    }
    scores[side]["blocks.1"]["neurons"][3] = value
    assert units.decide(scores["prune"], scores["grow"], 0.5) is None


def test_scores_by_unit():
    units = two_blocks()
    units.slots["blocks.0"]["heads"] = (3, 1)
    found = units.by_unit("blocks.0", "heads", torch.tensor([0.3, 0.1]), torch.tensor([0.0, 0.2]))
    assert found.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
