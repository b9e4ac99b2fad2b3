"""Damaged data: left out and counted up to the allowed share, then one error; and nothing in a shard is ever run."""

import ast
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import efftrain_ds
from efftrain_ds.core.errors import ShardError
from efftrain_ds.data import bundled
from efftrain_ds.data.audit import audit_shards, index_shards
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.loader import TicketSpec, TrainLoader
from efftrain_ds.data.manifest import ROW, load_manifest
from efftrain_ds.data.scan import file_sha256, write_index
from efftrain_ds.data.sources import IdxSource, encode_png

N, WORLD, STEPS = 60, 3, 10


class Some(IdxSource):
    """The first pictures of the bundled data."""

    def __init__(self):
        whole = bundled.source("bundled:fashion_mnist/val")
        self._images, self._labels = whole._images[:N], whole._labels[:N]
        self.classes, self._name = whole.classes, "some"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "data"
    build_shards(Some(), folder, split="train", samples_per_shard=20)
    return folder


@pytest.fixture
def shards(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "data")


def make(manifest, rank, **changes):
    return TrainLoader(
        manifest,
        seed=1,
        rank=rank,
        world=WORLD,
        spec_at=lambda consumed: TicketSpec(12, 2) if consumed < 12 * STEPS else None,
        resolution=16,
        workers=0,
        streams=24,
        **changes,
    )


def error_of(loader):
    """Text of the error that stops a loader, None where nothing does."""
    try:
        list(loader)
    except ShardError as error:
        return str(error)
    return None


def overwrite(shards, row, content):
    manifest = load_manifest(shards)
    entry = manifest.table[row]
    with manifest.shard_path(entry["shard"]).open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(content)


def relabel(shards, row, label):
    table = np.fromfile(shards / "index.bin", ROW)
    table["label"][row] = label
    table.tofile(shards / "index.bin")


def empty_shard(shards, manifest):
    """The same data with a shard without samples between the others."""
    path = shards / "train-empty.tar"
    with tarfile.open(path, "w"):
        pass
    table = np.fromfile(shards / "index.bin", ROW)
    table["shard"] += table["shard"] >= 1
    entry = type(manifest.shards[0])(path.name, path.stat().st_size, file_sha256(path), 0)
    write_index(shards, "train", manifest.classes, [manifest.shards[0], entry, *manifest.shards[1:]], [table])


BEFORE = {
    "none": (lambda s: None, set(), None),
    "undecodable image": (lambda s: overwrite(s, 7, b"\0" * 64), {7}, "decode"),
    "damaged image": (lambda s: overwrite(s, 30, b"\x89PNG\r\n\x1a\n" + bytes(range(200))), {30}, "decode"),
    "label out of range": (lambda s: relabel(s, 41, 10), {41}, "label"),
    "negative label": (lambda s: relabel(s, 41, -1), {41}, "label"),
    "empty shard": (lambda s: empty_shard(s, load_manifest(s)), set(), None),
}
AFTER = {  # while the run goes on, after the check of all sizes
    "shard removed": (lambda path, at: path.unlink(), "read"),
    "shard cut": (lambda path, at: os.truncate(path, at + 10), "read"),
}


@pytest.mark.parametrize("fault", BEFORE)
def test_bad_samples_leave_all_ranks_with_equal_steps(shards, fault):
    damage, rows, reason = BEFORE[fault]
    damage(shards)
    loaders = [make(load_manifest(shards), rank, max_bad_fraction=0.2) for rank in range(WORLD)]
    seen, bad = [], []
    for loader in loaders:
        batches = list(loader)
        assert [len(batch) for batch in batches] == [2] * (2 * STEPS)
        for batch in batches:
            seen += batch.ids[batch.valid].tolist()
            bad += batch.ids[~batch.valid].tolist()
            assert not batch.images[~batch.valid].any()
            assert torch.equal(batch.labels < 0, ~batch.valid)
    assert sorted(bad) == sorted([*rows] * 2)  # two epochs
    assert sorted(seen) == sorted([row for row in range(N) if row not in rows] * 2)
    counted = sum((list(loader.bad_samples.items()) for loader in loaders), [])
    assert sum(count for _, count in counted) == 2 * len(rows)
    assert {name for name, _ in counted} == ({reason} if rows else set())


@pytest.mark.parametrize("fault", [name for name, (_, rows, _) in BEFORE.items() if rows])
def test_more_than_allowed_is_an_error_with_file_and_offset(shards, fault):
    damage, rows, _ = BEFORE[fault]
    damage(shards)
    row = next(iter(rows))
    manifest = load_manifest(shards)
    entry = manifest.table[row]
    name, offset = manifest.shards[entry["shard"]].name, entry["offset"]
    texts = [text for text in (error_of(make(manifest, rank, max_bad_fraction=0.0)) for rank in range(WORLD)) if text]
    assert texts
    for text in texts:
        assert f"{name} row {row}, offset {offset}" in text
        assert "data.max_bad_fraction 0 allows 0" in text


