import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from efftrain_ds.core.errors import ShardError
from efftrain_ds.data.crops import SmallCrops, crop_boxes, eval_resize, resized_crop, scale_box
from efftrain_ds.data.decode import decode
from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard, load_manifest
from efftrain_ds.data.reader import ShardReader, check_shards


def write_split(folder, payloads_by_shard):
    """Tar shards with the given payloads; label = running number modulo 10."""
    rows, shards = [], []
    for number, payloads in enumerate(payloads_by_shard):
        path = folder / f"shard-{number:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for k, payload in enumerate(payloads):
                for suffix, data in (("bin", payload), ("cls", b"0")):
                    info = tarfile.TarInfo(f"{number:03d}{k:05d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".bin"):
                    rows.append((number, member.offset_data, member.size, len(rows) % 10, 8, 8))
        data = path.read_bytes()
        shards.append(Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), len(payloads)))
    table = np.array(rows, dtype=ROW)
    (folder / INDEX).write_bytes(table.tobytes())
    Manifest(folder, "train", tuple("0123456789"), tuple(shards), len(rows), "").write()
    return load_manifest(folder)


@pytest.fixture
def split(tmp_path):
    payloads = [[f"{s}/{k}".encode() * (1 + k) for k in range(n)] for s, n in enumerate((3, 0, 5, 1))]
    return write_split(tmp_path, payloads), [p for shard in payloads for p in shard]


def test_reads_every_payload_and_label_in_any_order(split):
    manifest, payloads = split
    reader = ShardReader(manifest, max_open=2)
    ids = np.array([8, 0, 4, 7, 0, 3])
    assert reader.read(ids) == [(payloads[i], i % 10) for i in ids]
    assert len(reader._files) <= 2
    reader.close()
    assert reader.read(range(9)) == [(payload, i % 10) for i, payload in enumerate(payloads)]


def test_a_pickled_reader_carries_neither_files_nor_the_table(split):
    manifest, payloads = split
    reader = ShardReader(manifest)
    reader.read([0])
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._files
    assert "table" not in vars(copy.manifest)
    assert copy.read([5]) == [(payloads[5], 5)]


def test_payload_beyond_the_end_names_file_and_offset(split):
    reader = ShardReader(split[0])
    with pytest.raises(ShardError, match=r"shard-000\.tar: offset 100: \d+ bytes read, the index says 9999999"):
        reader.payload(0, 100, 9_999_999)
    with pytest.raises(ShardError, match="names shard 4, there are 4"):
        reader.payload(4, 0, 1)


@pytest.mark.parametrize("damage", ["missing", "member boundary", "inside a header", "one byte", "longer"])
def test_damaged_shard_files_are_found_by_size(split, damage):
    manifest = split[0]
    path = manifest.shard_path(2)
    data = path.read_bytes()
    check_shards(manifest)
    cut = {"member boundary": data[:1024], "inside a header": data[:700], "one byte": data[:-1], "longer": data + b"x"}
    path.unlink()
    if damage != "missing":
        path.write_bytes(cut[damage])
    with pytest.raises(ShardError, match=r"1 of 4 shards(.|\n)*shard-002\.tar"):
        check_shards(manifest)


def encoded(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    y, x = np.mgrid[0:40, 0:56]
    return Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], axis=-1).astype(np.uint8))


def test_lossless_formats_decode_exactly(picture):
    for fmt in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(decode(encoded(picture, fmt)), np.asarray(picture))


