from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from efftrain_ds.observe.tensorboard import TensorBoard


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tb")
    assert board.enabled
    board.scalars({"loss/train": 4.5, "stage/bandwidth": 96}, 10)
    board.image("batch", np.zeros((4, 6, 3), np.uint8), 10)
    board.text("plan", "stage  B\n1      96")
    figure = SimpleNamespace(savefig=lambda file, format: Image.new("RGB", (7, 5)).save(file, format=format))
    board.figure("curve", figure, 10)
    board.close()
    board.scalars({"loss/train": 1.0}, 11)  # after close: nothing
    events = read(tmp_path / "tb")
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(10, 4.5)]
    assert [(e.step, e.value) for e in events.Scalars("stage/bandwidth")] == [(10, 96.0)]
    picture = events.Images("batch")[0]
    assert (picture.height, picture.width) == (4, 6)
    assert (events.Images("curve")[0].height, events.Images("curve")[0].width) == (5, 7)
    text = events.Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    stage  B\n    1      96"


def test_resume_hides_the_steps_that_were_lost(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    for step in range(5):
        first.scalars({"loss": float(step)}, step)
    first.close()
    second = TensorBoard(tmp_path, purge_step=3)
    second.scalars({"loss": 30.0}, 3)
    second.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize(("enabled", "rank"), [(False, 0), (True, 1)])
def test_off_or_another_rank_writes_nothing(tmp_path: Path, enabled: bool, rank: int) -> None:
    board = TensorBoard(tmp_path / "tb", enabled, rank)
    board.scalars({"x": 1.0}, 0)
    board.text("t", "t")
    board.flush()
    board.close()
    assert not (tmp_path / "tb").exists()
    assert board.command == f"tensorboard --logdir {tmp_path / 'tb'}"
