import io
import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efftrain_ds.core.errors import ShardError
from efftrain_ds.core.rng import numpy_rng
from efftrain_ds.data import build as build_module
from efftrain_ds.data.audit import audit_shards
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.checks import SampleRejected, check_image, image_size, strip_exif
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.sources import FolderSource, IdxSource, TorchvisionSource, encode_png, torchvision_source


def picture(seed, width=40, height=36, mode="RGB"):
    return Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(width * height * len(mode)))


def encoded(image, kind="JPEG", **options):
    with io.BytesIO() as buffer:
        image.save(buffer, kind, **options)
        return buffer.getvalue()


def make_folder(root, count=24):
    """Images of classes a and c (b is empty), JPEG and PNG, of different sizes, one in a nested folder."""
    for name in ("a", "b", "c/deep"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        image = picture(i, 34 + i, 64 - i)
        where = root / ("a", "c", "c/deep")[i % 3]
        if i % 4:
            (where / f"{i:03d}.JPEG").write_bytes(encoded(image, quality=90))
        else:
            (where / f"{i:03d}.png").write_bytes(encoded(image, "PNG"))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def payloads(folder):
    """[(payload, label)] in the order of the index, read by position."""
    manifest = load_manifest(folder)
    result = []
    for row in manifest.table:
        data = manifest.shard_path(row["shard"]).read_bytes()
        result.append((data[row["offset"] : row["offset"] + row["size"]], int(row["label"])))
    return result


def test_folder_is_packed_byte_for_byte_in_the_order_of_the_seed(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    report = build_shards(source, tmp_path / "out", split="train", samples_per_shard=7, seed=3)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.classes == ("a", "b", "c")
    assert (report.source, report.packed, report.rejected, report.shards) == (24, 24, 0, 4)
    assert [s.n for s in manifest.shards] == [6, 6, 6, 6]
    order = numpy_rng(3, "pack").permutation(24)
    expected = [source.get(int(i)) for i in order]
    assert payloads(tmp_path / "out") == [(item.payload, item.label) for item in expected]
    sides = [Image.open(io.BytesIO(item.payload)).size for item in expected]
    assert [(int(r["width"]), int(r["height"])) for r in manifest.table] == sides
    labels = manifest.table["label"].tolist()
    assert labels != sorted(labels)
    assert report.digest == manifest.digest
    assert report.kinds == {"jpg ycbcr": 18, "png RGB": 6}


def test_result_depends_on_source_and_seed_only(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        build_shards(source, tmp_path / name, split="train", samples_per_shard=9, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert load_manifest(tmp_path / "one").digest != load_manifest(tmp_path / "three").digest
    assert sorted(payloads(tmp_path / "one")) == sorted(payloads(tmp_path / "three"))


def test_workers_change_nothing(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    build_shards(source, tmp_path / "one", split="train", samples_per_shard=9)
    build_shards(source, tmp_path / "two", split="train", samples_per_shard=9, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_are_cut_by_size(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    total = sum(source.size(i) for i in range(len(source)))
    build_shards(source, tmp_path / "out", split="train", shard_bytes=total // 3)
    shards = load_manifest(tmp_path / "out").shards
    assert 4 <= len(shards) <= 5  # headers count too
    largest = max(source.size(i) for i in range(len(source)))
    assert all(s.bytes <= total // 3 + largest + 3 * 512 + 2 * 10240 for s in shards)
    assert sum(s.n for s in shards) == 24


BAD = {
    "cut.jpg": (encoded(picture(1))[:700], "decode"),
    "noise.jpg": (bytes(np.random.default_rng(0).integers(0, 256, 900, dtype=np.uint8)), "format"),
    "noisy_inside.jpg": (encoded(picture(2))[:650] + bytes(range(256)) * 4, "decode"),
    "png_named.jpg": (encoded(picture(3), "PNG"), "suffix"),
    "zero.png": (b"", "empty"),
    "cut.png": (encoded(picture(4), "PNG")[:900], "decode"),
    "small.png": (encoded(picture(5, 40, 31), "PNG"), "side"),
}


def test_bad_images_are_rejected_with_a_reason_and_counted(tmp_path):
    root = make_folder(tmp_path / "src", 12)
    for name, (payload, _) in BAD.items():
        (root / "a" / name).write_bytes(payload)
    report = build_shards(FolderSource(root), tmp_path / "out", split="train", samples_per_shard=5)
    assert (report.source, report.packed, report.rejected) == (12 + len(BAD), 12, len(BAD))
    assert report.reasons == {"decode": 3, "empty": 1, "format": 1, "side": 1, "suffix": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {Path(r["name"]).name: r["reason"] for r in lines} == {name: why for name, (_, why) in BAD.items()}
    assert all(r["detail"] for r in lines)
    keys = {r["key"] for r in lines}
    assert len(keys) == len(BAD)  # a rejected image leaves a gap in the keys
    assert audit_shards(tmp_path / "out", decode=True).ok


def test_labels_outside_the_classes_are_rejected(tmp_path):
    write_idx(tmp_path, np.arange(5 * 81, dtype=np.uint32).astype(np.uint8).reshape(5, 9, 9), [0, 1, 2, 1, 0])
    source = IdxSource(tmp_path / "images", tmp_path / "labels", classes=["x", "y"])
    report = build_shards(source, tmp_path / "out", split="val")
    assert (report.packed, report.reasons) == (4, {"label": 1})


def test_exif_goes_and_pixels_stay(tmp_path):
    image = picture(7)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated
    payload = encoded(image, exif=exif, quality=80)
    plain = encoded(image, quality=80)
    assert b"Exif" in payload
    checked = check_image(payload, "JPG", 8)
    assert checked.exif
    assert b"Exif" not in checked.payload
    assert checked.payload == plain  # the same file as if it had been written without
    assert (checked.width, checked.height) == (40, 36)
    assert not check_image(plain, ".jpeg").exif
    assert check_image(plain, "jpg").payload == plain


def test_strip_exif_leaves_broken_headers_alone():
    payload = encoded(picture(8), exif=Image.Exif())
    for cut in (2, 3, 5, 17, 40):
        assert strip_exif(payload[:cut])[0] == payload[:cut]


def test_colour_modes_are_named():
    assert check_image(encoded(picture(1, mode="L")), "jpg").kind == "jpg gray"
    assert check_image(encoded(picture(1, mode="CMYK")), "jpg").kind in ("jpg cmyk", "jpg ycck")
    assert check_image(encoded(picture(1), progressive=True), "jpg").kind == "jpg ycbcr progressive"
    assert check_image(encoded(picture(1), "WEBP"), "webp").kind == "webp RGB"
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"):
        assert image_size(encoded(picture(1), kind)) == (40, 36)
    with pytest.raises(SampleRejected, match="no known image"):
        image_size(b"GIF89a....")


def test_duplicates_are_reported_and_packed(tmp_path):
    root = make_folder(tmp_path / "src", 6)
    (root / "b" / "copy.png").write_bytes((root / "a" / "000.png").read_bytes())
    report = build_shards(FolderSource(root), tmp_path / "out", split="train")
    assert (report.packed, report.duplicates) == (7, 1)
    (line,) = (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert {found["name"], found["same_as"]["name"]} == {"a/000.png", "b/copy.png"}
    assert {found["label"], found["same_as"]["label"]} == {0, 1}
    assert found["same_as"]["key"] < found["key"]


def write_idx(folder, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
    (folder / "labels").write_bytes(struct.pack(">2I", 0x801, len(labels)) + bytes(labels))


class Dies:
    """Source that ends its own process, as a power cut would, when image `at` is asked for."""

    def __init__(self, source, at):
        self.source, self.at, self.calls = source, at, 0
        self.classes, self.min_side = source.classes, source.min_side
        self.size, self.fingerprint = source.size, source.fingerprint

    def __len__(self):
        return len(self.source)

    def get(self, i):
        self.calls += 1
        if self.calls > self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.get(i)


def killed_build(source, out, function=None, at=0):
    """Build in a child process that is killed at image `at`, or at call `at` of ``os.<function>``."""
    child = os.fork()
    if child == 0:
        try:
            if function is None:
                source = Dies(source, at)
            else:
                real, calls = getattr(os, function), []

                def killing(*args, **kwargs):
                    calls.append(1)
                    if len(calls) > at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                setattr(os, function, killing)
            build_shards(source, out, split="train", samples_per_shard=5)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_builds_go_on_to_the_same_bytes(tmp_path):
    root = make_folder(tmp_path / "src")
    (root / "a" / "bad.jpg").write_bytes(b"nothing")
    (root / "b" / "copy.png").write_bytes((root / "a" / "000.png").read_bytes())
    source = FolderSource(root)
    build_shards(source, tmp_path / "whole", split="train", samples_per_shard=5)
    expected = contents(tmp_path / "whole")
    draw = np.random.default_rng(0)
    points = [(None, int(at)) for at in draw.choice(26, 3, replace=False)]
    points += [("replace", int(at)) for at in draw.choice(12, 5, replace=False)]
    points += [("fsync", int(at)) for at in draw.choice(22, 5, replace=False)]
    broken = tmp_path / "broken"  # one folder that is hit again and again, and a fresh one for each point
    for number, (function, at) in enumerate(points):
        fresh = tmp_path / f"fresh{number}"
        assert killed_build(source, fresh, function, at), (function, at)
        assert not (fresh / "manifest.json").exists()
        build_shards(source, fresh, split="train", samples_per_shard=5)
        assert contents(fresh) == expected, (function, at)
        killed_build(source, broken, function, at % 4)
    build_shards(source, broken, split="train", samples_per_shard=5)
    assert contents(broken) == expected


def test_half_a_journal_line_is_forgotten(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    build_shards(source, tmp_path / "out", split="train", samples_per_shard=6)
    expected = contents(tmp_path / "out")
    journal = tmp_path / "out" / "build.journal"
    journal.write_text(journal.read_text()[:-40])
    report = build_shards(source, tmp_path / "out", split="train", samples_per_shard=6)
    assert (report.reused, report.shards) == (3, 4)
    assert contents(tmp_path / "out") == expected


def test_unreadable_file_stops_the_build_and_a_rerun_goes_on(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    build_shards(source, tmp_path / "whole", split="train", samples_per_shard=6)
    victim = tmp_path / "src" / source.get(int(numpy_rng(0, "pack").permutation(24)[13])).name
    kept = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ShardError, match=f"(?s)cannot be read.*{victim.name}"):
        build_shards(source, tmp_path / "out", split="train", samples_per_shard=6)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.partial"))
    victim.write_bytes(kept)
    report = build_shards(source, tmp_path / "out", split="train", samples_per_shard=6)
    assert report.reused == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damaged_shard_is_packed_again(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    out = tmp_path / "out"
    build_shards(source, out, split="train", samples_per_shard=6)
    expected = contents(out)
    shard = out / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    (out / "train-000003.tar").unlink()
    assert build_shards(source, out, split="train", samples_per_shard=6).reused == 2
    assert contents(out) == expected


def test_another_build_in_the_same_folder_is_refused(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src"))
    out = tmp_path / "out"
    build_shards(source, out, split="train")
    before = contents(out)
    with pytest.raises(ShardError, match="another seed"):
        build_shards(source, out, split="train", seed=1)
    with pytest.raises(ShardError, match="another cuts"):
        build_shards(source, out, split="train", samples_per_shard=3)
    (tmp_path / "src" / "a" / "new.png").write_bytes(encoded(picture(99), "PNG"))
    with pytest.raises(ShardError, match="another source, samples"):
        build_shards(FolderSource(tmp_path / "src"), out, split="train")
    assert contents(out) == before
    with build_module._locked(out), pytest.raises(ShardError, match="another build"):
        build_shards(source, out, split="train")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="another origin"):
        build_shards(source, foreign, split="train")


def test_empty_and_wholly_rejected_sources_are_errors(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    with pytest.raises(ShardError, match="no images"):
        build_shards(FolderSource(tmp_path / "src"), tmp_path / "out", split="train")
    (tmp_path / "src" / "a" / "x.jpg").write_bytes(b"nothing at all")
    with pytest.raises(ShardError, match=r"(?s)all 1 images were rejected.*a/x.jpg: format"):
        build_shards(FolderSource(tmp_path / "src"), tmp_path / "out", split="train")
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ShardError, match="no subfolders"):
        FolderSource(tmp_path / "src" / "a")
    with pytest.raises(ShardError, match="no such folder"):
        FolderSource(tmp_path / "nowhere")


def test_folder_that_cannot_be_written_is_named(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src", 3))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ShardError, match="cannot be written"):
        build_shards(source, tmp_path / "file" / "out", split="train")


def test_bad_arguments_are_named(tmp_path):
    source = FolderSource(make_folder(tmp_path / "src", 3))
    with pytest.raises(ShardError, match="split 'a-b'"):
        build_shards(source, tmp_path / "out", split="a-b")
    with pytest.raises(ShardError, match="samples_per_shard=0"):
        build_shards(source, tmp_path / "out", split="train", samples_per_shard=0)


def test_all_sources_agree(tmp_path):
    images = np.random.default_rng(5).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = (np.arange(40) % 3).tolist()
    raw = tmp_path / "tv" / "FashionMNIST" / "raw"
    write_idx(raw, images, labels)
    for part in ("train", "t10k"):
        for kind, dims in (("images", 3), ("labels", 1)):
            (raw / f"{part}-{kind}-idx{dims}-ubyte").write_bytes((raw / kind).read_bytes())
    idx = IdxSource(raw / "images", raw / "labels", classes=["x", "y", "z"])
    torchvision = TorchvisionSource(torchvision_source("FashionMNIST", tmp_path / "tv").dataset, idx.classes)
    for i, name in enumerate(idx.classes[label] for label in labels):
        (tmp_path / "src" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name / f"{i:02d}.png").write_bytes(encode_png(Image.fromarray(images[i])))

    def pixels(payload):
        return np.asarray(Image.open(io.BytesIO(payload))).tobytes()

    expected = sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
    sources = {"idx": idx, "torchvision": torchvision, "folder": FolderSource(tmp_path / "src")}
    tables = {}
    for name, source in sources.items():
        report = build_shards(source, tmp_path / name, split="train", samples_per_shard=15, min_side=8)
        assert (report.packed, report.rejected) == (40, 0)
        manifest = load_manifest(tmp_path / name)
        assert manifest.classes == ("x", "y", "z")
        assert [s.n for s in manifest.shards] == [13, 13, 14]
        assert sorted((pixels(p), label) for p, label in payloads(tmp_path / name)) == expected
        assert audit_shards(tmp_path / name, decode=True).ok
        tables[name] = manifest.table
    assert tables["idx"]["label"].tolist() == tables["torchvision"]["label"].tolist()  # same order too


def test_file_backed_torchvision_data_set_is_copied(tmp_path):
    from torchvision.datasets import ImageFolder

    root = make_folder(tmp_path / "src")
    build_shards(FolderSource(root), tmp_path / "one", split="train")
    source = TorchvisionSource(ImageFolder(str(root), allow_empty=True))
    build_shards(source, tmp_path / "two", split="train")
    assert load_manifest(tmp_path / "one").digest == load_manifest(tmp_path / "two").digest


def test_torchvision_sources_say_what_is_wrong(tmp_path):
    with pytest.raises(ShardError, match="no 'CIFAR11', allowed: .*CIFAR10"):
        torchvision_source("CIFAR11", tmp_path)
    with pytest.raises(ShardError, match=r"torchvision.datasets.CIFAR10 in .*not found"):
        torchvision_source("CIFAR10", tmp_path)

    class Tensors:
        targets = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return np.zeros((8, 8)), i

    source = TorchvisionSource(Tensors())
    assert source.classes == ("0", "1")
    with pytest.raises(ShardError, match="gives ndarray, needed is a PIL image"):
        source.get(0)


def test_idx_files_are_checked(tmp_path):
    write_idx(tmp_path, np.zeros((3, 8, 8), np.uint8), [0, 1, 2])
    whole = (tmp_path / "images").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"short: 191 bytes of data, 3 x 8 x 8 need 192"):
        IdxSource(tmp_path / "short", tmp_path / "labels")
    with pytest.raises(ShardError, match="not an IDX file"):
        IdxSource(tmp_path / "labels", tmp_path / "labels")
    with pytest.raises(ShardError, match="missing"):
        IdxSource(tmp_path / "missing", tmp_path / "labels")
    write_idx(tmp_path / "other", np.zeros((2, 8, 8), np.uint8), [0, 1])
    with pytest.raises(ShardError, match="3 images, .* 2 labels"):
        IdxSource(tmp_path / "images", tmp_path / "other" / "labels")
