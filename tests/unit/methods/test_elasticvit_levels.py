import json
from dataclasses import replace

import numpy as np
import pytest

from efftrain_ds.core.errors import CheckpointError, ConfigError
from efftrain_ds.methods.elasticvit.levels import (
    PUBLISHED_LEVELS,
    Levels,
    Smallest,
    SmallestSubnets,
    Walk,
    build_smallest,
    published_smallest,
    read_smallest,
    smallest_within,
    spread_levels,
)
from efftrain_ds.methods.elasticvit.tables import (
    Table,
    build_table,
    build_tables,
    load_table,
    read_tables,
    save_tables,
    table_path,
)
from efftrain_ds.models.elastic import PlainSpace, autoformer_space, elasticvit_space

LEVELS = Levels()
ROWS = 40


def small_space(classes=10):
    return elasticvit_space(divisor=4, num_classes=classes, resolutions=(32, 48, 64))


def plain_space():
    return PlainSpace(
        widths=(24, 36, 48), depths=(2, 3), heads=(1, 2, 3), mlp=(2.0, 4.0), head_dim=8, resolutions=(32, 48), patch=8
    )


@pytest.fixture(scope="module")
def space():
    return elasticvit_space()


@pytest.fixture(scope="module")
def tables(space):
    return build_tables(space, LEVELS, published_smallest(space), rows=ROWS, seed=3)


# Walk


def walked(n, mode="adjacent", levels=8, seed=0):
    rng, walk = np.random.default_rng(seed), Walk(levels, mode)
    return np.array([0, *(walk.next(rng) for _ in range(n))])


def test_adjacent_walk_keeps_its_rule():
    path = walked(100_000)
    moves = np.diff(path)
    assert set(moves) == {-1, 0, 1}
    np.testing.assert_allclose(np.bincount(path, minlength=8) / len(path), 1 / 8, atol=0.02)
    for level in range(8):
        chances = [(moves[path[:-1] == level] == move).mean() for move in (-1, 0, 1)]
        rule = [0, 2 / 3, 1 / 3] if level == 0 else [1 / 3, 2 / 3, 0] if level == 7 else [1 / 3] * 3
        np.testing.assert_allclose(chances, rule, atol=0.02)


def test_other_walks():
    assert walked(10, "cyclic", 3).tolist() == [0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2]
    path = walked(20_000, "random")
    np.testing.assert_allclose(np.bincount(path, minlength=8) / len(path), 1 / 8, atol=0.02)
    assert np.abs(np.diff(path)).max() == 7
    assert set(walked(20, levels=1)) == {0}
    with pytest.raises(ConfigError, match=r'no walk "up".*adjacent, random, cyclic'):
        Walk(8, "up")


def test_walk_goes_on_after_a_stop():
    rng, walk = np.random.default_rng(1), Walk(8)
    first = [walk.next(rng) for _ in range(50)]
    state = json.loads(json.dumps(walk.state_dict()))
    rest = [walk.next(rng) for _ in range(50)]
    again_rng, again = np.random.default_rng(1), Walk(8)
    for _ in range(50):
        again_rng.random()  # one number a step
    again.load_state_dict(state)
    assert again.index == first[-1]
    assert [again.next(again_rng) for _ in range(50)] == rest
    with pytest.raises(CheckpointError, match="8 levels, this run 5"):
        Walk(5).load_state_dict(state)


def test_consecutive_steps_differ_by_a_gap_and_a_window_at_most(tables):
    rng, walk = np.random.default_rng(4), Walk(8)
    before = None
    largest = 0
    for _ in range(1000):
        level = walk.next(rng)
        rows = rng.integers(len(tables[level]), size=3)
        macs = tables[level].macs[rows]
        if before is not None:
            differences = np.abs(macs[:, None] - before[1][None])
            assert abs(level - before[0]) <= 1
            assert differences.max() <= LEVELS.gap(level, before[0])
            largest = max(largest, differences.max())
        before = level, macs
    assert 200_000_000 < largest <= 320_000_000
    assert LEVELS.gap(0, 1) == 120_000_000


# Levels


def test_levels_refuse_nonsense(space):
    with pytest.raises(ConfigError, match="ascending"):
        Levels((200, 100))
    with pytest.raises(ConfigError, match=r"level 10 M MACs lies below the smallest.*38\.29 M"):
        Levels((10_000_000, 100_000_000)).check(space)
    with pytest.raises(ConfigError, match=r"level 4 G MACs lies above the largest.*3\.213 G"):
        Levels((4_000_000_000,)).check(space)
    assert LEVELS.holds(0, 100_000_000)
    assert LEVELS.holds(0, 120_000_000)
    assert not LEVELS.holds(0, 120_000_001)
    assert not LEVELS.holds(0, 99_999_999)