@pytest.mark.parametrize("fault", AFTER)
def test_a_shard_that_goes_in_mid_run(shards, fault):
    damage, reason = AFTER[fault]
    manifest = load_manifest(shards)
    loader = make(manifest, 0, max_bad_fraction=0.9)
    offset = int(manifest.table["offset"][30])
    batches = iter(loader)
    next(batches)
    loader._samples.reader.close()  # as after many other shards
    damage(manifest.shard_path(1), offset)
    rest = list(batches)
    assert len(rest) == 2 * STEPS - 1
    gone = {r for r in range(20, 40) if fault == "shard removed" or manifest.table["offset"][r] >= offset}
    assert {i for batch in rest for i in batch.ids[~batch.valid].tolist()} <= gone
    assert set(loader.bad_samples) == {reason}
    assert sum(loader.bad_samples.values()) == sum(int((~batch.valid).sum()) for batch in rest)
    with pytest.raises(ShardError, match=r"1 of 3 shards do not match.*\n.*train-000001.tar"):
        make(manifest, 0)


# -- what a shard could run -------------------------------------------------------------------------------------------


class Canary:
    """Unpickling writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def write_malicious(folder, canary, suffix):
    """A shard in webdataset's layout; one sample has a member that webdataset would unpickle."""
    folder.mkdir()
    with tarfile.open(folder / "evil-000000.tar", "w") as tar:
        for i in range(3):
            members = [("png", encode_png(bundled_picture(i))), ("cls", b"1")]
            if i == 1:
                members.append((suffix, payload(canary, suffix)))
            for name, content in members:
                info = tarfile.TarInfo(f"{i:08d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def payload(canary, suffix):
    if suffix != "pth":
        return pickle.dumps(Canary(canary))
    with io.BytesIO() as buffer:
        torch.save(Canary(canary), buffer)
        return buffer.getvalue()


def bundled_picture(i):
    from PIL import Image

    return Image.fromarray(Some()._images[i])


@pytest.mark.parametrize("suffix", ["pyd", "pth", "pickle"])
def test_members_that_could_run_code_are_refused_and_never_run(tmp_path, suffix):
    canary = tmp_path / "canary"
    folder = write_malicious(tmp_path / "evil", canary, suffix)
    with pytest.raises(ShardError, match=f"evil-000000.tar: offset .* key 00000001: unknown suffix .{suffix}"):
        index_shards(folder)
    assert not canary.exists()

    # a manifest that its owner wrote all the same, whose second row points at that member
    path = folder / "evil-000000.tar"
    with tarfile.open(path) as tar:
        found = {m.name: m for m in tar.getmembers()}
    rows = np.zeros(3, ROW)
    for i in range(3):
        member = found[f"{i:08d}.{suffix if i == 1 else 'png'}"]
        rows[i] = (0, member.offset_data, member.size, 1, 28, 28)
    shard = type(load_manifest(bundled.resolve("bundled:fashion_mnist/val")).shards[0])
    manifest = write_index(
        folder, "train", ("a", "b"), [shard(path.name, path.stat().st_size, file_sha256(path), 3)], [rows]
    )
    report = audit_shards(folder, decode=True)
    assert any(f"unknown suffix .{suffix}" in finding.what for finding in report.findings)
    loader = TrainLoader(
        manifest,
        seed=0,
        rank=0,
        world=1,
        spec_at=lambda consumed: TicketSpec(3, 3) if consumed < 3 else None,
        resolution=16,
        workers=0,
        max_bad_fraction=0.5,
    )
    (batch,) = loader
    assert batch.ids[~batch.valid].tolist() == [1]
    assert loader.bad_samples == {"decode": 1}
    assert not canary.exists()
    # the same bytes do write the file where they are unpickled
    with tarfile.open(path) as tar:
        content = tar.extractfile(found[f"00000001.{suffix}"]).read()
    if suffix == "pth":
        torch.load(io.BytesIO(content), weights_only=False).close()
    else:
        pickle.loads(content).close()
    assert canary.exists()


def test_only_the_tar_writer_of_webdataset_is_used_and_nothing_unpickles():
    """webdataset decodes .pyd and .pth members by unpickling them unless its `enforce_security` is set."""
    used = set()
    for path in Path(efftrain_ds.__file__).parent.joinpath("data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "webdataset":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert not names & {"webdataset", "pickle", "dill", "joblib"}, path
            elif isinstance(node, ast.Attribute):
                assert not (node.attr == "load" and ast.unparse(node.value) in ("torch", "np", "numpy")), path
    assert used == {"TarWriter"}
