"""S2ViTE under ZeRO 0-3 on two gloo ranks: updates, ranks, accumulation, resume, ramps, overflow, the published way."""

from __future__ import annotations

import pytest

from tests.distributed import s2vite_jobs as jobs
from tests.distributed import train_jobs

pytestmark = pytest.mark.dist
STAGES = [0, 1, 2, 3]
FULL = 114_250
"""Parameters of the small model with all units."""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "dtype", "method"),
    [
        (2, "fp32", {}),
        *(slow(stage, "fp32", {}) for stage in (0, 1, 3)),
        *(slow(stage, "bf16", {}) for stage in STAGES),
        *(slow(stage, "fp16", {}) for stage in (1, 2, 3)),
        slow(2, "fp32", {"heads": 0.3, "neurons": 0.8, "alpha": "reference"}),
        slow(1, "fp32", {"exclude": ["blocks.1"]}),
    ],
)
def test_an_update_writes_new_units_and_nothing_else(ranks, stage, dtype, method):
    first, second = ranks(jobs.run_job, stage, dtype, method)
    for result in (first, second):
        assert result["problems"] == []
        assert result["counts_constant"]
        assert result["updates"] == 3
        assert result["events"] == ["stage", "units", "unit_update", "unit_update", "unit_update"]
        assert result["written"] > 50
        for before, without, after in result["losses_around"]:
            assert after == pytest.approx(without, abs=1e-6), "a new unit has an effect"
            assert before != without
        # masters and moments exist for what lives, up to the padding of partitions
        live, held = result["elements"]
        assert live == result["parameters"]
        assert live <= held <= live + 100
        assert result["keys"] == ["exp_avg", "exp_avg_sq"]
        assert result["pictures"].keys() == {"sparse/heads", "sparse/neurons"}
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 4
    assert first["scalars"] == second["scalars"]
    assert first["moved"] > 30
    if method == {}:
        assert first["counts"] == {f"blocks.{i}": {"heads": 2, "neurons": 128} for i in range(2)}
        assert first["parameters"] == FULL - 2 * (2 * (4 * 16 * 64 + 3 * 16) + 128 * (2 * 64 + 1))
        assert first["scalars"]["sparse/macs_share"] == pytest.approx(1_069_824 / 1_942_400)
        assert first["last"]["macs"] == 1_069_824
        assert first["scalars"]["sparse/explored_neurons"] > 0.55
    if "exclude" in method:
        assert first["counts"]["blocks.1"] == {"heads": 4, "neurons": 256}


@pytest.mark.parametrize(
    ("stage", "gas", "updates", "exclude"),
    [
        (2, 1, 4, True),
        slow(0, 1, 20, False),
        slow(1, 4, 20, True),
        slow(2, 2, 20, False),
        slow(3, 1, 20, False),
        slow(3, 1, 20, True),
    ],
)
def test_units_are_those_of_one_process(ranks, stage, gas, updates, exclude):
    for result in ranks(jobs.reference_job, stage, gas, updates, exclude):
        assert result["wrong"] == []
        assert result["updates"] == updates
        assert result["moved"]["neurons"] >= updates
        assert result["moved"]["heads"] >= (2 * updates if exclude else 0)
        assert result["error"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "how"), [(2, "bf16", "offload"), (3, "fp32", "offload"), (1, "fp32", "compile")]
)
def test_an_update_beside_other_machinery(ranks, stage, dtype, how):
    for result in ranks(jobs.run_job, stage, dtype, {}, 8, 1, how):
        assert result["problems"] == []
        assert result["updates"] == 3


@pytest.mark.slow
def test_accumulation_gives_the_same_units(ranks):
    one, four = (ranks(jobs.run_job, 1, "fp32", {}, 6, gas)[0] for gas in (1, 4))
    assert one["digests"] == four["digests"]
    assert one["problems"] == four["problems"] == []


@pytest.mark.parametrize(("stage", "dtype"), [slow(2, "fp32"), slow(0, "fp32"), slow(3, "bf16")])
def test_queries_and_keys_of_a_grown_head_learn(ranks, stage, dtype):
    for result in ranks(jobs.grown_job, stage, dtype):
        assert result["grown"] > 0
        assert all(part > 0 for row in result["moments"][-1] for part in row)


RAMP = {"ramp": {"start": 1.0, "levels": 3, "until": 0.5}}


@pytest.mark.parametrize(
    ("stage", "dtype", "method", "stop", "steps", "to"),
    [
        (3, "fp32", {}, 3, 5, None),
        *(slow(stage, "fp32", {}, 5, 9, None) for stage in STAGES),
        *(slow(stage, "bf16", {}, 5, 9, None) for stage in (1, 3)),
        slow(2, "fp16", {}, 5, 9, None),
        slow(2, "fp32", {"revive": False}, 5, 9, None),
        slow(1, "fp32", RAMP, 3, 9, None),  # between the first and the second edge
        slow(2, "bf16", RAMP, 2, 9, None),  # at an edge
        slow(3, "fp32", RAMP, 6, 9, None),  # after the last
        slow(1, "fp32", {}, 5, 9, 3),
    ],
)
def test_a_resume_is_the_same_run(ranks, tmp_path, stage, dtype, method, stop, steps, to):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, dtype, method, stop, steps, to):
        if to is None:
            assert result["state"] == []
        else:
            assert result["gap"] < 1e-4
        for key in ("units", "union", "digest", "scalars", "other_start"):
            assert result[key] or (key == "scalars" and to is not None), key
        assert result["updates"] > 1


