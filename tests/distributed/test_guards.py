"""Guards on two gloo ranks: non-finite steps, decisions that differ, the request to stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import guard_jobs as jobs

pytestmark = pytest.mark.dist
STAGES = [0, 1, 2, 3]


OFFLOAD = (("offload_optimizer", {"device": "cpu"}),)


@pytest.mark.parametrize(
    ("stage", "dtype", "gas", "zero"),
    [
        *[(stage, dtype, 1, ()) for stage in STAGES for dtype in ("fp32", "bf16")],
        (1, "bf16_fp32", 1, ()),
        (0, "fp32", 2, ()),
        (3, "bf16", 2, ()),
        (2, "bf16", 2, OFFLOAD),
        (3, "bf16", 1, OFFLOAD),
    ],
)
def test_a_nonfinite_step_is_applied_on_no_rank(ranks, tmp_path, stage, dtype, gas, zero):
    results = ranks(jobs.refused_job, stage, dtype, gas, str(tmp_path), zero)
    for result in results:
        assert result["applied"] == [False, False]
        assert result["loss"] == []
        assert result["gradient"] == []
        assert result["left"] == []
        assert result["counters"] == (4, 4, 2, 2, 2)
        assert result["after"] == (True, 0, True)
        assert result["moved"] == []
        assert result["finite"]
        (_, loss), (_, gradient) = result["events"]
        assert (loss["step"], loss["consecutive"], gradient["step"], gradient["consecutive"]) == (2, 1, 3, 2)
        (of_loss,), (of_gradient,) = loss["findings"], gradient["findings"]
        first = 1000 + 200 + 10 * (gas - 1)
        assert (of_loss["rank"], of_loss["what"], of_loss["value"]) == (1, "loss", "nan")
        assert of_loss["ids"] == [first, first + 1, first + 2, first + 3]
        # of the two parameters behind the poisoned place
        assert of_gradient["rank"] == 0
        assert of_gradient["what"] in ("gradient of a.weight", "gradient of a.bias")
        assert of_gradient["ids"] == [300, 301, 302, 303]
    first_rank, second_rank = (result["lines"] for result in results)
    assert second_rank == []
    assert len(first_rank) == 2
    assert f"step 2 was not applied: rank 1: loss is nan, samples {first}, {first + 1}" in first_rank[0]
    assert "step-00000002.rank1.json (1 in a row, 5 end the run)" in first_rank[0]
    assert "step 3 was not applied: rank 0: gradient of a." in first_rank[1]
    written = sorted(p.name for p in (tmp_path / "faults").glob("*.json"))
    assert written == ["step-00000002.rank1.json", "step-00000003.rank0.json"]


def test_a_refused_step_can_be_computed_again(ranks, tmp_path):
    _, result = ranks(jobs.replay_job, str(tmp_path))
    assert result["files"] == ["step-00000000.rank1.json", "step-00000000.rank1.safetensors"]
    assert result["loss"] != result["loss"]
    assert result["rows"] == [True] * 4 or result["rows"] == [False, False, True, False]
    info = result["info"]
    assert (info["step"], info["rank"], info["found"], info["value"]) == (0, 1, "loss", "nan")
    assert json.loads((tmp_path / "faults" / "step-00000000.rank1.json").read_text()) == info


@pytest.mark.parametrize("stage", [0, 2])
def test_too_many_in_a_row_end_the_run(ranks, stage):
    for result in ranks(jobs.abort_job, stage):
        assert result["taken"] == [0, 1, 2]
        assert result["steps"] == 4
        assert result["code"] == 76
        assert "2 consecutive steps were not finite (efftrain.guard.max_nonfinite 2)" in result["text"]
        assert "step 3 was not applied: rank 1: loss is nan" in result["text"]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (3, "bf16")])
def test_plain_deepspeed_poisons_or_says_nothing(ranks, tmp_path, stage, dtype):
    for result in ranks(jobs.plain_deepspeed_job, stage, dtype, str(tmp_path)):
        assert bool(result["poisoned"]) == (stage == 0)
        assert result["skipped"] == (0 if stage == 0 else 1)
        assert not result["names_rank"]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (2, "fp32"), (3, "bf16")])
def test_without_looking_at_gradients(ranks, stage, dtype):
    for result in ranks(jobs.other_faults_job, stage, dtype):
        assert result == {"changed": [], "count": 1, "skips": 1}


def test_fp16_overflow_is_no_fault(ranks):
    for result in ranks(jobs.fp16_job, 2):
        assert result["steps"] == [(True, 0), (False, 0), (False, 1), (True, 1)]


@pytest.mark.parametrize(("stage", "gas"), [(1, 2), (3, 1)])
def test_a_loop_that_calls_backward_itself(ranks, stage, gas):
    first, _ = ranks(jobs.own_loop_job, stage, gas)
    assert first["steps"] == (3, 1)
    assert len(first["lines"]) == 1
    assert "rank 1: gradient of a." in first["lines"][0]
    assert "samples 1100, 1101, 1102, 1103" in first["lines"][0]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("method", "step 2: .*chooser \\(rank 0: 12 blocks; rank 1: 10 blocks\\)"),
        ("lr", "learning rate \\(rank 0: \\[[0-9.e-]+\\]; rank 1: \\[[0-9.e-]+\\]\\)"),
        ("step", "step \\(rank 0: 2, 2 of DeepSpeed, 0 skipped; rank 1: 3, 2 of DeepSpeed, 0 skipped\\)"),
    ],
)
def test_ranks_that_decide_differently(ranks, what, text):
    import re

    for result in ranks(jobs.decisions_job, what):
        assert result["text"] is not None
        assert re.search(text, result["text"]), result["text"]
        assert result["code"] == 77
        assert result["changed"] == []


def test_a_request_to_stop_reaches_all_ranks(ranks):
    for result in ranks(jobs.stop_job):
        assert result["found"] == [False, False, False, (True, True)]
        assert result["polls"] == [True, True]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (3, "bf16")])
def test_after_a_change_of_parameters(ranks, stage, dtype):
    for result in ranks(jobs.rebuilt_job, stage, dtype):
        assert result["gone"]
        ((rank, what),) = result["found"][0]
        assert rank == 1
        assert what in ("gradient of blocks.5.fc1.weight", "gradient of blocks.5.fc1.bias")
        assert result["changed"] == []
        assert result["applied"]


def test_when_there_is_a_guard(ranks):
    for found in ranks(jobs.off_job):
        on = {name for name in ("nothing", "key", "keyword", "null", "refused") if found[name]}
        assert on == {"key", "keyword"}
        assert found["nothing plain"]
        assert not found["key plain"]


def test_private_names_exist():
    import importlib
    import inspect

    from efftrain_ds.zero import native_files, skip

    for path, names in [*skip.private_names().items(), *native_files.private_names().items()]:
        module, name = path.rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        source = Path(inspect.getsourcefile(cls)).read_text()
        for attribute in names:
            assert hasattr(cls, attribute) or f"self.{attribute}" in source, f"{path}.{attribute}"
