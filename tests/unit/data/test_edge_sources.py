"""Tar-per-class archives, Hugging Face data sets, renditions."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from efftrain_ds.cli.main import main
from efftrain_ds.core.errors import CheckpointError, ShardError
from efftrain_ds.data.audit import audit_shards
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.checks import check_image
from efftrain_ds.data.hub_source import HubSource, hub_source
from efftrain_ds.data.loader import TicketSpec, TrainLoader
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.rendition import make_rendition, render, rendition_size
from efftrain_ds.data.sources import FolderSource
from efftrain_ds.data.tar_source import TarClassSource

CLASSES = ("n01440764", "n01443537", "n02000000")


def photograph(seed, width=60, height=45):
    """A smooth picture, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image, **options):
    with io.BytesIO() as buffer:
        image.save(buffer, "JPEG", **{"quality": 95, **options})
        return buffer.getvalue()


def archive(members):
    """Bytes of a tar file."""
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, payload in members:
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        return buffer.getvalue()


def class_members(label, count=6):
    name = CLASSES[label]
    pictures = [
        (f"{name}_{i}.JPEG", jpeg(photograph(100 * label + i, 60 + i, 40 + 3 * i))) for i in range(count - label)
    ]
    return [*pictures, ("notes.txt", b"no image")] if label == 1 else pictures