@pytest.mark.parametrize(
    ("stage", "dtype", "method"),
    [
        (1, "fp32", {}),
        *(slow(stage, "fp32", {}) for stage in (0, 2, 3)),
        *(slow(stage, "bf16", {}) for stage in STAGES),
        slow(2, "fp16", {}),
        slow(3, "fp32", {"end": 0.1}),
    ],
)
def test_counts_that_fall(ranks, stage, dtype, method):
    first, second = ranks(jobs.ramp_job, stage, dtype, method)
    assert first["digest"] == second["digest"]
    for result in (first, second):
        assert result["problems"] == []
        assert result["edges"] == [2, 4]
        assert result["counts"] == [[(4, 256)] * 2] * 2 + [[(3, 192)] * 2] * 2 + [[(2, 128)] * 2] * 5
        assert all(loss == loss and loss < 5 for loss in result["losses"])
        removed = [(step, by) for event, step, by in result["events"] if event == "units_removed"]
        assert removed == [(2, "score"), (4, "score")]
        assert result["scalars"]["sparse/heads"] == 0.5
        if not method:
            assert [step for event, step, _ in result["events"] if event == "unit_update"] == [2, 4, 6, 8]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp16"), (2, "fp16"), (3, "fp16"), (3, "fp32")])
@pytest.mark.slow
def test_a_skipped_step_postpones_the_update(ranks, stage, dtype):
    for result in ranks(jobs.overflow_job, stage, dtype):
        assert [i for i, applied in enumerate(result["applied"]) if not applied] == [3, 6, 7, 11]
        late, done = "unit_update_postponed", "unit_update"
        assert result["events"] == [
            (3, late, None), (4, done, None), (6, late, None), (7, late, None), (8, done, None), (9, done, None),
            (12, "units_removed", "size"), (12, done, None), (15, done, None),
        ]  # fmt: skip
        assert set(result["changed"]) <= {4, 8, 9, 12, 15}
        assert result["changed"][:2] == [4, 8]
        assert result["off"]
        assert result["finite"]


@pytest.mark.parametrize(("stage", "dtype"), [*((stage, "fp32") for stage in STAGES), (1, "bf16"), (3, "bf16")])
@pytest.mark.slow
def test_the_published_way(ranks, stage, dtype):
    first, second = ranks(jobs.masked_job, stage, dtype)
    assert first["digest"] == second["digest"]
    for result in (first, second):
        assert result["problems"] == []
        assert result["updates"] == 3
        assert result["neurons_moved"] == 0, "dead neurons have no gradient in this mode"
        assert result["heads_moved"]
        assert all(of == {"blocks.0": 2, "blocks.1": 2} for of in result["heads"])
        assert result["query_key"], "no head has grown"
        assert all(query == 0 and key == 0 for query, key, _ in result["query_key"]), "a saddle: they never learn"
        assert min(result["dead_bias"]) > 0, "dead heads still emit a constant"
        assert result["warm"] > 0
        assert result["parameters"] == FULL
        parts = ("attn.qkv", "mlp.fc1", "mlp.fc2")
        assert result["names"] == [f"blocks.{i}.{part}.weight" for i in range(2) for part in parts]


@pytest.mark.parametrize("stage", [slow(1), slow(3)])
def test_the_average(ranks, stage):
    for result in ranks(jobs.average_job, stage):
        assert result["gap"] < 1e-6


@pytest.mark.slow
def test_ranks_that_decide_differently_end_the_run(ranks):
    for text in ranks(jobs.desync_job, 1):
        assert text.startswith("efftrain.methods.s2vite: the units differ between the ranks after the update at step 2")


TRAINED = {
    "efftrain/methods": {"s2vite": {"heads": 0.5, "neurons": 0.6, "update_every": "3st"}},
    "efftrain/model/kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "stops", "others"),
    [
        (0, [4], {}),
        (2, [6, 9], {}),
        (1, [7], {"efficienttrain": {"schedule": "et++"}}),
        (3, [5], {"efficienttrain": {"schedule": "et++"}}),
    ],
)
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(ranks, tmp_path, stage, stops, others):
    changes = {**TRAINED, "efftrain/methods": {**TRAINED["efftrain/methods"], **others}}
    for result in ranks(train_jobs.resume_run, str(tmp_path), stage, stops, changes):
        assert result["problems"] == []
        assert (len({side for _, side, _ in result["sides"]}) > 1) == bool(others)
