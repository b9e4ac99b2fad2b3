"""Device RandAugment against Pillow and timm, and its draws."""

from __future__ import annotations

import gzip
import math
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_aa

from efftrain_ds.data.augment import OPS, Drawn, RandAugment, apply_ops, level_arguments
from efftrain_ds.data.augment.randaugment import IDLE
from efftrain_ds.data.augment.tables import histograms
from efftrain_ds.data.augment.transfer import Transfer

FILL = (124, 116, 104)
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
TIMM = {name.removesuffix("Increasing"): name for name in timm_aa._RAND_INCREASING_TRANSFORMS}
NO_ARGUMENT = ("Invert", "AutoContrast", "Equalize")
WHOLE = ("Posterize", "Solarize", "SolarizeAdd")


def natural(count: int, height: int, width: int) -> torch.Tensor:
    """[count, 3, height, width] uint8 images with the 1/f spectrum and the correlated channels of photographs."""
    generator = torch.Generator().manual_seed(0)
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2).sqrt()
    frequency[0, 0] = 1 / max(height, width)
    noise = torch.randn(count, 3, height, width, generator=generator)
    image = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    image = 0.4 * image + image.mean(1, keepdim=True)
    image = (image - image.mean((1, 2, 3), keepdim=True)) / image.std((1, 2, 3), keepdim=True)
    return (image * 30 + 120).clamp(0, 255).round().to(torch.uint8)


def clothes(count: int) -> torch.Tensor:
    """[count, 3, 28, 28] uint8 of the bundled data set, or natural images where it is not installed."""
    path = resources.files("efftrain_ds") / "data" / "samples" / "fashion_mnist" / "train-images-idx3-ubyte.gz"
    if not path.is_file():
        return natural(count, 28, 28)
    pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16, count=count * 28 * 28)
    return torch.from_numpy(pixels.reshape(count, 1, 28, 28).copy()).repeat(1, 3, 1, 1)


def images_of(kind: str) -> torch.Tensor:
    if kind == "clothes":
        return clothes(24)
    return natural(24, 64, 64) if kind == "square" else natural(24, 48, 80)


def pillow(image: torch.Tensor, name: str, argument: float) -> torch.Tensor:
    arguments = () if name in NO_ARGUMENT else (int(argument),) if name in WHOLE else (float(argument),)
    source = Image.fromarray(image.permute(1, 2, 0).numpy())
    out = timm_aa.NAME_TO_OP[TIMM[name]](source, *arguments, fillcolor=FILL, resample=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(out)).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["square", "oblong", "clothes"])
@pytest.mark.parametrize("name", OPS)
def test_operation_equals_pillow(name, kind):
    images = images_of(kind)
    count = len(images)
    ops = np.full((1, count), OPS.index(name))
    # Irrational levels: no output pixel centre falls exactly on the image edge, where either answer is right.
    levels = math.sqrt(2) * np.linspace(0.1, 7, count)[None]
    arguments = level_arguments(ops, levels, np.arange(count)[None] % 2 == 0)
    ours = apply_ops(images, Drawn(ops, arguments), FILL).int()
    reference = torch.stack([pillow(image, name, arguments[0, i]) for i, image in enumerate(images)]).int()
    difference = (ours - reference).abs()
    if name in GEOMETRY:
        assert 10 * math.log10(255**2 / difference.float().square().mean().clamp(min=1e-9)) > 48
        assert difference.float().quantile(0.999) <= 1
    else:
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-4
    assert (ours != images.int()).any() or (name, kind) == ("Color", "clothes")  # grey images


@pytest.mark.parametrize("value", [0, 7, 255])
def test_flat_images_equal_pillow(value):
    images = torch.full((len(OPS), 3, 16, 16), value, dtype=torch.uint8)
    images[:, 1] = 255 - value
    ops = np.arange(len(OPS))[None]
    arguments = level_arguments(ops, np.full(ops.shape, 6.3), np.zeros(ops.shape, dtype=bool))
    ours = apply_ops(images, Drawn(ops, arguments), FILL)
    for i, name in enumerate(OPS):
        assert torch.equal(ours[i], pillow(images[i], name, arguments[0, i])), name


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_levels_equal_timm(name, increasing, monkeypatch):
    full = name + "Increasing" if increasing and name + "Increasing" in timm_aa.LEVEL_TO_ARG else name
    function = timm_aa.LEVEL_TO_ARG[full]
    levels = np.linspace(0, 10, 201)
    for negate in (False, True):
        monkeypatch.setattr(timm_aa, "_randomly_negate", lambda value, negate=negate: -value if negate else value)
        ours = level_arguments(np.full(201, OPS.index(name)), levels, np.full(201, negate), increasing)
        if function is None:
            continue
        theirs = np.array([np.ravel(function(level, {}))[0] for level in levels])  # some return tuples, some integers
        if name == "Posterize":
            theirs = theirs.clip(1)  # zero bits raise in Pillow 13
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_posterize_keeps_a_bit_and_changes_nothing_else():
    images = clothes(2)
    ops = np.full((1, 2), OPS.index("Posterize"))
    arguments = level_arguments(ops, np.full((1, 2), 10.0), np.zeros((1, 2), dtype=bool))
    assert arguments.tolist() == [[1.0, 1.0]]
    assert sorted(apply_ops(images, Drawn(ops, arguments)).unique().tolist()) == [0, 128]


