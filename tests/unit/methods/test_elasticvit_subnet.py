"""The search for a sub-network on a supernet, and what is made of the winner."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from efftrain_ds.cli import main as cli
from efftrain_ds.core.errors import CheckpointError, ConfigError, ModelError
from efftrain_ds.export.subnet import export_subnet, timm_arguments
from efftrain_ds.methods.elasticvit import latency_blocks
from efftrain_ds.methods.elasticvit.calibrate import batch_norms
from efftrain_ds.methods.elasticvit.config import SearchConfig
from efftrain_ds.methods.elasticvit.latency import LatencyTable, Timing
from efftrain_ds.methods.elasticvit.search import Score, Scorer, Search, limits_of, provider_of
from efftrain_ds.models.elastic import save_extracted
from efftrain_ds.train_subnet import check_subnet_search
from tests.distributed.elasticvit_jobs import HYBRID, PLAIN, supernet


class Wide:
    """Scores by the width and counts."""

    def __init__(self, stop: int = 10**9) -> None:
        self.seen: list = []
        self.stop = stop

    def score(self, config) -> Score:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(config)
        value = config.width + sum(config.heads) / 100 + config.depth
        return Score(value / 100, 3 - value / 100)


def _search(folder, scorer, origin=None, **changes):
    config = SearchConfig.model_validate({"macs": (6000, 14000), "evaluations": 60, "population": 12, **changes})
    limits = limits_of(config, PLAIN, "exact", folder)
    return Search(config, PLAIN, scorer, limits, seeds=[PLAIN.min()], folder=folder, origin=origin or {"step": 3})


@pytest.mark.parametrize("algorithm", ["evolution", "random"])
@pytest.mark.parametrize("score", ["top1", "loss"])
def test_search_goes_on_where_it_was_stopped(tmp_path, algorithm, score):
    whole = Wide()
    best = _search(None, whole, algorithm=algorithm, score=score).run()
    assert len(set(whole.seen)) == len(whole.seen) == 60
    assert all(6000 <= PLAIN.macs(one) <= 14000 for one in whole.seen)
    first, second = Wide(stop=30), Wide()
    with pytest.raises(KeyboardInterrupt):
        _search(tmp_path, first, algorithm=algorithm, score=score).run()
    again = _search(tmp_path, second, algorithm=algorithm, score=score)
    assert again.resumed > 0
    assert again.run() == best
    assert len(second.seen) == 60 - again.resumed
    assert [row["config"] for row in again.table()] == [one.to_dict() for one in whole.seen]
    other = json.loads((tmp_path / "state.json").read_text())
    other["origin"] = {"step": 4}
    (tmp_path / "state.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"state.json: the search there is of \{'step': 4\}"):
        _search(tmp_path, Wide(), algorithm=algorithm, score=score)


def test_what_is_another_search_is_named(tmp_path):
    _search(tmp_path, Wide(), {"step": 3, "score": "loss"}, evaluations=2).run()
    with pytest.raises(
        CheckpointError, match=r"search there is of \{'score': 'loss'\}, this one of \{'score': 'top1'\}; r"
    ):
        _search(tmp_path, Wide(), {"step": 3, "score": "top1"}, evaluations=2)
    with pytest.raises(CheckpointError, match=r"there is of \{'score': 'loss'\}, this one of \{'score': None\}"):
        _search(tmp_path, Wide(), {"step": 3}, evaluations=2)


def test_counts_follow_the_formula():
    class Twice(type(HYBRID)):
        """MACs of the other formula are easily told apart."""

        def macs_of(self, codes, formula="exact"):
            return super().macs_of(codes, "exact") * (2 if formula == "reference" else 1)

    space = Twice(**{field.name: getattr(HYBRID, field.name) for field in dataclasses.fields(HYBRID)})
    high = 2 * space.macs(space.min()) + 10_000
    config = SearchConfig.model_validate({"macs": high, "evaluations": 4, "population": 2})
    scorer = SimpleNamespace(score=lambda one: Score(0.5, 1.0))
    search = Search(config, space, scorer, limits_of(config, space, "reference"), formula="reference")
    search.run()
    macs = [row["macs"] for row in search.table()]
    assert macs == [2 * space.macs(one) for one in search.scores]
    assert max(macs) <= high


def test_measured_blocks_stay_known(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(latency_blocks, "BlockLatency", lambda space, net, **options: made.append(options))
    provider_of("onnxruntime", PLAIN)
    provider_of("onnxruntime", PLAIN, tmp_path)
    table = LatencyTable("here", "r", 1, 1, "float32", PLAIN.hash, {"a": Timing(1, 1, 1, 1)})
    table.save(tmp_path / "latency.json")
    provider_of("onnxruntime", PLAIN, tmp_path)
    file = tmp_path / "latency.json"
    assert made == [{"file": None}, {"file": file}, {"file": file, "table": table}]
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"latency.json: .*schema None.*; remove the file, or name another --output"):
        provider_of("onnxruntime", PLAIN, tmp_path)


def test_limits_that_nothing_keeps():
    with pytest.raises(ConfigError, match=r"elasticvit.search: MACs of at most 10: the smallest sub-network"):
        _search(None, Wide(), macs=10)
    with pytest.raises(ConfigError, match=r"elasticvit.search: parameters of at most 5"):
        _search(None, Wide(), macs=None, params=5)
    with pytest.raises(ConfigError, match=r"elasticvit.search: .*none.json"):
        _search(None, Wide(), latency=1.0, latency_from="none.json")


class ByWidth:
    """A provider of one's own."""

    unit, device = "ms", "paper"

    def __init__(self, space) -> None:
        self.space = space

    def predict(self, config) -> float:
        return float(config.width)


