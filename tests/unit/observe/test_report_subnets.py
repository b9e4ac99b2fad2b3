"""Searches for a sub-network in the report: read from the run's folder, drawn and tabled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efftrain_ds.core.pareto import pareto
from efftrain_ds.observe.report.figures import SERIES, to_png
from efftrain_ds.observe.report.run import RunData
from efftrain_ds.observe.report.subnets import FoundSubnet, pareto_figure, read_found, subnets


def found(name: str = "search", *, timed: bool = False, budget: Any = 900_000) -> FoundSubnet:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for macs in rng.integers(400_000, 900_000, 40).tolist():
        row = {"macs": macs, "params": 20_000 + macs // 10, "top1": macs / 1.2e6 + float(rng.normal(0, 0.01))}
        rows.append({**row, **({"latency": macs / 1e6} if timed else {})})
    best = max(rows, key=lambda row: row["top1"])
    costs = {key: value for key, value in best.items() if key != "top1"}
    limits = {"macs": budget, "params": None, "latency": 0.8 if timed else None}
    result = {**costs, "search_top1": best["top1"], "val_top1": best["top1"] - 0.01, "limits": limits, "step": 1200}
    result |= {"algorithm": "evolution", "config": {"width": "<b>"}}
    result |= {"latency_unit": "ms", "latency_device": "a <clock>"} if timed else {}
    return FoundSubnet(name, result, rows)


def written(folder: Path, one: FoundSubnet) -> None:
    (folder / one.name).mkdir()
    (folder / one.name / "subnet.json").write_text(json.dumps(one.result))
    (folder / one.name / "evaluated.json").write_text(json.dumps(one.rows))


def run_in(folder: Path) -> RunData:
    return RunData(folder, "run", [], [])


def test_what_is_drawn(tmp_path: Path) -> None:
    one = found(timed=True, budget=(500_000, 900_000))  # a list in a file
    one.result["score"] = "loss"
    figure = pareto_figure([one])
    macs, params, latency = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "MACs of one image (K)",
        "parameters (K)",
        "latency (ms) on a <clock>",
    ]
    lines = {line.get_label(): line for line in macs.get_lines()}
    assert len(lines["evaluated"].get_xdata()) == 40
    front = pareto([row["macs"] for row in one.rows], [row["top1"] for row in one.rows])
    assert lines["best at this cost"].get_xdata().tolist() == [one.rows[j]["macs"] / 1e3 for j in front]
    top = one.result["search_top1"]
    assert lines[f"chosen by loss: {100 * top:.2f} %"].get_ydata() == [100 * top]
    assert lines[f"chosen, held out: {100 * top - 1:.2f} %"].get_xdata() == [one.result["macs"] / 1e3]
    at = sorted(float(line.get_xdata()[0]) for line in macs.get_lines() if line.get_linestyle() == "--")
    assert at == [500, 900]
    assert [line for line in params.get_lines() if line.get_linestyle() == "--"] == []
    assert [line.get_xdata()[0] for line in latency.get_lines() if line.get_linestyle() == "--"] == [0.8]
    to_png(figure, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 1000


def test_a_few_bad_ones_do_not_flatten_the_picture() -> None:
    one = found()
    assert pareto_figure([one]).axes[0].get_ylim()[0] < 40
    one.rows[0]["top1"] = 0.01
    bottom, top = pareto_figure([one]).axes[0].get_ylim()
    assert 10 < bottom < 40
    assert top > 100 * one.result["search_top1"]


def test_several_searches_have_their_own_colours_and_budgets() -> None:
    figure = pareto_figure([found("a"), found("b", budget=700_000)])
    assert len(figure.axes) == 2
    lines = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_color() for line in lines] == list(SERIES[:2])
    assert [line.get_xdata()[0] for line in lines] == [900, 700]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["budget", "evaluated", " a", "chosen", "chosen, held out", " b"]


def test_part_of_the_page(tmp_path: Path) -> None:
    assert subnets(run_in(tmp_path), "run") == ""
    written(tmp_path, found(timed=True))
    written(tmp_path, found("half", budget=[600_000, 700_000]))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "subnet.json").write_text("{")
    text = subnets(run_in(tmp_path), "run")
    assert "the search in damaged could not be read" in text
    assert "MACs at most 900,000, latency at most 0.8 ms" in text
    assert "MACs 600,000 to 700,000" in text
    assert text.count("<svg") == 1
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


@pytest.mark.parametrize("change", [{"limits": 3}, {"limits": {"macs": "much"}}, {"macs": None}, {"search_top1": "x"}])
def test_files_of_another_version_are_drawn_as_far_as_they_go(tmp_path: Path, change: dict[str, Any]) -> None:
    one = found()
    written(tmp_path, FoundSubnet("search", one.result | change, [*one.rows, {"odd": 1}]))
    assert len(read_found(tmp_path)[0]) == 1
    assert "<svg" in subnets(run_in(tmp_path), "run")
