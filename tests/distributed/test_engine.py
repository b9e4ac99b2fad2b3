"""The engine proxy: events, registration from outside, embedding, wrap."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from tests.distributed import train_jobs as jobs

pytestmark = pytest.mark.dist
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_signature_is_deepspeeds():
    import deepspeed

    import efftrain_ds

    theirs = inspect.signature(deepspeed.initialize).parameters
    ours = inspect.signature(efftrain_ds.initialize).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [p.default for p in theirs.values()] == [ours[name].default for name in theirs]
    extra = [p for name, p in ours.items() if name not in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra)


def test_events_in_order(ranks, tmp_path):
    step = ["batch", "batch", "boundary", "end True"]
    for result in ranks(jobs.event_order, str(tmp_path)):
        expected = ["prepare", "stage 1", "start 0", *step, "start 1", *step]
        expected += ["stage 2", "start 2", *step, "eval in", "eval out", "start 3", *step]
        assert result["log"] == expected
        # evaluation is untouched; the prepared batch is not shifted twice
        assert result["seen"] == [1.0] * 6 + [0.0, 1.0, 1.0]
        assert result["loss"] == 1.0
        assert result["labels"] == [1.0] * 4
        assert result["loaded"] == [f"loaded {len(expected)} [1.0, 1.0]"]
        assert result["steps"] == 4


def test_proxy_forwards(ranks):
    for result in ranks(jobs.proxy_behaviour):
        assert result["micro"] == 4
        assert result["note"] == 5
        assert result["optimizer"]
        assert result["nothing"] == (None, None)
        assert result["plain"]
        assert result["module"] == "Linear"
        assert result["steps"] == [(0, 0), (1, 1), (1, 1), (2, 2)]
        assert "no_such_thing" in result["missing"]


def test_wrap(ranks):
    for result in ranks(jobs.wrap_job):
        assert result["log"] == ["prepare", "stage 1", "start 0", "batch", "boundary", "end True"]
        assert result["same"]
        assert result["refused"] == "wrap: grower changes parameters; use efftrain_ds.initialize instead"


def test_unchanged_loop_sees_the_curriculum(ranks):
    for result in ranks(jobs.crop_in_forward):
        sides = result["sides"]
        assert sides[-1] == 32
        assert sorted(set(sides[:-1])) == [12, 24, 32]
        assert sides[:-1] == sorted(sides[:-1])


def test_adopting_takes_two_lines():
    plain = (EXAMPLES / "train_plain.py").read_text().splitlines()
    adopted = (EXAMPLES / "train_adopted.py").read_text().splitlines()
    import difflib

    changed = [line for line in difflib.ndiff(plain, adopted) if line.startswith("+ ")]
    assert len(changed) == 2
    assert changed[0] == "+ import efftrain_ds"
    assert "efftrain_ds.initialize(" in changed[1]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        *((stage, "fp32") for stage in range(3)),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
        *(pytest.param(stage, "bf16", marks=[] if stage == 3 else pytest.mark.slow) for stage in range(4)),
    ],
)
def test_examples_run(ranks, stage, dtype):
    config = json.loads((EXAMPLES / "ds_config.json").read_text())
    config["zero_optimization"]["stage"] = stage
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    config["efftrain"]["run"]["steps"] = 10
    plain, schedule = ranks(jobs.run_example, str(EXAMPLES / "train_plain.py"), config, 10)[0]
    assert schedule is None
    adopted, schedule = ranks(jobs.run_example, str(EXAMPLES / "train_adopted.py"), config, 10)[0]
    assert schedule == 10
    assert len(plain) == len(adopted) == 10
    assert all(0 < loss < 4 for loss in plain + adopted)
    assert plain != adopted  # the adopted one sees small images
    config["efftrain"]["methods"] = {}
    without, _ = ranks(jobs.run_example, str(EXAMPLES / "train_adopted.py"), config, 10)[0]
    assert without == plain  # with no method it is DeepSpeed, to the digit
