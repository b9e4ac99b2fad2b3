import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from efftrain_ds.core.errors import CheckpointError, ConfigError
from efftrain_ds.methods.elasticvit import latency_blocks, latency_ort
from efftrain_ds.methods.elasticvit.evolution import Evolution, RandomSearch, Rates, pareto
from efftrain_ds.methods.elasticvit.latency import (
    LatencyTable,
    MacsCost,
    TableLatency,
    Timing,
    block_keys,
    calibrated,
    import_nn_meter,
    load_latency,
    spearman,
    trusted,
)
from efftrain_ds.methods.elasticvit.limits import Limit, latency_limit, macs_limit, params_limit
from efftrain_ds.methods.elasticvit.tables import build_table
from efftrain_ds.models.elastic import PlainSpace, autoformer_space, elasticvit_space, released_subnets

LOW, HIGH = 300_000_000, 320_000_000


@pytest.fixture(scope="module")
def space():
    return elasticvit_space()


@pytest.fixture(scope="module")
def pool(space):
    """Random sub-networks of the window, so that no search has to look for them."""
    return build_table(space, LOW, window=HIGH - LOW, rows=4000)


def tiny():
    return PlainSpace(
        widths=(24, 36, 48), depths=(2, 3), heads=(1, 2, 3), mlp=(2.0, 4.0), head_dim=8, resolutions=(32, 48), patch=8
    )


class Objective:
    """A utility of each choice of each dimension, and 20 of pairs of choices."""

    def __init__(self, space, seed):
        rng = np.random.default_rng(seed)
        self.space = space
        most = max(len(d.choices) for d in space.dimensions)
        self.single = rng.normal(size=(len(space.dimensions), most))
        self.pairs = [tuple(rng.choice(len(space.dimensions), 2, replace=False)) for _ in range(20)]
        self.double = rng.normal(size=(20, most, most))

    def __call__(self, configs):
        codes = np.stack([self.space.codes(config) for config in configs])
        score = self.single[np.arange(codes.shape[1]), codes].sum(1)
        for (a, b), table in zip(self.pairs, self.double, strict=True):
            score += table[codes[:, a], codes[:, b]]
        return score.tolist()


def evolve(space, pool, seed=0, evaluations=600, **options):
    options.setdefault("source", pool.draw_codes if pool else None)
    return Evolution(space, [macs_limit(space, HIGH, LOW)], evaluations=evaluations, seed=seed, **options)


# Search


def beaten(space, pool, seeds):
    wins = 0
    for seed in seeds:
        objective = Objective(space, seed)
        evolution = evolve(space, pool, seed)
        best = evolution.run(objective)
        random = RandomSearch(space, [macs_limit(space, HIGH, LOW)], evaluations=600, seed=seed, source=pool.draw_codes)
        wins += best.score > random.run(objective).score
        for search in (evolution, random):
            macs = space.macs_of(np.stack([space.codes(one.config) for one in search.evaluated]))
            assert len({one.config for one in search.evaluated}) == len(search.evaluated) == 600
            assert LOW <= macs.min()
            assert macs.max() <= HIGH
    return wins


def test_evolution_beats_random_search(space, pool):
    assert beaten(space, pool, range(3)) == 3


@pytest.mark.slow
def test_evolution_beats_random_search_on_twenty_seeds(space, pool):
    assert beaten(space, pool, range(20)) >= 18


def test_equal_seeds_search_alike_however_candidates_are_shared_out(space, pool):
    objective = Objective(space, 0)
    whole = evolve(space, pool, 7, 200)
    whole.run(objective)
    ranks = evolve(space, pool, 7, 200)
    rng = np.random.default_rng(0)
    while not ranks.done:
        configs = ranks.ask()
        assert ranks.ask() == configs
        scores = dict(zip(configs, objective(configs), strict=True))
        order = [configs[j] for j in rng.permutation(len(configs))]  # in any order, in pieces
        half = len(order) // 2
        for part in (order[:half], order[half:]):
            ranks.tell(part, [scores[config] for config in part])
    assert ranks.evaluated == whole.evaluated
    other = evolve(space, pool, 8, 200)
    other.run(objective)
    assert other.evaluated != whole.evaluated
    assert whole.history()[-1] == (200, whole.best.score)
    assert [score for _, score in whole.history()] == sorted(score for _, score in whole.history())


