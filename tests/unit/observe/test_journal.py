import json
from pathlib import Path

import numpy as np
import torch

from efftrain_ds.observe.journal import Journal, read_journal


def test_lines_are_whole_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal(path, clock=lambda: 12.3456)
    journal.write(
        "stage",
        step=np.int64(7),
        loss=torch.tensor(1.5),
        norms=np.array([1.0, 2.0], dtype=np.float32),
        labels=torch.tensor([[1, 2]]),
        bad=float("nan"),
        settings={"bandwidth": np.int32(96), 3: (True, None)},
        path=Path("x/y"),
    )
    assert json.loads(path.read_text()) == {  # read before close: flushed
        "time": 12.346,
        "step": 7,
        "event": "stage",
        "loss": 1.5,
        "norms": [1.0, 2.0],
        "labels": [[1, 2]],
        "bad": "nan",
        "settings": {"bandwidth": 96, "3": [True, None]},
        "path": "x/y",
    }
    journal.close()
    journal.write("late")
    assert len(list(read_journal(path))) == 1


def test_resume_appends_and_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.write("start", step=0)
    first.write("stage", step=5)
    first.close()
    with path.open("a") as file:
        file.write('{"time": 1, "ste')  # killed while writing
    second = Journal(path)
    second.resume(3, checkpoint="step-00000003")
    second.close()
    events = list(read_journal(path))
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("stage", 5), ("resume", 3)]
    assert events[-1]["checkpoint"] == "step-00000003"


def test_switched_off_touches_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "journal.jsonl", enabled=False)
    journal.write("start")
    journal.close()
    assert list(tmp_path.iterdir()) == []
