import json
from pathlib import Path

import pytest

from efftrain_ds.core.errors import PlanError
from efftrain_ds.cost.throughput import Measured, Throughput, fit_line, load_throughput, machine_name, profile_key


def make(*entries: Measured) -> Throughput:
    return Throughput("CPU", "2.15", 2, "m fp32 zero1", "2026-01-02", entries)


def test_fit_recovers_a_line_and_stays_non_negative() -> None:
    a, b = fit_line([1e9, 2e9, 4e9], [1.5, 2.5, 4.5])
    assert (a, b) == pytest.approx((0.5, 1e-9))
    assert fit_line([2e9], [3.0]) == pytest.approx((0.0, 1.5e-9))
    assert fit_line([2e9, 2e9], [3.0, 5.0]) == pytest.approx((0.0, 2e-9))
    a, b = fit_line([1e9, 2e9], [0.5, 2.0])  # would need a constant of -1
    assert a == 0.0
    assert b == pytest.approx((0.5 * 1 + 2.0 * 2) / 5 * 1e-9)
    assert fit_line([1e9, 2e9], [2.0, 1.0]) == (1.5, 0.0)


def test_predict_measured_before_fitted() -> None:
    off_line = Measured(96, 8, 1, 100, 9.0, 5)
    profile = make(off_line, Measured(160, 8, 1, 300, 3.0, 5), Measured(224, 8, 1, 600, 5.0, 5))
    got = profile.predict(bandwidth=96, micro_batch=8, accumulation=1, macs=100)
    assert got is not None
    assert (got.seconds, got.how) == (9.0, "measured")
    two = make(Measured(160, 8, 1, 300, 3.0, 5), Measured(224, 8, 1, 600, 5.0, 5))
    other = two.predict(bandwidth=192, micro_batch=8, accumulation=1, macs=450)
    assert other is not None
    assert (other.how, other.seconds) == ("interpolated", pytest.approx(4.0))
    split = two.predict(bandwidth=160, micro_batch=4, accumulation=2, macs=300)  # same work, not the same setting
    assert split is not None
    assert (split.how, split.seconds) == ("interpolated", pytest.approx(3.0))
    assert make().predict(bandwidth=96, micro_batch=8, accumulation=1, macs=100) is None


def test_save_load_and_replace(tmp_path: Path) -> None:
    profile = make().with_entry(Measured(96, 8, 1, 100, 9.0, 5)).with_entry(Measured(96, 8, 1, 100, 7.0, 50))
    assert [e.seconds for e in profile.entries] == [7.0]
    deeper = Measured(96, 8, 1, 150, 9.0, 5)  # the same batch through another depth
    profile = profile.with_entry(deeper)
    assert [e.seconds for e in profile.entries] == [7.0, 9.0]
    found = profile.predict(bandwidth=96, micro_batch=8, accumulation=1, macs=150)
    assert found is not None
    assert (found.seconds, found.how) == (9.0, "measured")
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    assert load_throughput(path) == profile
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


def test_damaged_profiles_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    good = {"format": 1, "machine": "c", "torch": "2", "world": 1, "key": "k", "date": "d", "entries": []}
    entry = {"bandwidth": 9, "micro_batch": 1, "accumulation": 1, "macs": 5, "seconds": 0.0, "n": 1}
    for text in ("{", "[]", json.dumps({**good, "format": 9}), json.dumps({**good, "entries": [{"x": 1}]}),
                 json.dumps({**good, "entries": [entry]})):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PlanError, match="p.json"):
            load_throughput(path)
    with pytest.raises(PlanError, match="missing.json"):
        load_throughput(tmp_path / "missing.json")


def test_names() -> None:
    assert profile_key("deit_small_patch16_224", "bf16", 2) == "deit_small_patch16_224 bf16 zero2"
    assert machine_name()