def payloads(folder):
    """[(payload, label)] in the order of the index."""
    manifest = load_manifest(folder)
    result = []
    for row in manifest.table:
        data = manifest.shard_path(row["shard"]).read_bytes()
        result.append((data[row["offset"] : row["offset"] + row["size"]], int(row["label"])))
    return result


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same images as one archive of archives, as a folder of archives, and as folders."""
    root = tmp_path_factory.mktemp("forms")
    (root / "tars").mkdir()
    inner = []
    for label in (2, 0, 1):  # the outer archive is in no order
        name, members = CLASSES[label], class_members(label)
        data = archive(members)
        inner.append((f"winter/{name}.tar", data))
        (root / "tars" / f"{name}.tar").write_bytes(data)
        (root / "folders" / name).mkdir(parents=True)
        for file, payload in members:
            (root / "folders" / name / file).write_bytes(payload)
    (root / "all.tar").write_bytes(archive(inner))
    return root


def test_archives_hold_what_folders_hold(forms):
    expected = sorted((item.payload, item.label) for item in map(FolderSource(forms / "folders").get, range(15)))
    before = sorted(p.name for p in forms.rglob("*"))
    for path in (forms / "all.tar", forms / "tars"):
        source = TarClassSource(path)
        assert source.classes == CLASSES
        assert len(source) == 15
        items = [source.get(i) for i in reversed(range(15))]
        assert sorted((item.payload, item.label) for item in items) == expected
        assert [source.size(i) for i in range(15)] == [len(source.get(i).payload) for i in range(15)]
        assert source.get(0).name.startswith("n01440764.tar#")
        assert source.fingerprint() == TarClassSource(path).fingerprint()
    assert sorted(p.name for p in forms.rglob("*")) == before  # nothing is unpacked


def test_archives_are_packed(forms, tmp_path):
    source = pickle.loads(pickle.dumps(TarClassSource(forms / "all.tar")))  # as it comes to a packing process
    report = build_shards(source, tmp_path / "a", split="train")
    assert (report.packed, report.rejected) == (15, 0)
    build_shards(TarClassSource(forms / "tars"), tmp_path / "b", split="train", samples_per_shard=4)
    assert sorted(payloads(tmp_path / "a")) == sorted(payloads(tmp_path / "b"))
    assert audit_shards(tmp_path / "a", decode=True).ok


def test_a_class_without_images_keeps_its_index(tmp_path):
    for name, members in (("a", [("x.jpg", jpeg(photograph(1)))]), ("b", []), ("c", [("y.jpg", jpeg(photograph(2)))])):
        (tmp_path / f"{name}.tar").write_bytes(archive(members))
    source = TarClassSource(tmp_path)
    assert source.classes == ("a", "b", "c")
    assert [source.get(i).label for i in range(2)] == [0, 2]


@pytest.mark.parametrize("damage", ["cut", "header", "end", "inner magic"])
def test_a_damaged_archive_is_named_with_class_and_offset(forms, tmp_path, damage):
    data = bytearray((forms / "all.tar").read_bytes())
    with tarfile.open(forms / "all.tar") as outer:
        member = outer.getmembers()[2]  # the class n01443537
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            third = inner.getmembers()[2]
    start = member.offset_data
    expected = {
        "cut": (start, "payload ends at byte"),
        "header": (start + third.offset, "member header damaged"),
        "end": (start + member.size - 1, "bytes after the end"),
        "inner magic": (start, "not an uncompressed tar file"),
    }[damage]
    if damage == "cut":
        data = data[: start + 1000]
    elif damage == "header":
        data[expected[0] + 3] ^= 0xFF
    elif damage == "end":
        data[expected[0]] = 1
    else:
        data[start : start + 512] = b"x" * 512
    path = tmp_path / "all.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError) as error:
        TarClassSource(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "n01443537" in text
    assert expected[1] in text
    offset = int(text.split("offset ")[1].split(":")[0].split()[0])
    assert offset <= expected[0] < offset + (1 << 20) if damage == "end" else offset == expected[0]


def test_other_forms_are_refused_with_a_word_on_what_to_do(forms, tmp_path):
    def stop(path, text):
        with pytest.raises(ShardError, match=text):
            TarClassSource(path)

    stop(tmp_path / "none", "no such file or folder")
    stop(tmp_path, "no \\*.tar files there")
    (tmp_path / "flat.tar").write_bytes(archive(class_members(0)))
    stop(tmp_path / "flat.tar", "holds images itself")
    (tmp_path / "empty.tar").write_bytes(archive([]))
    stop(tmp_path / "empty.tar", "holds no tar files")
    (tmp_path / "zip.tar").write_bytes(b"\x1f\x8b" + b"0" * 600)
    stop(tmp_path / "zip.tar", r"compressed \(gzip\).*decompress it once")
    (tmp_path / "twice.tar").write_bytes(archive([("a/n1.tar", archive([])), ("b/n1.tar", archive([]))]))
    stop(tmp_path / "twice.tar", "two tar files for the class n1")
    folder = tmp_path / "nested"
    folder.mkdir()
    (folder / "train.tar").write_bytes((forms / "all.tar").read_bytes())
    stop(folder, "is a tar file inside a class's tar file")
    zipped = archive([("n1.tar", b"\x1f\x8b" + b"0" * 600)])
    (tmp_path / "inner.tar").write_bytes(zipped)
    stop(tmp_path / "inner.tar", "class n1, offset 512: compressed")


# -- Hugging Face datasets ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def saved(datasets, tmp_path_factory):
    """Seven rows: JPEG and PNG bytes, a GIF, and a file beside the data set."""
    root = tmp_path_factory.mktemp("hf")
    loose = root / "loose.jpg"
    loose.write_bytes(jpeg(photograph(9)))
    cells = [{"bytes": jpeg(photograph(i)), "path": f"{i}.png"} for i in range(4)]
    with io.BytesIO() as buffer:
        photograph(4).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    with io.BytesIO() as buffer:
        photograph(5).convert("P").save(buffer, "GIF")
        cells.append({"bytes": buffer.getvalue(), "path": "x.gif"})
    cells.append({"bytes": None, "path": str(loose)})
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "id": datasets.Value("int64")}
    )
    rows = {"photo": cells, "kind": [0, 1, 0, 1, 0, 1, 0], "id": list(range(7))}
    data = datasets.Dataset.from_dict(rows, features=features)
    # to_parquet and save_to_disk embed the files that paths name; this row keeps its path
    datasets.DatasetDict({"train": data.select(range(6)), "test": data.select([3, 1])}).save_to_disk(str(root / "dict"))
    return root, cells, data


def test_encoded_bytes_are_copied_and_other_formats_become_png(saved):
    root, cells, data = saved
    source = hub_source(str(root / "dict"))
    assert source.classes == ("cat", "dog")
    assert len(source) == 6
    items = [source.get(i) for i in range(6)]
    assert [item.payload for item in items[:5]] == [cell["bytes"] for cell in cells[:5]]
    assert [item.extension for item in items] == ["jpg"] * 4 + ["png"] * 2
    assert [item.label for item in items] == [0, 1, 0, 1, 0, 1]
    gif = Image.open(io.BytesIO(cells[5]["bytes"])).convert("RGB")
    assert np.array_equal(Image.open(io.BytesIO(items[5].payload)).convert("RGB"), gif)
    assert [source.size(i) for i in range(6)] == [len(cell["bytes"]) for cell in cells[:6]]
    source = pickle.loads(pickle.dumps(source))
    assert [source.get(i).payload for i in range(5)] == [cell["bytes"] for cell in cells[:5]]
    test = hub_source(str(root / "dict"), split="test")
    assert [(test.get(i).payload, test.get(i).label) for i in range(2)] == [(cells[i]["bytes"], 1) for i in (3, 1)]
    assert test.fingerprint() != source.fingerprint() == hub_source(str(root / "dict")).fingerprint()
    whole = HubSource(data)
    assert whole.get(6).payload == (root / "loose.jpg").read_bytes()
    assert whole.size(6) == (root / "loose.jpg").stat().st_size


def test_a_saved_data_set_is_packed_from_the_command_line(saved, tmp_path, capsys):
    root, _, _ = saved
    command = ["shards", "build", "--hf", str(root / "dict"), "--out", str(tmp_path / "s"), "--json"]
    assert main([*command, "--samples-per-shard", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["packed"], report["rejected"], report["shards"]) == (6, 0, 2)
    assert audit_shards(tmp_path / "s", decode=True).ok
    assert sorted(payloads(tmp_path / "s")) == sorted(
        (item.payload, item.label) for item in map(hub_source(str(root / "dict")).get, range(6))
    )


def test_wrong_columns_are_named_with_what_there_is(datasets, saved, tmp_path):
    root, cells, data = saved

    def stop(text, dataset, *columns):
        with pytest.raises(ShardError, match=text):
            HubSource(dataset, *columns)

    stop(r"no column 'img'; there are: photo \(Image\), kind \(ClassLabel\), id \(int64\)", data, "img")
    stop("column 'id' is int64, not Image", data, "id")
    stop("no column 'y'", data, "photo", "y")
    stop("column 'photo' is Image, a label is a ClassLabel or an integer", data, "photo", "photo")
    stop("no image column found; name one with --image-column", data.remove_columns("photo"))
    stop("no label column found", data.remove_columns("kind"))
    stop("several image columns", data.add_column("photo2", cells, feature=datasets.Image()))
    texts = data.cast_column("id", datasets.Value("string"))
    stop("column 'id' is string, a label", texts, "photo", "id")
    missing = datasets.Dataset.from_dict({"image": cells[:2], "label": [1, None]}).cast_column(
        "image", datasets.Image()
    )
    stop("column 'label': row 1 has no label", missing)
    stop("needed is one split", datasets.DatasetDict({"train": data}))
    with pytest.raises(ShardError, match="no split 'val', there are: train, test"):
        hub_source(str(root / "dict"), split="val")
    with pytest.raises(ShardError, match=str(tmp_path / "none")):
        hub_source(str(tmp_path / "none"))
    integers = HubSource(data.rename_column("id", "label").remove_columns("kind"))
    assert integers.classes == tuple(str(i) for i in range(7))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ShardError, match=r"pip install 'efftrain-ds\[hf\]'"):
        hub_source("anything")


# -- renditions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Eight pictures with short sides of 20 to 90 pixels, landscape and portrait, JPEG and PNG, one grey."""
    for label in ("a", "b"):
        (tmp_path / "src" / label).mkdir(parents=True)
    for i in range(8):
        side = 20 + 10 * i
        image = photograph(i, *((side, 2 * side + 1) if i % 2 else (3 * side, side)))
        image = image.convert("L") if i == 6 else image
        where = tmp_path / "src" / "ab"[i % 2]
        image.save(where / f"{i}.png") if i == 7 else (where / f"{i}.jpg").write_bytes(jpeg(image))
    return tmp_path / "src"


