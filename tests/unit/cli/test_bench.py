from __future__ import annotations

import json

import pytest
import torch

from efftrain_ds.cli import bench
from efftrain_ds.cli import main as cli

CHEAP = {"sets": 1, "rounds": 2, "repeats": 1, "warmup": 0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU only")
def test_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("efftrain bench kernels: needs an NVIDIA GPU of compute capability 8.0")
    assert "no GPU was found" in captured.err


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 2
    assert "WHAT" in capsys.readouterr().err
    assert cli.main(["bench", "kernels", "--head_dim", "63"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert cli.main(["bench", "kernels", "--help"]) == 0
    assert "--tune" in capsys.readouterr().out


def test_compares_on_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    lines: list[str] = []
    shapes = (bench.Shape(2, 20, 0.0), bench.Shape(2, 130, 0.5))
    rows = bench.compare(torch.device("cpu"), torch.float32, 128, lines.append, shapes, ((2, 32, 16),), **CHEAP)
    assert [row["correct"] for row in rows] == [True] * 3
    assert rows[0]["peer"].startswith("SDPA")
    assert "50 % pruned" in rows[1]["name"]
    assert set(rows[2]["us"]) == {"ours", "two matmuls", "interpolate"}
    for row in rows:
        assert row["range"][0] <= row["ratio"] <= row["range"][1]
        assert row["ratio"] > 0
    assert len(lines) == 4
    assert json.loads(json.dumps(rows)) == rows


def test_wrong_results_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from efftrain_ds.kernels import attention as package

    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    right = package.attention
    monkeypatch.setattr(package, "attention", lambda qkv, mask: right(qkv, mask) * 1.1, raising=False)
    lines: list[str] = []
    rows = bench.compare(torch.device("cpu"), torch.float32, 128, lines.append, (bench.Shape(2, 20, 0.0),), (), **CHEAP)
    assert rows == [{"name": "attention fwd+bwd, 2 x 20 tokens", "correct": False, "us": {}}], "it is not timed"
    assert lines[-1].endswith("WRONG RESULT, not timed")


def test_wrong_peers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from efftrain_ds.kernels.lowfreq_crop import reference

    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    right = reference.matmul_crop
    crops = ((2, 32, 16),)
    monkeypatch.setattr(
        reference,
        "matmul_crop",
        lambda x, size, **how: right(x, size, **how) * (1.1 if how["out_dtype"] == torch.bfloat16 else 1),
    )
    rows = bench.compare(torch.device("cpu"), torch.float32, 128, lambda text: None, (), crops, **CHEAP)
    assert set(rows[0]["us"]) == {"ours", "interpolate"}
    assert rows[0]["correct"]
