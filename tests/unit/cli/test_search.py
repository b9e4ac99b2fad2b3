"""``efftrain search growth``: what is kept of a plan, the schedule it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from efftrain_ds.cli import main as cli
from efftrain_ds.config.loader import LoadedConfig, load_config
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.methods.autoprog.config import AutoProgConfig
from efftrain_ds.planning import make_plan
from efftrain_ds.train_search import check_searches, growth_schedule, only_searches, schedule_text

ROOT = Path(__file__).resolve().parents[3]
SEARCHED = ROOT / "ds_configs" / "smoke_autoprog_search_vit_fmnist.json"
MANUAL = ROOT / "ds_configs" / "smoke_autoprog_vit_fmnist.json"


def searched(**search: Any) -> LoadedConfig:
    changes = [f"efftrain.methods.autoprog.search.{key}={json.dumps(value)}" for key, value in search.items()]
    return load_config(SEARCHED, overrides=changes, world=2)


def test_searches_are_kept_whole_and_the_training_between_them_is_cut() -> None:
    plan = make_plan(searched(), world=2)
    cut = only_searches(plan)
    before = [s for s in plan.schedule.stages if s.settings.get("search")]
    *searches, stub = cut.schedule.stages
    assert [s.steps for s in searches] == [s.steps for s in before]
    assert [(s.p_start, s.p_end, dict(s.settings)) for s in searches] == [
        (s.p_start, s.p_end, dict(s.settings)) for s in before
    ]
    assert stub.steps == 1
    assert not stub.settings.get("search")
    assert stub.settings["growth"] == 2
    assert [s.index for s in cut.schedule.stages] == [0, 1, 2, 3]
    assert all(a.end_step == b.start_step for a, b in zip(cut.schedule.stages, cut.schedule.stages[1:], strict=False))
    assert cut.schedule.total_steps == sum(s.steps for s in before) + 1
    assert tuple(s.stage for s in cut.stages) == cut.schedule.stages
    assert sum(s.share for s in cut.stages) == pytest.approx(1)
    for stage in searches:  # the learning rate of the real run, not of a run of this length
        middle = (stage.start_step + stage.end_step) / 2
        assert cut.schedule.progress(middle) == pytest.approx((stage.p_start + stage.p_end) / 2)
    assert only_searches(cut).schedule == cut.schedule


def test_a_search_as_long_as_its_stage_is_followed_by_the_next_one() -> None:
    cut = only_searches(make_plan(searched(epochs=4), world=2))
    assert [bool(s.settings.get("search")) for s in cut.schedule.stages] == [True, True, True, False]
    assert cut.schedule.stages[-1].settings["growth"] == 3
    assert cut.schedule.stages[-1].steps == 1


def test_schedule_of_choices_is_a_valid_configuration_of_the_same_cost() -> None:
    config = searched()
    spec = make_plan(config, world=2).schedule.spec
    settings = check_searches(config)
    decided = {0: (3, 24), 1: (4, 24), 2: (4, 28)}
    rows = growth_schedule(settings, spec, decided)
    assert [(r["depth"], r["resolution"]) for r in rows] == [(3, 24), (4, 24), (4, 28), (6, 28)]
    assert [r["until"] for r in rows] == [0.25, 0.5, 0.75, 1.0]
    assert [r["magnitude"] for r in rows] == [4, 6, 7, 9]
    assert [r["drop_path"] for r in rows] == pytest.approx([0, 0.05 / 3, 0.1 / 3, 0.05], abs=1e-6)
    assert [r["erasing"] for r in rows] == [None] * 4  # the data section has none, so nothing changes it
    assert json.loads(schedule_text(rows)) == rows
    pasted = load_config(SEARCHED, overrides=[f"efftrain.methods.autoprog={json.dumps({'schedule': rows})}"], world=2)
    stages = make_plan(pasted, world=2).schedule.stages
    assert [(s.settings["depth"], s.settings["resolution"]) for s in stages] == [(3, 24), (4, 24), (4, 28), (6, 28)]
    assert stages[1].settings["drop_path"] == pytest.approx(0.05 / 3, abs=1e-6)


def test_dimensions_that_do_not_grow_are_full_or_left_alone() -> None:
    spec = make_plan(searched(), world=2).schedule.spec
    only_depth = AutoProgConfig(stages=2, resolution_start=None, magnitude_start=None, search={})
    rows = growth_schedule(only_depth, spec, {0: (3, 0)})
    assert [(r["depth"], r["resolution"], r["magnitude"]) for r in rows] == [(3, None, None), (6, None, None)]
    only_images = AutoProgConfig(stages=2, depth_start=None, drop_path_start=None, search={})
    rows = growth_schedule(only_images, spec, {0: (0, 16)})
    assert [(r["depth"], r["resolution"], r["drop_path"]) for r in rows] == [(6, 16, None), (6, 28, None)]


def test_stages_that_were_not_chosen_are_named() -> None:
    config = searched()
    with pytest.raises(ConfigError, match=r"stages \[1, 2\] were not chosen"):
        growth_schedule(check_searches(config), make_plan(config, world=2).schedule.spec, {0: (3, 24)})


@pytest.mark.parametrize("name", [MANUAL.name, "smoke_et_vit_fmnist.json"])
def test_nothing_to_search_is_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "growth", str(ROOT / "ds_configs" / name)]) == 2
    error = capsys.readouterr().err
    assert "efftrain.methods.autoprog.search" in error
    assert "no growth search" in error


def test_average_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "growth", str(SEARCHED), "--set", "efftrain.model.ema=null"]) == 2
    assert "efftrain.model.ema" in capsys.readouterr().err


def test_a_kind_of_search_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search"]) == 2
    assert cli.main(["search", "pruning", str(SEARCHED)]) == 2
    assert "growth" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_search_from_start_to_file(tmp_path: Path) -> None:
    target = tmp_path / "found" / "growth.json"
    changes = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 24,
        "efftrain.run.epochs": None,
        "efftrain.run.steps": 30,
        "efftrain.run.output": str(tmp_path / "run"),
        "efftrain.model.kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2},
        "efftrain.data.workers": 0,
        "efftrain.data.val": None,
        "efftrain.methods.autoprog": {"stages": 3, "search": {"epochs": 0.02, "probe_samples": 24, "cost": "macs"}},
    }
    command = [sys.executable, "-m", "efftrain_ds.cli.main", "search", "growth", str(SEARCHED), "--output", str(target)]
    for key, value in changes.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(target.read_text())
    AutoProgConfig.model_validate({"schedule": rows})
    assert len(rows) == 3
    assert rows[-1]["depth"] == 4
    assert rows[-1]["resolution"] == 28
    events = [json.loads(line) for line in (tmp_path / "run" / "search" / "journal.jsonl").read_text().splitlines()]
    tables = [e["table"] for e in events if e["event"] == "growth_search"]
    chosen = [(r["depth"], r["resolution"]) for table in tables for r in table if r["chosen"]]
    assert len(tables) == 2
    assert chosen == [(r["depth"], r["resolution"]) for r in rows[:-1]]
    assert [e["schedule"] for e in events if e["event"] == "search_end"] == [rows]
    assert not (tmp_path / "run" / "search" / "checkpoints").exists()
    assert done.stdout.count(schedule_text(rows)) == 1


CURRICULUM = ROOT / "ds_configs" / "smoke_curriculum_search_vit_fmnist.json"


def test_a_curriculum_search_shows_its_price_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    words = ["search", "curriculum", str(CURRICULUM), "--output", str(target), "--dry_run"]
    assert cli.main([*words, "--set", f"efftrain.run.output={tmp_path}/run"]) == 0
    shown = capsys.readouterr().out
    assert "3 stages of 12, 20, 28 px" in shown
    assert "5,101 images to train on, 899 held out" in shown
    assert "2.18 to 3.66 times the baseline" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ("efftrain.methods.efficienttrain.search=null", 2, "no search for a schedule"),
        ("efftrain.methods.efficienttrain.search.candidates=[10]", 3, "10 is not a multiple of the model's stride 4"),
        ("efftrain.methods.efficienttrain.search.max_epochs=7", 3, "search.max_epochs: the limit is 1.17 times"),
        ("efftrain.methods.efficienttrain.search.tolerance=0.5", 2, "tolerance"),
        ('efftrain.methods.efficienttrain.search.hold_out={"per_class":900}', 2, "nothing left to train on"),
        ("efftrain.run.epochs=0.05", 3, "optimizer steps"),
    ],
)
def test_a_curriculum_search_that_cannot_run(
    change: str, code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", change, "--set", f"efftrain.run.output={tmp_path}/run"]
    assert cli.main(["search", "curriculum", str(CURRICULUM), *changes]) == code
    assert text in capsys.readouterr().err
