import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from efftrain_ds.core.errors import ShardError
from efftrain_ds.data import bundled
from efftrain_ds.data.audit import audit_shards, index_shards
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.manifest import ROW, load_manifest
from efftrain_ds.data.scan import read_rows, scan_shard
from efftrain_ds.data.sources import IdxSource


class Some(IdxSource):
    """The first 30 bundled pictures."""

    def __init__(self):
        whole = bundled.source("bundled:fashion_mnist/val")
        self._images, self._labels = whole._images[:30], whole._labels[:30]
        self.classes, self._name = whole.classes, "some"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "good"
    build_shards(Some(), folder, split="val", samples_per_shard=10)
    return folder


@pytest.fixture
def shards(good, tmp_path):
    return shutil.copytree(good, tmp_path / "shards")


def whats(folder, **options):
    return [(f.shard, f.what) for f in audit_shards(folder, **options).findings]


def test_good_shards_have_no_findings(good):
    report = audit_shards(good, decode=True)
    assert report.ok
    assert (report.shards, report.samples, report.decoded) == (3, 30, 30)


def test_rows_read_back_are_those_that_were_written(good):
    manifest = load_manifest(good)
    rows = np.concatenate([read_rows(manifest.shard_path(i), i)[0] for i in range(3)])
    assert rows.dtype == ROW
    assert rows.tobytes() == manifest.table.tobytes()


def cuts(path):
    """Four places to cut a tar file: between members, in a header, in a payload, in the two zero blocks."""
    sample = scan_shard(path)[6]
    header = sample.offset - 512
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    return {"boundary": header, "header": header + 200, "data": sample.offset + 100, "end": end + 700}


@pytest.mark.parametrize("place", ["boundary", "header", "data", "end"])
def test_cut_shard_is_found_and_named(shards, place):
    path = shards / "val-000001.tar"
    at = cuts(path)[place]
    path.write_bytes(path.read_bytes()[:at])
    report = audit_shards(shards)
    assert {f.shard for f in report.findings} == {"val-000001.tar"}
    texts = [str(f) for f in report.findings]
    assert any(f"{at} bytes, the manifest says" in text for text in texts)
    assert any("sha256" in text for text in texts)
    expected = {"boundary": "zero blocks", "header": "cut", "data": "payload ends at", "end": "zero blocks"}[place]
    assert any(expected in text for text in texts)
    if place != "end":
        assert any("6 readable samples" in text for text in texts)
    # the same shard without a manifest
    for name in ("manifest.json", "index.bin"):
        (shards / name).unlink()
    with pytest.raises(ShardError, match=f"(?s)val-000001.tar: offset .*{expected}"):
        index_shards(shards)
    assert not (shards / "manifest.json").exists()


@pytest.mark.parametrize("where", ["payload", "header", "padding"])
def test_flipped_bit_is_found(shards, where):
    path = shards / "val-000002.tar"
    sample = scan_shard(path)[4]
    at = {"payload": sample.offset + 300, "header": sample.offset - 500, "padding": path.stat().st_size - 1}[where]
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
    found = whats(shards)
    assert {name for name, _ in found} == {"val-000002.tar"}
    assert any(what.startswith("sha256") for _, what in found)
    if where == "header":
        assert any("header damaged" in what for _, what in found)


def test_flipped_pixel_is_located_by_decoding(shards):
    path = shards / "val-000000.tar"
    sample = scan_shard(path)[3]
    data = bytearray(path.read_bytes())
    data[sample.offset + 20] ^= 0x04  # the header's height
    path.write_bytes(data)
    findings = [f for f in audit_shards(shards, decode=True).findings if f.key is not None]
    assert [(f.key, f.offset) for f in findings] == [(sample.key, sample.offset)]


def test_missing_and_extra_shards_are_found(shards):
    (shards / "val-000001.tar").rename(shards / "val-000009.tar")
    assert whats(shards) == [
        ("val-000009.tar", "extra shard, not in the manifest"),
        ("val-000001.tar", "missing shard"),
    ]


def test_swapped_shards_are_found(shards):
    (shards / "val-000000.tar").rename(shards / "x")
    (shards / "val-000001.tar").rename(shards / "val-000000.tar")
    (shards / "x").rename(shards / "val-000001.tar")
    assert {name for name, what in whats(shards) if "sha256" in what} == {"val-000000.tar", "val-000001.tar"}


