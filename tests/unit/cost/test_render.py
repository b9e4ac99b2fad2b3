from pathlib import Path

import numpy as np
from PIL import Image

from efftrain_ds.core.text import align, bytes_text, duration_text, short_settings
from efftrain_ds.core.timeline import PlanSpec, Segment, Timeline, merge_timelines
from efftrain_ds.cost.plan import PricedPlan, price
from efftrain_ds.cost.render import macs_text, plan_bars, plan_png, plan_table, plan_text
from efftrain_ds.cost.throughput import Measured, Throughput


def small_plan(throughput: Throughput | None = None, steps: int | None = None) -> PricedPlan:
    spec = PlanSpec(0, 0.0 if steps else 10.0, 0 if steps else 1000, 100, 10, 2, 32, 4, steps=steps)
    settings = [(0.0, 0.25, 16, 0), (0.25, 0.5, 16, 1), (0.5, 1.0, 32, 9)]
    segments = tuple(
        Segment(a, b, {"bandwidth": side, "ra_magnitude": m}, pace=(side / 32) ** 2) for a, b, side, m in settings
    )
    schedule = merge_timelines([Timeline(segments, "compute")], spec)
    return price(
        schedule,
        macs=[10**9, 10**9, 4 * 10**9],
        full_macs=4 * 10**9,
        activations=[10**9, 10**9, 4 * 10**9],
        model="net",
        params=10**6,
        precision="fp32",
        zero_stage=0,
        methods=[("efficienttrain", "B16 m0 -> B32 m9 in 3 stages")],
        throughput=throughput,
    )


def test_table_rows() -> None:
    lines = plan_table(small_plan()).splitlines()
    assert lines[0].split() == ["stage", "from", "step", "steps", "epochs", "settings", "micro", "x", "acc",
                                "GMACs/img", "memory", "share"]  # fmt: skip
    assert lines[2].split() == ["1", "0", "100", "10.0", "B16", "m0", "10", "x", "5", "1.00", "1.0", "GB", "25.0%"]
    assert lines[4].split() == ["3", "200", "50", "5.0", "B32", "m9", "10", "x", "5", "4.00", "4.0", "GB", "50.0%"]
    totals = "\n".join(lines[6:])
    assert "total      250 steps of 100 images = 25,000 images (25.0 passes over 1,000)" in totals
    assert "cost       0.12 PMACs = 10.0 baseline epochs at 32 px, x1.00 of 10 dense epochs" in totals
    assert "1.5x longer dense training: x0.67 of 15" in totals
    assert max(map(len, plan_text(small_plan()).splitlines())) <= 120


def test_times_and_their_source() -> None:
    profile = Throughput("CPU", "2.15", 2, "net fp32 zero0", "2026-01-02", (Measured(16, 10, 5, 10**9, 2.0, 9),))
    text = plan_table(small_plan(profile))
    rows = text.splitlines()
    assert rows[2].endswith("3m20s")
    assert rows[4].endswith("6m40s *")  # 50 steps x 2 s x 4 times the work
    assert "time       13m20s for the steps alone  * interpolated" in text
    assert "measured 2026-01-02 on CPU, 2 ranks, torch 2.15" in text
    assert max(map(len, rows)) <= 120


def test_steps_without_samples_have_no_epochs() -> None:
    text = plan_text(small_plan(steps=250))
    assert "epochs" not in text
    assert "of as many steps at 32 px" in text


def test_bars_are_proportional_to_cost() -> None:
    low, high, axis = plan_bars(small_plan(), width=40).splitlines()
    assert low == "B16 |" + "#" * 20 + " " * 20 + "|  50.0%"
    assert high == "B32 |" + " " * 20 + "#" * 20 + "|  50.0%"
    assert axis.strip().startswith("0")


def test_png(tmp_path: Path) -> None:
    plan_png(small_plan(), tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 300
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 5


def test_words() -> None:
    assert [bytes_text(n) for n in (41e9, 1.24e9, 512e6, 900, 9.97e9)] == [
        "41 GB",
        "1.2 GB",
        "512 MB",
        "900 B",
        "10 GB",
    ]
    times = (3.21, 45, 125, 6 * 3600 + 12 * 60 + 29, 3 * 86400 + 4 * 3600, 59.6, 3599.7)
    assert [duration_text(s) for s in times] == ["3.2s", "45s", "2m05s", "6h12m", "3d04h", "1m00s", "1h00m"]
    assert short_settings({"bandwidth": 128, "ra_magnitude": 3.0}) == "B128 m3"
    assert short_settings({"bandwidth": 128, "keep_ratio": 0.7, "ra_magnitude": 3}, leave={"ra_magnitude"}) == (
        "B128 keep_ratio=0.7"
    )
    assert short_settings({}) == "full"
    grown = {"resolution": 160, "depth": 8, "drop_path": 0.03, "ra_magnitude": 6.0, "erasing": 0.1}
    assert short_settings(grown) == "R160 d8 m6"
    assert short_settings({**grown, "search": True, "other": None}, leave={"ra_magnitude"}) == "R160 d8 search"
    assert short_settings({"depth": 8, "search": False, "phase": "thaw"}) == "d8 thaw"
    assert short_settings({"drop_path": 0.1, "erasing": 0.0}) == "full"
    assert [macs_text(m) for m in (4.599e9, 2.5e7, 3e6)] == ["4.60", "0.025", "0.00300"]
    assert align([["a", "bb"], ["ccc", "d"]], left=(0,)) == ["a    bb", "ccc   d"]