def test_spread_levels_stand_where_the_published_ones_do(space):
    found = spread_levels(space)
    assert found.macs[0] == pytest.approx(PUBLISHED_LEVELS[0], rel=0.05)
    assert found.macs[-1] == pytest.approx(PUBLISHED_LEVELS[-1], rel=0.05)
    assert found.window == pytest.approx(20e6, rel=0.02)
    for other in (small_space(), plain_space(), autoformer_space("tiny")):
        levels = spread_levels(other, 5)
        levels.check(other)
        assert all(b - a > levels.window for a, b in zip(levels.macs, levels.macs[1:], strict=False))
        assert all(b <= 2 * a for a, b in zip(levels.macs, levels.macs[1:], strict=False))


# Smallest sub-networks


def test_published_smallest(space):
    smallest = published_smallest(space)
    assert smallest.by_level == (0, 0, 1, 1, 2, 2, 2, 2)
    assert smallest.of(0) == space.min()
    assert [round(space.macs(e.config, "reference") / 1e6, 2) for e in smallest.entries] == [37.37, 159.92, 288.81]
    assert [round(space.macs(e.config) / 1e6, 2) for e in smallest.entries] == [38.29, 161.67, 290.31]
    again = read_smallest(json.loads(json.dumps(smallest.to_list())), space, LEVELS)
    assert again.entries == smallest.entries
    # a level belongs to a key up to one window above it
    moved = published_smallest(space, Levels((220_000_000, 220_000_001, 420_000_000, 420_000_001, 1_000_000_000)))
    assert moved.by_level == (0, 1, 1, 2, 2)


def test_wrong_smallest_are_refused(space):
    big = Smallest(space.max(), None)
    with pytest.raises(ConfigError, match=r"smallest sub-network 0 has 3\.213 G MACs, more than level 100 M"):
        SmallestSubnets(space, [big], LEVELS)
    with pytest.raises(ConfigError, match="must ascend"):
        SmallestSubnets(space, [Smallest(space.min(), 300), Smallest(space.min(), 200)], LEVELS)
    with pytest.raises(ConfigError, match="does not have the published"):
        published_smallest(small_space())
    with pytest.raises(ConfigError, match="does not have the published"):
        published_smallest(plain_space())
    data = [{"up_to": None, "config": {**space.min().to_dict(), "resolution": 100}}]
    with pytest.raises(ConfigError, match=r"smallest\[0\].config: resolution is 100"):
        read_smallest(data, space, LEVELS)
    with pytest.raises(ConfigError, match=r"smallest\[0\] has config; needed: up_to, config"):
        read_smallest([{"config": {}}], space, LEVELS)