@pytest.mark.parametrize("told", [3, 20, 33, 45])
def test_a_stopped_search_goes_on(space, pool, told):
    objective = Objective(space, 1)
    whole = evolve(space, pool, 2, 120)
    whole.run(objective)
    first = evolve(space, pool, 2, 120)
    for _ in range(told):
        config = first.ask(1)
        first.tell(config, objective(config))
    state = json.loads(json.dumps(first.state_dict()))
    again = evolve(space, pool, 2, 120)
    again.load_state_dict(state)
    assert again.ask() == first.ask()
    again.run(objective)
    assert again.evaluated == whole.evaluated
    assert again.state_dict() == whole.state_dict()
    with pytest.raises(CheckpointError, match="started with seed 2, now it is 3"):
        evolve(space, pool, 3, 120).load_state_dict(state)
    with pytest.raises(CheckpointError, match="started with limits"):
        Evolution(space, [macs_limit(space, HIGH)], evaluations=120, seed=2).load_state_dict(state)


def test_scores_come_from_candidates_only(space, pool):
    search = evolve(space, pool, 0, 12, population=6)
    first = search.ask(2)
    search.tell(first, [math.nan, 1.0])
    with pytest.raises(ValueError, match="was not asked for, or has a score"):
        search.tell(first[:1], [2.0])
    with pytest.raises(ValueError, match="was not asked for"):
        search.tell([space.min()], [2.0])
    assert [one.score for one in search.evaluated] == [-math.inf, 1.0]
    assert search.best.config == first[1]
    again = evolve(space, pool, 0, 12, population=6)
    again.load_state_dict(json.loads(json.dumps(search.state_dict())))
    assert again.evaluated == search.evaluated
    search.run(lambda configs: [0.0] * len(configs))
    assert len(search.evaluated) == 12
    assert search.ask() == []


def test_seeds_of_the_bank_come_first(space, pool):
    seeds = [space.config(row) for row in pool.codes[:5]]
    search = evolve(space, pool, 0, 60, population=20, seeds=[space.min(), *seeds])  # the smallest is too small
    assert search.ask()[:5] == seeds
    options = {"evaluations": 30, "source": pool.draw_codes, "batch": 10}
    random = RandomSearch(space, search.limits, **options).ask()
    assert not set(random) & set(seeds)
    assert RandomSearch(space, search.limits, seeds=seeds, **options).ask() == random  # what it has to beat begins bare


def test_children_reach_every_dimension(space, pool):
    search = evolve(space, pool, 0, 600)
    rng = np.random.default_rng(0)
    parents = pool.codes[:1]
    mutants = space.settled(search._mutate(rng, parents, 4000))
    mutants = mutants[space.legal(mutants)]
    for column, dimension in enumerate(space.dimensions):
        reached = {dimension.choices[code] for code in mutants[:, column]}
        assert len(reached) == 1 or reached <= set(dimension.choices)
        if column not in space.ascending:
            assert reached == set(dimension.choices), dimension.name
    pair = pool.codes[:2]
    children = search._cross(rng, pair, 200)
    for columns in search._kinds:
        whole = [(children[:, columns] == parent[columns]).all(1) for parent in pair]
        assert (whole[0] | whole[1]).all()
    assert space.legal(children).all()


def test_search_without_a_source_and_in_a_small_space():
    own = tiny()
    budget = (own.macs(own.min()) + own.macs(own.max())) // 2
    everything = own.count()
    inside = [one for one in (own.macs_of(own.sample_codes(np.random.default_rng(0), 40_000)) <= budget)]
    assert any(inside)
    assert not all(inside)
    search = Evolution(own, [macs_limit(own, budget), params_limit(own, 60_000)], evaluations=everything, population=40)
    best = search.run(lambda configs: [own.macs(config) for config in configs])
    assert search.done
    assert len(search.evaluated) < everything  # it stopped when nothing new was left
    assert all(own.macs(one.config) <= budget and own.params(one.config) <= 60_000 for one in search.evaluated)
    assert best.score == max(one.score for one in search.evaluated)