def test_two_layers_compose_and_idle_samples_stay():
    images = natural(30, 32, 32)
    rng = np.random.default_rng(0)
    ops = rng.integers(0, IDLE + 1, (2, 30))
    ops[:, :3] = IDLE
    arguments = level_arguments(ops, np.full(ops.shape, 6.3), rng.random(ops.shape) < 0.5)
    before = images.clone()
    both = apply_ops(images, Drawn(ops, arguments))
    first = apply_ops(images, Drawn(ops[:1], arguments[:1]))
    assert torch.equal(both, apply_ops(first, Drawn(ops[1:], arguments[1:])))
    assert torch.equal(images, before)
    assert torch.equal(both[:3], images[:3])
    for i in range(30):
        alone = apply_ops(images[i : i + 1], Drawn(ops[:, i : i + 1], arguments[:, i : i + 1]))
        assert torch.equal(alone[0], both[i])


def test_output_depends_on_seed_and_position_only():
    images = natural(24, 32, 32)
    positions = np.arange(100, 124)
    ra = RandAugment()
    out = ra(images, positions, 5)
    shuffled = np.random.default_rng(0).permutation(24)[:10]
    assert torch.equal(ra(images[shuffled], torch.from_numpy(positions[shuffled]), 5), out[shuffled])
    assert not torch.equal(ra(images, positions, 6), out)
    assert not torch.equal(ra(images, positions + 1, 5), out)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ra(channels_last, positions, 5), out)


def test_fewer_operations_are_a_prefix_of_more():
    positions = np.arange(50)
    two, three = RandAugment(2).draw(positions, 0), RandAugment(3).draw(positions, 0)
    assert np.array_equal(three.ops[:2], two.ops)
    assert np.array_equal(three.arguments[:2], two.arguments)


def test_magnitude_zero_and_ten():
    positions = np.arange(4000)
    ra = RandAugment(num_ops=2, magnitude=9, magnitude_std=0, prob=1.0)
    none, full, default = ra.draw(positions, 0, 0.0), ra.draw(positions, 0, 10.0), ra.draw(positions, 0)
    assert np.array_equal(none.ops, full.ops)
    for name, least, most in (("Rotate", 0, 30), ("ShearX", 0, 0.3), ("TranslateYRel", 0, 0.45), ("Color", 0, 0.9)):
        mine, neutral = none.ops == OPS.index(name), float(name == "Color")
        np.testing.assert_allclose(np.abs(none.arguments[mine] - neutral), least)
        np.testing.assert_allclose(np.abs(full.arguments[mine] - neutral), most)
        np.testing.assert_allclose(np.abs(default.arguments[mine] - neutral), 0.9 * most)
        assert 0.3 < (full.arguments[mine] > neutral).mean() < 0.7
    images = natural(8, 16, 16)
    still = Drawn(np.full((1, 8), OPS.index("Rotate")), np.zeros((1, 8)))
    assert torch.equal(apply_ops(images, still), images)


def test_draw_statistics():
    drawn = RandAugment(num_ops=2, prob=0.5).draw(np.arange(40_000), 3)
    assert abs((drawn.ops != IDLE).mean() - 0.5) < 0.01
    counts = np.bincount(drawn.ops[drawn.ops != IDLE], minlength=len(OPS))
    expected = counts.sum() / len(OPS)
    # 14 degrees of freedom: 36.1 is exceeded with probability 0.001 (and the seed is fixed).
    assert ((counts - expected) ** 2 / expected).sum() < 36.1
    joint = np.histogram2d(drawn.ops[0], drawn.ops[1], bins=IDLE + 1)[0] / 40_000
    assert np.abs(joint - joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)).max() < 0.006
    degrees = np.abs(drawn.arguments[drawn.ops == OPS.index("Rotate")]) / 3
    assert abs(np.median(degrees) - 9) < 0.05
    assert abs(np.std(degrees[degrees < 9.5]) - 0.36) < 0.06
    assert degrees.max() <= 10


def test_uniform_magnitude():
    drawn = RandAugment(num_ops=1, magnitude=8, magnitude_std=math.inf, prob=1).draw(np.arange(30_000), 0)
    degrees = np.abs(drawn.arguments[drawn.ops == OPS.index("Rotate")]) / 3
    np.testing.assert_allclose(np.quantile(degrees, [0.25, 0.5, 0.75]), [2, 4, 6], atol=0.3)
    assert degrees.max() <= 8


def test_rejects_other_inputs():
    with pytest.raises(AssertionError, match="uint8"):
        RandAugment()(torch.zeros(1, 3, 8, 8), np.zeros(1, int), 0)
    with pytest.raises(AssertionError, match=r"\[N, 3, H, W\]"):
        RandAugment()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), np.zeros(1, int), 0)


def test_both_ways_to_count_agree():
    levels = torch.randint(0, 256, (6, 500), generator=torch.Generator().manual_seed(0)) // 3
    counts = histograms(levels, counting=True)
    assert torch.equal(histograms(levels, counting=False), counts)
    assert torch.equal(counts[2], torch.histc(levels[2].float(), 256, 0, 256).long())


def test_packed_transfer_returns_every_array():
    arrays = [
        np.arange(5),
        np.zeros((0, 2, 3), np.float32),
        np.arange(7, dtype=np.uint8).reshape(1, 7),
        np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 256), np.uint8),
        np.array([-3]),
    ]
    transfer = Transfer()
    for array in arrays:
        transfer.add(array)
    for view, array in zip(transfer.unpack(transfer.pack()), arrays, strict=True):
        assert np.array_equal(view.numpy(), array)
        assert view.numpy().dtype == array.dtype
