"""Changing parameters in mid-run under ZeRO 0-3: nothing is lost, nothing is refused too late, nothing leaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import rebuild_jobs as jobs
from tests.distributed import refusal_jobs as refusals

pytestmark = pytest.mark.dist
slow = pytest.mark.slow
STAGES = [0, 1, 2, 3]
ROOT = Path(__file__).resolve().parents[2]
OFFLOAD, OFFLOAD_PARAM = jobs.OFFLOAD, jobs.OFFLOAD_PARAM
CPU_ADAM = {"optimizer": "ds", **OFFLOAD}


def _exact(result, *, keeps_on: bool = True) -> None:
    assert result["at_rebuild"] == []
    if keeps_on:
        assert result["losses"] == 0.0
        assert result["end"] == []
        assert result["end_error"] == 0.0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_identity(ranks, stage, dtype):
    for result in ranks(jobs.identity_job, stage, dtype, {}):
        _exact(result)


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=slow)])
def test_identity_fp16_with_skipped_steps(ranks, stage):
    for result in ranks(jobs.identity_job, stage, "fp16", {}):
        _exact(result)
        assert 0 < result["skipped"] < 8
        assert result["scale"]["cur_scale"] < 2**18


@pytest.mark.parametrize(
    ("stage", "dtype", "extra"),
    [
        pytest.param(1, "bf16_fp32", {}, marks=slow),
        (2, "fp32", {"gas": 2}),
        pytest.param(3, "bf16", {"gas": 2}, marks=slow),
        pytest.param(0, "bf16", {"gas": 2}, marks=slow),
        pytest.param(1, "bf16_fp32", {"gas": 2}, marks=slow),
        pytest.param(2, "bf16", OFFLOAD, marks=slow),
        (3, "bf16", OFFLOAD),
        pytest.param(1, "fp32", OFFLOAD, marks=slow),
        pytest.param(2, "fp32", OFFLOAD, marks=slow),
        pytest.param(3, "fp32", OFFLOAD, marks=slow),
        pytest.param(3, "bf16", OFFLOAD_PARAM, marks=slow),
        pytest.param(3, "fp32", OFFLOAD_PARAM, marks=slow),
        (2, "bf16", {"tied": True}),
        pytest.param(3, "fp32", {"tied": True}, marks=slow),
        pytest.param(3, "bf16", {"sub_group_size": 500}, marks=slow),
        (2, "bf16", {"keep_old": False}),
        pytest.param(3, "bf16", {"keep_old": False}, marks=slow),
        pytest.param(0, "fp32", {"keep_old": False}, marks=slow),
        pytest.param(2, "bf16", {"overlap_comm": True, "contiguous_gradients": False}, marks=slow),
        pytest.param(1, "bf16", {"grouped": False}, marks=slow),
    ],
)
def test_identity_of_other_configurations(ranks, stage, dtype, extra):
    for result in ranks(jobs.identity_job, stage, dtype, extra):
        _exact(result)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [pytest.param(stage, dtype, marks=slow) for stage, dtype in [(2, "fp32"), (3, "bf16"), (1, "bf16")]],
)
def test_identity_on_three_ranks(ranks, stage, dtype):
    for result in ranks(jobs.identity_job, stage, dtype, {}, world=3):
        _exact(result)


@pytest.fixture(scope="session")
def optimizer_extensions():
    """DeepSpeed's own CPU optimizers, compiled (two minutes where they are not)."""
    command = [sys.executable, str(ROOT / "tools" / "build_extensions.py"), "--optimizers"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        pytest.skip(f"DeepSpeed's CPU optimizers cannot be built here: {done.stderr[-300:]}")


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_identity_with_cpu_adam(ranks, optimizer_extensions, stage, dtype):
    """Its running product of betas is replayed, so that not even the last bits differ."""
    for result in ranks(jobs.identity_job, stage, dtype, CPU_ADAM):
        _exact(result)


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_identity_with_fused_adam(ranks, optimizer_extensions, stage, dtype):
    """Exact, with two oddities of its CPU form at stage 0.

    In fp32 only the last parameter of a group counts steps; a rebuild gives all of them the group's count. In bf16 the
    constructor takes a step, which puts the extension's running product of betas (one a process) on another last bit.
    """
    for result in ranks(jobs.identity_job, stage, dtype, {"optimizer": "ds"}):
        if stage == 0 and dtype == "bf16":
            _exact(result, keeps_on=False)
            assert result["losses"] <= 1e-2
            assert result["end_error"] <= 1e-3
            continue
        for part in ("at_rebuild", "end"):
            result[part] = [name for name in result[part] if name != "steps" or stage]
        _exact(result)


def _changed(result, what: str, stage: int) -> None:
    assert result["wrong"] == []
    assert result["cast"] == []
    assert result["getter"] == []
    assert result["frozen"]
    assert result["names"]
    assert result["keys"] == ["ema", "exp_avg", "exp_avg_sq", "fp32"]
    assert result["moved"] > 0
    assert all(loss == loss for loss in result["losses"] if loss is not None)
    at = result["at"]
    newcomers = [f"decay@{at}", f"no_decay@{at}"] if what == "grow" else []
    assert sorted(result["groups"]) == sorted(["decay", "no_decay", *newcomers])
    if stage in (1, 2):  # one flat a group
        assert result["steps"] == {"decay": at, "no_decay": at, **dict.fromkeys(newcomers, 0.0)}
    assert [h["step"] for h in result["history"]] == [at]


GROW_MORE = [
    pytest.param(2, "bf16", OFFLOAD, 2, marks=slow),
    pytest.param(3, "bf16", OFFLOAD, 2, marks=slow),
    pytest.param(1, "bf16_fp32", {}, 2, marks=slow),
    pytest.param(3, "bf16", {"sub_group_size": 500}, 2, marks=slow),
    pytest.param(1, "bf16", {}, 3, marks=slow),
    pytest.param(3, "fp16", {}, 2, marks=slow),
    (3, "bf16", {"keep_old": False}, 2),
    pytest.param(1, "bf16", {"keep_old": False}, 2, marks=slow),
    pytest.param(3, "fp32", {}, 3, marks=slow),
    pytest.param(2, "fp32", {}, 3, marks=slow),
    pytest.param(3, "bf16", OFFLOAD_PARAM, 2, marks=slow),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("dtype", "what"),
    [
        ("fp32", "grow"),
        ("bf16", "grow"),
        ("bf16", "shrink"),
        ("fp32", "widen"),
        pytest.param("fp32", "shrink", marks=slow),
        pytest.param("bf16", "widen", marks=slow),
    ],
)
def test_change_against_an_oracle(ranks, stage, dtype, what):
    for result in ranks(jobs.change_job, stage, dtype, what, {}):
        _changed(result, what, stage)


@pytest.mark.parametrize(("stage", "dtype", "extra", "world"), GROW_MORE)
@pytest.mark.parametrize("what", ["grow", pytest.param("shrink", marks=slow), pytest.param("widen", marks=slow)])
def test_change_under_other_configurations(ranks, stage, dtype, extra, world, what):
    for result in ranks(jobs.change_job, stage, dtype, what, extra, world=world):
        _changed(result, what, stage if not extra else 3)


@slow
def test_stages_agree_after_growth(ranks):
    """Without dropout's help: all stages see the same numbers, so five steps after a growth they still agree."""
    runs = {stage: ranks(jobs.change_job, stage, "fp32", "grow", {})[0]["losses"] for stage in STAGES}
    for stage in (1, 2, 3):
        for a, b in zip(runs[0], runs[stage], strict=True):
            if a is not None and b is not None:
                assert abs(a - b) < 5e-5


NEGATIVE = {
    "moments": True,
    "element": True,
    "step": True,
    "master bits": True,
    "lr": True,
    "weight decay": True,
    "scheduler": True,
    "rng": True,
    "scaler": True,
    "counters": False,
}


@pytest.mark.parametrize("what", list(NEGATIVE))
def test_losing_anything_is_noticed(ranks, what):
    """Negative controls: the identity test would fail without each carried item."""
    for result in ranks(jobs.negative_job, what):
        assert result["end"]
        if what == "counters":  # they do not show in the losses, so they are compared by themselves
            assert result["losses"]
            assert result["end"] == ["counters"]


REFUSED = {
    "accumulation": "accumulation is in flight",
    "unmapped": "blocks.4.norm.weight is new and has no map",
    "lost": "nothing takes over blocks.3",
    "shape": "head.weight <- embed.weight: dimension",
    "source": "nowhere, which the module does not have",
    "target": "map of nowhere, which the new module does not have",
    "index": "an index is not in 0..6",
    "one rank": "rank 1 of 2",
    "one rank's surgery": "rank 1 of 2",
    "ranks differ": "rank 1 asks for another change than rank 0",
    "state": "history (Tensor), which cannot be moved",
    "class": "Other is not supported",
    "zero_hpz_partition_size": "zero_hpz_partition_size: not supported",
    "zero_quantized_weights": "zero_quantized_weights: not supported",
    "zenflow": "zenflow: not supported",
    "evaluating": "while the average is swapped in",
    "frozen by hand": "requires_grad of head.bias was changed on the module itself",
    "while others ask": "return the request from on_stage_enter instead of calling rebuild",
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refusals_touch_nothing(ranks, what):
    results = ranks(refusals.refusal_job, what)
    assert len({result["text"] for result in results}) == 1
    for result in results:
        assert REFUSED[what] in result["text"]
        assert result["untouched"]


@pytest.mark.parametrize(
    ("stage", "dtype", "extra", "text"),
    [
        (2, "fp32", {"round_robin_gradients": True, "ema": False}, "round_robin_gradients: not supported"),
        (0, "fp16", {}, "use stage 1, 2 or 3"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_at_the_start(ranks, stage, dtype, extra, text):
    for found in ranks(refusals.start_refusal_job, stage, dtype, extra):
        assert text in found


@pytest.mark.parametrize(
    ("stage", "dtype", "where"),
    [
        (1, "bf16", "create"),
        pytest.param(3, "fp32", "after create", marks=slow),
        (2, "bf16", "one rank"),
        (0, "fp32", "restore"),
        pytest.param(2, "bf16", "restore", marks=slow),
        pytest.param(3, "bf16", "restore", marks=slow),
        pytest.param(0, "bf16", "create", marks=slow),
        pytest.param(3, "bf16", "one rank", marks=slow),
    ],
)
def test_a_failure_brings_the_old_state_back(ranks, stage, dtype, where):
    for result in ranks(jobs.rollback_job, stage, dtype, where):
        assert "no memory (a test)" in result["text"]
        assert "the state before the rebuild is restored" in result["text"]
        assert result["restored"] == []
        assert result["losses"]
        assert result["end"] == []
        assert result["blocks"] == 6
        assert result["history"] == 1
        assert result["told"]  # methods hear of the engine that a roll-back makes


def test_a_failure_without_the_old_state_says_so(ranks):
    for text in ranks(refusals.streamed_failure_job):
        assert "the old state was given up (keep_old is false)" in text


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=slow) for stage in (0, 1, 3))])
def test_nothing_of_a_replaced_engine_lives_on(ranks, stage):
    for result in ranks(jobs.leak_job, stage, 5):
        assert result["alive"] == [0] * 5
        assert len(set(result["hooks"])) == 1
        assert len(set(result["groups"])) == 1


@slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_hundred_rebuilds_need_no_more_memory(ranks, stage):
    for result in ranks(jobs.many_job, stage, 200):
        settled = result["resident"][50:]
        assert max(settled) <= 1.02 * min(settled), [r >> 20 for r in result["resident"][::20]]
        assert max(result["files"][50:]) == min(result["files"][50:]), result["files"][::20]
        assert len(set(result["groups"])) == 1


@pytest.mark.parametrize(
    ("stage", "dtype", "pair"),
    [
        (2, "bf16", "grow, shrink"),
        (1, "fp32", "newcomers, renumber"),
        pytest.param(3, "fp32", "fresh, renumber", marks=slow),
        pytest.param(2, "fp32", "widen, grow", marks=slow),
        (0, "fp32", "grow, widen"),
    ],
)
def test_two_requests_are_the_one_after_the_other(ranks, stage, dtype, pair):
    for result in ranks(jobs.compose_job, stage, dtype, pair):
        assert result["at"] == []
        assert result["losses"]
        assert result["end"] == []
        assert result["rebuilds"] == (1, 2)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "fp32"), *(pytest.param(*cell, marks=slow) for cell in ((3, "bf16"), (1, "bf16"), (2, "fp32")))],
)
def test_freezing_and_unfreezing(ranks, stage, dtype):
    for result in ranks(jobs.unfreeze_job, stage, dtype):
        assert result["carried"] == []
        assert result["shift"]
        assert result["moments"]
        assert result["gone"]
        assert result["groups"] == ["decay", "no_decay", "decay@3"]
        assert result["moves"]
        assert result["stays"]
        assert result["back"]
        assert result["back_bias"]
        assert result["back_groups"] == ["decay", "no_decay", "no_decay@5"]
        assert result["back_carried"] == []
        assert result["back_moves"]