def test_a_rendition_shrinks_large_images_and_copies_the_others(pictures, tmp_path):
    source = FolderSource(pictures)
    build_shards(source, tmp_path / "full", split="train", min_side=8, samples_per_shard=3)
    report = build_shards(source, tmp_path / "r50", split="train", min_side=8, samples_per_shard=3, short_side=50)
    assert report.kinds["resized"] == 4
    full, small = load_manifest(tmp_path / "full"), load_manifest(tmp_path / "r50")
    assert small.rendition.short_side == 50
    assert small.rendition.quality == 92
    assert "Pillow" in small.rendition.encoder
    assert "rendition" not in json.loads((tmp_path / "full" / "manifest.json").read_text())
    assert [s.n for s in full.shards] == [s.n for s in small.shards]  # row i is the same sample
    assert full.table["label"].tolist() == small.table["label"].tolist()
    for before, after, old, new in zip(
        payloads(tmp_path / "full"), payloads(tmp_path / "r50"), full.table, small.table, strict=True
    ):
        if min(old["width"], old["height"]) <= 50:
            assert after == before
            continue
        assert (new["width"], new["height"]) == rendition_size(int(old["width"]), int(old["height"]), 50)
        assert min(new["width"], new["height"]) == 50
        image, original = Image.open(io.BytesIO(after[0])), Image.open(io.BytesIO(before[0]))
        assert image.format == "JPEG"
        assert image.mode == ("L" if original.mode == "L" else "RGB")
        wanted = np.asarray(original.resize(image.size, Image.Resampling.LANCZOS), dtype=float)
        assert np.sqrt(np.mean((np.asarray(image, dtype=float) - wanted) ** 2)) < 6
    assert audit_shards(tmp_path / "r50", decode=True).ok
    again = build_shards(source, tmp_path / "r50", split="train", min_side=8, samples_per_shard=3, short_side=50)
    assert again.reused == 3
    with pytest.raises(ShardError, match="another rendition"):
        build_shards(source, tmp_path / "r50", split="train", min_side=8, samples_per_shard=3, short_side=40)
    with pytest.raises(ShardError, match="another rendition"):
        build_shards(source, tmp_path / "r50", split="train", min_side=8, samples_per_shard=3)


