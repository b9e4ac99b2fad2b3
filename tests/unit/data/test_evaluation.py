import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from efftrain_ds.core.errors import ShardError
from efftrain_ds.data.evaluation import EvalLoader
from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard, load_manifest

N = 97


def write_split(folder, n, bad=None, label=None):
    """Three shards of flat grey-level images: pixel value = 2 x row."""
    folder.mkdir(exist_ok=True)
    rows, shards, done = [], [], 0
    for number, count in enumerate((n // 3, 0, n - n // 3)):
        path = folder / f"shard-{number:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(done, done + count):
                buffer = io.BytesIO()
                Image.new("RGB", (10, 8), (2 * row % 256,) * 3).save(buffer, "PNG")
                payload = b"broken" if row == bad else buffer.getvalue()
                info = tarfile.TarInfo(f"{row:06d}.png")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        done += count
        with tarfile.open(path) as tar:
            for member in tar:
                value = label if label is not None and len(rows) == 5 else len(rows) % 7
                rows.append((number, member.offset_data, member.size, value, 10, 8))
        data = path.read_bytes()
        shards.append(Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), count))
    (folder / INDEX).write_bytes(np.array(rows, dtype=ROW).tobytes())
    Manifest(folder, "val", tuple("abcdefg"), tuple(shards), len(rows), "").write()
    return load_manifest(folder)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("val"), N)


@pytest.mark.parametrize("world", range(1, 9))
def test_every_sample_exactly_once_with_equal_step_counts(manifest, world):
    seen, steps = [], set()
    for rank in range(world):
        loader = EvalLoader(manifest, rank=rank, world=world, batch=6, resolution=8)
        batches = list(loader)
        steps.add(len(batches))
        assert len(loader) == len(batches)
        for batch in batches:
            assert batch.images.shape == (6, 3, 8, 8)
            assert torch.equal(batch.labels == -100, ~batch.valid)
            assert torch.equal(batch.ids == -1, ~batch.valid)
            assert not batch.images[~batch.valid].any()
            ids = batch.ids[batch.valid]
            assert (ids % world == rank).all()
            assert torch.equal(batch.labels[batch.valid], ids % 7)
            assert torch.equal(batch.images[batch.valid, 0, 0, 0].long(), 2 * ids % 256)
            seen += ids.tolist()
    assert steps == {-(-N // (world * 6))}
    assert sorted(seen) == list(range(N))


def test_workers_are_kept_between_evaluations(manifest):
    loader = EvalLoader(manifest, rank=0, world=1, batch=40, resolution=8, workers=1)
    pids = []
    for _ in range(2):
        assert torch.cat([b.ids[b.valid] for b in loader]).tolist() == list(range(N))
        pids.append([p.pid for p in loader._loader._iterator._workers])
    assert pids[0] == pids[1]
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_any_bad_sample_stops_the_evaluation(tmp_path, workers):
    loader = EvalLoader(write_split(tmp_path, 12, bad=7), rank=0, world=1, batch=4, resolution=8, workers=workers)
    with pytest.raises(ShardError, match=r"validation sample 7, .*shard-002\.tar, offset \d+: image cannot be decoded"):
        list(loader)
    loader.close()


def test_unknown_label_stops_the_evaluation(tmp_path):
    manifest = write_split(tmp_path, 12, label=7)
    with pytest.raises(ShardError, match=r"validation sample 5.*label 7 is not in 0\.\.6"):
        list(EvalLoader(manifest, rank=0, world=1, batch=4, resolution=8))
    assert len(list(EvalLoader(manifest, rank=0, world=1, batch=4, resolution=8, num_classes=8))) == 3
