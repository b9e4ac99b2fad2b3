"""``efftrain search subnet`` on a checkpoint, in one process, and what is made of its files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from efftrain_ds import train_subnet, train_supernets
from efftrain_ds.cli import main as cli
from efftrain_ds.config.loader import load_config
from efftrain_ds.core import ranks
from efftrain_ds.core.errors import CheckpointError, ConfigError, ShardError
from efftrain_ds.methods.elasticvit.latency import LatencyTable, Timing
from efftrain_ds.methods.elasticvit.latency_space import blocks_of
from efftrain_ds.models.adapters import create_model
from efftrain_ds.models.elastic import load_extracted
from efftrain_ds.observe.report.subnets import read_found
from efftrain_ds.train_subnet import SubnetSearch
from efftrain_ds.train_supernets import load_supernet, measure_latency
from tests.stored import save_model

SMOKE = Path(__file__).resolve().parents[3] / "ds_configs" / "smoke_elasticvit_fmnist.json"
PLAIN = {"widths": [8, 16], "depths": [1, 2], "heads": [1, 2], "mlp": [1, 2], "head_dim": 8, "resolutions": [16, 28]}
SEARCH = {"macs": 400_000, "evaluations": 6, "population": 4, "images": 30, "calibrate": 20, "score": "loss"}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_subnet, "start_processes", lambda config: (0, 1, torch.device("cpu")))


def made(folder: Path, *changes: str, plain: bool = False, seed_of_weights: int = 0, **search: Any) -> Any:
    """The configuration of a run that has one checkpoint of a fresh supernet."""
    found = [f"efftrain.run.output={folder}", "efftrain.data.workers=0", "efftrain.data.val=null", *changes]
    found += ["efftrain.observe.tensorboard=true"]
    if plain:
        kwargs = {**PLAIN, "patch": 4}
        found += ["efftrain.model.name=elastic_vit", f"efftrain.model.kwargs={json.dumps(kwargs)}"]
        found += ["efftrain.methods.elasticvit.levels=2", "efftrain.methods.elasticvit.window=null"]
        found += ['efftrain.methods.elasticvit.evaluate=["smallest"]']
    found += [f"efftrain.methods.elasticvit.search={json.dumps(SEARCH | search)}"]
    config = load_config(SMOKE, overrides=found, world=1)
    model = config.efftrain.model
    torch.manual_seed(seed_of_weights)
    net = create_model(model.name, resolution=28, num_classes=10, **model.kwargs)
    if not (folder / "checkpoints").is_dir():
        save_model(folder / "checkpoints" / "step-00000003", net, None, methods={"elasticvit": {"bank": None}})
    return config


def test_everything_is_written_and_belongs_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = SubnetSearch(made(tmp_path)).run()
    folder = tmp_path / "search"
    assert {"subnet.safetensors", "subnet.json", "evaluated.json", "pareto.png", "state.json", "tensorboard"} == {
        path.name for path in folder.iterdir()
    }
    (one,), notes = read_found(tmp_path)
    assert notes == []
    assert one.result == json.loads(json.dumps(result))
    assert len(one.rows) == 6
    assert one.limit("macs") == (0, 400_000)
    assert all(row["macs"] <= 400_000 for row in one.rows)
    assert min(row["loss"] for row in one.rows) == result["search_loss"]
    assert "val_top1" not in result
    net, space, config = load_extracted(folder / "subnet.safetensors")
    assert space.macs(config) == result["macs"]
    assert result["input"]["size"] == [3, config.resolution, config.resolution]
    assert result["input"]["loaded"] == 28
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
    with Image.open(folder / "pareto.png") as picture:
        assert picture.width > 1000
    assert f"written  {folder}: " in capsys.readouterr().out


def test_origin_tells_apart_what_scores_depend_on(tmp_path: Path) -> None:
    def origin(*changes: str, **search: Any) -> dict[str, Any]:
        return SubnetSearch(made(tmp_path, *changes, **search))._origin()

    own = origin()
    assert own["loaded"] == [28, 1.0, "bicubic"]
    assert own["latency_from"] is None
    assert len(own["files"]) == 16
    assert json.loads(json.dumps(own)) == own
    for changed, key in (
        (origin(score="top1"), "score"),
        (origin("efftrain.data.eval_resolution=32"), "loaded"),
        (origin(latency=2.0, latency_from="table.json"), "latency_from"),
        (origin("efftrain.methods.elasticvit.formula=reference"), "formula"),
    ):
        assert {name for name in own if own[name] != changed[name]} == {key}
    shutil.rmtree(tmp_path / "checkpoints")
    again = made(tmp_path, seed_of_weights=1)
    assert {name for name in own if own[name] != SubnetSearch(again)._origin()[name]} == {"files"}


def test_what_cannot_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"search.calibrate: 0, but elasticvit has batch normalisation"):
        SubnetSearch(made(tmp_path / "hybrid", calibrate=0))
    assert SubnetSearch(made(tmp_path / "plain", calibrate=0, plain=True)).scorer.calibration == []
    monkeypatch.setattr(train_subnet, "start_processes", lambda config: (0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r'latency_from: "onnxruntime" measures on one rank.*run the search on one'):
        SubnetSearch(made(tmp_path / "hybrid", latency=2.0))


def test_images_of_the_search_and_of_the_statistics(tmp_path: Path) -> None:
    every = SubnetSearch(made(tmp_path)).scorer
    assert [sum(len(labels) for _, labels in part) for part in (every.calibration, every.images)] == [20, 30]
    both = torch.cat([images for images, _ in (*every.calibration, *every.images)]).flatten(1)
    assert len(both.unique(dim=0)) == 50
    other = SubnetSearch(made(tmp_path, data="bundled:fashion_mnist/val", images=2000)).scorer
    assert [sum(len(labels) for _, labels in part) for part in (other.calibration, other.images)] == [20, 2000]
    part = 'efftrain.data.hold_out={"per_class": 5}'
    held = SubnetSearch(made(tmp_path, part, images=50)).scorer
    assert torch.cat([labels for _, labels in held.images]).bincount().tolist() == [5] * 10
    with pytest.raises(ConfigError, match=r"search: images 51 are more than the 50 images"):
        SubnetSearch(made(tmp_path, part, images=51))
    with pytest.raises(ConfigError, match=r"search: images 2001 are more than the 2,000 images there are in"):
        SubnetSearch(made(tmp_path, data="bundled:fashion_mnist/val", images=2001))
    with pytest.raises(ConfigError, match=r"search: calibrate 20 and images 6000 are more than the 6,000"):
        SubnetSearch(made(tmp_path, images=6000))


def test_held_out_images_judge_the_winner(tmp_path: Path) -> None:
    search = SubnetSearch(made(tmp_path, "efftrain.data.val=bundled:fashion_mnist/val", evaluations=2))
    result = search.run()
    right = seen = 0
    net, _, _ = load_extracted(tmp_path / "search" / "subnet.safetensors")
    for images, labels in search.labelled("bundled:fashion_mnist/val"):
        with torch.no_grad():
            right += int((net(search.ready(images)).argmax(1) == labels).sum())
        seen += len(labels)
    assert seen == 2000
    assert result["val_top1"] == pytest.approx(right / seen, abs=1.5 / seen)


def test_a_checkpoint_of_another_supernet(tmp_path: Path) -> None:
    config = made(tmp_path, plain=True)
    with pytest.raises(CheckpointError, match=r"step-00000003: .* elasticvit of this configuration has "):
        SubnetSearch(made(tmp_path))
    with pytest.raises(CheckpointError, match="average"):
        load_supernet(config, SubnetSearch(config).found, 10, average=True)


def test_a_table_of_latencies_is_measured_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"

    def measured(space: Any, net: Any, path: Path, *, tell: Any) -> LatencyTable:
        tell("2 blocks measured")
        entries = {key: Timing(0.1, 0.1, 0.1, 1) for key in blocks_of(space)}
        runtime, options = "onnxruntime 9", space.options(net)
        table = LatencyTable("abacus", runtime, 1, 1, "float32", space.hash, entries, options=options)
        table = dataclasses.replace(table, error=0.02, rank=0.99, scale=1.5)
        table.save(path)
        return table

    monkeypatch.setattr(train_supernets, "measure_table", measured)
    kwargs = {"space": {**json.loads(SMOKE.read_text())["efftrain"]["model"]["kwargs"]["space"]}, "norm": "gn1"}
    given = ["--set", f"efftrain.model.kwargs={json.dumps(kwargs)}", "--measure_latency", str(file)]
    assert cli.main(["search", "subnet", str(SMOKE), *given]) == 0
    assert json.loads(file.read_text())["options"] == {"norm": "gn1"}
    out = capsys.readouterr().out
    assert "latency  2 blocks measured\n" in out
    assert "latency  calibrated: mean error 2.0%, rank correlation 0.990 against whole networks, scale 1.500\n" in out
    assert f"written  {file}" in out
    assert cli.main(["search", "subnet", str(SMOKE), *given, "--output", str(tmp_path / "out")]) == 2
    assert "--output and --checkpoint belong to a search" in capsys.readouterr().err
    config = made(tmp_path, plain=True, latency=10.0, latency_from=str(file), evaluations=2, macs=None)
    measure_latency(config, file)
    search = SubnetSearch(config)
    assert search.run()["latency"] <= 10
    blocks = len(blocks_of(search.space))
    assert (
        f"latency  abacus, onnxruntime 9 with 1 thread, in ms, {blocks} blocks known; prices 300 of 300 random "
        "sub-networks; calibrated: mean error 2.0%"
    ) in capsys.readouterr().out


def test_what_fails_is_agreed_on_before_the_ranks_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(ranks, "gather", lambda value: [told.append(value), value][1:])
    config = made(tmp_path, "efftrain.data.val=bundled:fashion_mnist/val", plain=True)
    search = SubnetSearch(config)
    assert told == [None]

    def damaged(*args: Any, **more: Any) -> Any:
        raise ShardError("validation sample 7: damaged")

    monkeypatch.setattr(search, "_loader", damaged)
    with pytest.raises(ShardError, match="validation sample 7"):
        search._held_out(search.space.min())
    assert told[1:] == [(ShardError, "validation sample 7: damaged")]
    monkeypatch.setattr(train_subnet, "Checkpoint", damaged)
    with pytest.raises(ShardError):
        SubnetSearch(config)
    assert len(told) == 3


def test_timm_files_say_how_images_become_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    search = SubnetSearch(made(tmp_path, plain=True))
    best = search.space.make(16, 2, 2, 2.0, resolution=16)
    (tmp_path / "search").mkdir()
    result = {"input": search._input(best.resolution)}
    (tmp_path / "search" / "subnet.json").write_text(json.dumps(result))
    path = tmp_path / "search" / "subnet.safetensors"
    train_subnet.save_extracted(path, search.space.extract(search.net, best).eval(), search.space, best)
    out = tmp_path / "out"
    assert cli.main(["export", str(path), "--output", str(out), "--format", "timm"]) == 0
    assert "timm.create_model(" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    cfg = timm.data.resolve_model_data_config(model)
    assert [list(cfg[key]) for key in ("input_size", "mean", "std")] == [[3, 16, 16], [0.286] * 3, [0.353] * 3]
    assert (cfg["crop_pct"], cfg["interpolation"]) == (1.0, search.config.efftrain.data.interpolation)
    assert "augreg" not in (out / "config.json").read_text()
    images = search.ready(search.scorer.images[0][0])
    small = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(model(small), search.net(images, best), atol=1e-5, rtol=1e-5)
