"""Every shipped configuration loads and can be priced without devices or shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from efftrain_ds.config.loader import load_config
from efftrain_ds.planning import make_plan

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_configuration_is_planned(path):
    plan = make_plan(load_config(path, world=2), world=2)
    assert plan.schedule.total_steps > 100
    assert sum(stage.share for stage in plan.stages) == pytest.approx(1)
    assert 0.6 < plan.relative < 1.01
    assert plan.stages[-1].stage.settings["bandwidth"] == plan.schedule.spec.resolution


def test_all_files_are_in_the_table():
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert FILES
    assert all(f"`{path.name}`" in table for path in FILES)
