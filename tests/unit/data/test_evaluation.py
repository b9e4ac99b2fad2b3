import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import ShardError
from efftrain_ds.data.augment import DeviceAugment
from efftrain_ds.data.evaluation import EvalLoader
from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard, load_manifest
from efftrain_ds.train_setup import probe_source

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


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("limit", [1, 10, 96, N, 500])
def test_a_limit_takes_evenly_spaced_samples(manifest, world, limit):
    count, seen, steps = min(limit, N), {}, set()
    for rank in range(world):
        loader = EvalLoader(manifest, rank=rank, world=world, batch=4, resolution=8, limit=limit)
        batches = list(loader)
        steps.add(len(batches))
        assert loader.samples == count
        for step, batch in enumerate(batches):
            assert torch.equal(batch.images[batch.valid, 0, 0, 0].long(), 2 * batch.ids[batch.valid] % 256)
            assert torch.equal(batch.labels[batch.valid], batch.ids[batch.valid] % 7)
            for row, sample in enumerate(batch.ids[batch.valid].tolist()):
                seen[(step * 4 + row) * world + rank] = sample
    assert steps == {-(-count // (world * 4))}
    assert seen == {i: i * N // count for i in range(count)}


def test_a_limit_must_take_something(manifest):
    with pytest.raises(ValueError, match="limit is at least 1, found 0"):
        EvalLoader(manifest, rank=0, world=1, batch=4, resolution=8, limit=0)


def test_not_strict_leaves_bad_samples_out(tmp_path):
    manifest = write_split(tmp_path, 12, bad=7, label=7)
    loader = EvalLoader(manifest, rank=0, world=1, batch=6, resolution=8, strict=False)
    first, second = loader
    assert first.valid.tolist() == [True] * 5 + [False]  # sample 5 has a label that is no class
    assert second.valid.tolist() == [True, False] + [True] * 4
    assert second.ids.tolist() == [6, -1, 8, 9, 10, 11]
    assert second.labels.tolist() == [6, -100, 1, 2, 3, 4]
    assert not second.images[1].any()
    assert second.images[2].any()


def probes(manifest, world, batch=4):
    config = load_config({"efftrain": {"schema": 1, "data": {"resolution": 8, "eval_crop": 1.0}}})
    return [probe_source(config, manifest, rank, world, batch, 7) for rank in range(world)]


def test_probe_batches_are_equal_at_every_call_whatever_was_done_to_them(manifest):
    (probe,) = probes(manifest, 1)
    first = [(b.images.clone(), b.labels.clone(), b.ids.tolist()) for b in probe(10)]
    augment = DeviceAugment(seed=0)
    for batch in probe(10):
        images = augment.evaluate(batch.to("cpu")).images
        assert images.dtype == torch.float32
    again = probe(10)
    assert [b.images.dtype for b in again] == [torch.uint8] * 3
    assert [len(b) for b in again] == [4, 4, 4]
    for batch, (images, labels, ids) in zip(again, first, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert batch.ids.tolist() == ids
    assert torch.cat([b.ids[b.valid] for b in again]).tolist() == [i * N // 10 for i in range(10)]
    assert sum(int(b.valid.sum()) for b in probe(3)) == 3


def test_probe_batches_of_several_ranks_are_the_total(manifest):
    per_rank = [probe(10) for probe in probes(manifest, 3, batch=2)]
    assert [len(batches) for batches in per_rank] == [2, 2, 2]
    ids = [i for batches in per_rank for b in batches for i in b.ids[b.valid].tolist()]
    assert sorted(ids) == [i * N // 10 for i in range(10)]


def test_an_unreadable_training_sample_does_not_stop_a_probe(tmp_path):
    (probe,) = probes(write_split(tmp_path, 12, bad=7), 1)
    assert torch.cat([b.ids[b.valid] for b in probe(12)]).tolist() == [i for i in range(12) if i != 7]
