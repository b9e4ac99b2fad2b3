"""Attention sparsity under ZeRO 0-3 on two gloo ranks: counts, ranks, one process, resume, overflow, lengths."""

from __future__ import annotations

import pytest

from tests.distributed import svite_attention_jobs as jobs
from tests.distributed import train_jobs

pytestmark = pytest.mark.dist
LATE, DONE = "attention_update_postponed", "attention_update"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "dtype", "method", "gas", "how"),
    [
        *(slow(stage, "fp32", {}, 1, "") for stage in (0, 1, 2, 3)),
        *(slow(stage, "bf16", {}, 2, "checkpointing") for stage in (1, 3)),
        slow(2, "fp16", {"block": 32}, 1, ""),
        slow(1, "fp32", {"growth": "random", "exclude_just_dropped": True}, 1, ""),
        slow(3, "fp32", {}, 1, "rebuild"),
        slow(1, "fp32", {}, 1, "rebuild"),
    ],
)
def test_counts_hold_and_ranks_agree(ranks, stage, dtype, method, gas, how):
    first, second = ranks(jobs.run_job, stage, dtype, method, 8, gas, how)
    for result in (first, second):
        assert result["problems"] == []
        assert result["updates"] == 3
        assert [e for e in result["events"] if e != "stage"] == ["attention_masks", DONE, DONE, DONE]
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) > 2
    assert first["scalars"] == second["scalars"]
    if "block" not in method:
        assert first["live"] == {f"blocks.{i}.attn": [15, 15] for i in range(2)}
        assert first["scalars"]["sparse_attention/density"] == 0.6
        assert 0.6 < first["scalars"]["sparse_attention/explored"] <= 1
    assert first["last"]["dropped"] == sum(sum(row["dropped"]) for row in first["last"]["layers"].values())


@pytest.mark.slow
def test_checkpointing_accumulation_and_rebuilds_change_no_decision(ranks):
    plain = ranks(jobs.run_job, 1, "fp32")[0]
    for gas, how in ((1, "checkpointing"), (4, ""), (1, "rebuild")):
        assert ranks(jobs.run_job, 1, "fp32", {}, 8, gas, how)[0]["digests"] == plain["digests"]
    assert ranks(jobs.wrap_job, 1)[0]["digests"] == plain["digests"]


@pytest.mark.parametrize(("stage", "gas", "updates"), [(3, 2, 4), *(slow(stage, 1, 20) for stage in (0, 1, 2, 3))])
def test_masks_are_those_of_one_process(ranks, stage, gas, updates):
    for result in ranks(jobs.reference_job, stage, gas, updates):
        assert result["wrong"] == []
        assert result["updates"] == updates
        assert result["moved"] >= updates
        assert result["error"] < 1e-3


@pytest.mark.parametrize(
    ("stage", "dtype", "method", "stop", "steps"),
    [
        (1, "fp32", {"end": 1.0}, 3, 6),
        *(slow(stage, "fp32", {"end": 1.0}, 11, 21) for stage in (0, 1, 2, 3)),
        *(slow(stage, "bf16", {"growth": "random", "block": 32}, 5, 10) for stage in (1, 3)),
        slow(1, "fp32", {"pattern": "window", "window": 3}, 2, 4),
    ],
)
def test_a_resume_is_the_same_run(ranks, tmp_path, stage, dtype, method, stop, steps):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, dtype, method, stop, steps):
        for key in ("state", "masks", "union", "stale"):
            assert result[key] == [], key
        assert result["digest"]
        assert result["scalars"]
        learned = method.get("pattern") is None
        assert result["other_start"] == learned
        whole = "end" in method
        assert result["updates"] == (len(range(2, steps if whole else int(0.8 * steps), 2)) if learned else 0)


@pytest.mark.parametrize(("stage", "dtype"), [slow(1, "fp16"), slow(2, "fp16"), slow(3, "fp16"), slow(3, "fp32")])
def test_a_skipped_step_postpones_the_update(ranks, stage, dtype):
    for result in ranks(jobs.overflow_job, stage, dtype):
        assert [i for i, applied in enumerate(result["applied"]) if not applied] == [3, 6, 7]
        assert result["changed"] == [4, 8, 9]
        assert result["events"] == [(3, LATE), (4, DONE), (6, LATE), (7, LATE), (8, DONE), (9, DONE)]
        assert result["stale"] == []


@pytest.mark.slow
@pytest.mark.parametrize("short", [False, True])
def test_fixed_patterns_follow_the_length(ranks, short):
    method = {"pattern": "window", "window": 3, "block": 16, "allow_short": short}
    for result in ranks(jobs.lengths_job, 1, method):
        assert result["tokens"] == [257] * 6, "an evaluation is at full size in every stage"
        early, late = result["density"][:3], result["density"][3:]
        assert len(set(early)) == len(set(late)) == 1
        assert 0 < late[0] < 0.5
        assert late[0] < early[0] < 1 if short else early[0] == 1
        assert result["share"][-1] < (1 if short else result["share"][0])
        assert result["made"] == [65]
        assert result["buffers"] == 2 * 6, "masks of other lengths stay out of checkpoints"


def test_learned_masks_refuse_other_lengths(ranks):
    for text in ranks(jobs.lengths_job, 1, {}):
        assert text.startswith("PlanError: efftrain.methods.svite_attention: stage 0")
        assert "65 tokens" in text
        assert "257" in text


@pytest.mark.slow
def test_ranks_that_differ_end_the_run(ranks):
    for text, events in ranks(jobs.desync_job, 1):
        assert text.startswith("DesyncError: efftrain.methods.svite_attention: the masks differ")
        assert "step 2" in text
        assert DONE not in events


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "stops"), [(1, [7]), (3, [4])])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(ranks, tmp_path, stage, stops):
    method = {"update_every": "2st", "density": 0.75, "block": 16, "allow_short": True}
    changes = {"efftrain/methods": {"svite_attention": method}}
    for result in ranks(train_jobs.resume_run, str(tmp_path), stage, stops, changes):
        assert result["problems"] == []
        assert result["steps"] == 20
