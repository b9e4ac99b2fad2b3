"""Reading a run folder: sessions and history, curves, stages, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efftrain_ds.core.errors import ConfigError
from efftrain_ds.observe.journal import Journal
from efftrain_ds.observe.report import read_run
from efftrain_ds.observe.report.compare import numbers, reached, target
from efftrain_ds.observe.report.history import history, lost_steps, number, split_sessions
from efftrain_ds.observe.report.traces import Trace

STAGES = [
    {"index": 0, "start_step": 0, "steps": 40, "cost_macs": 400, "settings": {"bandwidth": 12}, "seconds": 4.0},
    {"index": 1, "start_step": 40, "steps": 60, "cost_macs": 1200, "settings": {"bandwidth": 28}, "seconds": 12.0},
]
PLAN = {"total_steps": 100, "batch": 8, "total_cost_macs": 1600, "relative_cost": 0.8, "seconds": 16.0}
PLAN |= {"stages": [{**s, "batch": 8, "micro_batch": 4, "accumulation": 1} for s in STAGES]}


def event(name: str, step: int, time: float, **data: Any) -> dict[str, Any]:
    return {"time": time, "step": step, "event": name, **data}


def write_run(folder: Path, events: list[dict[str, Any]], plan: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "plan.json").write_text(json.dumps(PLAN if plan is None else plan))
    (folder / "config.json").write_text(json.dumps({"efftrain": {"data": {"train": "shards/x"}}}))
    return folder


WHOLE = [
    event("start", 0, 100.0, argv=["launch/train.py"], world=2),
    event("stage", 0, 100.1, index=0, settings={"bandwidth": 12}, micro_batch=4, accumulation=1),
    event("log", 20, 102.0, loss=3.0, train_seconds=2.0),
    event("stage", 40, 104.0, index=1, settings={"bandwidth": 28}, micro_batch=4, accumulation=1, train_seconds=4.5),
    event("eval", 50, 106.0, train_seconds=6.5, top1=0.4, loss=2.0),
    event("log", 100, 117.0, loss="nan", train_seconds=16.5),
    event("eval", 100, 118.0, train_seconds=16.5, top1=0.7, ema_top1=0.72, loss=1.0),
    event("end", 100, 118.5, seconds=16.5, others={"eval": 1.5}),
]


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", WHOLE))
    assert (run.steps_done, run.total_steps, run.train_seconds) == (100, 100, 16.5)
    assert run.wall_seconds == pytest.approx(18.5)
    assert run.best == (0.72, 100, "ema_top1")
    assert run.cost_at(np.array([20.0, 70.0, 100.0])).tolist() == [200.0, 1000.0, 1600.0]
    assert run.seconds_at(np.array([10.0, 40.0])).tolist() == [1.0, 4.5]
    assert [(s.actual, s.exact, s.done) for s in run.stages] == [(4.5, True, 40), (12.0, True, 60)]
    assert run.stages[0].off == pytest.approx(0.125)
    assert run.traces["loss"].steps.tolist() == [20, 100]
    assert np.isnan(run.traces["loss"].values[1])
    assert run.traces["loss"].last == 3.0
    assert run.end is not None
    assert run.notes == []


def test_seconds_of_the_end_event_come_first(tmp_path: Path) -> None:
    closing = {**WHOLE[-1], "stages": [{"index": 0, "seconds": 5.0}, {"index": 1, "seconds": 11.5}]}
    run = read_run(write_run(tmp_path / "r", [*WHOLE[:-1], closing]))
    assert [s.actual for s in run.stages] == [5.0, 11.5]


def test_an_edge_between_two_times_is_found_by_cost(tmp_path: Path) -> None:
    events = [WHOLE[0], event("eval", 30, 1.0, train_seconds=3.0), event("eval", 50, 2.0, train_seconds=6.0)]
    first, second = read_run(write_run(tmp_path / "r", events)).stages
    # 10 steps of cost 10, then 10 of cost 20, in 3 seconds: the edge lies after 1 of them
    assert (first.actual, first.exact) == (pytest.approx(4.0), False)
    assert (second.actual, second.done) == (pytest.approx(2.0), 10)
    assert second.predicted_so_far == pytest.approx(2.0)


def test_only_the_last_account_of_a_step_counts(tmp_path: Path) -> None:
    events = [
        WHOLE[0],
        event("eval", 50, 110.0, top1=0.1),
        event("checkpoint", 50, 110.5, seconds=0.1),
        event("stage", 50, 110.6, index=1, settings={}),
        event("eval", 60, 112.0, top1=0.9),
        event("nonfinite", 61, 113.0, findings=[]),
        event("resume", 50, 200.0, checkpoint="step-00000050", world=1),
        event("stage", 50, 200.1, index=1, settings={"bandwidth": 99}),
        event("eval", 60, 212.0, top1=0.2),
        event("preempted", 70, 220.0, seconds=1.0),
        event("resume", 70, 300.0),
        event("eval", 80, 310.0, top1=0.3),
    ]
    run = read_run(write_run(tmp_path / "r", events))
    assert [(e["step"], e["top1"]) for e in run.evaluations] == [(50, 0.1), (60, 0.2), (80, 0.3)]
    assert [e["settings"] for e in run.named("stage")] == [{"bandwidth": 99}]
    assert [s.outcome for s in run.sessions] == ["", "preempted, state saved", ""]
    assert [lost_steps(run.sessions, i) for i in range(3)] == [11, 0, 0]
    assert [(i, e["step"]) for i, e in run.all_named("nonfinite")] == [(0, 61)]  # faults are told, repeated or not
    assert run.end is None
    assert run.wall_seconds == pytest.approx(13.0 + 20.0 + 10.0)


def test_a_fresh_start_in_the_same_folder_forgets_what_was_before() -> None:
    events = [*WHOLE, event("start", 0, 500.0), event("eval", 10, 510.0, top1=0.3)]
    sessions = split_sessions(events)
    assert [(e["event"], e["step"]) for e in history(sessions)] == [("eval", 10)]
    assert lost_steps(sessions, 0) == 100


def test_tensorboard_fills_in_what_the_journal_lacks(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    folder = write_run(
        tmp_path / "r",
        [event("start", 0, 100.0), event("log", 30, 130.0, loss=30.0), event("resume", 20, 200.0)],
    )
    writer = SummaryWriter(str(folder / "tensorboard"))
    for step, wall in ((10, 110.0), (20, 120.0), (30, 130.0), (40, 140.0)):
        writer.add_scalar("loss/train", step, step, walltime=wall)
        writer.add_scalar("speed/data_pct", 5.0, step, walltime=wall)
    writer.close()
    writer = SummaryWriter(str(folder / "tensorboard"), filename_suffix=".2")
    writer.add_scalar("loss/train", 300.0, 30, walltime=230.0)
    writer.close()
    run = read_run(folder)
    # step 20 was logged before the checkpoint of step 20, steps 30 and 40 of the first session were lost
    assert run.traces["loss"].steps.tolist() == [10, 20, 30]
    assert run.traces["loss"].values.tolist() == [10.0, 20.0, 300.0]
    assert run.traces["data_share"].values == pytest.approx([0.05, 0.05])
    (folder / "tensorboard" / "events.out.tfevents.9").write_bytes(b"torn" * 5)
    assert read_run(folder).traces["loss"].steps.tolist() == [10, 20, 30]


def test_a_damaged_folder_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", WHOLE[:-1])
    with (folder / "journal.jsonl").open("a") as file:
        file.write('[1, 2]\n"text"\n{"event": ["x"]}\n{"event": "eval", "step": null}\n{"time": "x"}\n')
        file.write('{"time": 1, "step": 100, "event": "ev')
    (folder / "plan.json").write_text('{"stages": [')
    (folder / "config.json").unlink()
    run = read_run(folder)
    assert len(run.evaluations) == 2
    assert run.stages == []
    assert run.cost_done is None
    assert [note.split()[0] for note in run.notes] == ["plan.json", "config.json"]


@pytest.mark.parametrize("stages", [None, 3, [7], [{"start_step": "x", "steps": 1, "cost_macs": 1}]])
def test_a_plan_of_another_form(tmp_path: Path, stages: Any) -> None:
    run = read_run(write_run(tmp_path / "r", WHOLE, {**PLAN, "stages": stages}))
    assert run.stages == []
    assert run.cost_at(np.array([1.0])) is None


def test_a_folder_that_is_no_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
    write_run(tmp_path / "inner", WHOLE)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        read_run(tmp_path)
    text = str(caught.value)
    assert "journal.jsonl (missing), plan.json (found), config.json (missing)" in text
    assert str(tmp_path / "inner") in text
    Journal(tmp_path / "empty" / "journal.jsonl").close()
    with pytest.raises(ConfigError, match="at least one event"):
        read_run(tmp_path / "empty")


def test_numbers_side_by_side(tmp_path: Path) -> None:
    slow = [
        *WHOLE[:4],
        event("eval", 100, 300.0, train_seconds=40.0, top1=0.41),
        event("end", 100, 301.0, seconds=40.0),
    ]
    runs = [read_run(write_run(tmp_path / "a", WHOLE)), read_run(write_run(tmp_path / "b", slow))]
    level = target(runs)
    assert level == 0.41
    assert [reached(r, level) for r in runs] == [100, 100]
    assert reached(runs[1], 0.42) is None
    assert reached(runs[0], 0.4) == 50
    found = numbers(runs[0], 0.4)
    assert (found.images, found.cost_macs, found.final_top1) == (800, 1600.0, 0.7)
    assert (found.target_cost_macs, found.target_seconds) == (600.0, 6.5)
    assert target([runs[0], read_run(write_run(tmp_path / "c", WHOLE[:3]))]) is None


def test_pieces() -> None:
    assert [number(v) for v in (1, "2.5", True, None, [], "x")] == [1.0, 2.5, None, None, None, None]
    assert number("inf") == float("inf")
    thin = Trace([(i, float(i)) for i in range(1000)]).thinned(10)
    assert len(thin) == 10
    assert thin.values.mean() == pytest.approx(499.5)
    assert Trace([(5, 1.0), (3, 2.0), (5, 4.0)]).values.tolist() == [2.0, 4.0]
    assert Trace([(1, float("nan"))]).median() is None
