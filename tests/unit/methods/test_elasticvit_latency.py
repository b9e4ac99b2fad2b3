"""Tables of latencies of a whole space, what says how far they can be trusted, and providers that fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efftrain_ds.core import ranks
from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.core.rng import numpy_rng
from efftrain_ds.methods.elasticvit import latency_blocks, latency_ort
from efftrain_ds.methods.elasticvit.config import SearchConfig
from efftrain_ds.methods.elasticvit.latency import Coverage, LatencyTable, TableLatency, Timing, load_latency
from efftrain_ds.methods.elasticvit.latency_keys import block_keys
from efftrain_ds.methods.elasticvit.latency_ort import Measured
from efftrain_ds.methods.elasticvit.latency_space import blocks_of, measure_table, provider_text, trust_text
from efftrain_ds.methods.elasticvit.limits import latency_limit
from efftrain_ds.methods.elasticvit.search import Score, Search, latency_of, limits_of, provider_of
from efftrain_ds.models.elastic.hybrid_space import StageSpec
from tests.distributed.elasticvit_jobs import HYBRID, PLAIN


class Session:
    """In place of one of ONNX Runtime; a network takes as many milliseconds as it has parameters in thousands."""

    opened = 0

    def __init__(self, model: int, threads: int) -> None:
        Session.opened += 1
        self.parameters = model


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("onnxruntime")
    if request.node.get_closest_marker("slow"):
        return
    Session.opened = 0

    def timed(sessions: list[Session], inputs: list[Any], **times: int) -> list[Measured]:
        found = [1 + session.parameters / 1e3 for session in sessions]
        return [Measured(one, one, one, (one,), 1) for one in found]

    for module in (latency_ort, latency_blocks):
        monkeypatch.setattr(module, "require", lambda: None)
        monkeypatch.setattr(module, "onnx_bytes", lambda net, x: sum(p.numel() for p in net.parameters()))
        monkeypatch.setattr(module, "session_of", Session)
        monkeypatch.setattr(module, "time_sessions", timed)


UNEVEN = dataclasses.replace(
    HYBRID,
    stages=(
        StageSpec("stem", 1, (4, 6, 10), (1, 3), (1,), (3, 5)),
        StageSpec("conv", 2, (6, 8), (1,), (2, 3), (3,), se=True),
        StageSpec("vit1", 1, (4, 8, 12), (1, 3), mlp=(1, 2, 3), v_scale=(1, 2)),
        StageSpec("vit2", 2, (8, 16), (2,), mlp=(1,), v_scale=(2,)),
    ),
)
"""With widths that not every neighbour can follow, and stages of one layer."""


SMALL = dataclasses.replace(
    HYBRID,
    resolutions=(12,),
    stages=(
        StageSpec("stem", 1, (4,), (1,), (1,), (3,)),
        StageSpec("conv", 2, (4, 6), (1,), (2,), (3,)),
        StageSpec("vit", 2, (8,), (1, 2), mlp=(1, 2), v_scale=(1, 2)),
    ),
)


@pytest.mark.parametrize("space", [HYBRID, UNEVEN, PLAIN], ids=["hybrid", "uneven", "plain"])
def test_all_blocks_of_a_space_are_found(space: Any) -> None:
    found = blocks_of(space)
    assert all(key in block_keys(space, config) for key, config in found.items())
    assert all(space.contains(config) for config in found.values())
    drawn = {
        key for row in space.sample_codes(numpy_rng(0, "blocks"), 1500) for key in block_keys(space, space.config(row))
    }
    assert drawn == set(found)


def test_a_measured_table_serves_a_search(tmp_path: Path) -> None:
    file, lines = tmp_path / "tables" / "here.json", []
    table = measure_table(SMALL, SMALL.supernet(norm="gn1"), file, compared=3, tell=lines.append)
    blocks = blocks_of(SMALL)
    assert load_latency(file) == table
    assert set(table.entries) == set(blocks)
    assert Session.opened == len(blocks) + 1 + 3  # an empty call beside the blocks, whole networks
    assert (table.scale, table.error) == pytest.approx((1.0, 0.0))  # a network is its blocks and one call
    assert table.error is not None
    assert table.rank is not None
    assert table.options == {"norm": "gn1"}
    assert lines[0] == f"{len(blocks)} blocks in all sub-networks of the space, {len(blocks)} to measure"
    assert lines[-1] == "comparing sums with 3 random sub-networks as a whole"
    # what is known is not measured again
    measure_table(SMALL, SMALL.supernet(norm="gn1"), file, compared=2)
    assert Session.opened == len(blocks) + 1 + 5
    net = SMALL.supernet(norm="gn1")
    config = SearchConfig(latency=100.0, latency_from=str(file), evaluations=4, population=2)
    (limit,) = limits_of(config, SMALL, "exact", None, net)
    assert "prices 300 of 300 random sub-networks; " in limit.about
    assert f"{len(blocks)} blocks known" in limit.about
    own = Search(config, SMALL, SimpleNamespace(score=lambda one: Score(0.5, 1.0)), [limit])  # type: ignore[arg-type]
    own.run()
    assert all(row["latency"] <= 100 for row in own.table())
    assert Session.opened == len(blocks) + 1 + 5
    with pytest.raises(ConfigError, match=r"for networks with \{'norm': 'gn1'\}, these have \{'norm': 'ln'\}"):
        limits_of(config, SMALL, "exact", None, SMALL.supernet())


@pytest.mark.slow
def test_a_table_measured_with_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = SMALL.supernet(norm="gn1")
    table = measure_table(SMALL, net, tmp_path / "t.json", compared=3, warmup=1, runs=30)
    assert set(table.entries) == set(blocks_of(SMALL))
    assert all(0 < one.p10 <= one.median <= one.p90 and one.n == 30 for one in table.entries.values())
    assert table.error is not None
    assert 0 < table.scale < 10
    config = SearchConfig(latency=1e6, latency_from=str(tmp_path / "t.json"))
    (limit,) = limits_of(config, SMALL, "exact", None, net)
    assert "calibrated: mean error" in limit.about
    whole = latency_of(SearchConfig(latency=1e6), SMALL, [limit], SMALL.min(), net)
    assert whole["latency_whole"] > 0


def test_a_table_of_another_machine_or_runtime_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    table = measure_table(SMALL, SMALL.supernet(), file, compared=2)
    for change in ({"runtime": "onnxruntime 0.1"}, {"device": "abacus"}, {"threads": 2}):
        dataclasses.replace(table, **change).save(file)
        with pytest.raises(ConfigError, match=r"t.json: the latency table is of .*; this is .*, onnxruntime "):
            measure_table(SMALL, SMALL.supernet(), file)
        with pytest.raises(ConfigError, match="the latency table is of"):
            latency_blocks.BlockLatency(SMALL, table=load_latency(file))
    file.write_text(json.dumps({"schema": 1}))
    with pytest.raises(ConfigError, match=r"t.json: 'device' is missing"):
        measure_table(SMALL, SMALL.supernet(), file)
    with pytest.raises(ConfigError, match="cannot write"):
        table.save(file / "below")


def test_trust_in_words() -> None:
    table = LatencyTable("chip", "r 1", 2, 1, "float32", PLAIN.hash, {"a": Timing(1, 1, 1, 1)})
    assert trust_text(table).startswith("uncalibrated: sums were never compared")
    assert trust_text(dataclasses.replace(table, error=0.031, rank=0.99)) == (
        "calibrated: mean error 3.1%, rank correlation 0.990 against whole networks"
    )
    assert trust_text(dataclasses.replace(table, error=0.2, rank=0.99)).startswith("uncalibrated: mean error 20.0%")
    text = provider_text(TableLatency(PLAIN, table), PLAIN)
    assert text.startswith(
        "chip, r 1 with 2 threads, in ms, 1 blocks known; prices 0 of 300 random sub-networks, lacks"
    )
    with pytest.raises(ConfigError, match=r'no entry "patch_8_4_8"; "efftrain search subnet FILE --measure_latency T'):
        TableLatency(PLAIN, table).predict(PLAIN.min())
    own = SimpleNamespace(unit="mJ", device="meter", predict=lambda config: 1.0)
    assert provider_text(own, PLAIN) == "meter, in mJ"
    own.coverage = lambda space: Coverage(10, 10, {})
    assert provider_text(own, PLAIN) == "meter, in mJ; prices 10 of 10 random sub-networks"


def test_the_choice_is_measured_as_a_network_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def whole(space: Any, net: Any) -> Any:
        given.append(net)
        return SimpleNamespace(predict=lambda config: 7.0)

    monkeypatch.setattr(latency_ort, "OrtLatency", whole)
    net = HYBRID.supernet(norm="gn1")
    config = SearchConfig(latency=100.0)
    limits = limits_of(config, HYBRID, "exact", None, net)
    assert limits[0].about.endswith("uncalibrated: sums were never compared with whole networks")
    assert latency_of(config, HYBRID, limits, HYBRID.min(), net)["latency_whole"] == 7.0
    assert given == [net]
    provider: Any = provider_of("onnxruntime", HYBRID, None, net)
    assert provider.table.options == {"norm": "gn1"}


def broken(space: Any) -> Any:
    raise KeyError("no power meter")


class Failing:
    unit, device = "ms", "paper"

    def __init__(self, space: Any) -> None:
        self.answer: Any = float("nan")

    def predict(self, config: Any) -> float:
        if self.answer is None:
            raise RuntimeError("out of paper")
        return self.answer


def test_providers_that_fail() -> None:
    for source, message in (
        (":f", 'latency_from: ":f"; "onnxruntime", the JSON file of a table or "package.module:function" is needed'),
        ("math:", 'latency_from: "math:"; "onnxruntime"'),
        (f"{__name__}:broken", "latency_from: \".*:broken\": KeyError: 'no power meter'"),
    ):
        with pytest.raises(ConfigError, match=message):
            provider_of(source, PLAIN)
    provider = Failing(PLAIN)
    codes = PLAIN.codes(PLAIN.min())[None]
    with pytest.raises(ConfigError, match="latency on paper: nan for PlainConfig"):
        latency_limit(PLAIN, provider, 1.0).measure(codes)
    provider.answer = None
    with pytest.raises(ConfigError, match="latency on paper: RuntimeError: out of paper"):
        latency_limit(PLAIN, provider, 1.0).measure(codes)


# What fails on one rank


def test_an_error_of_a_candidate_is_told_to_the_other_ranks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(ranks, "gather", lambda value: told.append(value) or [value, None])

    def fail(one: Any) -> Score:
        raise ModelError("too large")

    config = SearchConfig(macs=10**9, evaluations=2, population=2)
    own = Search(config, PLAIN, SimpleNamespace(score=fail), limits_of(config, PLAIN, "exact"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="too large"):
        own.run()
    assert told == [(ModelError, "too large")]


def test_spaces_of_another_kind_have_no_blocks() -> None:
    with pytest.raises(ConfigError, match="SimpleNamespace has no grammar for keys of blocks"):
        blocks_of(SimpleNamespace())  # type: ignore[arg-type]
