"""Plans and configurations of the trainings of a curriculum search."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efftrain_ds.checkpoint.folder import newest_good, seal
from efftrain_ds.config.loader import LoadedConfig, check_config, load_config
from efftrain_ds.core.errors import CheckpointError, ConfigError
from efftrain_ds.data.holdout import HoldOutConfig
from efftrain_ds.lr_schedule import ProgressLR
from efftrain_ds.methods.efficienttrain.search import Trial
from efftrain_ds.planning import make_plan
from efftrain_ds.train_changes import past_stages
from efftrain_ds.train_curriculum import check_curriculum_search
from efftrain_ds.train_trial import begin_with, cut_plan, scheduled, stage_end, trial_config

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "ds_configs" / "smoke_et_vit_fmnist.json"
METHOD = "efftrain.methods.efficienttrain"


def loaded(*changes: str, **search: Any) -> LoadedConfig:
    return load_config(FILE, overrides=[f"{METHOD}.search={json.dumps(search)}", *changes], world=2)


def trial(sizes: tuple[int, ...], last: int, *, budget: float = 2 / 3, tune: bool = True) -> Trial:
    return Trial("t", sizes, budget, last, None, tune, 0.0)


def plan_of(config: LoadedConfig, what: Trial, tune: float | None = None) -> Any:
    made = trial_config(config, what, epochs=16, folder=Path("out"), hold_out=HoldOutConfig(), world=2)
    return cut_plan(make_plan(made, world=2), stage_end(config, what), tune)


def test_a_stage_goes_on_where_the_one_before_it_stopped() -> None:
    config = loaded()
    first = plan_of(config, trial((12, 28, 28, 28, 28), 1))
    for size in (12, 20, 28):
        second = plan_of(config, trial((12, size, 28, 28, 28), 2))
        end = first.schedule.total_steps
        assert past_stages(second.schedule, end) == past_stages(first.schedule, end)
        assert second.schedule.total_steps > end
        middle = end / 2
        assert second.schedule.progress(middle) == pytest.approx(first.schedule.progress(middle))
        assert second.schedule.stages[-1].p_end == pytest.approx(0.4)
    whole = plan_of(config, trial((12, 20, 28, 28, 28), 5, tune=False))
    cut = plan_of(config, trial((12, 20, 28, 28, 28), 2))
    assert whole.schedule.total_steps > cut.schedule.total_steps
    assert whole.schedule.stages[: len(cut.schedule.stages)] == cut.schedule.stages
    assert sum(priced.share for priced in cut.stages) == pytest.approx(1)


def test_stages_of_one_size_are_cut_where_they_join() -> None:
    config = loaded("efftrain.data.randaugment=null")  # without magnitudes neighbours become one stage
    whole = plan_of(config, trial((12, 12, 28, 28, 28), 5, tune=False))
    assert [s.settings["bandwidth"] for s in whole.schedule.stages] == [12, 28]
    cut = plan_of(config, trial((12, 12, 28, 28, 28), 1))
    assert len(cut.schedule.stages) == 1
    assert cut.schedule.stages[0].steps == pytest.approx(whole.schedule.stages[0].steps / 2, abs=1)
    full = plan_of(config, trial((28, 28, 28, 28, 28), 2), tune=0.02)
    assert [s.settings["bandwidth"] for s in full.schedule.stages] == [28, 28]
    assert full.schedule.stages[0].p_end == pytest.approx(0.4)


def test_tuning_is_short_at_full_size_and_its_rate_falls_to_the_floor() -> None:
    config = loaded()
    plain, tuned = (plan_of(config, trial((12, 20, 28, 28, 28), 2), tune) for tune in (None, 0.05))
    *before, last = tuned.schedule.stages
    assert before == list(plain.schedule.stages)
    spec = tuned.schedule.spec
    assert spec.samples == 5401
    assert last.settings["bandwidth"] == 28
    assert last.steps == round(0.05 * spec.epochs * spec.samples / spec.batch)
    assert (last.p_start, last.p_end) == pytest.approx((0.4, 0.45))

    rates = []
    for schedule in (plain.schedule, tuned.schedule):
        lr = ProgressLR(SimpleNamespace(param_groups=[{"lr": 1.0}]), schedule, warmup=0.1, min_lr=1e-5, shape="cosine")
        for step in range(last.start_step - 2, schedule.total_steps):
            lr.set_step(step)
            rates.append(lr.get_lr()[0])
    assert rates[:2] == rates[2:4]  # the whole schedule's rate up to there
    fall = rates[3:]
    assert all(a > b for a, b in zip(fall, fall[1:], strict=False))
    assert 1e-5 <= fall[-1] < 0.1 * fall[0]


def test_configurations_of_trials() -> None:
    replay = [{"bandwidth": 12, "uses": 2, "capacity": 4}, {"bandwidth": 20, "uses": 2, "capacity": 4}]
    config = loaded(f"{METHOD}.replay={json.dumps(replay)}", "efftrain.model.ema=null", stages=3)
    made = trial_config(
        config, trial((20, 28, 28), 1), epochs=6, folder=Path("o"), hold_out=HoldOutConfig(per_class=3), world=2
    )
    section, settings = made.efftrain, made.methods["efficienttrain"]
    assert section.run.epochs == pytest.approx(4)
    assert section.data.val is None
    assert section.data.hold_out == HoldOutConfig(per_class=3)
    assert section.observe.tensorboard is False
    assert settings.search is None  # type: ignore[attr-defined]
    assert [row.bandwidth for row in settings.replay] == [20]  # type: ignore[attr-defined]
    assert settings.pacing == "compute"  # type: ignore[attr-defined]
    plain = check_config(scheduled(config, None, 6), world=2)
    assert plain.methods == {}
    assert plain.efftrain.data == config.efftrain.data
    assert make_plan(plain, world=2).relative == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("warmup", "epochs", "found"), [("5ep", 4, "1.25ep"), ("40st", 4, "10st"), ("10%", 4, "10%"), ("5ep", 16, "5ep")]
)
def test_the_warm_up_is_the_same_share_of_a_shorter_training(warmup: str, epochs: float, found: str) -> None:
    config = loaded(f"efftrain.optim.warmup={warmup}", "efftrain.run.epochs=16", "efftrain.checkpoint.keep=3")
    made = trial_config(
        config, trial((12, 28, 28, 28, 28), 1), epochs=epochs, folder=Path("o"), hold_out=HoldOutConfig(), world=2
    )
    assert made.efftrain.optim.warmup == found
    assert made.efftrain.checkpoint.keep == 1  # no training goes back behind its last checkpoint


def test_a_training_begins_with_the_last_checkpoint_of_another(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    for step in (1, 2):
        partial = source / "checkpoints" / f".tmp-step-0000000{step}"
        partial.mkdir(parents=True)
        (partial / "x").write_text(str(step))
        digest = {"1": "6b86b273ff34fce1", "2": "d4735e3a265e16ee"}[str(step)]
        full = {
            "6b86b273ff34fce1": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
            "d4735e3a265e16ee": "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35",
        }[digest]
        final = source / "checkpoints" / f"step-0000000{step}"
        seal(partial, final, [{"name": "x", "bytes": 1, "sha256": full}])
    begin_with(target, source)
    found = newest_good(target / "checkpoints")
    assert found is not None
    assert found.name == "step-00000002"
    assert (found / "x").read_text() == "2"
    (found / "x").unlink()
    begin_with(target, source)  # has begun: left as it is
    assert not (found / "x").exists()
    assert (source / "checkpoints" / "step-00000002" / "x").read_text() == "2"
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        begin_with(tmp_path / "c", tmp_path / "empty")


@pytest.mark.parametrize(
    ("changes", "search", "text"),
    [
        ([f"{METHOD}.search=null"], {}, 'no search for a schedule, found "search": null'),
        (["efftrain.run.epochs=null", "efftrain.run.steps=50"], {}, "efftrain.run.epochs: not given"),
        (["efftrain.model.ema=null"], {"average": True}, "search.average"),
        (["efftrain.data.val=null", "efftrain.data.hold_out={}"], {"hold_out": {}}, "search.hold_out"),
        (["efftrain.methods.autoprog={}"], {}, "without other methods: found \\['autoprog'\\]"),
        (['scheduler={"type": "WarmupLR", "params": {}}'], {}, "scheduler: the learning rate"),
    ],
)
def test_what_a_search_cannot_run_with(changes: list[str], search: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_curriculum_search(loaded(*changes, **search))
