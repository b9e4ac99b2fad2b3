"""The trainer on the bundled images: exact resume, equal ranks, bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from efftrain_ds.data import bundled
from efftrain_ds.data.manifest import ROW, load_manifest
from tests.distributed import train_jobs as jobs

pytestmark = pytest.mark.dist


EDGES = [1, 9, 10, 17]


@pytest.mark.parametrize(
    ("stage", "stops"),
    [
        pytest.param(0, [10], marks=pytest.mark.slow),
        (2, [9]),
        (3, [9]),
        *(pytest.param(stage, EDGES, marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
        pytest.param(2, list(range(1, 20)), marks=pytest.mark.slow),
    ],
    ids=["zero0", "zero2", "zero3", *(f"zero{stage}-edges" for stage in range(4)), "zero2-every-step"],
)
def test_stopped_and_resumed_is_the_same_run(ranks, tmp_path, stage, stops):
    for rank, result in enumerate(ranks(jobs.resume_run, str(tmp_path), stage, stops)):
        assert result["problems"] == []
        assert result["steps"] == 20
        sides = [side for _, side, _ in result["sides"]]
        assert sorted(set(sides)) == [12, 20, 28]
        # one forward of 12 samples while images are small, two of 6 at full size: the global batch stays
        assert {(side, n) for _, side, n in result["sides"]} == {(12, 12), (20, 6), (28, 6)}
        if rank == 0:
            assert "plan against actual" in result["screen"]


@pytest.mark.slow
def test_resume_with_workers_half_precision_and_mixing(ranks, tmp_path):
    changes = {"bf16": {"enabled": True}, "efftrain/data/workers": 1, "efftrain/run/steps": 8}
    for result in ranks(jobs.resume_run, str(tmp_path), 2, [3], changes):
        assert result["problems"] == []


def test_other_world_sizes_go_on_with_the_same_samples(ranks, tmp_path):
    changes = {"efftrain/run/steps": 6, "efftrain/data/streams": 60, "efftrain/methods": {}}
    whole = ranks(jobs.loss_of_run, str(tmp_path / "w"), 1, changes)
    seen = sorted(i for result in whole for i in result["ids"])
    one = ranks(jobs.loss_of_run, str(tmp_path / "o"), 1, changes, world=1)
    assert sorted(one[0]["ids"]) == seen
    shutil.copytree(tmp_path / "w", tmp_path / "r")
    for name in ("step-00000004", "step-00000005", "step-00000006"):
        shutil.rmtree(tmp_path / "r" / "checkpoints" / name)
    rest = ranks(jobs.loss_of_run, str(tmp_path / "r"), 3, changes, world=1)[0]
    half = [result["ids"][36:] for result in whole]
    assert sorted(rest["ids"]) == sorted(i for ids in half for i in ids)
    # the mean over the ranks, from masters that were split otherwise (other summation order)
    mean = np.mean([np.reshape(r["losses"], (6, -1)).mean(1) for r in whole], axis=0)[3:]
    assert np.abs(mean - np.reshape(rest["losses"], (3, -1)).mean(1)).max() < 2e-2


def test_evaluation_and_logs(ranks, tmp_path):
    changes = {
        "efftrain/data/val": "bundled:fashion_mnist/val",
        "efftrain/run/steps": 4,
        "efftrain/observe/tensorboard": True,
        "efftrain/observe/images_every": "50%",
        "efftrain/observe/eval_every": "50%",
        "efftrain/data/eval_batch": 128,
    }
    first, second = ranks(jobs.loss_of_run, str(tmp_path), 3, changes)
    assert first["results"] == second["results"]
    assert set(first["results"]) == {"top1", "loss", "top5", "ema_top1", "ema_loss", "ema_top5"}
    assert "2,000 samples" in first["screen"]
    assert "method" in first["screen"]
    assert "step 4/4" in first["screen"]
    assert "done 100.0% of steps, 100.0% of cost" in first["screen"]
    assert second["screen"] == ""
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("eval") == 2
    assert kinds.count("checkpoint") == 4
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"loss/train", "eval/top1", "optim/lr", "stage/bandwidth", "cost/done", "speed/img_s"} <= tags
    assert board.Tags()["images"] == ["batch/original_seen_spectrum"]
    for name in ("config.json", "plan.json", "throughput.json"):
        assert json.loads((tmp_path / name).read_text())


def test_measured_profile_prices_the_run(ranks, tmp_path):
    first, _ = ranks(jobs.measured_run, str(tmp_path))
    assert (first["stages"], first["steps"]) == (6, 12)  # a warm-up round, then three steps of each kind
    assert not (tmp_path / "checkpoints").exists() or "resumed" not in first["screen"]
    profile = json.loads((tmp_path / "throughput.json").read_text())
    assert sorted(e["bandwidth"] for e in profile["entries"]) == [12, 20, 28]
    assert first["predicted"] > 0
    assert "predicted" in first["screen"]
    assert "off by" in first["screen"]


def test_another_plan_is_not_resumed(ranks, tmp_path):
    ranks(jobs.loss_of_run, str(tmp_path), 1, {"efftrain/run/steps": 4})
    for kind, text, code in ranks(jobs.error_of_run, str(tmp_path), {"efftrain/run/steps": 6}):
        assert kind == "CheckpointError"
        assert "efftrain.run.output" in text
        assert code == 2


@pytest.fixture
def shards(tmp_path):
    """A private copy of the bundled shards."""
    source = bundled.resolve("bundled:fashion_mnist/train")
    folder = tmp_path / "shards"
    shutil.copytree(source, folder)
    return folder


def _changes(shards, **more):
    return {"efftrain/data/train": str(shards), "efftrain/run/steps": 4, **more}


def test_corrupt_samples_are_counted_and_left_out(ranks, tmp_path, shards):
    manifest = load_manifest(shards)
    table = np.array(manifest.table)
    for row in range(0, 6000, 60):
        with (shards / manifest.shards[table["shard"][row]].name).open("r+b") as stream:
            stream.seek(int(table["offset"][row]))
            stream.write(b"broken!!")
    changes = _changes(shards, **{"efftrain/data/max_bad_fraction": 0.05, "efftrain/run/steps": 30})
    results = ranks(jobs.loss_of_run, str(tmp_path / "run"), 1, changes)
    bad = sum(sum(result["bad"].values()) for result in results)
    ids = [i for result in results for i in result["ids"]]
    assert bad == sum(i % 60 == 0 for i in ids) > 0
    assert all(np.isfinite(result["losses"]).all() for result in results)
    ledger = [json.loads(x) for rank in (0, 1) for x in (tmp_path / f"run/quarantine.rank{rank}.jsonl").open()]
    assert len(ledger) == bad


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        ("missing", "ShardError", ["train-"]),
        ("truncated", "ShardError", ["bytes"]),
        ("label", "ShardError", ["label"]),
        ("manifest", "ShardError", ["manifest.json"]),
    ],
)
def test_damaged_shards_stop_with_one_error(ranks, tmp_path, shards, damage, kind, words):
    manifest = load_manifest(shards)
    victim = shards / manifest.shards[2].name
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-5000])
    elif damage == "manifest":
        (shards / "manifest.json").write_text("{")
    else:
        table = np.fromfile(shards / "index.bin", dtype=ROW)
        table["label"] = 99
        table.tofile(shards / "index.bin")
    for name, text, code in ranks(jobs.error_of_run, str(tmp_path / "run"), _changes(shards)):
        assert name == kind
        assert all(word in text for word in words), text
        assert code == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "words", "exit_code"),
    [
        ({"efftrain/data/workerz": 1}, "ConfigIssues", ["efftrain.data.workerz", 'Did you mean "workers"'], 2),
        ({"efftrain/run/steps": "many"}, "ConfigIssues", ["efftrain.run.steps", '"many"'], 2),
        ({"train_batch_size": 25}, "ConfigIssues", ["train_batch_size", "25"], 2),
        ({"efftrain/model/name": "vit_tinny"}, "ModelError", ["efftrain.model.name", "vit_tinny"], 2),
        ({"efftrain/data/resolution": 30}, "PlanError", ["efftrain.data.resolution", "30"], 3),
        ({"efftrain/model/kwargs/dynamic_img_size": False}, "ModelError", ["dynamic_img_size"], 2),
        ({"efftrain/data/train": "nowhere"}, "ShardError", ["nowhere"], 2),
        ({"efftrain/methods": {"efficienttrain": {"schedule": "et+"}}}, "ConfigIssues", ['"et+"', '"et++"'], 2),
    ],
)
def test_bad_configuration_is_one_error(ranks, tmp_path, changes, kind, words, exit_code):
    for name, text, code in ranks(jobs.error_of_run, str(tmp_path / "run"), changes):
        assert name == kind, text
        assert all(word in text for word in words), text
        assert code == exit_code
    assert not (tmp_path / "run").exists()
