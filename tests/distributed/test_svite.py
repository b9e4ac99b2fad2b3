"""SViTE under ZeRO 0-3 on two gloo ranks: zeros and counts, ranks, accumulation, resume, overflow, other forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efftrain_ds.methods.svite.nm import violation
from tests.distributed import svite_jobs as jobs
from tests.distributed import train_jobs

pytestmark = pytest.mark.dist
STAGES = [0, 1, 2, 3]
EVERY2 = {"update_every": "2st"}
EVENTS = ["stage", "masks", "mask_update", "mask_update", "mask_update"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "dtype", "method"),
    [
        (3, "bf16", {}),
        (1, "fp32", {"moments": "dense"}),
        *(slow(stage, "fp32", {}) for stage in STAGES),
        *(slow(stage, "bf16", {}) for stage in (0, 1, 2)),
        *(slow(stage, "fp16", {}) for stage in (1, 2, 3)),
        *(slow(stage, "fp32", {"moments": "dense"}) for stage in (0, 2, 3)),
        slow(1, "bf16", {"rule": "svite_reference"}),
    ],
)
def test_zeros_and_counts_hold_in_every_step(ranks, stage, dtype, method):
    first, second = ranks(jobs.run_job, stage, dtype, {**EVERY2, **method})
    for result in (first, second):
        assert result["problems"] == []
        assert result["updates"] == 3
        assert result["events"] == EVENTS
        assert (result["warm"] > 0) == (method != {})
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 4
    assert first["scalars"] == second["scalars"]
    assert first["scalars"]["sparse/density"] == pytest.approx(55613 / 111232)
    assert 0.5 < first["scalars"]["sparse/explored"] < 1
    assert sum(first["counts"].values()) == 55613 - 640  # the classifier stays dense
    assert first["last"]["dropped"] == sum(row["dropped"] for row in first["last"]["layers"].values())
    counts = first["counts"]
    blocks = [sum(n for name, n in counts.items() if name.startswith(f"blocks.{i}.")) for i in range(2)]
    macs = 16 * counts["patch_embed.proj.weight"] + sum(17 * n + 2 * 17 * 17 * 64 for n in blocks) + 640
    assert first["last"]["macs"] == macs


@pytest.mark.parametrize(("stage", "gas"), [(2, 1), slow(0, 1), slow(1, 4), slow(3, 1), slow(3, 2)])
def test_masks_are_those_of_one_process(ranks, stage, gas):
    for result in ranks(jobs.reference_job, stage, gas):
        assert result["wrong"] == []
        assert result["updates"] == 20
        assert result["moved"] > 10_000
        assert result["error"] < 1e-3


@pytest.mark.slow
def test_accumulation_gives_the_same_masks(ranks):
    one, four = (ranks(jobs.run_job, 1, "fp32", EVERY2, 6, gas) for gas in (1, 4))
    assert one[0]["digests"] == four[0]["digests"]
    assert one[0]["problems"] == four[0]["problems"] == []
    means = [np.mean([result["losses"] for result in found], axis=0) for found in (one, four)]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "dtype", "method", "stop", "steps"),
    [
        (3, "fp32", {"end": 1.0}, 5, 9),
        *(slow(stage, "fp32", {"end": 1.0}, 11, 21) for stage in STAGES),
        *(slow(stage, "bf16", {"growth": "mixed"}, 5, 10) for stage in (1, 3)),
        slow(2, "fp32", {"form": "block", "block": 16, "density": 0.6}, 5, 10),
        slow(1, "fp32", {"form": "nm"}, 5, 10),
        slow(2, "fp32", {"rule": "granet", "density": 0.3, "start_density": 0.8}, 5, 10),
        slow(1, "fp32", {"rule": "topkast"}, 5, 10),
    ],
)
def test_a_resume_is_the_same_run(ranks, tmp_path, stage, dtype, method, stop, steps):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, dtype, {**EVERY2, **method}, stop, steps):
        for key in ("state", "masks", "union"):
            assert result[key] == [], key
        assert result["digest"]
        assert result["scalars"]
        assert result["other_start"]
        if method.get("rule") != "topkast":
            assert result["strays"] == {}
        whole = "end" in method or method.get("rule") == "topkast"
        assert result["updates"] == len(range(2, steps if whole else int(0.8 * steps), 2))


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp16"), slow(2, "fp16"), slow(3, "fp16"), slow(3, "fp32")])
def test_a_skipped_step_postpones_the_update(ranks, stage, dtype):
    for result in ranks(jobs.overflow_job, stage, dtype):
        assert [i for i, applied in enumerate(result["applied"]) if not applied] == [3, 6, 7]
        assert result["changed"] == [4, 8, 9]
        late, done = "mask_update_postponed", "mask_update"
        assert result["events"] == [(3, late), (4, done), (6, late), (7, late), (8, done), (9, done)]
        assert result["strays"] == []
        assert result["off"]


@pytest.mark.parametrize("stage", [1, slow(3)])
def test_the_average_has_the_zeros(ranks, stage):
    for result in ranks(jobs.average_job, stage):
        assert result["zeros"]
        assert result["alive"]
        assert result["differs"]
        assert result["gap"] < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        {"form": "block", "block": 16},
        {"form": "nm"},
        slow({"form": "nm", "two_way": True}),
        slow({"rule": "rigl"}),
        {"rule": "set"},
        slow({"rule": "itop"}),
        slow({"rule": "granet", "density": 0.3, "start_density": 0.8}),
        slow({"rule": "srigl"}),
        slow({"rule": "mest"}),
        slow({"growth": "mixed", "exclude_just_dropped": True}),
        slow({"growth": "random"}),
    ],
)
def test_other_forms_and_rules(ranks, method):
    first, second = ranks(jobs.form_job, 2, "fp32", method)
    assert first["digest"] == second["digest"]
    assert first["problems"] == second["problems"] == []
    assert first["moved"] > 5000
    assert first["updates"] in (3, 4)
    assert first["layers"] == second["layers"]
    assert first["needs_gradient"] == (method.get("rule") != "set" and method.get("growth") != "random")
    if method.get("rule") == "granet":
        assert first["densities"][0] == pytest.approx(0.8, abs=1e-3)
        assert first["densities"][-1] == pytest.approx(0.3, abs=1e-3)
        assert first["densities"] == sorted(first["densities"], reverse=True)
    else:
        assert all(counts == first["live"][0] for counts in first["live"])
    for mask in first["masks"].values():
        if method.get("form") == "nm":
            assert violation(torch.from_numpy(mask), two_way=method.get("two_way", False)) is None
        if method.get("form") == "block":
            tiles = mask.reshape(mask.shape[0] // 16, 16, mask.shape[1] // 16, 16).mean((1, 3))
            assert set(np.unique(tiles)) == {0.0, 1.0}
            assert tiles.any(0).all()
            assert tiles.any(1).all()


@pytest.mark.parametrize("stage", [slow(0), 2, slow(3)])
def test_top_kast(ranks, stage):
    for result in ranks(jobs.topkast_job, stage, "fp32"):
        assert result == {"problems": [], "updates": 2, "layers": 9}


@pytest.mark.parametrize(("stage", "how"), [slow(1, "wrap"), slow(2, "wrap"), slow(3, "rebuild"), slow(1, "rebuild")])
def test_engines_made_before_and_rebuilt_ones(ranks, stage, how):
    plain = ranks(jobs.run_job, stage, "fp32", EVERY2)[0]
    for result in ranks(jobs.embedded_job, stage, how):
        assert result["problems"] == []
        assert result["updates"] == 3
        assert result["digests"] == plain["digests"]


TRAINED = {
    "efftrain/methods": {"svite": {**EVERY2, "growth": "mixed"}},
    "efftrain/model/kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
}


@pytest.mark.parametrize(("stage", "stops"), [slow(1, [7]), slow(0, [4]), slow(2, [6, 9]), slow(3, [5])])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(ranks, tmp_path, stage, stops):
    for result in ranks(train_jobs.resume_run, str(tmp_path), stage, stops, TRAINED):
        assert result["problems"] == []
        assert result["steps"] == 20


@pytest.mark.slow
def test_beside_efficienttrain(ranks, tmp_path):
    changes = {**TRAINED, "efftrain/methods": {"svite": EVERY2, "efficienttrain": {"schedule": "et++"}}}
    for result in ranks(train_jobs.resume_run, str(tmp_path), 1, [6], changes):
        assert result["problems"] == []
        assert len({side for _, side, _ in result["sides"]}) > 1


def test_a_layer_that_does_not_fit_is_named_on_all_ranks(ranks):
    for text in ranks(jobs.bad_job, {"form": "block", "block": 16}, "odd"):
        assert text.startswith("ModelError: efftrain.methods.svite: blocks.0.attn.qkv.weight [180, 60]")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_hundred_updates_need_no_more_memory(ranks, stage):
    for result in ranks(jobs.many_job, stage, 200):
        assert result["updates"] == 200
        assert result["stray"] == []
        settled = result["resident"][50:]
        assert max(settled) <= 1.02 * min(settled), [r >> 20 for r in result["resident"][::20]]
        assert max(result["files"][50:]) == min(result["files"][50:])