def test_hooks_and_composed_requests(ranks):
    for result in ranks(jobs.hooks_job):
        assert result["calls"] == 4
        assert result["blocks"] == 5
        assert result["rebuilds"] == 1
        assert result["keys"] == ["ema", "exp_avg", "exp_avg_sq", "fp32"]


@pytest.mark.parametrize("stage", [0, 2, pytest.param(1, marks=slow), pytest.param(3, marks=slow)])
def test_first_update_of_newcomers(ranks, stage):
    """Bias correction from step 0: |update| = lr. In an old group at step 40 it would be 0.64 of it."""
    for result in ranks(jobs.birth_job, stage):
        assert result["ratio"] == pytest.approx(1.0, abs=0.01)


def _without(state: dict, *parts: str) -> dict:
    return {k: v for k, v in state.items() if k not in parts}


def test_resume_after_growth_goes_on_to_the_bit(ranks, tmp_path):
    for stage, dtype in [(2, "fp32"), (3, "bf16")]:
        folder = str(tmp_path / f"{stage}")
        first = ranks(jobs.save_grown_job, folder, stage, dtype)
        second = ranks(jobs.load_grown_job, folder, stage, dtype)
        for a, b in zip(first, second, strict=True):
            assert jobs.differing(a["saved"], b["saved"]) == []
            assert a["losses"] == b["losses"]
            assert jobs.differing(a["end"], b["end"]) == []
            assert a["history"] == b["history"]
            assert len(b["history"]) == 1
            assert b["depth"] == 6
            assert b["groups"] == ["decay", "rest", "rest@3", "decay@3"]
            assert b["rebuilt"] == 1


