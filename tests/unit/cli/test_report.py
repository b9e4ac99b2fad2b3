from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efftrain_ds.cli import main as cli
from efftrain_ds.cli.report import distinct_names


@pytest.fixture
def run_folder(tmp_path: Path) -> Any:
    def make(name: str, top1: float) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        events = [
            {"time": 10.0, "step": 0, "event": "start", "argv": ["launch/train.py"], "world": 1},
            {"time": 20.0, "step": 10, "event": "eval", "top1": top1, "train_seconds": 8.0},
            {"time": 20.5, "step": 10, "event": "end", "seconds": 8.0},
        ]
        (folder / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        return str(folder)

    return make


def test_report_of_one_run_goes_into_its_folder(run_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder("one", 0.5)
    assert cli.main(["report", folder]) == 0
    out = capsys.readouterr().out
    assert f"report   {folder}/report.html" in out
    assert f"picture  {folder}/report.png" in out
    assert "plan.json is missing" in out
    assert "50.00 %" in Path(folder, "report.html").read_text()
    assert Path(folder, "report.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_as_json(run_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder("x/run", 0.5), run_folder("y/run", 0.25)
    output = tmp_path / "new" / "both.html"
    assert cli.main(["report", a, "--compare", b, "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target_top1"] == 0.25
    assert [(r["name"], r["best_top1"], r["finished"]) for r in found["runs"]] == [
        ("x/run", 0.5, True),
        ("y/run", 0.25, True),
    ]
    assert "x/run against y/run" in output.read_text()
    assert output.with_suffix(".png").is_file()


def test_a_folder_that_is_no_run(tmp_path: Path, run_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "journal.jsonl (missing)" in capsys.readouterr().err
    folder = run_folder("one", 0.5)
    assert cli.main(["report", folder, "--compare", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not Path(folder, "report.html").exists()


def test_names_that_tell_runs_apart() -> None:
    assert distinct_names(["/a/x", "/b/y"]) == ["x", "y"]
    assert distinct_names(["/a/x", "/b/x", "/c/z"]) == ["a/x", "b/x", "z"]
    assert distinct_names(["/a/x", "/a/x"])[0] != distinct_names(["/a/x", "/a/x"])[1]
