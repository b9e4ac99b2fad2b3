"""Masked layers and zeros in sharded training state: ZeRO 0-3 on two gloo ranks."""

from __future__ import annotations

import pytest

from tests.distributed import mask_jobs as jobs

pytestmark = pytest.mark.dist
STAGES = [0, 1, 2, 3]
slow = pytest.mark.slow


def cells(*quick: tuple[int, str]) -> list:
    """Every stage in fp32 and bf16; all but the quick ones are slow."""
    every = [(stage, dtype) for stage in STAGES for dtype in ("fp32", "bf16")]
    return [cell if cell in quick else pytest.param(*cell, marks=slow) for cell in every]


def check_cell(found: dict, stage: int, dtype: str) -> None:
    assert found["problems"] == []
    assert found["wrote"] == []
    assert found["collectives"] == []
    assert (found["collectives_seen"] > 0) == (stage > 0)
    assert found["scale"] == [256.0 if dtype == "fp16" else 1.0] * 2
    assert len(found["capture"]) == 12
    assert found["to_engine"] == [] or len(found["to_engine"]) == 12
    exact = dtype == "fp32"
    assert max(found["capture"]) < (1e-6 if exact else 2e-2)
    assert max(found["to_engine"], default=0.0) < (1e-6 if exact else 2e-2)
    assert max(found["norm"], default=0.0) < (1e-5 if exact else 3e-2)
    assert found["moved"] > 1e-4
    if exact:
        assert found["trajectory"] < 1e-5


@pytest.mark.parametrize(("stage", "dtype"), cells((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")))
def test_zeros_hold_and_dense_gradients_are_right(ranks, stage, dtype):
    for found in ranks(jobs.cell_job, stage, dtype, {}):
        check_cell(found, stage, dtype)


@pytest.mark.parametrize(
    ("stage", "dtype", "extra"),
    [
        pytest.param(1, "fp16", {}, marks=slow),
        (2, "fp16", {}),
        pytest.param(3, "fp16", {}, marks=slow),
        pytest.param(1, "fp32", {"offload": True}, marks=slow),
        (2, "bf16", {"offload": True}),
        pytest.param(3, "bf16", {"offload": True}, marks=slow),
        pytest.param(2, "fp32", {"offload": True, "cpu_adam": True}, marks=slow),
        pytest.param(3, "fp32", {"offload": True, "cpu_adam": True}, marks=slow),
        (3, "fp32", {"stage3_param_persistence_threshold": 0}),
        pytest.param(3, "bf16", {"offload_param": {"device": "cpu"}, "offload": True}, marks=slow),
        pytest.param(3, "bf16", {"sub_group_size": 100}, marks=slow),
    ],
)
def test_other_optimizers(ranks, stage, dtype, extra):
    for found in ranks(jobs.cell_job, stage, dtype, extra):
        check_cell(found, stage, dtype)


@pytest.mark.parametrize(("stage", "dtype"), cells((1, "fp32"), (3, "bf16")))
def test_writes_reach_the_borders_of_fragments(ranks, stage, dtype):
    for found in ranks(jobs.every_entry_job, stage, dtype):
        assert found["wrong"] == []
        assert bool(found["split"]) == (stage > 0)
        assert found["magnitudes"]
        assert "no parameter nothing" in found["refused"][0]
        assert "head.weight has shape [5, 21]" in found["refused"][1]


@pytest.mark.parametrize(("stage", "dtype"), cells((1, "bf16"), (2, "fp32")))
def test_dense_moments(ranks, stage, dtype):
    for found in ranks(jobs.dense_moments_job, stage, dtype):
        assert found["problems"] == []
        assert found["warm"] > 0.5
        assert found["strays"]
        assert not found["weights_stray"]
        if dtype == "fp32":
            assert found["trajectory"] < 1e-5
            assert found["moment"] < 1e-4


@pytest.mark.parametrize(("stage", "dtype"), cells((3, "fp32")))
def test_masks_survive_a_rebuild(ranks, stage, dtype):
    for found in ranks(jobs.rebuild_job, stage, dtype):
        assert found["identity"] == []
        assert found["identity_masks"] == []
        assert found["grown_masks"] == []
        assert found["strays"] == {}
        assert found["problems"] == []
        assert found["capture"] < (1e-6 if dtype == "fp32" else 3e-2)


@pytest.mark.parametrize(
    ("stage", "other"),
    [pytest.param(0, 3, marks=slow), pytest.param(1, 2, marks=slow), (2, 3), pytest.param(3, 0, marks=slow)],
)
def test_masks_are_in_checkpoints(ranks, tmp_path, stage, other):
    for found in ranks(jobs.resume_job, str(tmp_path), stage, "fp32", other):
        for key in ("same", "other"):
            assert found[key]["masks"] == []
            assert found[key]["strays"] == {}
            assert found[key]["error"] < 1e-6
        assert found["same"]["state"] == []


@slow
@pytest.mark.parametrize(
    ("stage", "extra"),
    [(1, {"compiled": True}), (3, {"compiled": True}), (1, {"autocast": True}), (3, {"autocast": True})],
)
def test_compiled_and_autocast(ranks, stage, extra):
    for found in ranks(jobs.cell_job, stage, "fp32", extra):
        check_cell(found, stage, "bf16" if "autocast" in extra else "fp32")


@slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_partitioned_from_the_start(ranks, dtype):
    for found in ranks(jobs.partitioned_job, dtype):
        assert found == {"before": True, "problems": []}


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_hooks_on_parameters_are_lost_in_a_rebuild(ranks, stage):
    for found in ranks(jobs.hook_job, stage, "fp32"):
        assert found == {"held": True, "after_rebuild": False}
