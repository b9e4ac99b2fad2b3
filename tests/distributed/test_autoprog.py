"""AutoProg under ZeRO 0-3 on two gloo ranks: growth, search, skipped blocks, resume, refusals."""

from __future__ import annotations

import pytest

from tests.distributed import autoprog_jobs as jobs
from tests.distributed import train_jobs

pytestmark = pytest.mark.dist
STAGES = [0, 1, 2, 3]

MODEL = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
MANUAL = {
    "efftrain/model/kwargs": MODEL,
    "efftrain/methods": {"autoprog": {"stages": 4}},
    "efftrain/data/erasing": 0.25,
}
NO_RATE = {**MANUAL, "efftrain/methods": {"autoprog": {"stages": 4, "drop_path_start": None}}}
SEARCHED = {
    "efftrain/model/kwargs": MODEL,
    "efftrain/data/samples": 6000,
    "efftrain/methods": {"autoprog": {"stages": 3, "search": {"epochs": 0.012, "probe_samples": 24, "cost": "macs"}}},
}
STACKED = {
    "efftrain/model/kwargs": MODEL,
    "efftrain/methods": {
        "efficienttrain": {"schedule": "et++"},
        "autoprog": {"stages": 4, "resolution_start": None, "magnitude_start": None},
    },
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "dtype", "state"),
    [
        *((stage, "fp32", "carry") for stage in STAGES),
        *((0, "fp32", "reset"), (2, "fp32", "reset")),
        *(slow(stage, "bf16", "carry") for stage in STAGES),
        *(slow(stage, "fp32", "reset") for stage in (1, 3)),
    ],
)
def test_mogrow_takes_everything_from_the_average(ranks, stage, dtype, state):
    for result in ranks(jobs.growth_job, stage, dtype, state):
        assert result["wrong"] == []
        assert result["online_gone"]
        assert result["blocks"] == 6
        assert result["rates"] == pytest.approx([0.1 * i / 5 for i in range(6)])
        if state == "carry":
            assert result["states"] == ["ema", "exp_avg", "exp_avg_sq", "fp32"]
            assert min(result["steps"]) >= 4
        else:
            assert max(result["steps"]) == 0


@pytest.mark.parametrize("stage", [1, slow(3)])
def test_growth_changes_neither_learning_rate_nor_step_count(ranks, stage):
    for result in ranks(jobs.lr_job, stage):
        assert result == {"lr": True, "steps": (12, 12), "depths": (6, 6)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_skipped_blocks_stay(ranks, dtype):
    ends = {}
    for stage in STAGES:
        for result in ranks(jobs.skipped_job, stage, dtype):
            assert result["moved"] == []
            assert result["still"] > 20
            assert result["finite"]
            assert len({d for d, _ in result["drawn"]}) > 1
            ends[stage] = result
    assert {tuple(r["drawn"]) for r in ends.values()} == {tuple(ends[0]["drawn"])}
    if dtype == "fp32":
        for stage in STAGES:
            assert ends[stage]["end"] == pytest.approx(ends[2]["end"], abs=1e-3)
            if stage > 0:  # DeepSpeed reports no norm for stage 0 in fp32
                assert ends[stage]["norms"] == pytest.approx(ends[2]["norms"], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "dtype"), [slow(0, "fp32"), (1, "bf16"), slow(2, "fp32"), slow(3, "fp32"), slow(3, "bf16")]
)
def test_search(ranks, stage, dtype):
    first, second = ranks(jobs.search_job, stage, dtype)
    for result in (first, second):
        assert result["wrong"] == []
        assert result["global_steps"] == 24
        sizes = [(d, r) for _, d, r in result["sizes"]]
        assert sizes[-1] == (6, 32)
        decided = [result["decided"][k] for k in sorted(result["decided"])]
        assert decided == sorted(decided)
        assert decided[-1] == (6, 32)
        assert all(b[0] >= a[0] and b[1] >= a[1] for a, b in zip(decided, decided[1:], strict=False))
        assert result["losses"] == [5] * len(result["tables"])
        assert all(sum(chosen for *_, chosen in table) == 1 for table in result["tables"])
        assert {(d, r) for d, r, *_ in result["tables"][0]} == {(d, r) for d in (3, 5, 6) for r in (16, 24, 32)}
    assert first["decided"] == second["decided"]
    assert first["tables"] == second["tables"]
    assert "growth_supernet" in first["events"]
    assert any("<- chosen" in line for text in first["lines"] for line in text)


