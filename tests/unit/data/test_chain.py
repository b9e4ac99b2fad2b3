"""Flip, random erasing, normalisation and the whole device chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efftrain_ds.core.batch import Batch
from efftrain_ds.data.augment import DeviceAugment, RandomErasing, horizontal_flip, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(count: int, height: int = 24, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def batch_of(positions: np.ndarray) -> Batch:
    """A batch whose image and label at a position are the same whatever the batch is."""
    images = torch.cat([pixels(200)[p % 200][None] for p in positions])
    labels = torch.from_numpy(positions) % 7
    return Batch(images, labels, torch.ones(len(labels), dtype=torch.bool), torch.from_numpy(positions))


def chain(**changes) -> DeviceAugment:
    return DeviceAugment(seed=4, randaugment={"magnitude": 9.0, "num_ops": 2}, **changes)


def test_flip_depends_on_seed_and_position_only():
    images, positions = pixels(200), np.arange(200)
    out = horizontal_flip(images, positions, 0)
    flipped = (out == images.flip(3)).flatten(1).all(1)
    assert torch.equal(out[~flipped], images[~flipped])
    assert 70 < flipped.sum() < 130
    some = np.array([150, 3, 77])
    assert torch.equal(horizontal_flip(images[some], positions[some], 0), out[some])
    assert not torch.equal(horizontal_flip(images, positions, 1), out)
    assert torch.equal(horizontal_flip(images, positions, 0, 1.0), images.flip(3))
    assert torch.equal(horizontal_flip(images, positions, 0, 0.0), images)


def test_erasing_boxes():
    positions = np.arange(20_000)
    boxes, offsets = RandomErasing(0.25).draw(positions, 0, 64, 96)
    top, left, height, width = boxes[boxes[:, 2] > 0].T
    assert abs(len(top) / 20_000 - 0.25) < 0.01
    assert (top + height <= 64).all()
    assert (left + width <= 96).all()
    assert top.min() == left.min() == 0
    assert (top + height).max() == 64
    assert (left + width).max() == 96
    share = height * width / (64 * 96)
    assert 0.015 < share.min() < 0.025
    assert 0.32 < share.max() < 0.35
    ratio = height / width
    assert 0.2 < ratio.min() < 0.35
    assert abs(np.log(ratio[share < 0.1]).mean()) < 0.1
    some = np.array([9, 19_000, 4])
    again = RandomErasing(0.25).draw(positions[some], 0, 64, 96)
    assert np.array_equal(again[0], boxes[some])
    assert np.array_equal(again[1], offsets[some])
    assert not np.array_equal(RandomErasing(0.25).draw(positions, 1, 64, 96)[0], boxes)


def test_erasing_noise():
    images = torch.full((64, 3, 24, 32), 7.0)
    positions = np.arange(64)
    out = RandomErasing(0.9)(images.clone(), positions, 0)
    boxes, _ = RandomErasing(0.9).draw(positions, 0, 24, 32)
    noise = []
    for image, (top, left, height, width) in zip(out, boxes, strict=True):
        inside = torch.zeros(24, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (image[:, ~inside] == 7).all()
        noise.append(image[:, inside].flatten())
    values = torch.cat(noise)
    assert (values != 7).all()
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03
    assert len(torch.unique(values)) > 0.9 * len(values)
    some = np.array([40, 2, 33])
    assert torch.equal(RandomErasing(0.9)(images[:3].clone(), positions[some], 0), out[some])
    assert not torch.equal(RandomErasing(0.9)(images.clone(), positions, 1), out)


def test_erasing_noise_does_not_depend_on_earlier_image_sizes():
    fresh, used = RandomErasing(1.0), RandomErasing(1.0)
    positions = np.arange(8)
    used(torch.zeros(8, 3, 96, 96), positions, 0)
    small = torch.zeros(8, 3, 32, 32)
    assert torch.equal(used(small.clone(), positions, 0), fresh(small.clone(), positions, 0))
    large = torch.zeros(8, 3, 128, 128)
    assert torch.equal(used(large.clone(), positions, 0), RandomErasing(1.0)(large.clone(), positions, 0))


def test_erasing_on_a_device_equals_the_host(monkeypatch):
    images, positions = torch.randn(32, 3, 24, 32), np.arange(32)
    expected = RandomErasing(0.5)(images.clone(), positions, 0)
    erasing = RandomErasing(0.5)
    monkeypatch.setattr(erasing, "_on_host", lambda device: False)
    assert torch.equal(erasing(images.clone(), positions, 0), expected)


def test_normalize():
    images = pixels(4)
    expected = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normalize(images, MEAN, STD, torch.float32), expected, rtol=0, atol=2e-6)
    assert normalize(images, MEAN, STD, torch.bfloat16).dtype == torch.bfloat16


def test_before_is_pure_in_seed_and_position():
    positions = np.arange(10, 50)
    out = chain().before(batch_of(positions), 5.0)
    assert out.images.dtype == torch.uint8
    assert (out.mean, out.std) == (MEAN, STD)
    assert not torch.equal(out.images, batch_of(positions).images)
    some = positions[[30, 0, 7]]
    assert torch.equal(chain().before(batch_of(some), 5.0).images, out.images[[30, 0, 7]])
    assert not torch.equal(chain().before(batch_of(positions), 9.0).images, out.images)
    assert torch.equal(chain().before(batch_of(positions)).images, chain().before(batch_of(positions), 9.0).images)


def test_after_normalizes_erases_and_mixes_the_same_again():
    positions = np.arange(40)
    first = chain().after(chain().before(batch_of(positions)), step=3, micro=1)
    again = chain().after(chain().before(batch_of(positions)), step=3, micro=1)
    assert first.normalized
    assert torch.equal(first.images, again.images)
    assert first.lam == again.lam < 1
    assert torch.equal(first.labels_b, first.labels.flip(0))
    other = chain().after(chain().before(batch_of(positions)), step=3, micro=2)
    assert other.lam != first.lam


def test_after_takes_images_that_a_method_has_normalized():
    positions = np.arange(12)
    plain = chain(erasing=0, mixup=0, cutmix=0)
    batch = plain.before(batch_of(positions))
    expected = normalize(batch.images, MEAN, STD, torch.float32)
    assert torch.equal(plain.after(batch, 0, 0).images, expected)
    assert torch.equal(plain.after(batch, 0, 0).images, expected)
    assert batch.lam == 1
    assert batch.labels_b is None


def test_evaluate_only_normalizes():
    batch = Batch(pixels(3))
    out = chain(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).evaluate(batch)
    torch.testing.assert_close(out.images, (pixels(3) / 255 - 0.5) / 0.25, rtol=0, atol=2e-6)


def test_everything_off_changes_nothing():
    augment = DeviceAugment(seed=0, flip=0, randaugment=None, erasing=0, mixup=0, cutmix=0)
    batch = augment.before(batch_of(np.arange(5)))
    assert torch.equal(batch.images, pixels(200)[:5])


def test_geometry_fills_with_the_mean():
    assert chain().randaugment.fill == (124, 116, 104)


def test_positions_are_required_and_stay_on_the_host():
    with pytest.raises(AssertionError, match="positions"):
        chain().before(Batch(pixels(2)))
    moved = batch_of(np.arange(3)).to("meta")
    assert moved.images.device.type == "meta"
    assert moved.positions.device.type == "cpu"


def test_erasing_probability_of_one_step():
    positions = np.arange(60)
    plain = {"flip": 0, "mixup": 0, "cutmix": 0}

    def run(configured: float, *arguments) -> torch.Tensor:
        augment = DeviceAugment(seed=4, randaugment=None, erasing=configured, **plain)
        return augment.after(batch_of(positions), 3, 1, *arguments).images

    whole = run(0.0)
    assert torch.equal(run(0.4), run(0.4, None))
    assert torch.equal(run(0.4, 0.0), whole)
    for configured in (0.0, 0.25):
        assert torch.equal(run(configured, 0.4), run(0.4))
    few, many = ((run(0.0, p) != whole).flatten(1).any(1) for p in (0.2, 0.6))
    assert 0 < few.sum() < many.sum() < 60
    assert not (few & ~many).any()  # a smaller probability erases some of the same samples, with the same boxes
    assert torch.equal(run(0.2)[few], run(0.6)[few])
