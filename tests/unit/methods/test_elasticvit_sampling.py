import json
import math

import numpy as np
import pytest

from efftrain_ds.core.errors import CheckpointError, ConfigError
from efftrain_ds.methods.elasticvit.bank import MemoryBank, published_capacities
from efftrain_ds.methods.elasticvit.levels import Levels, build_smallest, published_smallest, spread_levels
from efftrain_ds.methods.elasticvit.preference import (
    NO_EXPLOITATION,
    ExploitSchedule,
    Sampler,
    preference_of,
)
from efftrain_ds.methods.elasticvit.tables import build_tables
from efftrain_ds.models.elastic import PlainSpace, elasticvit_space, released_subnets

LEVELS = Levels((200_000_000, 700_000_000))
"""Those of the published levels that are filled fastest."""
CAPACITY = 20


@pytest.fixture(scope="module")
def space():
    return elasticvit_space()


@pytest.fixture(scope="module")
def tables(space):
    return build_tables(space, LEVELS, published_smallest(space, LEVELS), rows=400)


def filled(space, tables, count=CAPACITY, seed=0, **options):
    """A bank with `count` entries in each level, scores -3 to -1."""
    bank, rng = MemoryBank(space, LEVELS, CAPACITY, **options), np.random.default_rng(seed)
    for level, table in enumerate(tables):
        for row, score in zip(table.codes[:count], rng.uniform(-3, -1, count), strict=True):
            assert bank.offer(level, space.config(row), float(score)) == "added"
    return bank


# Bank


def test_full_bank_takes_better_ones_only(space, tables):
    bank = filled(space, tables)
    scores = [entry.score for entry in bank.entries(0)]
    worst = int(np.argmin(scores))
    new = [space.config(row) for row in tables[0].codes[CAPACITY : CAPACITY + 2]]
    before = bank.entries(0)
    assert bank.offer(0, new[0], min(scores) - 0.1) == "worse"
    assert bank.offer(0, new[0], min(scores)) == "worse"  # an equal one does not come in
    assert bank.entries(0) == before
    assert bank.offer(0, new[0], min(scores) + 1e-6) == "replaced"
    assert bank.size(0) == CAPACITY
    assert bank.configs(0) == [e.config for j, e in enumerate(before) if j != worst] + [new[0]]
    assert bank.offer(0, new[0], 5.0) == "known"
    assert bank.offer(0, before[worst].config, 5.0) == "replaced"  # it may come back
    assert bank.best(0).config == before[worst].config


def test_the_oldest_of_equal_ones_goes(space, tables):
    bank = MemoryBank(space, LEVELS, 3)
    configs = [space.config(row) for row in tables[0].codes[:4]]
    for config in configs[:3]:
        bank.offer(0, config, -1.0)
    assert bank.offer(0, configs[3], -0.5) == "replaced"
    assert bank.configs(0) == [configs[1], configs[2], configs[3]]


def test_what_may_not_enter(space, tables):
    bank = MemoryBank(space, LEVELS)
    config = space.config(tables[1].codes[0])
    assert bank.offer(0, config, -1.0) == "outside"
    assert bank.offer(1, space.min(), -1.0) == "outside"
    assert bank.offer(1, config, math.nan) == "not finite"
    assert bank.offer(1, config, -math.inf) == "not finite"
    assert len(bank) == 0
    assert bank.best(1) is None
    assert published_capacities(8) == (150, 150, 150, 150, 50, 50, 50, 50)
    with pytest.raises(ConfigError, match=r"capacities \[3, 0\] for 2 levels"):
        MemoryBank(space, LEVELS, [3, 0])
    with pytest.raises(ConfigError, match=r"smoothing 1; allowed"):
        MemoryBank(space, LEVELS, smoothing=1.0)


def test_refresh_changes_scores_and_nothing_else(space, tables):
    bank = filled(space, tables, smoothing=0.0)
    other, configs = bank.entries(1), bank.configs(0)
    scores = np.linspace(-2, -1, CAPACITY).tolist()
    scores[4] = math.nan
    old = bank.entries(0)[4].score
    bank.rescore(0, scores)
    assert bank.configs(0) == configs
    assert bank.entries(1) == other
    scores[4] = old
    assert [entry.score for entry in bank.entries(0)] == scores
    with pytest.raises(ValueError, match="3 scores for 20 entries"):
        bank.rescore(0, [1.0, 2.0, 3.0])