def test_a_search_of_the_resolution_alone(ranks):
    first, second = ranks(jobs.resolution_only_job, 1)
    assert first == second
    assert first["rebuilds"] == 0
    assert set(first["sides"][:4]) <= {16, 24, 32}
    assert first["sides"][-1] == 32
    assert all(size[0] == 0 for size in first["decided"].values())
    assert first["rates"][0] == pytest.approx(0.1)  # a search runs at full strength
    assert first["rates"][5] == pytest.approx(0.0)
    assert first["rates"][-1] == pytest.approx(0.1)


def test_own_schedule_keeps_the_models_drop_path(ranks):
    (result, _) = ranks(jobs.own_schedule_job)
    assert result["first"] == pytest.approx([0.0, 0.05, 0.1])
    assert result["last"] == pytest.approx([0.1 * i / 5 for i in range(6)])


def test_a_search_may_fill_its_stage(ranks):
    first, second = ranks(jobs.back_to_back_job, 1)
    assert first == second
    assert [s for _, s in first["sizes"]] == [0] * 8 + [1] * 8 + [None] * 8
    assert first["sizes"][-1][0] == 6
    assert sorted(first["decided"]) == [0, 1, 2]
    assert first["decided"][2] == (6, 32)


@pytest.mark.parametrize(
    ("changes", "stage", "stops"),
    [
        slow(MANUAL, 0, [5, 7]),
        slow(MANUAL, 1, [5, 12]),
        slow(NO_RATE, 2, [10, 12]),
        slow(MANUAL, 3, [5]),
        slow(SEARCHED, 0, [2, 3]),
        (SEARCHED, 1, [3]),
        slow(SEARCHED, 1, [8]),
        slow(SEARCHED, 1, [1, 7]),
        slow(SEARCHED, 3, [8]),
        slow(STACKED, 1, [8]),
        slow(STACKED, 1, [5, 16]),
        slow(STACKED, 2, [11]),
    ],
    ids=lambda v: v if isinstance(v, int) else None,
)
def test_stopped_and_resumed_is_the_same_run(ranks, tmp_path, changes, stage, stops):
    for result in ranks(train_jobs.resume_run, str(tmp_path), stage, stops, changes):
        assert result["problems"] == []
        assert result["steps"] == 20


@pytest.mark.slow
def test_one_rank_resumes_in_mid_search(ranks, tmp_path):
    (result,) = ranks(train_jobs.resume_run, str(tmp_path), 2, [2, 8], SEARCHED, world=1)
    assert result["problems"] == []


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ({}, {"model": "mlp"}, ["ModelError", "stride"]),
        ({"stages": 20}, {}, ["PlanError", "efftrain.methods.autoprog.stages", "20"]),
        ({"resolution_step": 12}, {}, ["PlanError", "resolution_step", "12"]),
        ({"schedule": [{"until": 1.0, "depth": 7}]}, {}, ["PlanError", "schedule.0.depth", "7", "6"]),
        (
            {"schedule": [{"until": 0.5, "depth": 4}, {"until": 1.0, "depth": 3}]},
            {},
            ["ConfigIssues", "must not fall", "[4, 3]"],
        ),
        ({"schedule": [{"until": 1.0, "depth": 4}]}, {}, ["PlanError", "last stage must be the full model"]),
        ({"operator": "copy"}, {}, ["ConfigIssues", "operator", "mogrow"]),
        ({}, {"efftrain/model": {"ema": None}}, ["ConfigError", "efftrain.model.ema", "autoprog"]),
        ({"search": {"epochs": 9}, "stages": 2}, {}, ["PlanError", "search.epochs"]),
        ({"search": {"epochs": 0.01}, "stages": 2}, {}, ["PlanError", "search.epochs", "less than one step"]),
        ({"search": {"epochs": 1}, "stages": 2}, {"no_probes": True}, ["ConfigError", "probe_batches"]),
        ({}, {"fp16": {"enabled": True}, "zero_optimization/stage": 0}, ["ConfigError", "fp16", "stage 0"]),
        ({}, {"zero_optimization/round_robin_gradients": True}, ["Error", "round_robin_gradients"]),
    ],
)
def test_bad_input_is_one_error(ranks, method, changes, words):
    for text in ranks(jobs.bad_job, method, dict(changes)):
        for word in words:
            assert word in text, text
