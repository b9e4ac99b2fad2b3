"""A curriculum search before its first training, gone on with, and at its end; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efftrain_ds import train_curriculum
from efftrain_ds.checkpoint.survey import FOLDER
from efftrain_ds.config.loader import check_config, load_config
from efftrain_ds.core.errors import CheckpointError, ConfigError, PlanError
from efftrain_ds.methods.efficienttrain.search import Outcome
from efftrain_ds.train_curriculum import BASELINE, RESULT, STATE, TRIALS, CurriculumRun, check_curriculum_search

ROOT = Path(__file__).resolve().parents[3]
METHOD = "efftrain.methods.efficienttrain"
SEARCH = {"candidates": [12, 20], "stages": 2, "hold_out": {"per_class": 5, "train_share": 0.1}}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a search in one process that joins no group."""

    def make(*changes: str, world: int = 1, **search: Any) -> CurriculumRun:
        monkeypatch.setattr(train_curriculum, "start_processes", lambda config: (0, world, None))
        file = ROOT / "ds_configs" / "smoke_curriculum_search_vit_fmnist.json"
        overrides = [f"{METHOD}.search={json.dumps({**SEARCH, **search})}", f"efftrain.run.output={tmp_path}", *changes]
        return CurriculumRun(load_config(file, overrides=overrides, world=world))

    return make


def begun(run: CurriculumRun) -> CurriculumRun:
    """With the baseline's result in its folder."""
    run._open_journal(0)
    trial = run.search.ask()
    assert trial is not None
    run.search.tell(trial.name, 0.5)
    run._told(trial)
    return run


@pytest.mark.parametrize(
    ("changes", "search", "kind", "text"),
    [
        ([f"{METHOD}.max_micro_batch=8"], {}, PlanError, "max_micro_batch: 8 is below"),
        (
            [f'{METHOD}.replay=[{{"bandwidth": 20, "uses": 3, "capacity": 4}}]'],
            {},
            PlanError,
            "uses: 128 samples .* do not divide by 3",
        ),
        (
            [f"{METHOD}.large_batch={{}}", 'scheduler={"type": "WarmupLR", "params": {}}'],
            {"algorithm": "et"},
            ConfigError,
            "scheduler: DeepSpeed's learning rate does not follow the plan",
        ),
        (["efftrain.data.resolution=30"], {}, PlanError, "30 is not a multiple of the model's stride 4"),
    ],
)
def test_what_a_training_would_refuse_is_refused_before_all(
    prepared: Any, changes: list[str], search: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        prepared(*changes, **search)


def test_methods_that_measure_no_accuracy_are_refused() -> None:
    file = ROOT / "ds_configs" / "smoke_mae_fmnist.json"
    config = load_config(file, overrides=[f'{METHOD}.search={{"algorithm": "et"}}'], world=1)
    with pytest.raises(ConfigError, match=r"search: compares top-1, which efftrain\.methods\.mae does not measure"):
        check_curriculum_search(config)


def test_the_schedule_of_the_file_need_not_fit_when_going_on(prepared: Any) -> None:
    begun(prepared())
    # 10 px is no multiple of the stride; no training of the search has it
    rows = [{"until": 0.5, "bandwidth": 10}, {"until": 1.0, "bandwidth": 28}]
    assert prepared(f"{METHOD}.schedule={json.dumps(rows)}")._load() == 1


def test_another_global_batch_is_refused_by_name(prepared: Any) -> None:
    per_rank = ("train_batch_size=null", "train_micro_batch_size_per_gpu=64", "gradient_accumulation_steps=1")
    begun(prepared(*per_rank))
    assert prepared(*per_rank)._load() == 1
    with pytest.raises(CheckpointError, match="global_batch: 64 -> 128"):
        prepared(*per_rank, world=2)._load()


def test_checkpoints_are_deleted_at_the_end_too(prepared: Any, tmp_path: Path) -> None:
    run = begun(prepared())
    left = run.folder / TRIALS / "baseline" / FOLDER / "step-00000001"
    left.mkdir(parents=True)  # killed between the state and the deletion
    run._finish(Outcome(None, 1.0, 1.0, 0.5, 0.5, "why", True))
    assert not left.exists()
    assert not list(run.folder.glob("*.partial"))
    assert json.loads((run.folder / STATE).read_text())["search"]["results"] == [["baseline", 0.5]]


def test_what_is_written_trains_on_all_that_is_not_held_out(prepared: Any) -> None:
    held = {"per_class": 5, "train_share": 0.1}
    changes = ("efftrain.data.val=null", f"efftrain.data.hold_out={json.dumps(held)}", "efftrain.data.samples=595")
    run = begun(prepared(*changes, hold_out=None))
    assert run.train.kept == 595
    run._finish(Outcome((12, 28), 2 / 3, 0.6, 0.5, 0.5, "why", True))
    for name in (RESULT, BASELINE):
        found = check_config(json.loads((run.folder / name).read_text()), world=1)
        data = found.efftrain.data
        assert data.hold_out is not None
        assert (data.hold_out.per_class, data.hold_out.train_share, data.samples) == (5, 1.0, None)
