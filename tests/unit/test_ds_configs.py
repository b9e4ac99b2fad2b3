"""Every shipped configuration loads and can be priced without devices or shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efftrain_ds.config.loader import load_config
from efftrain_ds.planning import make_plan

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
HEAVY = (
    *("swin", "cswin", "caformer", "pvt", "volo", "ft_convnext", "ft384_convnext", "convnext_base", "in1k_pretrain"),
    "elasticvit_in1k",
)
"""Models (or teachers) whose MACs are counted layer by layer, which takes seconds."""
RELATIVE = {
    "efficienttrain": (0.6, 1.01),
    "autoprog": (0.4, 0.6),
    "autoprog_zero": (0.4, 1.01),
    "svite": (0.99, 1.01),
    "s2vite": (0.5, 0.75),
    "svite_tokens": (0.9, 1.01),
    "elasticvit": (0.5, 2.5),
    "mae": (0.99, 1.01),
}
"""Cost of a run that has only this method, relative to dense training of as many epochs."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if any(name in p.stem for name in HEAVY) else []) for p in FILES],
    ids=lambda p: p.stem,
)
def test_configuration_is_planned(path: Path) -> None:
    config = load_config(path, world=2)
    assert not config.warnings
    plan = make_plan(config, world=2)
    assert plan.schedule.total_steps > 100
    assert sum(stage.share for stage in plan.stages) == pytest.approx(1)
    methods, spec = config.efftrain.methods, plan.schedule.spec
    bounds = [RELATIVE[name] for name in methods]
    low, high = bounds[0] if len(bounds) == 1 else (0.4, 1.01)
    assert low < plan.relative < high
    searched = "autoprog" in methods and methods["autoprog"].get("search") is not None
    assert (plan.range is not None) >= searched  # other methods may search, too
    if plan.range is not None:
        cheapest, dearest = plan.range
        assert 0.2 < cheapest <= plan.relative <= dearest < 1.01
    settings = plan.stages[-1].stage.settings
    if "efficienttrain" in methods:
        assert settings["bandwidth"] == spec.resolution
    if "autoprog" in methods:
        assert settings["depth"] == spec.depth > 0
        assert settings.get("resolution", spec.resolution) == spec.resolution
        depths = [s.settings["depth"] for s in plan.schedule.stages if not s.settings.get("search")]
        assert depths == sorted(depths)
        assert depths[0] < depths[-1]
        assert sum(bool(s.settings.get("search")) for s in plan.schedule.stages) == (3 if searched else 0)
        assert plan.stages[-1].macs == plan.full_macs
    if "autoprog_zero" in methods:
        assert settings["unfrozen"] == max(s.settings["unfrozen"] for s in plan.schedule.stages)


def test_average_where_growth_takes_it() -> None:
    growing = [p for p in FILES if "autoprog" in json.loads(p.read_text())["efftrain"]["methods"]]
    assert len(growing) >= 8
    for path in growing:
        section = json.loads(path.read_text())["efftrain"]
        small = "fmnist" in path.name
        assert section["model"]["ema"]["decay"] == (0.9 if small else 0.998), path.name


def test_all_files_are_in_the_table() -> None:
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert FILES
    assert all(f"`{path.name}`" in table for path in FILES)


def test_output_folders_are_named_after_the_files() -> None:
    for path in FILES:
        assert json.loads(path.read_text())["efftrain"]["run"]["output"] == f"runs/{path.stem}"