def nothing(space):
    return object()


def test_latency_of_ones_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_latency", sys.modules[__name__])
    searched = _search(None, Wide(), latency=12.0, latency_from="my_latency:ByWidth")
    assert searched.run().width == 12
    rows = searched.table()
    assert {row["latency"] for row in rows} == {8.0, 12.0}
    assert all(row["latency"] == row["config"]["width"] for row in rows)
    for latency, source, message in (
        (7.0, "my_latency:ByWidth", "search: latency on paper of at most 7 ms: the smallest sub-network .* has 8 ms"),
        (9.0, "my_latency:By", 'search: latency_from: "my_latency:By": .*has no attribute'),
        (9.0, "no_such:thing", "No module named 'no_such'"),
        (9.0, "my_latency:nothing", "object has no unit, device, predict, so it is no provider"),
    ):
        with pytest.raises(ConfigError, match=message):
            _search(None, Wide(), latency=latency, latency_from=source)


def test_nothing_to_search():
    from efftrain_ds.config.loader import load_config

    text = {"train_batch_size": 8, "gradient_clipping": 0.0, "efftrain": {"methods": {"elasticvit": {}}}}
    with pytest.raises(ConfigError, match='"search": null'):
        check_subnet_search(load_config(text, world=1))


def test_budgets_of_the_benchmark_are_checked(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    import elastic_accuracy

    monkeypatch.setattr(elastic_accuracy, "CHUNKS", 1)
    rng = np.random.default_rng(0)
    drawn = elastic_accuracy.draw(PLAIN, [6000, 14000], 3, rng)
    assert len(set(drawn)) == 3
    assert all(6000 <= PLAIN.macs(one) <= 14000 for one in drawn)
    with pytest.raises(ConfigError, match="from 6,000 to 6,001: 0 sub-networks in 4,096 random ones of the space; 3"):
        elastic_accuracy.draw(PLAIN, [6000, 6001], 3, rng)
    with pytest.raises(ConfigError, match="MACs of at most 11: the smallest sub-network"):
        elastic_accuracy.draw(PLAIN, [10, 11], 3, rng)


def test_scores_do_not_depend_on_what_ran_before():
    net = supernet(HYBRID)
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randint(256, (8, 3, 20, 20), dtype=torch.uint8, generator=generator), torch.arange(8)) for _ in range(3)
    ]
    scorer = Scorer(net, lambda images: images.float() / 64 - 2, parts[:2], parts[2:])
    config, other = HYBRID.max(), HYBRID.min()
    first = scorer.score(config)
    assert scorer.score(other) != first
    assert scorer.score(config) == first
    assert not any(m.training for m in batch_norms(net))
    # extracted with the statistics that are its own
    scorer.prepare(other)
    cut = HYBRID.extract(net, other).eval()
    images = scorer.ready(parts[2][0])
    with torch.no_grad():
        torch.testing.assert_close(cut(images), net(images), atol=1e-5, rtol=1e-5)


def test_timm_files_of_a_plain_sub_network(tmp_path, capsys):
    config = PLAIN.make(12, 2, 3, 2.0, resolution=8)
    net = PLAIN.extract(supernet(PLAIN), config).eval()
    save_extracted(tmp_path / "subnet.safetensors", net, PLAIN, config)
    path, out = str(tmp_path / "subnet.safetensors"), str(tmp_path / "out")
    assert cli.main(["export", path, "--output", out, "--format", "timm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["files"]) == {"config.json", "model.safetensors"}
    assert result["checks"]["logits of the files loaded with timm"] <= 1e-5
    assert result["config"] == config.to_dict()


def test_formats_that_do_not_fit(tmp_path):
    uneven = PLAIN.make(12, 2, (3, 2), 1.0)
    with pytest.raises(ModelError, match=r"different sizes \(heads \(3, 2\)"):
        timm_arguments(PLAIN, uneven)
    with pytest.raises(ModelError, match="2 heads of 4 at width 12"):
        timm_arguments(PLAIN, PLAIN.make(12, 2, 2, 1.0))
    with pytest.raises(ModelError, match="no networks of the space elasticvit"):
        timm_arguments(HYBRID, HYBRID.min())
    with pytest.raises(ModelError, match="cannot be written as compact"):
        export_subnet(tmp_path / "x.safetensors", tmp_path / "o", ["compact"])
    with pytest.raises(ModelError, match="cannot be read"):
        export_subnet(tmp_path / "x.safetensors", tmp_path / "o", ["timm"])
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("space", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_onnx_of_a_sub_network(tmp_path, space):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = space.max()
    save_extracted(tmp_path / "s.safetensors", space.extract(supernet(space), config).eval(), space, config)
    result = export_subnet(tmp_path / "s.safetensors", tmp_path / "o", ["onnx"])
    assert result["checks"]["logits of ONNX Runtime"] <= 1e-4
