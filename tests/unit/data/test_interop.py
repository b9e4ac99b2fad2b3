import argparse
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from efftrain_ds.cli import shards as cli
from efftrain_ds.core.errors import ShardError
from efftrain_ds.data import bundled
from efftrain_ds.data.audit import audit_shards, index_shards
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.sources import FolderSource

VAL = "bundled:fashion_mnist/val"
SAMPLES = Path(bundled.__file__).parent / "samples" / "fashion_mnist"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return bundled.resolve(VAL, cache=tmp_path_factory.mktemp("cache"))


def test_webdataset_reads_what_we_pack(packed):
    manifest = load_manifest(packed)
    urls = [str(manifest.shard_path(i)) for i in range(len(manifest.shards))]
    read = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(read) == manifest.samples == 2000
    assert [int(s["cls"]) for s in read] == manifest.table["label"].tolist()
    assert [s["__key__"] for s in read] == [f"{i:08d}" for i in range(2000)]
    assert [len(s["png"]) for s in read] == manifest.table["size"].tolist()


@pytest.mark.parametrize("training", [False, True])
def test_timm_reads_what_we_pack(packed, training):
    from timm.data.readers.reader_wds import ReaderWds

    reader = ReaderWds(str(packed), split="val", is_training=training, batch_size=100)
    assert len(reader) == 2000
    labels = Counter()
    for image, label in reader:
        assert image.size == (28, 28)
        labels[label] += 1
    expected = np.bincount(load_manifest(packed).table["label"], minlength=10)
    assert [labels[c] for c in range(10)] == expected.tolist()


