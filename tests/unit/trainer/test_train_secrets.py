"""Secrets in the configuration are in nothing that a run shows or writes."""

from __future__ import annotations

import dataclasses
import io
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efftrain_ds.cli.main import main as cli
from efftrain_ds.core.errors import CheckpointError, ShardError
from efftrain_ds.core.timeline import PlanSpec, Segment, Timeline, merge_timelines
from efftrain_ds.doctor.storage import shards
from efftrain_ds.observe.console import Console, StartInfo, start_block
from efftrain_ds.observe.report.run import read_run
from efftrain_ds.train_changes import Change, check, compare
from efftrain_ds.train_logs import RunLogs
from tests.secret_values import VALUES, seen

ROOT = Path(__file__).resolve().parents[3]
SMOKE = ROOT / "ds_configs" / "smoke_et_vit_fmnist.json"

everything = pytest.mark.parametrize("name", VALUES)


@everything
def test_files_of_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = VALUES[name]
    document = {"efftrain": {"data": {"train": value, "val": value}}}
    config = SimpleNamespace(
        efftrain=SimpleNamespace(
            run=SimpleNamespace(output=str(tmp_path)), observe=SimpleNamespace(tensorboard=True, wandb=None)
        ),
        resolved=lambda: document,
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--set", f"efftrain.data.train={value}"])
    monkeypatch.setattr("efftrain_ds.train_logs.environment", dict)
    logs = RunLogs(config, rank=0, world=1, write=True, train_seconds=lambda: 1.0)  # type: ignore[arg-type]
    plan: Any = SimpleNamespace(to_dict=lambda: {"source": value})
    change = str(Change("efftrain.data.train", value, value + "x"))
    logs.open(plan, step=3, resumed="step-00000003", changes=[change])
    logs.write_plan(plan)
    logs.record("checkpoint_failed", step=4, error=value.splitlines()[0] + ": gone")
    logs.record("nonfinite", step=4, findings=[{"where": value}])
    logs.close()
    assert logs.board is not None
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name.split(".")[0] for path in written} == {"config", "plan", "journal", "events"}
    for path in written:
        assert not seen(path.read_bytes().decode(errors="replace")), path
    kept = json.loads((tmp_path / "config.json").read_text())["efftrain"]["data"]["train"]
    assert kept.partition(":")[0] == value.partition(":")[0]


@everything
def test_screen(name: str) -> None:
    value = VALUES[name]
    fields = {field.name: 1 for field in dataclasses.fields(StartInfo)}
    info = StartInfo(**{**fields, "data": value, "methods": [], "plan": [], "output": "runs/a"})  # type: ignore[arg-type]
    stream = io.StringIO()
    console = Console(stream=stream)
    console.write(start_block(info))
    console.write(f"changed since the checkpoint  {Change('efftrain.data.train', value, value + 'x')}")
    console.write(f"checkpoint not saved, the run goes on: {value.splitlines()[0]}")
    assert not seen(stream.getvalue())
    assert ": 1 samples, 1 held out, batch 1\n" in stream.getvalue()  # what follows a command is still there


def schedule() -> Any:
    spec = PlanSpec(seed=0, epochs=10, samples=1000, batch=10, micro_batch=10, world=1, resolution=32, stride=4)
    return merge_timelines([Timeline((Segment(0.0, 1.0, {}),))], spec)


@everything
def test_a_new_token_is_no_change_and_another_place_is(name: str) -> None:
    value = VALUES[name]
    old: dict[str, Any] = {"efftrain": {"data": {"train": value}, "run": {"seed": 0}}}
    same = {
        "efftrain": {"data": {"train": value.replace("SECRET", "new").replace("hunter", "new")}, "run": {"seed": 0}}
    }
    rest = {"past": None, "schedule": schedule(), "step": 3}
    assert compare(old, same, **rest) == []
    moved = {"efftrain": {"data": {"train": "https://ann:hunter2@elsewhere/x?sig=SECRET"}, "run": {"seed": value}}}
    found = compare(old, moved, **rest)
    assert [change.key for change in found] == ["efftrain.data.train", "efftrain.run.seed"]
    assert "https://elsewhere/x" in str(found[0])
    with pytest.raises(CheckpointError) as error:
        check(found, "runs/a")
    assert not seen([*map(str, found), error.value])


@everything
def test_an_old_journal_is_shown_without(name: str, tmp_path: Path) -> None:
    value = VALUES[name]
    event = {"event": "start", "step": 0, "argv": ["train.py", "--set", f"efftrain.data.train={value}"], "said": value}
    (tmp_path / "journal.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"efftrain": {"data": {"train": value}}}))
    run = read_run(tmp_path)
    assert not seen([run.sessions, run.events, run.config])


@everything
def test_doctor(name: str) -> None:
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(efftrain=SimpleNamespace(data=SimpleNamespace(train=VALUES[name], val=None)))
    )
    assert not seen(list(shards(setup)))


@everything
def test_a_wrong_configuration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--set", f"efftrain.data.train={json.dumps(VALUES[name])}", "--set", "efftrain.data.workers=-1"]
    for more in ([], ["--json"]):
        assert cli(["validate", str(SMOKE), *wrong, *more]) == 2
        out, err = capsys.readouterr()
        assert "efftrain.data.workers" in out + err
        assert not seen(out + err)


@everything
@pytest.mark.parametrize("kind", [RuntimeError, ShardError])
def test_the_end_of_a_failed_run(
    name: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = VALUES[name]

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise kind(f"no data at {value.splitlines()[0]}")

    monkeypatch.setattr("efftrain_ds.trainer.Trainer", Trainer)
    where = [f"efftrain.data.train={json.dumps(value)}", f"efftrain.run.output={tmp_path}"]
    argv = ["train.py", "--ds_config", str(SMOKE), *(word for key in where for word in ("--set", key))]
    monkeypatch.setattr(sys, "argv", argv)
    code = runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="launched")["main"]()
    assert code == (1 if kind is RuntimeError else 2)
    said = capsys.readouterr().err
    assert "no data at " in said
    crash = tmp_path / "crash.rank0.txt"
    assert crash.exists() == (kind is RuntimeError)
    assert not seen(said + (crash.read_text() if crash.exists() else ""))
