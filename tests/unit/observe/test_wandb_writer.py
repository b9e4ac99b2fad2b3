"""The W&B writer, against a module of the same interface; W&B itself is optional."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efftrain_ds.config.sections import ObserveConfig
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.observe.wandb import Boards, WandB
from tests.secret_values import VALUES, seen


class FakeRun:
    url = "https://example.org/run"

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self.broken = False

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics.append((name, options))

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise OSError("no space left")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.runs, module.asked = [], []
    module.Image = lambda data: ("image", getattr(data, "shape", None))
    module.Html = lambda text: ("html", text)

    def init(**options: Any) -> FakeRun:
        module.asked.append(options)
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_everything_is_logged_over_the_optimizer_step(wandb: Any, tmp_path: Path) -> None:
    board = WandB(tmp_path / "run", project="p", mode="offline", config={"a": 1})
    assert board.enabled
    board.scalars({"loss/train": np.float32(4.5)}, 10)
    board.image("batch", np.zeros((4, 6, 3), np.uint8), 10)
    board.text("plan", "stage <1>", 0)
    board.flush()
    assert board.command == f"wandb sync {tmp_path / 'run' / 'wandb' / 'offline-run-*'}"
    board.close()
    board.scalars({"loss/train": 1.0}, 11)  # after close: nothing
    run, asked = wandb.runs[0], wandb.asked[0]
    assert run.logged == [
        {"step": 10, "loss/train": 4.5},
        {"step": 10, "batch": ("image", (4, 6, 3))},
        {"step": 0, "plan": ("html", "<pre>stage &lt;1&gt;</pre>")},
    ]
    assert run.metrics == [("step", {}), ("*", {"step_metric": "step"})]
    assert run.finished
    assert not board.enabled
    assert (asked["project"], asked["mode"], asked["name"], asked["config"]) == ("p", "offline", "run", {"a": 1})


@pytest.mark.parametrize("name", VALUES)
def test_nothing_secret_is_sent(wandb: Any, tmp_path: Path, name: str) -> None:
    board = WandB(tmp_path, project="p", config={"efftrain": {"data": {"train": VALUES[name]}}})
    board.text("config", json.dumps({"train": VALUES[name]}, indent=1))
    assert len(wandb.runs[0].logged) == 1
    assert not seen([wandb.asked[0]["config"], wandb.runs[0].logged])


def test_a_resume_goes_on_with_the_same_run(wandb: Any, tmp_path: Path) -> None:
    for resumed in (False, True, False):
        WandB(tmp_path, project="p", resumed=resumed).close()
    first, second, third = (asked["id"] for asked in wandb.asked)
    assert first == second != third
    (tmp_path / "wandb.json").write_text("{")
    WandB(tmp_path, project="p", resumed=True)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == wandb.asked[-1]["id"]


def test_other_ranks_write_nothing(wandb: Any, tmp_path: Path) -> None:
    board = WandB(tmp_path / "run", project="p", rank=1)
    board.scalars({"x": 1.0}, 0)
    board.close()
    assert wandb.asked == []
    assert not board.enabled
    assert not (tmp_path / "run").exists()


def test_a_failure_ends_the_writing_and_not_the_run(wandb: Any, tmp_path: Path) -> None:
    board = WandB(tmp_path, project="p")
    assert board.command == FakeRun.url
    wandb.runs[0].broken = True
    board.scalars({"x": 1.0}, 0)
    assert not board.enabled
    board.scalars({"x": 1.0}, 1)
    board.close()


def test_missing_package_and_refused_project(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError("not logged in")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r'observe\.wandb: cannot open a run of project "p".*not logged in.*offline'):
        WandB(tmp_path, project="p")
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for rank in (0, 1):  # on all ranks, or the others would wait for the one that ended
        with pytest.raises(ConfigError, match=r'"wandb" is not installed; pip install "efftrain-ds\[wandb\]"'):
            WandB(tmp_path, project="p", rank=rank)


def test_several_boards_behind_one(wandb: Any, tmp_path: Path) -> None:
    from efftrain_ds.observe.tensorboard import TensorBoard

    boards = Boards([TensorBoard(tmp_path / "tb", enabled=False), WandB(tmp_path, project="p", mode="offline")])
    assert boards.enabled
    assert boards.command.startswith("wandb sync ")
    boards.scalars({"x": 1.0}, 3)
    boards.text("t", "t", fixed=False)
    boards.image("i", np.zeros((1, 1, 3), np.uint8), 3)
    boards.figure("f", object(), 3)
    boards.flush()
    boards.close()
    assert [sorted(v) for v in wandb.runs[0].logged] == [["step", "x"], ["step", "t"], ["i", "step"], ["f", "step"]]
    assert not boards.enabled


def test_the_key_of_the_configuration() -> None:
    assert ObserveConfig().wandb is None
    found = ObserveConfig.model_validate({"wandb": {"project": "p", "mode": "offline"}}).wandb
    assert found is not None
    assert (found.project, found.entity, found.mode) == ("p", None, "offline")
    for wrong in ({}, {"project": ""}, {"project": "p", "mode": "no"}, {"project": "p", "key": "x"}):
        with pytest.raises(ValueError):
            ObserveConfig.model_validate({"wandb": wrong})