def test_rendition_sizes_are_exact_on_the_short_side():
    assert rendition_size(500, 375, 256) == (341, 256)
    assert rendition_size(375, 500, 160) == (160, 213)
    assert rendition_size(300, 300, 256) == (256, 256)
    assert rendition_size(4001, 33, 32) == (3880, 32)
    with pytest.raises(ShardError, match="short side 0 "):
        make_rendition(0)
    with pytest.raises(ShardError, match="JPEG quality 101"):
        make_rendition(256, 101)


def test_cmyk_and_alpha_are_rendered_as_the_loader_sees_them():
    cmyk = check_image(jpeg(photograph(1, 90, 70).convert("CMYK")), "jpg")
    with io.BytesIO() as buffer:
        photograph(2, 90, 70).convert("RGBA").save(buffer, "PNG")
        alpha = check_image(buffer.getvalue(), "png")
    for image in (cmyk, alpha):
        small = render(image, make_rendition(64))
        assert small.suffix == "jpg"
        assert Image.open(io.BytesIO(small.payload)).mode == "RGB"
        check_image(small.payload, "jpg")


def test_a_resume_refuses_another_rendition(pictures, tmp_path, caplog):
    source = FolderSource(pictures)
    build_shards(source, tmp_path / "data", split="train", min_side=8)

    def loader(resolution=16):
        return TrainLoader(
            load_manifest(tmp_path / "data"),
            seed=0,
            rank=0,
            world=1,
            spec_at=lambda consumed: TicketSpec(4, 4) if consumed < 8 else None,
            resolution=resolution,
            workers=0,
        )

    state = loader().state_dict()
    loader().load_state_dict(state)
    (tmp_path / "data").rename(tmp_path / "original")
    build_shards(source, tmp_path / "data", split="train", min_side=8, short_side=40)
    with pytest.raises(CheckpointError, match="manifest: checkpoint"):
        loader().load_state_dict(state)
    assert "short side of 40 px" not in caplog.text
    assert sum(len(batch) for batch in loader(48)) == 8
    assert "reduced to a short side of 40 px, below efftrain.data.resolution 48" in caplog.text


def test_a_rendition_from_the_command_line(pictures, tmp_path, capsys):
    command = ["shards", "build", "--folder", str(pictures), "--out", str(tmp_path / "out"), "--min-side", "8"]
    assert main([*command, "--short_side", "32", "--quality", "80"]) == 0
    assert "6 images resized to short side 32, JPEG quality 80 (Pillow" in capsys.readouterr().out
    assert load_manifest(tmp_path / "out").rendition.quality == 80