@slow
def test_resume_after_growth_elsewhere(ranks, tmp_path):
    """Other stages and world sizes: the state is the same to the bit, the losses up to the order of sums."""
    saved = {stage: ranks(jobs.save_grown_job, str(tmp_path / str(stage)), stage, "fp32")[0] for stage in (0, 2, 3)}
    for source, target, world in [(2, 2, 1), (2, 3, 2), (3, 1, 2), (0, 2, 2)]:
        results = ranks(jobs.load_grown_job, str(tmp_path / str(source)), target, "fp32", world=world)
        for rank, result in enumerate(results):
            for key, value in saved[source]["saved"]["state"].items():
                assert torch.equal(value, result["saved"]["state"][key]), (source, target, world, key)
            assert result["depth"] == 6
            if rank == 0 and world == 2:
                ours = [a for a in result["losses"] if a is not None]
                theirs = [a for a in saved[source]["losses"] if a is not None]
                assert ours[0] == pytest.approx(theirs[0], abs=1e-5)


def test_resume_of_another_model_is_refused(ranks, tmp_path):
    ranks(jobs.save_grown_job, str(tmp_path), 1, "fp32")
    for result in ranks(jobs.wrong_grown_job, str(tmp_path)):
        assert "belongs to another model" in result["text"]
        assert result["untouched"]