def test_smoothing_leaves_the_common_progress_alone(space, tables):
    bank = MemoryBank(space, LEVELS, 4, smoothing=0.9)
    configs = [space.config(row) for row in tables[0].codes[:4]]
    for config in configs[:3]:
        bank.offer(0, config, -9.0)
    bank.rescore(0, [-3.0, -2.0, -1.0])  # first scores come from other images: replaced
    assert [entry.score for entry in bank.entries(0)] == [-3.0, -2.0, -1.0]
    bank.rescore(0, [-2.0, -1.0, 0.0])  # all are better by 1: in full
    np.testing.assert_allclose([entry.score for entry in bank.entries(0)], [-2.0, -1.0, 0.0])
    bank.offer(0, configs[3], -9.0)
    bank.rescore(0, [0.0, -1.0, -2.0, -0.5])  # the order turns round: a tenth of it; the newcomer as it is
    np.testing.assert_allclose([entry.score for entry in bank.entries(0)], [-1.8, -1.0, -0.2, -0.5])


def test_bank_comes_back_from_a_checkpoint(space, tables):
    bank = filled(space, tables)
    bank.rescore(0, np.linspace(-2, -1, CAPACITY) / 3)
    state = json.loads(json.dumps(bank.state_dict()))
    again = MemoryBank(space, LEVELS, CAPACITY)
    again.load_state_dict(state)
    assert again.checksum() == bank.checksum()
    assert again.entries(0) == bank.entries(0)
    assert again.offer(0, bank.configs(0)[3], 9.0) == "known"
    small = MemoryBank(space, LEVELS, 5)
    small.load_state_dict(state)
    kept = sorted(entry.score for entry in bank.entries(1))[-5:]
    assert sorted(entry.score for entry in small.entries(1)) == kept
    with pytest.raises(CheckpointError, match=f"is of the space {space.hash}, this run has"):
        MemoryBank(elasticvit_space(num_classes=7), LEVELS).load_state_dict(state)
    with pytest.raises(CheckpointError, match="the memory bank has levels"):
        MemoryBank(space, Levels((200_000_000,))).load_state_dict(state)


def test_two_ranks_with_equal_scores_end_with_equal_banks(space, tables):
    banks = []
    for _ in range(2):
        bank = MemoryBank(space, LEVELS, CAPACITY)
        sampler = Sampler(space, LEVELS, tables, bank)
        rng, scores = np.random.default_rng(5), np.random.default_rng(6)
        for step in range(300):
            drawn = sampler.sample(step % 2, rng, step / 300)
            if drawn.explored:
                bank.offer(step % 2, drawn.config, float(scores.normal()))
            if step % 50 == 49:
                bank.rescore(0, scores.normal(size=bank.size(0)).tolist())
        banks.append(bank)
    assert banks[0].checksum() == banks[1].checksum()
    assert banks[0].size(0) == CAPACITY
    banks[1].rescore(0, [entry.score + 1e-15 for entry in banks[1].entries(0)])
    assert banks[0].checksum() != banks[1].checksum()


def test_draws_from_the_bank_follow_softmax(space, tables):
    bank, rng = filled(space, tables), np.random.default_rng(0)
    scores = np.array([entry.score for entry in bank.entries(0)])
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(bank.weights(0), expected)
    place = {config: j for j, config in enumerate(bank.configs(0))}
    for how, weights in (("softmax", expected), ("uniform", np.full(CAPACITY, 1 / CAPACITY))):
        counts = np.bincount([place[bank.draw(0, rng, how)] for _ in range(4000)], minlength=CAPACITY)
        chi = ((counts - 4000 * weights) ** 2 / (4000 * weights)).sum()
        assert chi < 43.8  # 99.9 % quantile for 19 degrees of freedom
    assert {bank.draw(0, rng, "best") for _ in range(5)} == {bank.best(0).config}
    with pytest.raises(ConfigError, match=r'no draw "top"'):
        bank.draw(0, rng, "top")


# Exploitation


def test_exploitation_rises_as_published():
    schedule = ExploitSchedule()
    found = [round(schedule.value(epoch / 610), 10) for epoch in (0, 98, 99, 199, 299, 399, 499, 598, 599, 610)]
    assert found == [0.2, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 0.95, 1.0, 1.0]
    assert NO_EXPLOITATION.value(1.0) == 0
    with pytest.raises(ConfigError, match="a start from 0 to 1"):
        ExploitSchedule(start=1.5)


@pytest.mark.parametrize("progress", [0.0, 0.4])
def test_how_often_the_bank_is_used(space, tables, progress):
    bank = filled(space, tables)
    sampler = Sampler(space, LEVELS, tables, bank, preference="uniform")
    rng, inside = np.random.default_rng(1), set(bank.configs(1))
    drawn = [sampler.sample(1, rng, progress) for _ in range(5000)]
    q = sampler.exploit.value(progress)
    assert np.mean([not one.explored for one in drawn]) == pytest.approx(q, abs=0.02)
    assert all(one.config in inside for one in drawn if not one.explored)


