"""Maps of masks and units: the numbers behind the pictures, and where they end up."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from efftrain_ds.core.method import Method
from efftrain_ds.methods.svite import pictures
from efftrain_ds.observe import maps
from efftrain_ds.observe.report.parts import maps as report_maps
from efftrain_ds.observe.report.parts import pictures as report_pictures
from efftrain_ds.observe.report.run import read_run
from efftrain_ds.train_logs import RunLogs


def found_colors(picture: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(c) for c in picture.flatten(1).t().tolist()}


def area(picture: torch.Tensor, color: np.ndarray) -> int:
    return int((picture == torch.from_numpy(color).view(3, 1, 1)).all(0).sum())


def test_density_of_squares_with_a_smaller_edge() -> None:
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[:2, :3] = True
    mask[4, 6] = True
    expected = [[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert np.allclose(maps.block_density(mask, 2), expected)
    kernel = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    assert maps.block_density(kernel, 4).shape == (1, 3)


def test_the_colour_scale_ends_where_it_should() -> None:
    assert maps.colors(np.array([[0.0, 0.5, 1.0]])).tolist() == [[[68, 1, 84], [33, 145, 140], [253, 231, 37]]]


def test_a_mask_map_shows_dead_rows_at_full_size() -> None:
    mask = torch.ones(128, 64, dtype=torch.bool)
    mask[:32] = False
    picture = maps.mask_map({"blocks.0.mlp.fc1.weight": mask, "head.weight": torch.ones(10, 64, dtype=torch.bool)})
    assert (picture.dtype, picture.shape[0]) == (torch.uint8, 3)
    # one entry is 2 x 2 pixels; the colour scale has each of its ends once more, a column of 14
    assert abs(area(picture, np.array([68, 1, 84], dtype=np.uint8)) - 4 * 32 * 64) <= 2 * 14
    assert abs(area(picture, np.array([253, 231, 37], dtype=np.uint8)) - 4 * (96 + 10) * 64) <= 2 * 14


def test_a_large_mask_is_averaged_down() -> None:
    picture = maps.mask_map({"a.weight": torch.ones(2048, 512, dtype=torch.bool)})
    assert picture.shape[1] < 256 + 80
    assert abs(area(picture, np.array([253, 231, 37], dtype=np.uint8)) - 256 * 64) <= 2 * 14


def test_states_of_units() -> None:
    ever = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.bool)
    states = maps.unit_states([0, 4], 6, ever=ever, before=[0, 2])
    assert states.tolist() == [maps.LIVE, maps.PAST, maps.DROPPED, maps.UNUSED, maps.GROWN, maps.UNUSED]
    assert maps.unit_states([], 2).tolist() == [maps.UNUSED] * 2


def test_a_unit_map_shows_every_unit() -> None:
    rows = {"blocks.0": torch.tensor([4, 4, 3, 2, 1, 0]), "blocks.1": torch.tensor([4, 4, 4, 4, 0, 0])}
    picture = pictures.unit_map(rows)
    cell = 23 * 23  # 24 pixels less the line
    legend = 14 * 14
    for state, count in ((maps.LIVE, 6), (maps.GROWN, 1), (maps.DROPPED, 1), (maps.PAST, 1), (maps.UNUSED, 3)):
        assert area(picture, maps._STATE_COLORS[state]) == count * cell + legend
    many = pictures.unit_map({"blocks.0": torch.full((1537,), maps.LIVE)})
    assert area(many, maps._STATE_COLORS[maps.LIVE]) == 1537 * 16 + legend
    assert many.shape[2] < 1000


class Drawing(Method):
    name = "drawing"

    def __init__(self, broken: bool):
        super().__init__(None)
        self.broken = broken

    def pictures(self, ctx):
        if self.broken:
            raise ValueError("no pen")
        return {"sparse/heads": torch.full((3, 4, 6), ctx, dtype=torch.uint8)}


def test_the_trainer_keeps_pictures_of_methods(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    config = SimpleNamespace(efftrain=SimpleNamespace(run=SimpleNamespace(output=str(tmp_path))))
    logs = RunLogs(config, rank=0, world=1, write=True, train_seconds=lambda: 0.0)
    shown = []
    logs.board = SimpleNamespace(image=lambda tag, picture, step: shown.append((tag, picture.shape, step)))
    with caplog.at_level(logging.WARNING):
        logs.pictures([Drawing(True), Drawing(False), Method(None)], 9, 30)
    assert "no picture of drawing at step 30: ValueError: no pen" in caplog.text
    assert shown == [("sparse/heads", (4, 6, 3), 30)]
    with Image.open(tmp_path / "pictures" / "sparse-heads-step-00000030.png") as image:
        assert (np.asarray(image) == 9).all()
    other = RunLogs(config, rank=1, world=2, write=True, train_seconds=lambda: 0.0)
    other.pictures([Drawing(False)], 9, 31)
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_the_report_shows_them_apart_from_batches(tmp_path) -> None:
    events = [{"event": "start", "step": 0}, {"event": "end", "step": 100}]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (tmp_path / "pictures").mkdir()
    names = [f"sparse-masks-step-{i:08d}" for i in range(0, 100, 10)]
    for name in [*names, "sparse-heads-step-00000050", "batch-step-00000050"]:
        Image.new("RGB", (12, 12)).save(tmp_path / "pictures" / f"{name}.png")
    run = read_run(tmp_path)
    page = report_maps(run)
    assert page.count("<figure>") == 4 + 1
    assert [page.count(f"<h3>{kind}</h3>") for kind in ("sparse-masks", "sparse-heads", "batch")] == [1, 1, 0]
    assert "step 0<" in page
    assert "step 90<" in page
    assert report_pictures(run).count("<figure>") == 1