@pytest.mark.parametrize("make", [elasticvit_space, small_space, plain_space])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_built_smallest_contain_each_other(make, count):
    own = make()
    levels = spread_levels(own, 6)
    smallest = build_smallest(own, levels, count)
    assert smallest.by_level == tuple(np.repeat(range(count), 6 // count))
    assert smallest.of(0) == own.min()
    macs = [own.macs(entry.config) for entry in smallest.entries]
    assert macs == sorted(macs)
    assert macs[-1] < levels.macs[6 - 6 // count]
    for small, large in zip(smallest.entries, smallest.entries[1:], strict=False):
        assert own.contains(large.config, small.config)


def test_smallest_within_a_budget(space):
    for budget in (50e6, 200e6, 900e6, 4e9):
        config = smallest_within(space, budget)
        assert space.macs(config) <= budget
        assert space.macs(config) > min(0.8 * budget, 1e9)
    assert space.contains(smallest_within(space, 4e9))
    with pytest.raises(ConfigError, match=r"no sub-network within 20 M MACs; the smallest has 38\.29 M"):
        smallest_within(space, 20e6)


# Tables


def test_tables_hold_what_they_promise(space, tables):
    smallest = published_smallest(space)
    for index, table in enumerate(tables):
        low = LEVELS.macs[index]
        assert len(table) == len({row.tobytes() for row in table.codes}) == ROWS
        assert space.legal(table.codes).all()
        assert space.at_least(table.codes, smallest.of(index)).all()
        assert table.macs.min() >= low
        assert table.macs.max() <= low + 20_000_000
        np.testing.assert_array_equal(table.macs, space.macs_of(table.codes))
        config = table.draw(np.random.default_rng(0))
        assert space.contains(config, smallest.of(index))
        assert low <= space.macs(config) <= low + 20_000_000


def test_a_table_depends_on_seed_level_and_smallest_only(space, tables):
    smallest = published_smallest(space)
    alone = build_table(space, LEVELS.macs[5], window=LEVELS.window, lower=smallest.of(5), rows=ROWS, seed=3)
    np.testing.assert_array_equal(alone.codes, tables[5].codes)
    other = build_table(space, LEVELS.macs[5], window=LEVELS.window, lower=smallest.of(5), rows=ROWS, seed=4)
    assert not np.array_equal(other.codes, alone.codes)
    more = build_table(space, LEVELS.macs[5], window=LEVELS.window, lower=smallest.of(5), rows=2 * ROWS, seed=3)
    np.testing.assert_array_equal(more.codes[:ROWS], alone.codes)


def test_tables_come_back_from_files(space, tables, tmp_path):
    save_tables(tmp_path, tables)
    assert not list(tmp_path.glob("*.tmp"))
    smallest = published_smallest(space)
    again = read_tables(tmp_path, space, LEVELS, smallest, rows=ROWS, seed=3)
    assert list(again) == list(range(len(LEVELS)))
    for index, a in again.items():
        b = tables[index]
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.macs, b.macs)
        assert (a.lower, a.seed, a.drawn, a.rows) == (b.lower, b.seed, b.drawn, b.rows)
        rngs = np.random.default_rng(0), np.random.default_rng(0)
        assert a.draw(rngs[0]) == b.draw(rngs[1])
    narrow = read_tables(tmp_path, space, Levels(window=10_000_000), smallest)
    assert all((t.macs <= t.level + 10_000_000).all() and 0 < len(t) < ROWS for t in narrow.values())
    # fewer rows, or a narrower window: the tables that would have been made for them
    few = read_tables(tmp_path, space, Levels(window=10_000_000), smallest, rows=5)[5]
    made = build_table(space, LEVELS.macs[5], window=10_000_000, lower=smallest.of(5), rows=5, seed=3)
    np.testing.assert_array_equal(few.codes, made.codes)
    table_path(tmp_path, LEVELS.macs[2]).unlink()
    assert sorted(read_tables(tmp_path, space, LEVELS, smallest)) == [0, 1, 3, 4, 5, 6, 7]
    assert read_tables(tmp_path / "none", space, LEVELS, smallest) == {}


def test_tables_of_another_run_are_refused(space, tables, tmp_path):
    save_tables(tmp_path, tables[1:2])
    smallest = published_smallest(space)

    def read(levels=LEVELS, lower=smallest, **changes):
        return read_tables(tmp_path, space, levels, lower, **changes)

    with pytest.raises(ConfigError, match=r"level_200000000.npz was made for a window of 20 M MACs; 30 M is asked for"):
        read(Levels(window=30_000_000))
    with pytest.raises(ConfigError, match="another smallest sub-network.*; give another folder, or remove the file"):
        read(lower=None)
    with pytest.raises(ConfigError, match="by the exact formula; needed: 200 M, reference"):
        read(Levels(formula="reference"))
    with pytest.raises(ConfigError, match='made with seed 3, this run has "seed": 4; give another folder'):
        read(seed=4)
    with pytest.raises(ConfigError, match=f'has {ROWS} sub-networks of its level, this run has "rows": {ROWS + 1}'):
        read(rows=ROWS + 1)
    save_tables(tmp_path, [replace(tables[1], rows=2 * ROWS)])  # more were asked for then and not found
    assert len(read(rows=ROWS + 1)[1]) == ROWS


def test_wrong_files_are_refused(space, tables, tmp_path):
    path = tmp_path / "one.npz"
    tables[1].save(path)
    with pytest.raises(ConfigError, match=rf"made for the space {space.hash}, this run has"):
        load_table(path, elasticvit_space(num_classes=10))
    t = tables[1]

    def changed(codes, macs, level=t.level):
        Table(space, level, t.window, t.formula, t.lower, t.seed, codes, macs, t.drawn, t.rows).save(path)

    changed(t.codes[:0], t.macs[:0])
    with pytest.raises(ConfigError, match="level 200 M has no sub-networks"):
        load_table(path, space)
    macs = t.macs.copy()
    macs[7] += 1
    changed(t.codes, macs)
    with pytest.raises(ConfigError, match="row 7 is no sub-network of level 200 M"):
        load_table(path, space)
    codes = t.codes.copy()
    codes[5, 1] = 9
    changed(codes, t.macs)
    with pytest.raises(ConfigError, match="row 5 is no sub-network"):
        load_table(path, space)
    changed(t.codes, t.macs, level=10_000_000)
    with pytest.raises(ConfigError, match="below the smallest sub-network"):
        load_table(path, space)
    path.write_bytes(b"no table")
    with pytest.raises(ConfigError, match="is no table of sub-networks"):
        load_table(path, space)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="is no table of sub-networks"):
        load_table(tmp_path / "plain.npy", space)


def test_levels_that_cannot_be_filled(space, caplog):
    with pytest.raises(ConfigError, match="below the smallest sub-network"):
        build_tables(space, Levels((1_000_000, 100_000_000)))
    with pytest.raises(ConfigError, match=r"none of 65,536 sub-networks.*window of 0 K"):
        build_tables(space, Levels((100_000_001,), 0), draws=100_000)
    own = plain_space()
    few = build_tables(own, Levels((own.macs(own.min()),), 1000), rows=500, draws=200_000)[0]
    assert 0 < len(few) < 500
    assert "500 were asked for" in caplog.text


def test_tables_of_a_plain_space():
    own = autoformer_space("tiny")
    levels = spread_levels(own, 3)
    smallest = build_smallest(own, levels, 2)
    for index, table in enumerate(build_tables(own, levels, smallest, rows=8)):
        assert own.legal(table.codes).all()
        assert own.at_least(table.codes, smallest.of(index)).all()
        assert all(levels.holds(index, own.macs(own.config(row))) for row in table.codes)
