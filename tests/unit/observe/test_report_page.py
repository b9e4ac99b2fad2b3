"""The page: complete, valid, escaped, and without anything from outside."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from efftrain_ds.core.errors import ConfigError
from efftrain_ds.observe.report import html, read_run, write_report
from efftrain_ds.observe.report.page import comparison, report_html
from efftrain_ds.observe.report.words import decisions, faults

EVIL = '<script>alert("1")</script>&$x_'
VOID = {"meta", "img", "br", "link", "input", "path", "use", "rect", "line", "circle", "clippath"}


class Checker(HTMLParser):
    """Collects text, ids and addresses, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.addresses.append(str(value))
            assert not name.startswith("on"), name
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    for address in checker.addresses:
        assert address.startswith(("#", "data:image/")), address
        if address.startswith("#"):
            assert address[1:] in checker.ids
    assert "@import" not in page.read_text()
    return checker


def stage(index: int, step: int, **settings: Any) -> dict[str, Any]:
    return {"event": "stage", "step": step, "index": index, "settings": settings, "micro_batch": 4, "accumulation": 1}


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    def make(name: str = "run", *, evil: str = "words", finished: bool = True, bare: bool = False) -> Any:
        folder = tmp_path / name
        (folder / "pictures").mkdir(parents=True)
        events: list[dict[str, Any]] = [{"event": "start", "step": 0, "argv": ["launch/train.py", evil], "world": 2}]
        if not bare:
            events += [
                stage(0, 0, bandwidth=12, depth=2),
                *({"event": "log", "step": s, "loss": 3 - s / 50, "images_per_s": 9.0} for s in range(5, 40, 5)),
                {"event": "nonfinite", "step": 20, "consecutive": 1, "findings": [{"odd": evil}]},
                {"event": "resume", "step": 10, "checkpoint": "step-00000010", "changes": [evil], "world": 1},
                *({"event": "log", "step": s, "loss": 3 - s / 50, "memory": 1e9} for s in range(15, 101, 5)),
                {"event": "growth", "step": 40, "depth": [2, 4], "operator": "mogrow", "map": ["a <- b", evil]},
                {"event": "rebuild", "step": 40, "reason": evil, "seconds": 0.5, "parameters": [1e6, 2e6], "parts": {}},
                stage(1, 40, bandwidth=28, depth=4, odd=evil),
                {"event": "growth_search", "step": 41, "stage": 1, "alpha": 1.0, "cost": "macs", "table": "torn"},
                {"event": "mask_update", "step": 50, "density": 0.5, "layers": {evil: 1}},
                {"event": "eval", "step": 100, "train_seconds": 9.0, "top1": 0.5, "loss": 1.0},
            ]
        if finished:
            events.append({"event": "end", "step": 100, "seconds": 9.0, "bad_samples": {"decode": 2}, "others": {}})
        lines = [json.dumps({"time": 1000.0 + i, **e}) for i, e in enumerate(events)]
        (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
        if not bare:
            stages = [
                {"index": 0, "start_step": 0, "steps": 40, "cost_macs": 4e9, "settings": {"bandwidth": 12, "depth": 2}},
                {
                    "index": 1,
                    "start_step": 40,
                    "steps": 60,
                    "cost_macs": 9e9,
                    "settings": {"bandwidth": 28, "depth": 4},
                },
            ]
            plan = {"model": evil, "batch": 8, "stages": stages, "total_steps": 100, "total_cost_macs": 13e9}
            plan |= {"relative_cost": 0.5, "resolution": 28, "methods": [{"name": evil, "line": ""}], "epochs": 3}
            (folder / "plan.json").write_text(json.dumps(plan))
            (folder / "config.json").write_text(json.dumps({"efftrain": {"data": {"train": evil}}, "optimizer": evil}))
            Image.new("RGB", (12, 12)).save(folder / "pictures" / "batch-step-00000050.png")
            (folder / "pictures" / "batch-step-00000060.png").write_bytes(b"not a picture")
            (folder / "quarantine.rank0.jsonl").write_text(evil + "\n")
        return read_run(folder)

    return make


def test_every_part_stands_in_the_page(make_run: Any, tmp_path: Path) -> None:
    page, picture = write_report([make_run()], tmp_path / "out" / "page.html", now=2000.0)
    assert (page, picture) == (tmp_path / "out" / "page.html", tmp_path / "out" / "page.png")
    text = checked(page).text
    for part in (
        *("Summary", "Plan against actual", "Learning", "Speed and memory", "What the network sees", "Decisions"),
        *("Restarts and faults", "Evaluations", "Commands", "Versions and machine", "Configuration and files"),
        "50.00 %",  # best top-1
        "x0.50",  # planned cost
        "bandwidth 12 -> 28, depth 2 -> 4",
        "depth 2 -> 4 by mogrow",
        "1 M -> 2 M trainable parameters",
        "density: 0.5",  # an event that is not known here
        "non-finite loss or gradient",
        "before a restart that repeats this step",
        "step-00000010",
        "launch/train.py words",
        "finished at step 100",
        "step 50, B28 d4",
        "decode 2",
    ):
        assert part in text, part
    assert page.read_text().count("data:image/png") == 1  # the damaged picture is left out
    with Image.open(picture) as image:
        assert image.width > 800
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_text_from_files_is_never_markup(make_run: Any, tmp_path: Path) -> None:
    run = make_run("evil", evil=EVIL)
    run.name = EVIL
    other = make_run("other")
    page, _ = write_report([run, other], tmp_path / "page.html")
    assert checked(page).text.count(EVIL) > 10
    assert "<script" not in page.read_text().lower()


def test_a_run_that_has_only_begun(make_run: Any, tmp_path: Path) -> None:
    run = make_run("young", bare=True, finished=False)
    page, _ = write_report([run], tmp_path / "page.html", now=1010.0)
    text = checked(page).text
    assert "not finished: step 0; last sign of life 9.9s ago" in text or "10s ago" in text
    assert "still running" in text
    assert "plan.json is missing" in text
    assert "Plan against actual" not in text
    assert "killed, or stopped" in report_html([run], now=1e6)


def test_comparison(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", finished=False), make_run("c", bare=True)]
    text = comparison(runs)
    assert "b (not finished)" in text
    assert "(x1.00)" in text
    assert "cost to 50.0 %" not in text  # a run without evaluations reached no common accuracy
    assert "cost to 50.0 %" in comparison(runs[:2])


def test_output_that_cannot_be_written(make_run: Any, tmp_path: Path) -> None:
    run, bare = make_run(), make_run("bare", bare=True)
    with pytest.raises(ConfigError, match=r"picture goes beside it"):
        write_report([run], tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report([bare], tmp_path / "file" / "x.html")


def test_tables_of_searches_in_words() -> None:
    rows = [
        {"depth": 2, "resolution": None, "loss": 1.5, "cost": 2e6, "score": 0.5, "chosen": False},
        {"depth": 3, "resolution": 28, "loss": "nan", "cost": 3e6, "score": 0.25, "chosen": True},
    ]
    event = {"event": "growth_search", "step": 7, "stage": 1, "alpha": 0.75, "cost": "macs", "table": rows}
    words = decisions([event], 2)[0]
    assert words.table[1] == ["2", "-", "1.5000", "2e+06", "0.5", ""]
    assert words.table[2][2:] == ["nan", "3e+06", "0.25", "chosen"]
    assert words.marked == 1
    row = {"level": 1, "resolution": 16, "seconds": 0.01, "ntk": 2.0, "zico": 3.0, "votes": 2, "chosen": True}
    words = decisions([{"event": "unfreeze_search", "step": 7, "stage": 1, "seconds": 1.0, "table": [row]}], 2)[0]
    assert words.table[1] == ["1", "16", "10.0", "2", "3.0", "2", "chosen"]
    finding = {"rank": 1, "what": "loss", "value": "nan", "ids": list(range(20)), "replay": "faults/x.pt"}
    event = {"event": "nonfinite", "step": 3, "consecutive": 2, "findings": [finding]}
    text = faults([(event, True)])[0].text
    assert text.startswith("rank 1: loss is nan, samples 0, 1, 2, 3, 4, 5, 6, 7, ..., replay faults/x.pt;")
    assert "applied on no rank; 2 in a row" in text


def test_bars_and_large_pictures(tmp_path: Path) -> None:
    assert html.bars(2.0, 1.0, 2.0).count("width:100.0%") == 1
    assert "width:50.0%" in html.bars(None, 1.0, 2.0)
    assert "width:0.0%" in html.bars(1.0, None, 0.0)
    path = tmp_path / "x.png"
    Image.effect_noise((1400, 700), 80).convert("RGB").save(path)
    assert path.stat().st_size > 500_000
    text = html.picture(path, "a <b>")
    assert text.startswith('<img src="data:image/jpeg;base64,')
    assert 'alt="a &lt;b&gt;" width="720" height="360"' in text