def test_damaged_index_is_found(shards):
    table = np.array(load_manifest(shards).table)
    table["offset"][12] += 512
    table["label"][13] += 1
    (shards / "index.bin").write_bytes(table.tobytes())
    found = whats(shards)
    assert [name for name, _ in found] == ["index.bin", "val-000001.tar", "val-000001.tar"]
    assert "offset" in found[1][1]
    assert "label" in found[2][1]
    (shards / "index.bin").write_bytes(table.tobytes()[:-3])
    assert any(name == "index.bin" and "bytes" in what for name, what in whats(shards))
    (shards / "index.bin").unlink()
    assert any(name == "index.bin" and "missing" in what for name, what in whats(shards))


def test_label_outside_the_classes_is_found(shards):
    document = json.loads((shards / "manifest.json").read_text())
    document["classes"] = document["classes"][:9]
    (shards / "manifest.json").write_text(json.dumps(document))
    expected = int((np.array(load_manifest(shards).table["label"]) == 9).sum())
    found = whats(shards)
    assert len(found) == expected > 0
    assert all(what == "label 9, allowed: 0 to 8" for _, what in found)


def png(seed=0):
    with io.BytesIO() as buffer:
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


FOREIGN = {
    "dots": ([("a.b.png", png()), ("a.b.cls", b"0")], "key with dots"),
    "label": ([("a.png", png())], "key a: missing label"),
    "image": ([("a.cls", b"0")], "key a: 0 image members"),
    "images": ([("a.png", png()), ("a.jpg", png()), ("a.cls", b"0")], "key a: 2 image members"),
    "text": ([("a.png", png()), ("a.cls", b"cat")], "key a: label b'cat' is not a class index"),
    "negative": ([("a.png", png()), ("a.cls", b"-1")], "key a: unknown label -1"),
    "suffix": ([("a.png", png()), ("a.cls", b"0"), ("a.exe", b"")], "key a: unknown suffix .exe, allowed"),
    "nosuffix": ([("a", png())], "no suffix"),
    "twice": (
        [("a.png", png()), ("a.cls", b"0"), ("b.png", png()), ("b.cls", b"0"), ("a.png", png()), ("a.cls", b"1")],
        "key a: duplicate key",
    ),
    "member": ([("a.png", png()), ("a.png", png()), ("a.cls", b"0")], "key a: duplicate key: a second .png"),
    "content": ([("a.png", b"no picture"), ("a.cls", b"0")], "key a: format"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_shards_with_unusable_samples_are_refused(tmp_path, case):
    members, expected = FOREIGN[case]
    write_tar(tmp_path / "good-0.tar", [("x/0.png", png()), ("x/0.cls", b"0")])
    write_tar(tmp_path / "good-1.tar", members)
    with pytest.raises(ShardError, match=f"good-1.tar: offset [0-9]+.*{expected}"):
        index_shards(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good-0.tar", "good-1.tar"]


def test_same_key_in_two_foreign_shards_is_refused(tmp_path):
    for name in ("one.tar", "two.tar"):
        write_tar(tmp_path / name, [("k.png", png()), ("k.cls", b"0")])
    with pytest.raises(ShardError, match=r"two.tar: offset 512 key k: duplicate key, also in one.tar"):
        index_shards(tmp_path)


def test_foreign_shards_are_indexed(tmp_path):
    write_tar(
        tmp_path / "b.tar", [("k/1.cls", b"3\n"), ("k/1.PNG", png(1)), ("k/1.json", b"{}"), ("__meta__", b"anything")]
    )
    write_tar(tmp_path / "a.tar", [])
    manifest = index_shards(tmp_path, split="test")
    assert [(s.name, s.n) for s in manifest.shards] == [("a.tar", 0), ("b.tar", 1)]
    assert manifest.classes == ("0", "1", "2", "3")
    (row,) = manifest.table
    data = (tmp_path / "b.tar").read_bytes()[row["offset"] :][: row["size"]]
    assert data == png(1)
    assert (row["shard"], row["label"], row["width"], row["height"]) == (1, 3, 11, 9)
    assert manifest.shards[1].sha256 == hashlib.sha256((tmp_path / "b.tar").read_bytes()).hexdigest()
    assert audit_shards(tmp_path, decode=True).ok
    with pytest.raises(ShardError, match="is there already"):
        index_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"b.tar: offset \d+ key k/1: unknown label 3, 2 classes"):
        index_shards(tmp_path, classes=["x", "y"])


def test_files_that_are_no_tar_are_refused(tmp_path):
    with pytest.raises(ShardError, match="no .*tar files"):
        index_shards(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(ShardError, match="x.tar: offset 0: not an uncompressed tar"):
        index_shards(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="x.tar: offset 0: not an uncompressed tar"):
        index_shards(tmp_path)
    with pytest.raises(ShardError, match="no manifest"):
        audit_shards(tmp_path)
