"""Token selection in training: ZeRO stages, accumulation, precisions, resumes, and the methods it may run beside."""

import pytest

from tests.distributed import tokens_jobs as jobs
from tests.distributed import train_jobs

pytestmark = pytest.mark.dist

RAMP = {"keep": 0.5, "ramp": {"start": 1.0, "levels": 3, "until": 0.5}}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def check(results, gas=1, gather=True):
    for result in results:
        want = [17, 17, 13, 13, 9, 9, 9, 9]
        assert result["seen"] == [k if gather else 17 for k in want for _ in range(gas)]
        assert result["evaluated"] == [9 if gather else 17] * 2
        assert result["taus"] == pytest.approx([10 - 9.9 * step / 8 for step in range(8)], rel=1e-5)
        assert result["kind"] == "torch.float32"
        assert result["moved"] > 1e-3
        assert result["second"] > 0
        assert result["equal"]
        assert [r["kept"] for r in result["records"]] == [17, 13, 9]
        assert {r["tokens"] for r in result["records"]} == {17}
        assert result["records"][0]["dense_macs"] == 1_942_400
        assert result["scalars"]["tokens/keep"] == 0.5
        assert 0 < result["scalars"]["tokens/entropy"] < 2.84
        assert result["decisions"] == results[0]["decisions"]
        assert result["first"] == results[0]["first"]
        assert not any("scorer" in name for name in result["masked"])


@pytest.mark.parametrize(
    ("stage", "dtype", "gas"),
    [
        (3, "bf16", 1),
        slow(0, "fp32", 1),
        slow(1, "bf16", 2),
        slow(2, "fp16", 1),
        slow(2, "fp32", 4),
        slow(3, "fp32", 2),
    ],
)
def test_zero_stages(ranks, stage, dtype, gas):
    check(ranks(jobs.run_job, stage, dtype, {"svite_tokens": RAMP}, 8, gas), gas)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_the_same(ranks, stage):
    config = {"svite_tokens": RAMP}
    plain, found = (ranks(jobs.run_job, s, "fp32", config) for s in (0, stage))
    for one, other in zip(plain, found, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert plain[0]["losses"] != plain[1]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True), (3, False)])
def test_masked_tokens(ranks, stage, offload):
    config = {"svite_tokens": {**RAMP, "select": "mask"}}
    check(ranks(jobs.run_job, stage, "fp32", config, 8, 1, offload), gather=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_beside_sparse_weights(ranks, stage):
    results = ranks(jobs.run_job, stage, "fp32", {"svite_tokens": RAMP, "svite": {"update_every": "2st"}})
    check(results)
    assert len(results[0]["masked"]) > 5
    dense = ranks(jobs.run_job, stage, "fp32", {"svite_tokens": RAMP})[0]["records"]
    # the sparse run's MACs are those of the live weights and the kept tokens
    assert all(a["macs"] < 0.62 * b["macs"] for a, b in zip(results[0]["records"], dense, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_after_a_resume(ranks, tmp_path, stage):
    for result in ranks(jobs.resumed_evaluation, str(tmp_path), stage, {"svite_tokens": RAMP}):
        assert result == {"equal": True, "keep": [1.0, 0.5, 0.5]}


@pytest.mark.slow
def test_wrap_says_what_to_do(ranks):
    for text in ranks(jobs.wrapped):
        assert "svite_tokens" in text
        assert "efftrain_ds.initialize" in text


TINY = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
BESIDE = {
    "sparse weights and smaller inputs": (
        {"svite": {"update_every": "2st"}, "efficienttrain": {"schedule": "et++"}},
        TINY,
    ),
    "growth": ({"autoprog": {"depth_start": 0.5, "stages": 2, "operator": "interpolation"}}, {**TINY, "depth": 4}),
    "momentum growth": ({"autoprog": {"depth_start": 0.5, "stages": 2, "resolution_start": 0.6}}, {**TINY, "depth": 4}),
    "nothing": ({}, TINY),
    "fewer units": ({"s2vite": {"heads": 0.5, "update_every": "2st", "ramp": {"start": 1.0, "levels": 2}}}, TINY),
    "registers": ({}, {**TINY, "reg_tokens": 4}),
}


@pytest.mark.parametrize(
    ("stage", "beside", "select", "stops"),
    [
        (1, "sparse weights and smaller inputs", "gather", [7]),
        slow(0, "nothing", "mask", [9]),
        slow(2, "registers", "gather", [3, 11]),
        slow(3, "sparse weights and smaller inputs", "mask", [6]),
        slow(1, "fewer units", "gather", [4, 11]),
        slow(1, "growth", "gather", [4, 12]),
        slow(3, "growth", "gather", [11]),
        slow(2, "momentum growth", "gather", [9, 12]),
    ],
)
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(ranks, tmp_path, stage, beside, select, stops):
    methods, kwargs = BESIDE[beside]
    changes = {
        "efftrain/methods": {"svite_tokens": {**RAMP, "select": select}, **methods},
        "efftrain/model/kwargs": kwargs,
    }
    for result in ranks(train_jobs.resume_run, str(tmp_path), stage, stops, changes):
        assert result["problems"] == []
        assert result["steps"] == 20