def test_jpeg_equals_pillow_and_ignores_the_orientation(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to display"
    for options in ({}, {"progressive": True}, {"exif": exif.tobytes()}):
        payload = encoded(picture, "JPEG", quality=92, **options)
        reference = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")).astype(int)
        assert decode(payload).shape == (40, 56, 3)
        assert np.abs(decode(payload) - reference).max() <= 1


def test_grey_palette_cmyk_alpha_and_16_bit_become_rgb(picture):
    grey = decode(encoded(picture.convert("L"), "PNG"))
    assert grey.shape == (40, 56, 1)
    assert np.array_equal(grey[:, :, 0], np.asarray(picture.convert("L")))
    palette = picture.quantize(16)
    assert np.array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    alpha = picture.copy()
    alpha.putalpha(7)
    assert np.array_equal(decode(encoded(alpha, "PNG")), np.asarray(picture))
    cmyk = decode(encoded(picture.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(cmyk - np.asarray(picture)).mean() < 8
    assert decode(encoded(picture.convert("L"), "JPEG")).shape == (40, 56, 3)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    assert np.array_equal(decode(encoded(deep, "PNG"))[:, :, 0], np.asarray(picture.convert("L")))


def test_damaged_images_raise(picture):
    jpeg, png = encoded(picture, "JPEG"), encoded(picture, "PNG")
    for payload in (jpeg[: len(jpeg) // 2], png[: len(png) // 2], b"\xff\xd8\xff" + bytes(range(200)), b"text", b"\0"):
        with pytest.raises(ShardError, match="cannot be decoded"):
            decode(payload)


def test_crop_boxes_follow_the_rules_of_random_resized_crop():
    n = 20_000
    width, height = np.full(n, 100), np.full(n, 80)
    boxes = crop_boxes(1, np.arange(n), width, height, (0.3, 0.5), (0.75, 4 / 3))
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 80).all()
    assert (left + w <= 100).all()
    area = h * w / 8000
    assert area.min() > 0.29
    assert area.max() < 0.51
    assert abs(area.mean() - 0.4) < 0.005
    assert abs(np.log(w / h).mean()) < 0.01
    # Placement is uniform over all places, borders included.
    assert np.abs((top / np.maximum(80 - h, 1)).mean() - 0.5) < 0.01
    assert ((left + w) == 100).any()
    assert (left == 0).any()
    again = crop_boxes(1, np.array([17, 4]), width[:2], height[:2], (0.3, 0.5), (0.75, 4 / 3))
    assert np.array_equal(again, boxes[[17, 4]])


@pytest.mark.parametrize(("width", "height"), [(400, 20), (20, 400), (100, 99)])
def test_crop_fallback_equals_torchvision(width, height):
    scale, ratio = (1.5, 1.6), (0.75, 4 / 3)  # never fits
    box = crop_boxes(0, np.array([3]), np.array([width]), np.array([height]), scale, ratio)[0]
    expected = RandomResizedCrop.get_params(torch.zeros(3, height, width), list(scale), list(ratio))
    assert tuple(box) == tuple(expected)


def test_scaled_box_covers_the_same_part_of_a_rendition():
    assert scale_box((10, 20, 40, 60), (100, 200), (50, 100)) == (5, 10, 20, 30)
    assert scale_box((0, 0, 100, 200), (100, 200), (33, 67)) == (0, 0, 33, 67)
    assert scale_box((99, 199, 1, 1), (100, 200), (10, 20)) == (9, 19, 1, 1)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resized_crop_equals_torchvision(picture, mode):
    pixels = np.array(picture)
    out = torch.zeros(3, 24, 24, dtype=torch.uint8)
    for box in ((3, 5, 30, 41), (0, 0, 40, 56), (7, 9, 6, 5)):
        resized_crop(pixels, box, out, mode)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        expected = tv.resized_crop(image, *box, [24, 24], InterpolationMode(mode), antialias=True)
        assert (out.int() - expected.int()).abs().max() <= 1
    grey = pixels[:, :, :1].copy()
    resized_crop(grey, (3, 5, 30, 41), out, mode)
    rgb = torch.zeros_like(out)
    resized_crop(np.repeat(grey, 3, axis=2), (3, 5, 30, 41), rgb, mode)
    assert (out.int() - rgb.int()).abs().max() <= 1
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resolution", [16, 32])
def test_small_boxes_in_one_go_equal_one_by_one_in_any_company(mode, resolution):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (44, 44, 3), dtype=np.uint8)
    colour[:22] = np.where(colour[:22] > 127, 255, 0)  # overshoot beyond 0..255
    small = SmallCrops(resolution, mode)
    boxes = [(k % 4, k % 3, h, w) for k, (h, w) in enumerate((h, w) for h in (1, 7, 16, 30, 40) for w in (2, 19, 31))]
    boxes = [box for box in boxes if small.fits(box)]
    assert len(boxes) >= 9
    sources = [colour if k % 2 else colour[:, :, :1].copy() for k in range(len(boxes))]
    cuts = [p[t : t + h, x : x + w] for p, (t, x, h, w) in zip(sources, boxes, strict=True)]
    together = torch.zeros(len(boxes), 3, resolution, resolution, dtype=torch.uint8)
    alone, single = torch.zeros_like(together), torch.zeros_like(together)
    small.run(cuts, list(range(len(cuts))), together)
    for i, cut in enumerate(cuts):
        small.run([cut], [i], alone)
        resized_crop(sources[i], boxes[i], single[i], mode)
    assert torch.equal(together, alone)
    difference = (together.int() - single.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_shrinking_and_large_boxes_are_left_to_the_kernel():
    small = SmallCrops(8, "bicubic")
    assert small.fits((0, 0, 8, 5))
    assert not small.fits((0, 0, 40, 5))
    assert not SmallCrops(64, "bicubic").fits((0, 0, 41, 20))
    assert not SmallCrops(224, "bicubic").fits((0, 0, 8, 8))


def test_eval_resize_takes_the_centre_of_the_resized_picture(picture):
    pixels = eval_resize(picture, 28, 0.875, "bicubic")
    expected = np.asarray(picture.resize((44, 32), Image.Resampling.BICUBIC))[2:30, 8:36]
    assert np.array_equal(pixels, expected)
    tall = eval_resize(picture.transpose(Image.Transpose.ROTATE_90), 32, 1.0, "bilinear")
    assert tall.shape == (32, 32, 3)