def test_limits_that_nothing_keeps(space):
    with pytest.raises(ConfigError, match=r"MACs of at most 1e\+07: the smallest .* has 3\.82862e\+07"):
        Evolution(space, [macs_limit(space, 10_000_000)], evaluations=10)
    with pytest.raises(ConfigError, match=r"parameters of at least 1e\+12: the largest"):
        RandomSearch(space, [params_limit(space, 2e12, 1e12)], evaluations=10)
    with pytest.raises(ConfigError, match="nothing lies there"):
        Evolution(space, [macs_limit(space, 1e8, 2e8)], evaluations=10)
    nowhere = [macs_limit(space, 400_000_001, 400_000_001), params_limit(space, 9_000_000)]
    with pytest.raises(ConfigError, match="no sub-network found within the limits: MACs from"):
        Evolution(space, nowhere, evaluations=10, draws=20_000).ask()
    with pytest.raises(ConfigError, match="at least 1 is needed"):
        Evolution(space, [], evaluations=0)
    with pytest.raises(ConfigError, match="mutation rates"):
        Rates(rest=0.0)


def test_pareto_front():
    assert pareto([3.0, 1.0, 2.0, 2.0, 4.0], [5.0, 1.0, 4.0, 3.0, 4.5]) == [1, 2, 0]
    assert pareto([1.0, 2.0], [math.nan, 1.0]) == [1]


# Latency

T1 = {
    "firstconv_128_3_16_2_3": 0.0966,
    "conv_64_16_16_1_1_hard_swish_3_nose": 0.1358,
    "conv_64_16_24_3_2_hard_swish_3_nose": 0.3163,
    "conv_32_24_24_3_1_hard_swish_3_nose": 0.2373,
    "conv_32_24_32_3_2_hard_swish_3_se": 0.1461,
    "conv_16_32_32_3_1_hard_swish_3_se": 0.0994,
    "transds_16_32_64_2_6": 0.1250,
    "transattn_8_64_hard_swish_2_ln": 0.1638,
    "transffn_8_64_2_hard_swish_ln": 0.0633,
    "transds_8_64_96_1_6": 0.2054,
    "transattn_8_96_hard_swish_2_ln": 0.2867,
    "transffn_8_96_2_hard_swish_ln": 0.1373,
    "transds_8_96_176_2_6": 0.2563,
    "transattn_4_176_hard_swish_2_ln": 0.1634,
    "transffn_4_176_3_hard_swish_ln": 0.1767,
    "transds_4_176_272_2_6": 0.3105,
    "transattn_2_272_hard_swish_2_ln": 0.1227,
    "transffn_2_272_4_hard_swish_ln": 0.2177,
    "mbpool_2_272_1984_6_hard_swish": 1.0807,
}
"""Blocks of the released T1 on a Pixel 6, in ms, rounded (published table of nn-Meter)."""


def test_latency_of_a_released_subnet(space, tmp_path):
    (tmp_path / "lut.json").write_text(json.dumps(T1))
    table = import_nn_meter(tmp_path / "lut.json", "Pixel 6")
    provider = TableLatency(space, table)
    released = released_subnets()
    keys = provider.keys(released["T1"])
    assert list(dict.fromkeys(keys)) == list(T1)
    assert keys.count("conv_16_32_32_3_1_hard_swish_3_se") == 2
    assert provider.predict(released["T1"]) == pytest.approx(4.440, abs=5e-4)
    assert (provider.unit, provider.device) == ("ms", "Pixel 6")
    with pytest.raises(ConfigError, match='table of Pixel 6 has no entry "firstconv_160_3_16_2_3"'):
        provider.predict(released["T2"])
    # odd sides round up: 176 gives 88, 44, 22, 11, 11, 6, 3
    odd = block_keys(space, space.make(176, (16, 16, 16, 48, 80, 144, 160), (1, 2, 2, 1, 1, 1, 1)))
    assert [k.split("_")[1] for k in odd if k.startswith("transds")] == ["22", "11", "11", "6"]
    assert odd[-1].startswith("mbpool_3_160_")
    coverage = provider.coverage(sample=20)
    assert coverage.covered == 0
    assert coverage.sampled == 20
    assert all(key not in T1 for key in coverage.missing)


