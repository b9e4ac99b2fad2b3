"""What a run writes beside its checkpoints: on a full disk, in a folder that is gone, when the clock jumps."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from efftrain_ds.data.quarantine import BadSample, Quarantine
from efftrain_ds.observe import journal as journals
from efftrain_ds.observe import tensorboard as boards
from efftrain_ds.observe.console import Console
from efftrain_ds.observe.journal import Journal, read_journal
from efftrain_ds.observe.meters import Chrono, StepMeter
from efftrain_ds.observe.report.run import read_run
from efftrain_ds.observe.tensorboard import TensorBoard
from efftrain_ds.train_logs import RunLogs


class Disk:
    """`FileIO` on a disk with so many bytes of room."""

    def __init__(self) -> None:
        self.room = 10**9
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if disk.room <= 0:
                    raise OSError(28, "No space left on device")
                written = super().write(bytes(data)[: disk.room])
                disk.room -= written
                return written

        self.File = File


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    for module in (boards, journals):
        monkeypatch.setattr(module, "FileIO", found.File)
    monkeypatch.setattr(boards, "RETRY_S", 0.0)
    return found


def curve(folder: Path, tag: str = "x") -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(tag)]


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def test_curves_go_on_when_there_is_room_again(disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = TensorBoard(tmp_path, purge_step=0)
    board.scalars({"x": 0.0}, 0)
    board.flush()
    disk.room = 20  # half of a record
    for step in range(1, 20):
        board.scalars({"x": float(step)}, step)
        board.image("picture", np.zeros((4, 4, 3), np.uint8), step)
        board.flush()
    assert caplog.text.count("TensorBoard files cannot be written, the run goes on without: [Errno 28]") == 1
    disk.room = 10**9
    board.scalars({"x": 20.0}, 20)
    board.close()
    assert "TensorBoard files can be written again; lost: 38" in caplog.text
    assert curve(tmp_path) == [(0, 0.0), (20, 20.0)]
    assert len(list(tmp_path.iterdir())) == 2  # none of the tries in between has left a file
    assert not board.enabled


def test_a_disk_that_stays_full_stops_neither_a_step_nor_the_end(disk: Disk, tmp_path: Path) -> None:
    disk.room = 0
    board = TensorBoard(tmp_path)
    board.scalars({"x": 0.0}, 0)
    board.text("plan", "text")
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_becomes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(boards, "RETRY_S", 3600.0)  # tried again after that only
    (tmp_path / "tb").write_text("")
    board = TensorBoard(tmp_path / "tb")
    for step in range(3):
        board.scalars({"x": 0.0}, step)
    board.flush()
    (tmp_path / "tb").unlink()
    board.scalars({"x": 0.0}, 3)
    board.close()
    assert not (tmp_path / "tb").exists()
    assert len(caplog.records) == 1


def test_a_full_queue_loses_values_and_never_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    free, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(boards, "WAITING", 8)
    monkeypatch.setattr(boards, "PATIENCE_S", 0.01)
    monkeypatch.setattr(boards, "CLOSE_S", 0.05)

    class Hanging(io.FileIO):
        def write(self, data: Any) -> int:
            begun.set()
            assert free.wait(30)
            return super().write(data)

    monkeypatch.setattr(boards, "FileIO", Hanging)
    board = TensorBoard(tmp_path / "slow")
    for step in range(100):
        board.scalars({"x": 0.0}, step)
    assert begun.wait(30)
    board.flush()
    assert caplog.text.count("values cannot be written, the run goes on without: the disk is too slow, 8 wait") == 1
    thread = board._thread
    board.close()  # does not wait for ever either
    assert "not done after 0.05 s" in caplog.text or not thread.is_alive()
    free.set()

    monkeypatch.setattr(boards, "CLOSE_S", 30.0)
    board = TensorBoard(tmp_path / "fast")
    for step in range(100):
        board.scalars({"x": float(step)}, step)
    board.close()
    assert len(curve(tmp_path / "fast")) == 100


def test_files_stay_in_order_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    for hours, purge in ((0, None), (7, 3), (-9, 5)):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        board = TensorBoard(tmp_path, purge_step=purge)
        for step in range(purge or 0, 8):
            board.scalars({"x": float(step + 100 * hours)}, step)
        board.close()
    assert curve(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 703), (4, 704), (5, -895), (6, -894), (7, -893)]


# -- the others -------------------------------------------------------------------------------------------------------


def test_events_wait_for_room(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(journals, "KEPT", 3)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", step=0)
    disk.room = 30  # half of a line
    for step in range(1, 6):
        journal.write("log", step=step)
    assert [e["step"] for e in read_journal(journal.path)] == [0]
    assert journal.path.read_bytes().endswith(b"\n")  # and nothing of the half
    disk.room = 10**9
    journal.write("end", step=6)
    assert [e["step"] for e in read_journal(journal.path)] == [0, 3, 4, 5, 6]
    assert caplog.text.count("events cannot be written") == 1
    assert "events can be written again; lost: 2" in caplog.text
    disk.room = 0
    journal.write("late", step=7)
    disk.room = 10**9
    journal.close()
    assert [e["event"] for e in read_journal(journal.path)][-1] == "late"


def test_the_ledger_costs_its_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    bad = BadSample("decode", "a.tar", 1, 2, 3, "d", "broken")
    ledger = Quarantine(tmp_path / "out" / "quarantine.jsonl", 0.5, 1000)
    (tmp_path / "out").write_text("")  # no folder can be made there
    ledger.update(2, [bad], 0)
    ledger.update(2, [bad], 0)
    assert caplog.text.count("bad samples cannot be written") == 1
    (tmp_path / "out").unlink()
    real = Quarantine.update.__globals__["os"].write
    monkeypatch.setattr("os.write", lambda descriptor, data: real(descriptor, data[:20]))
    ledger.update(2, [bad], 0)  # written in part
    monkeypatch.undo()
    ledger.update(2, [bad], 0)
    assert ledger.counts == {"decode": 4}
    last = ledger.path.read_text().splitlines()[-1]  # type: ignore[union-attr]
    assert json.loads(last)["shard"] == "a.tar"


def test_a_terminal_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = Console(stream=Gone())
    console.write("a")
    console.write("b")
    assert caplog.text.count("standard output: lines cannot be written, the run goes on without") == 1


def test_a_run_folder_that_cannot_be_written_any_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "run"
    config = SimpleNamespace(
        efftrain=SimpleNamespace(
            run=SimpleNamespace(output=str(output)), observe=SimpleNamespace(tensorboard=True, wandb=None)
        ),
        resolved=lambda: {"a": 1},
    )
    logs = RunLogs(config, rank=0, world=1, write=True, train_seconds=lambda: 1.0)  # type: ignore[arg-type]
    plan: Any = SimpleNamespace(to_dict=lambda: {"stages": [1]})
    logs.open(plan, step=0, resumed=None, changes=[])
    assert logs.board is not None
    logs.board.flush()
    output.rename(tmp_path / "away")
    output.write_text("")  # as good as a folder without write permission, for root too

    def everything(step: int) -> None:
        logs.write_plan(plan)
        logs.record("rebuild", step=step, seconds=1.0, parameters=[1, 2])
        logs.scalars({"loss/train": 1.0}, step)
        logs.picture("batch", np.zeros((4, 4, 3), np.uint8), step)

    everything(1)
    everything(2)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len({text.partition(":")[0] for text in told}) == 2, told  # plan.json and a picture, once each
    output.unlink()
    (tmp_path / "away").rename(output)
    everything(3)
    logs.close()
    assert [e["step"] for e in read_journal(output / "journal.jsonl") if e["event"] == "rebuild"] == [1, 2, 3]
    assert [p.name for p in (output / "pictures").iterdir()] == ["batch-step-00000003.png"]
    assert curve(output / "tensorboard", "loss/train")[-1] == (3, 1.0)


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_durations_do_not_come_from_the_clock_of_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jump = time.time, {"hours": 0.0}
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * jump["hours"])
    chrono, meter, journal = Chrono(), StepMeter(), Journal(tmp_path / "journal.jsonl")
    journal.write("start", step=0)
    for step, hours in enumerate((0.0, 5.0, -7.0, 2.0), 1):
        chrono.switch("train")
        meter.begin()
        with meter.part("data"):
            jump["hours"] = hours
        assert 0 <= meter.end(0, 8) < 60
        journal.write("log", step=step, loss=1.0, train_seconds=meter.stage_seconds[0])
    chrono.switch(None)
    journal.write("end", step=4, seconds=meter.stage_seconds[0])
    journal.close()
    assert 0 <= chrono.seconds["train"] < 60
    run = read_run(tmp_path)
    assert run.steps_done == 4
    assert run.wall_seconds >= 0
    assert list(run.traces["loss"].steps) == [1, 2, 3, 4]


def test_who_asks_the_clock_of_the_day() -> None:
    """Names, stamps and the skew between hosts; every duration and time limit is monotonic."""
    package = Path(journals.__file__).parents[1]
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if "time.time" in p.read_text()}
    assert found == {"doctor/comm.py", "observe/journal.py", "observe/report/page.py", "observe/tensorboard.py"}