def test_a_half_full_bank_is_not_used(space, tables):
    sampler = Sampler(space, LEVELS, tables, filled(space, tables, CAPACITY // 2), exploit=ExploitSchedule(1.0))
    rng = np.random.default_rng(1)
    assert all(sampler.sample(0, rng).explored for _ in range(50))
    assert sampler.sample(0, rng).preference is not None  # half is enough for a preference
    sampler.bank = filled(space, tables, CAPACITY // 2 - 1)
    assert sampler.sample(0, rng).preference is None
    sampler.bank = filled(space, tables, CAPACITY // 2 + 1)
    assert not sampler.sample(0, rng).explored


# Preference


def test_preference_of_known_subnets(space):
    released = released_subnets()
    codes = np.stack([space.codes(released[name]) for name in ("S1", "M", "L3")])
    anchors = [entry.config for entry in published_smallest(space).entries]
    expected = ([-6.82, -10.38, -121.56], [-26.84, -50.06, -252.15])
    for anchor, values in zip(anchors, expected, strict=False):
        np.testing.assert_allclose(preference_of(space, codes, anchor) / 1e6, values, atol=0.005)


def vit_shape(space, configs):
    stages = [[stage for stage in config.stages if stage.is_vit] for config in configs]
    return np.mean([[s.depth for s in one] for one in stages]), np.mean([[s.width for s in one] for one in stages])


def test_preference_takes_the_least_and_goes_for_wide_and_shallow(space, tables):
    bank = filled(space, tables)
    sampler = Sampler(space, LEVELS, tables, bank, exploit=NO_EXPLOITATION)
    assert sampler.anchor(0) == space.min()
    assert sampler.anchor(1) == bank.best(0).config
    for level in (0, 1):
        rng, again = np.random.default_rng(2), np.random.default_rng(2)
        again.random()
        drawn = sampler.sample(level, rng)
        codes = tables[level].draw_codes(again, 5)
        values = preference_of(space, codes, sampler.anchor(level))
        assert drawn.preference == values.min()
        assert drawn.config == space.config(codes[np.argmin(values)])
    uniform = Sampler(space, LEVELS, tables, bank, exploit=NO_EXPLOITATION, preference="uniform")
    rng = np.random.default_rng(3)
    chosen = vit_shape(space, [sampler.sample(1, rng).config for _ in range(1000)])
    plain = vit_shape(space, [uniform.sample(1, rng).config for _ in range(1000)])
    assert chosen[0] < plain[0] - 0.3
    assert chosen[1] > plain[1] + 5


def test_equal_generators_draw_equal_subnets_whatever_numpy_does(space, tables):
    sampler = Sampler(space, LEVELS, tables, filled(space, tables))
    found = []
    for rank in range(2):
        rng = np.random.default_rng(9)
        row = []
        for step in range(60):
            np.random.seed(rank * 100 + step)  # other libraries use the global generator
            row.append(sampler.sample(step % 2, rng, 0.3).config)
        found.append(row)
    assert found[0] == found[1]
    assert len(set(found[0])) > 30


def test_every_switch_in_a_plain_space():
    own = PlainSpace(
        widths=(24, 36, 48), depths=(2, 3), heads=(1, 2, 3), mlp=(2.0, 4.0), head_dim=8, resolutions=(32, 48), patch=8
    )
    levels = spread_levels(own, 4)
    for count in (1, 3):
        smallest = build_smallest(own, levels, count)
        tables = build_tables(own, levels, smallest, rows=20)
        for preference in ("uniform", "wide_shallow"):
            for bank in (None, MemoryBank(own, levels, 6)):
                sampler, rng = Sampler(own, levels, tables, bank, preference=preference), np.random.default_rng(0)
                for step in range(40):
                    drawn = sampler.sample(step % 4, rng, step / 40)
                    assert own.contains(drawn.config, smallest.of(step % 4))
                    assert levels.holds(step % 4, own.macs(drawn.config))
                    if bank is not None and drawn.explored:
                        bank.offer(step % 4, drawn.config, -float(step))
    with pytest.raises(ConfigError, match=r'no preference "deep"; allowed: wide_shallow, uniform'):
        Sampler(own, levels, tables, preference="deep")
    with pytest.raises(ConfigError, match="tables of levels"):
        Sampler(own, levels, tables[:2])