def test_latency_tables_in_files(space, tmp_path):
    path = tmp_path / "table.json"
    entries = {key: Timing(value, 0.9 * value, 1.2 * value, 50) for key, value in T1.items()}
    table = LatencyTable("cpu", "onnxruntime", 1, 1, "float32", space.hash, entries, scale=1.25)
    table.save(path)
    again = load_latency(path)
    assert again == table
    assert TableLatency(space, again).predict(released_subnets()["T1"]) == pytest.approx(1.25 * 4.440, abs=1e-3)
    with pytest.raises(ConfigError, match=f"measured for the space {space.hash}, this one is"):
        TableLatency(elasticvit_space(num_classes=10), again)
    good = json.loads(path.read_text())
    for change, message in (
        ({"schema": 2}, "schema 2; 1 is needed"),
        ({"speed": 1}, "unknown entry 'speed'"),
        ({"threads": "many"}, "threads is 'many'"),
        ({"entries": {}}, "at least one key"),
        ({"entries": {"a": {"median": 1.0}}}, "entries.a: median, p10, p90 and n"),
        ({"entries": {"a": {"median": -1.0, "p10": 0, "p90": 0, "n": 1}}}, r"entries.a.median is -1.0"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ConfigError, match=message):
            load_latency(path)
    path.write_text(json.dumps({key: value for key, value in good.items() if key != "dtype"}))
    with pytest.raises(ConfigError, match="'dtype' is missing"):
        load_latency(path)
    path.write_text('{"transds_1": "fast"}')
    with pytest.raises(ConfigError, match="transds_1 is 'fast'"):
        import_nn_meter(path, "x")


def test_sums_of_blocks_are_compared_with_networks(space):
    table = LatencyTable("cpu", "r", 1, 1, "float32", None, {"a": Timing(1, 1, 1, 1)})
    sums = np.array([1.0, 2.0, 3.0, 4.0])
    assert not trusted(table)
    good = calibrated(table, sums, 1.5 * sums * [1.0, 1.05, 0.95, 1.0])
    assert good.scale == pytest.approx(1.5)
    assert good.rank == 1.0
    assert good.error == pytest.approx(0.025, abs=0.002)
    assert trusted(good)
    assert not trusted(calibrated(table, sums, [1.0, 2.0, 6.0, 2.0]))
    assert spearman([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


class ByBlocks:
    """A provider for any space: milliseconds that depend on the width, not on the MACs alone."""

    unit, device = "ms", "test"

    def __init__(self, space):
        self.space, self.calls = space, 0

    def predict(self, config):
        self.calls += 1
        return config.width * 0.1 + self.space.macs(config) / 1e6


def test_search_under_latency():
    own = tiny()
    provider = ByBlocks(own)
    limit = latency_limit(own, provider, 4.2)
    search = Evolution(own, [limit], evaluations=60, population=20)
    search.run(lambda configs: [own.macs(config) for config in configs])
    assert len(search.evaluated) == 60
    assert all(provider.predict(one.config) <= 4.2 for one in search.evaluated)
    assert provider.predict(search.best.config) > 3.4
    calls = provider.calls
    limit.inside(np.stack([own.codes(one.config) for one in search.evaluated]))
    assert provider.calls == calls  # each is asked for once
    with pytest.raises(ConfigError, match=r"latency on test of at most 1 ms: the smallest .* already has 2\.6"):
        Evolution(own, [latency_limit(own, provider, 1.0)], evaluations=5)
    macs = MacsCost(own)
    assert macs.predict(own.max()) == own.macs(own.max()) / 1e6
    assert isinstance(latency_limit(own, macs, 1.0), Limit)


def test_plain_keys():
    own = autoformer_space("tiny")
    config = own.make(192, 12, 3, [3.5] * 11 + [4.0])
    keys = block_keys(own, config)
    assert keys[:3] == ["patch_224_16_192", "attn_197_192_3_64", "mlp_197_192_672"]
    assert keys[-2:] == ["mlp_197_192_768", "head_192_1000"]
    assert len(keys) == 26


# ONNX Runtime


def small():
    return elasticvit_space(divisor=8, num_classes=10, resolutions=(32, 48))


@pytest.mark.parametrize("make", [small, tiny])
def test_parts_in_a_row_are_the_network(make):
    own = make()
    torch.manual_seed(0)
    net = own.supernet()
    for config in (own.min(), own.sample(np.random.default_rng(0))):
        whole = own.extract(net, config).eval()
        images = torch.randn(2, 3, config.resolution, config.resolution)
        with torch.no_grad():
            expected, x, keys = whole(images), images, []
            for key, module, change in latency_blocks.parts(own, whole, config):
                keys.append(key)
                x = module(latency_blocks._shaped(x, change))
        torch.testing.assert_close(x, expected)
        assert keys == block_keys(own, config)


class Session:
    """In place of one of ONNX Runtime."""

    opened = 0

    def __init__(self, model, threads):
        Session.opened += 1
        self.runs = 0

    def get_inputs(self):
        return [SimpleNamespace(name="x")]

    def run(self, outputs, feed):
        assert feed["x"].shape[0] == 1
        self.runs += 1


@pytest.fixture
def sessions(monkeypatch):
    pytest.importorskip("onnxruntime")
    Session.opened = 0
    for module in (latency_ort, latency_blocks):
        monkeypatch.setattr(module, "require", lambda: None)
        monkeypatch.setattr(module, "onnx_bytes", lambda model, inputs: b"")
        monkeypatch.setattr(module, "session_of", Session)
    return Session


def test_rounds_are_interleaved_and_their_medians_count(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(latency_ort, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def session(name):
        def run(outputs, feed):
            order.append(name)
            milliseconds = (2, 50, 3)[max(len(order) - 5, 0) // 10]  # the second round meets other load
            now[0] += 1e-3 * milliseconds

        return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="x")], run=run)

    images = np.zeros((1, 3))
    found = latency_ort.time_sessions([session("a"), session("b")], [images, images], warmup=2, runs=15, rounds=3)
    assert "".join(order) == "aabb" + 3 * ("aaaaa" + "bbbbb")
    for one in found:
        np.testing.assert_allclose(one.rounds, [2, 50, 3])
        assert one.median == pytest.approx(3)
        assert one.n == 15
        assert one.variation > 0.5
        assert one.p90 == pytest.approx(50)


def test_a_network_is_measured_once(sessions):
    own = tiny()
    provider = latency_ort.OrtLatency(own, warmup=1, runs=3)
    found = provider.measure([own.min(), own.max(), own.min()])
    assert sessions.opened == 2
    assert found[0] is found[2]
    assert provider.predict(own.max()) == found[1].median > 0
    assert sessions.opened == 2
    with pytest.raises(ConfigError, match="0 runs in 3 rounds"):
        latency_ort.OrtLatency(own, runs=0)


def test_a_block_is_measured_once(sessions, tmp_path):
    own = tiny()
    provider = latency_blocks.BlockLatency(own, warmup=1, runs=3)
    time = provider.predict(own.min())
    keys = provider.keys(own.min())
    assert len(provider.entries) == len(set(keys)) < len(keys)
    opened = sessions.opened
    assert opened == len(set(keys)) + 1  # and one of nothing, for what a call takes
    assert time == pytest.approx(sum(provider.entries[key].median for key in keys))
    provider.predict(own.min())
    assert sessions.opened == opened
    provider.table.save(tmp_path / "table.json")
    again = latency_blocks.BlockLatency(own, table=load_latency(tmp_path / "table.json"))
    assert again.predict(own.min()) == time
    assert sessions.opened == opened
    again.predict(own.max())
    assert sessions.opened > opened
    with pytest.raises(ConfigError, match="with 1 threads; this is .* with 2"):
        latency_blocks.BlockLatency(own, table=again.table, threads=2)
    with pytest.raises(ConfigError, match="was measured for the space"):
        latency_blocks.BlockLatency(small(), table=again.table)
    kept = latency_blocks.BlockLatency(own, warmup=1, runs=3, file=tmp_path / "kept" / "latency.json")
    kept.predict(own.min())
    first = load_latency(tmp_path / "kept" / "latency.json")
    assert dict(first.entries) == dict(kept.entries)
    kept.predict(own.max())  # it grows with what is measured
    assert set(load_latency(tmp_path / "kept" / "latency.json").entries) == set(kept.entries) > set(first.entries)
    compared = provider.compare([own.min(), own.max()])
    assert compared.error is not None
    assert compared.scale > 0


@pytest.mark.slow
def test_latency_on_this_machine():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    own = small()
    provider = latency_ort.OrtLatency(own, warmup=3, runs=30)
    found = provider.measure([own.min(), own.max()])
    assert 0 < found[0].median < found[1].median
    assert found[0].n == 30
    assert len(found[0].rounds) == 3
    assert found[0].p10 <= found[0].median <= found[0].p90
    assert found[0].timing().median == found[0].median
    plain = tiny()
    blocks = latency_blocks.BlockLatency(plain, warmup=3, runs=30)
    assert 0 < blocks.predict(plain.min())
    assert set(blocks.entries) == set(block_keys(plain, plain.min()))
