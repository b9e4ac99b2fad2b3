"""State, average and checkpoints under ZeRO 0-3 on two gloo ranks."""

from __future__ import annotations

import json
import shutil

import pytest

from efftrain_ds.zero import access
from tests.distributed import zero_jobs as jobs

pytestmark = pytest.mark.dist
STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("dtype", "gas"), [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_resume_is_bit_exact(ranks, tmp_path, stage, dtype, gas):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, dtype, gas):
        assert result["path"] == "step-00000003"
        assert result["client"] == ("x", 3, [0, 1, 2], (1, 2))
        assert result["keys"] == ["ema", "exp_avg", "exp_avg_sq", "fp32"]
        assert result["state_at_load"] == []
        assert result["losses_equal"]
        assert result["state_at_end"] == []
        assert result["weights_at_end"] == []
        assert result["counters_equal"]
        assert result["lr_equal"]
        assert result["moved"] > 0


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "fp16"), (3, "fp16"), pytest.param(1, "bf16_fp32", marks=pytest.mark.slow)]
)
def test_resume_other_optimizers(ranks, tmp_path, stage, dtype):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, dtype, 1):
        assert result["losses_equal"]
        assert result["state_at_end"] == []


def test_any_stage_and_world_loads(ranks, tmp_path):
    saved = {stage: ranks(jobs.save_job, str(tmp_path / str(stage)), stage, "fp32")[0] for stage in (0, 2, 3)}
    for source, target, world in [(2, 0, 2), (2, 3, 1), (3, 1, 2), (0, 3, 2), (3, 2, 1)]:
        for result in ranks(jobs.load_job, str(tmp_path / str(source)), target, "fp32", world=world):
            assert result["state"] == saved[source], (source, target, world)
            assert result["stale"] == []
            assert result["steps"] == [3.0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_stage_loads_at_every_stage_and_world(ranks, tmp_path, world):
    for source in STAGES:
        folder = str(tmp_path / str(source))
        saved = ranks(jobs.save_job, folder, source, "fp32")[0]
        for target in STAGES:
            for result in ranks(jobs.load_job, folder, target, "fp32", world=world):
                assert result["state"] == saved, (source, target, world)
                assert result["stale"] == []


def test_low_precision_weights_follow_masters_after_load(ranks, tmp_path):
    saved = ranks(jobs.save_job, str(tmp_path), 3, "bf16")[0]
    for target in (0, 1, 3):
        for result in ranks(jobs.load_job, str(tmp_path), target, "bf16"):
            assert result["state"] == saved
            assert result["stale"] == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_average(ranks, stage, dtype):
    for result in ranks(jobs.ema_job, stage, dtype):
        assert result["error"] < 1e-6
        assert result["swapped"] == 0
        assert result["differs"]
        assert result["restored"] == []
        assert result["mode"] == (False, True)
        assert result["rng"]
        assert result["goes_on"]


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_parameters_are_stored(ranks, tmp_path, stage):
    assert all(result["frozen"] for result in ranks(jobs.frozen_job, str(tmp_path), stage))


def test_damage_is_found_and_the_older_one_taken(ranks, tmp_path):
    ranks(jobs.save_job, str(tmp_path), 1, "fp32")
    good = tmp_path / "step-00000003"
    newer = tmp_path / "step-00000009"
    shutil.copytree(good, newer)
    (tmp_path / "latest").write_text(newer.name)
    victim = newer / "rank-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    for result in ranks(jobs.load_job, str(tmp_path), 1, "fp32"):
        assert result["steps"] == [3.0]
    shutil.rmtree(good)
    with pytest.raises(RuntimeError, match="rank-00001.safetensors.*SHA-256"):
        ranks(jobs.load_job, str(tmp_path), 1, "fp32")


def test_another_model_is_refused_before_anything_changes(ranks, tmp_path):
    ranks(jobs.save_job, str(tmp_path), 1, "fp32")
    for answer in ranks(jobs.wrong_model_job, str(tmp_path)):
        text, unchanged = json.loads(answer)
        assert "belongs to another model" in text
        assert "not in the checkpoint: 0.bias" in text
        assert unchanged


@pytest.mark.parametrize("stage", STAGES)
def test_batch_changes_between_steps(ranks, stage):
    for result in ranks(jobs.batch_job, stage):
        assert [tuple(s) for s in result["steps"]] == [(2, 2, 16), (4, 4, 16), (6, 6, 16), (8, 8, 16)]


def test_guards(ranks, tmp_path):
    for found in ranks(jobs.guard_job, str(tmp_path)):
        assert "swapped in" in found["inside"]
        assert found["stale"]
        assert found["masters"] == []
        assert found["refreshed"] == ([], False)
        assert "a.weight is [33, 5], the model's is [5, 33]" in found["shape"]
        assert "DeepSpeed's own form" in found["native"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "native"]


def test_private_names_exist():
    import importlib

    import deepspeed

    assert deepspeed.__version__.split("+")[0] in access.TESTED_VERSIONS
    for path, names in access.private_names().items():
        module, name = path.rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        source = __import__("inspect").getsource(importlib.import_module(module))
        for attribute in names:
            assert hasattr(cls, attribute) or f"self.{attribute}" in source, f"{path}.{attribute}"
