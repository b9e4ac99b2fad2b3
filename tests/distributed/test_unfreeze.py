"""Staged unfreezing under ZeRO 0-3 on two gloo ranks."""

from __future__ import annotations

import pytest

from tests.distributed import unfreeze_jobs as jobs

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("stage", "dtype", "order"),
    [
        pytest.param(0, "fp32", "interleaved", marks=pytest.mark.slow),
        (1, "fp32", "interleaved"),
        pytest.param(2, "fp32", "suffix", marks=pytest.mark.slow),
        pytest.param(3, "fp32", "interleaved", marks=pytest.mark.slow),
        pytest.param(1, "bf16", "interleaved", marks=pytest.mark.slow),
        pytest.param(3, "fp32", "suffix", marks=pytest.mark.slow),
    ],
)
def test_only_what_is_unfrozen_trains(ranks, stage, dtype, order):
    levels = {"interleaved": [[0, 3], [0, 1, 3, 4]], "suffix": [[4, 5], [2, 3, 4, 5]]}[order]
    levels.append(list(range(jobs.BLOCKS)))
    for rows in ranks(jobs.stages_job, stage, dtype, {**jobs.MANUAL, "order": order}):
        assert [row["blocks"] for row in rows] == levels
        for row in rows:
            assert row["others"]
            assert row["masters_for_trainable"]
            assert row["frozen_moved"] == row["drifted"] == []
            assert row["finite"]
            assert row["still"] == []
        sizes = [row["flat_numel"] for row in rows]
        assert sizes[0] < sizes[1] < sizes[2]
        for row, old in zip(rows[1:], levels, strict=False):
            assert row["lost"] == row["changed"] == []
            assert row["carried"] == old
            assert row["new"] == sorted(set(row["blocks"]) - set(old))
            assert row["new_moments"] == 0
            assert row["new_masters"] == []
        assert sorted(rows[1]["groups"]) == ["decay", "decay@2", "no_decay", "no_decay@2"]
        assert sorted(rows[2]["groups"]) == sorted([*rows[1]["groups"], "decay@4", "no_decay@4"])
        assert rows[2]["steps"]["decay"] == 4
        assert rows[2]["steps"]["decay@2"] == 2
        assert not rows[2]["steps"]["decay@4"]
        assert rows[0]["sides"] == [16, 16, 24, 24, 32, 32]
        assert rows[0]["history"] == [(2, "unfreezing level 1 -> 2 of 3"), (4, "unfreezing level 2 -> 3 of 3")]


@pytest.mark.parametrize(
    ("stage", "at", "world"),
    [
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in ((0, 4, 2), (2, 3, 2), (3, 4, 2))),
        *((1, 4, 1), (3, 5, 1)),
    ],
)
def test_resume_repeats_the_uninterrupted_run(ranks, tmp_path, stage, at, world):
    for result in ranks(jobs.resume_job, str(tmp_path), stage, "fp32", jobs.MANUAL, at, world=world):
        assert result["level"] == {"level": 2 if at <= 4 else 3}
        assert result["losses"]
        assert result["state"] == []
        assert result["weights"] == []
        assert result["history"] == [2, 4]


@pytest.fixture(scope="module")
def searched(ranks):
    return {key: ranks(jobs.search_job, *key) for key in [(0, "fp32"), (3, "fp32"), (2, "bf16")]}


def test_search_decides_alike_and_changes_nothing(searched):
    for results in searched.values():
        first = results[0]
        assert all(result["decided"] == first["decided"] for result in results)
        assert all(result["tables"] == first["tables"] for result in results)
        for result in results:
            assert result["untouched"] == [True] * 3
            assert result["final"] == {"level": 3}
            assert result["trainable"] == list(range(jobs.BLOCKS))
            assert [k for k, *_ in result["decided"]] == [0, 1]
            (_, level0, side0), (_, level1, side1) = result["decided"]
            assert (level0, side0) in {(1, 16), (2, 16), (1, 24), (2, 24)}
            assert level0 <= level1 <= level0 + 1
            assert side0 <= side1 <= 32
            assert result["sides"][:2] == [side0] * 2
            assert result["described"] == f"u{level1} R{side1}"


def test_search_is_recorded(searched):
    for result, *_ in searched.values():
        assert len(result["tables"]) == 2
        for table, (_, level, side) in zip(result["tables"], result["decided"], strict=True):
            chosen = [row for row in table if row["chosen"]]
            assert [(row["level"], row["resolution"]) for row in chosen] == [(level, side)]
            assert chosen[0]["votes"] == min(row["votes"] for row in table)
            assert all(row["seconds"] > 0 and row["ntk"] <= -1 for row in table)
        assert [(row["level"], row["resolution"]) for row in result["tables"][0]] == [
            (1, 16),
            (2, 16),
            (1, 24),
            (2, 24),
        ]
        assert result["lines"][0][0].startswith("unfreezing search, stage 0: 4 candidates")
        assert len(result["lines"][0]) == 6
        assert sum("<- chosen" in line for line in result["lines"][0]) == 1


def test_scores_are_those_of_the_whole_weights_at_any_stage(searched):
    plain, sharded = searched[0, "fp32"][0]["tables"][0], searched[3, "fp32"][0]["tables"][0]
    for a, b in zip(plain, sharded, strict=True):
        assert a["ntk"] == pytest.approx(b["ntk"], rel=1e-3)
        assert a["zico"] == pytest.approx(b["zico"], rel=1e-4)
    # more trainable layers give a larger ZiCo
    assert plain[1]["zico"] > plain[0]["zico"]


@pytest.mark.parametrize("at", [1, 3])
def test_resume_keeps_the_choice(ranks, tmp_path, at):
    for result in ranks(jobs.search_resume_job, str(tmp_path), at):
        assert result == {"losses": True, "kept": True}


def test_search_refusals(ranks):
    for missing, empty, broken in ranks(jobs.search_refusals_job):
        assert "efftrain.methods.autoprog_zero.search" in missing
        assert "launch/train.py" in missing
        assert "none of the samples to measure on is valid" in empty
        assert "the disk is gone" in broken
        assert "rank 1 of 2" in broken
