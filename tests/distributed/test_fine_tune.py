"""Fine-tuning: weights of another run, rows of its head by class, classes left out, other sizes, rates by layer."""

from __future__ import annotations

import pytest

from tests.distributed import fine_tune_jobs as jobs

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2)), 3])
def test_a_run_starts_from_the_average_of_another(ranks, tmp_path, stage):
    first, second = ranks(jobs.fine_tune_job, str(tmp_path), stage)
    for result in (first, second):
        assert result["problems"] == []
        assert result["positions"] == [1, 37, 24]  # 6 x 6 patches of 4 pixels, and the class token
        # 4 layers of two kinds each; the stem and the class token have one that weight decay spares
        assert result["rates"] == sorted(result["rates"], reverse=True)
        assert set(result["rates"]) == {1.0, 0.5, 0.25, 0.125}
        assert result["bad"] == {}
        assert result["kept"] == result["expected"]
        assert result["plan"] == result["kept"][0]
        assert result["results"]["top1"] == second["results"]["top1"]
    assert "tensors, 1 resampled to this image size; head map: 3 rows taken, 1 new" in first["screen"]
    assert f"{first['kept'][1]:,} samples" in first["screen"]
    assert "resumed from step-00000002" in first["again"]
    assert "rows taken" not in first["again"]
    assert [(event["rows"], event["new_rows"]) for event in first["init"]] == [(3, 1)]


SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {}}, "efftrain/model/init": None}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"efftrain/model/num_classes": 10}, 3, ["num_classes is 10", "has 4 classes"]),
        ({"efftrain/data/labels": None, "efftrain/model/num_classes": 4}, 3, ["num_classes is 4", "has 10 classes"]),
        ({"efftrain/data/labels/missing": "error"}, 2, ["7 of 10 classes", "efftrain.data.labels"]),
        ({"efftrain/data/labels/target": "winter21"}, 2, ['"winter21" names several label sets']),
        ({"efftrain/model/init/missing": "error"}, 2, ["1 of 4 classes", "(Hat)", 'missing = "new"']),
        ({"efftrain/model/init/weights": "no/such.safetensors"}, 2, ["efftrain.model.init.weights", "no such file"]),
        ({"efftrain/model/init/labels": ...}, 2, ['head "map" and labels belong together']),
        (
            {"scheduler": {"type": "WarmupLR", "params": {}}, "efftrain/model/init": None},
            2,
            ["efftrain.optim.layer_decay", "scheduler"],
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_start(ranks, tmp_path, changes, code, words):
    (tmp_path / "base").mkdir()
    for text, exit_code in ranks(jobs.error_job, str(tmp_path), changes, world=1):
        assert exit_code == code, text
        assert all(word in text for word in words), text