def test_timm_reads_mixed_formats(tmp_path):
    from timm.data.readers.reader_wds import ReaderWds

    draw = np.random.default_rng(0)
    for i in range(9):
        (tmp_path / "src" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(draw.integers(0, 256, (33 + i, 40, 3), dtype=np.uint8))
        image.save(tmp_path / "src" / f"c{i % 2}" / f"{i}.{('jpeg', 'png', 'webp')[i % 3]}")
    build_shards(FolderSource(tmp_path / "src"), tmp_path / "out", split="train", samples_per_shard=4)
    found = sorted((image.size[1], label) for image, label in ReaderWds(str(tmp_path / "out"), split="train"))
    assert found == [(33 + i, i % 2) for i in range(9)]


def test_shards_written_by_webdataset_are_indexed(tmp_path):
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8) for i in range(11)]
    with wds.ShardWriter(str(tmp_path / "x-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"img{i}", "png": image, "cls": i % 3, "json": {"i": i}})
    manifest = index_shards(tmp_path)
    assert [s.n for s in manifest.shards] == [4, 4, 3]
    assert audit_shards(tmp_path, decode=True).ok
    for row, image, i in zip(manifest.table, images, range(11), strict=True):
        data = manifest.shard_path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
        assert (row["label"], row["width"], row["height"]) == (i % 3, 12, 10 + i)


def test_bundled_counts_are_those_of_the_files():
    for split, count in (("train", 6000), ("val", 2000)):
        path = f"bundled:fashion_mnist/{split}"
        source = bundled.source(path)
        assert len(source) == bundled.samples(path) == count
        assert source.classes == bundled.classes(path)
        assert len(source.classes) == 10
        assert set(source._labels.tolist()) == set(range(10))
    assert bundled.samples("some/folder") is None
    assert bundled.classes("some/folder") is None
    assert "Zalando SE" in (SAMPLES / "LICENSE").read_text()
    # written without a time stamp, so that the files do not change when they are made again
    assert all(p.read_bytes()[4:8] == bytes(4) for p in SAMPLES.glob("*.gz"))


def test_bundled_pictures_survive_packing(packed):
    manifest = load_manifest(packed)
    assert (manifest.samples, len(manifest.shards)) == (2000, 2)
    source = bundled.source(VAL)
    whole = Counter((image.tobytes(), int(label)) for image, label in zip(source._images, source._labels, strict=True))
    files = [manifest.shard_path(i).read_bytes() for i in range(2)]
    found = Counter()
    for row in manifest.table:
        payload = files[row["shard"]][row["offset"] : row["offset"] + row["size"]]
        found[np.asarray(Image.open(io.BytesIO(payload))).tobytes(), int(row["label"])] += 1
    assert found == whole


def test_bundled_names(tmp_path, monkeypatch):
    assert bundled.resolve("some/folder") == Path("some/folder")
    for call in (bundled.resolve, bundled.samples, bundled.classes):
        with pytest.raises(ShardError, match="bundled:fashion_mnist/train, bundled:fashion_mnist/val"):
            call("bundled:cifar")


def test_bundled_cache_folder(tmp_path, monkeypatch):
    made = []

    def fake(source, folder, **options):
        made.append(folder)

    monkeypatch.setattr(bundled, "build_shards", fake)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFTRAIN_CACHE", raising=False)
    assert bundled.resolve(VAL) == Path("shards/fashion_mnist/val")
    monkeypatch.setenv("EFFTRAIN_CACHE", str(tmp_path / "elsewhere"))
    assert bundled.resolve(VAL) == tmp_path / "elsewhere" / "fashion_mnist" / "val"
    assert made == [Path("shards/fashion_mnist/val"), tmp_path / "elsewhere" / "fashion_mnist" / "val"]


def test_two_ranks_may_ask_at_once(packed, tmp_path):
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                folder = bundled.resolve(VAL, cache=tmp_path)
                status = 0 if load_manifest(folder).samples == 2000 else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert load_manifest(tmp_path / "fashion_mnist" / "val").digest == load_manifest(packed).digest
    marks = {p: p.stat().st_mtime_ns for p in (tmp_path / "fashion_mnist" / "val").iterdir()}
    bundled.resolve(VAL, cache=tmp_path)
    assert marks == {p: p.stat().st_mtime_ns for p in (tmp_path / "fashion_mnist" / "val").iterdir()}


def run(*argv):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["shards", *map(str, argv)])
    return args.func(args)


def test_command_line_builds_audits_and_indexes(tmp_path, capsys):
    images, labels = SAMPLES / "val-images-idx3-ubyte.gz", SAMPLES / "val-labels-idx1-ubyte.gz"
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(bundled.classes(VAL)))
    build = ["build", "--idx-images", images, "--idx-labels", labels, "--classes", names]
    out = tmp_path / "out"
    assert run(*build, "--out", out, "--split", "val", "--samples-per-shard", 1000, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["packed"], report["rejected"], report["shards"], report["reused"]) == (2000, 0, 2, 0)
    assert report["digest"] == load_manifest(out).digest
    assert run(*build, "--out", out, "--split", "val", "--samples-per-shard", 1000) == 0
    assert "2000 images in 2 shards" in capsys.readouterr().out
    assert run("audit", out) == 0
    assert "no findings" in capsys.readouterr().out
    (out / "manifest.json").unlink()
    assert run("index", out, "--split", "val", "--classes", names, "--json") == 0
    assert json.loads(capsys.readouterr().out)["digest"] == report["digest"]
    (out / "val-000001.tar").unlink()
    assert run("audit", out, "--decode", "--json") == 2
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"]
    assert document["findings"] == [{"shard": "val-000001.tar", "offset": 0, "key": None, "what": "missing shard"}]
    assert document["decoded"] == 1000


def test_command_line_says_what_is_missing(tmp_path):
    with pytest.raises(ShardError, match="--idx-labels"):
        run("build", "--idx-images", "x", "--out", tmp_path)
    with pytest.raises(ShardError, match="--root"):
        run("build", "--torchvision", "CIFAR10", "--out", tmp_path)
    with pytest.raises(ShardError, match="no such folder"):
        run("build", "--folder", tmp_path / "none", "--out", tmp_path)
