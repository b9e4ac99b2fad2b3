from pathlib import Path

import numpy as np
import torch
from PIL import Image

from efftrain_ds.observe.pictures import GAP, batch_picture, denormalize, enlarge, save_png, spectrum, zoomed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RED = np.array([255, 64, 64])


def test_denormalize_inverts_the_normalisation() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    view = (1, 3, 1, 1)
    seen = (pixels.float() / 255 - torch.tensor(MEAN).view(view)) / torch.tensor(STD).view(view)
    assert torch.equal(denormalize(seen, MEAN, STD), pixels)
    assert denormalize(seen + 100, MEAN, STD).eq(255).all()


def test_enlarge_repeats_pixels() -> None:
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    big = enlarge(small, 4)
    assert np.array_equal(big[0, 0], small[0, 0])
    assert np.array_equal(big[::2, ::2], small)
    assert np.array_equal(big[1::2, 1::2], small)
    assert enlarge(small, 5).shape == (5, 5, 3)


def test_spectrum_peaks_where_the_frequency_is() -> None:
    x = torch.arange(32)
    wave = 128 + 100 * torch.cos(2 * torch.pi * 5 * x / 32)
    image = wave.round().to(torch.uint8).expand(3, 32, 32)
    picture = spectrum(image, 32)
    row = picture[16, :, 0].astype(int)
    assert set(np.argsort(row)[-3:]) == {16, 16 - 5, 16 + 5}
    assert (picture[..., 0] == picture[..., 1]).all()  # nothing outlined at full bandwidth


def test_kept_block_is_outlined() -> None:
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    red = (spectrum(image, 16) == RED).all(axis=2)
    assert red.sum() == 4 * 15
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 23, 8, 23)  # frequencies -8..7


def test_grid() -> None:
    original = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    seen = torch.zeros(9, 3, 16, 16)
    picture = batch_picture(original, seen, MEAN, STD, limit=4)
    assert picture.dtype == np.uint8
    assert picture.shape == (4 * 32 + 3 * GAP, 3 * 32 + 2 * GAP, 3)
    second = slice(32 + GAP, 64 + GAP)
    assert np.array_equal(picture[second, :32], original[1].permute(1, 2, 0).numpy())
    assert (picture[second, second] == np.rint(255 * np.array(MEAN)).astype(np.uint8)).all()
    assert (picture[32 : 32 + GAP] == 255).all()


def test_grey_images_and_png(tmp_path: Path) -> None:
    original = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    picture = batch_picture(original, torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16), (0.5,), (0.5,))
    assert np.array_equal(picture[:8, :8, 2], original[0, 0].numpy())
    save_png(picture, tmp_path / "deep" / "batch.png")
    with Image.open(tmp_path / "deep" / "batch.png") as image:
        assert np.array_equal(np.asarray(image), picture)


def test_small_pictures_are_enlarged_by_whole_factors() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(zoomed(picture, 28)[::4, ::4], picture)
    assert zoomed(picture, 28).shape == (8, 8, 3)
    assert zoomed(picture, 224).shape == picture.shape
