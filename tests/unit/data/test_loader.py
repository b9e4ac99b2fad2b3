import hashlib
import io
import json
import logging
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from efftrain_ds.core.errors import CheckpointError, PlanError, ShardError
from efftrain_ds.data import loader as loader_module
from efftrain_ds.data.loader import TicketSpec, TrainLoader
from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard, load_manifest
from efftrain_ds.data.worker import DecodedCache

SIZES = (5, 17, 9, 30, 0, 2, 11, 23)
N = sum(SIZES)


def picture(number, fmt="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def write_split(folder, sizes=SIZES, replace=(), labels=()):
    """Shards of small noise images; `replace` maps row -> payload, `labels` row -> label (else row modulo 10)."""
    folder.mkdir(exist_ok=True)
    replace, labels = dict(replace), dict(labels)
    rows, shards = [], []
    for number, n in enumerate(sizes):
        path = folder / f"shard-{number:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(n):
                row = len(rows) + k
                payload = replace.get(row, picture(row, "JPEG" if row % 3 == 0 else "PNG"))
                info = tarfile.TarInfo(f"{row:06d}.jpg")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        with tarfile.open(path) as tar:
            for member in tar:
                label = labels.get(len(rows), len(rows) % 10)
                rows.append((number, member.offset_data, member.size, label, 14, 12))
        data = path.read_bytes()
        shards.append(Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), n))
    (folder / INDEX).write_bytes(np.array(rows, dtype=ROW).tobytes())
    Manifest(folder, "train", tuple("0123456789"), tuple(shards), len(rows), "").write()
    return load_manifest(folder)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"))


def until(total, batch=12, micro=4):
    return lambda consumed: TicketSpec(batch, micro) if consumed < total else None


def make(manifest, spec_at, *, rank=0, world=1, workers=0, **changes):
    settings = {"seed": 5, "resolution": 8, "prefetch": 2, "streams": 12, "shuffle_block": 16, **changes}
    return TrainLoader(manifest, rank=rank, world=world, spec_at=spec_at, workers=workers, **settings)


def by_position(loaders):
    """{position: (id, label, pixels)} over the ranks; fails on a position that comes twice."""
    found = {}
    for loader in loaders:
        for batch in loader:
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous()
            for i in range(len(batch)):
                position = int(batch.positions[i])
                assert position not in found
                found[position] = (int(batch.ids[i]), int(batch.labels[i]), batch.images[i].numpy().tobytes())
    return found


def changing(consumed):
    """Batch 12, then 21, then 9; 291 = 3 x 97 samples in all."""
    if consumed < 108:
        return TicketSpec(12, 2)
    if consumed < 192:
        return TicketSpec(21, 7)
    return TicketSpec(9, 1) if consumed < 291 else None


@pytest.mark.parametrize("workers", [0, 2])
def test_three_ranks_see_every_sample_once_an_epoch_while_the_batch_changes(manifest, workers):
    loaders = [make(manifest, changing, rank=rank, world=3, workers=workers) for rank in range(3)]
    sizes = [[len(batch) for batch in loader] for loader in loaders]
    # Equal step counts: 9 steps of 2 x 2, 4 of 1 x 7, 11 of 3 x 1 micro-batches on every rank, each of them full.
    assert sizes == [[2] * 18 + [7] * 4 + [1] * 33] * 3
    found = by_position(loaders)
    assert sorted(found) == list(range(3 * N))
    for epoch in range(3):
        assert sorted(found[p][0] for p in range(epoch * N, (epoch + 1) * N)) == list(range(N))
    assert all(label == row % 10 for row, label, _ in found.values())
    assert len({found[p][2] for p in range(N)}) == N
    for loader in loaders:
        loader.close()


def test_consecutive_positions_go_round_the_ranks_and_micro_batches_are_in_order(manifest):
    positions = [[b.positions.tolist() for b in make(manifest, until(24), rank=r, world=3)] for r in range(3)]
    assert positions[1] == [[1, 4, 7, 10], [13, 16, 19, 22]]
    assert sorted(sum(sum(positions, []), [])) == list(range(24))


def test_resume_at_every_step_boundary_with_every_world_gives_the_same_samples_and_pixels(manifest):
    total = 300
    whole = by_position([make(manifest, until(total, 60, 4))])
    for stop in range(0, total + 1, 60):
        first = make(manifest, until(total, 60, 4))
        for _, batch in zip(range(stop // 4), first, strict=False):
            assert len(batch) == 4
        for _ in range(stop // 60):
            first.commit(60)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["consumed"] == stop
        for world in range(1, 6):
            rest = [make(manifest, until(total, 60, 60 // world), rank=r, world=world) for r in range(world)]
            for loader in rest:
                loader.load_state_dict(state)
            assert by_position(rest) == {p: v for p, v in whole.items() if p >= stop}


def read_until(loader, samples):
    """Deliver and commit steps until `samples` are consumed; returns the ids."""
    ids = []
    for batch in loader:
        ids += batch.ids.tolist()
        if loader._steps:
            loader.commit(loader._steps[0])
        if loader.consumed == samples:
            return ids
    raise AssertionError(f"ended at {loader.consumed}")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_samples_and_outlive_changes_and_restarts(manifest, workers):
    whole = by_position([make(manifest, until(120))])
    sequence = [whole[p][0] for p in range(120)]

    def spec(consumed):
        return TicketSpec(12, 4) if consumed < 60 else TicketSpec(20, 5) if consumed < 120 else None

    state = torch.random.get_rng_state()
    loader = make(manifest, spec, workers=workers)
    read_until(loader, 24)
    pids = loader.worker_pids()
    assert len(pids) == workers
    assert os.getpid() not in pids
    # Thrown away while batches are prefetched: issued again, by the same processes.
    assert read_until(loader, 80) == sequence[24:80]
    assert by_position([loader]) == {p: v for p, v in whole.items() if p >= 80}
    assert loader.worker_pids() == pids
    # An interrupt from the terminal (signal 2, bit 1 of the mask) is ignored by the workers.
    if os.path.exists(f"/proc/{pids[0]}/status"):
        with open(f"/proc/{pids[0]}/status") as file:
            mask = next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))
        assert mask & 0b10
    assert torch.equal(state, torch.random.get_rng_state())
    loader.close()
    assert loader.worker_pids() == []


def test_images_from_workers_lie_in_shared_memory(manifest):
    loader = make(manifest, until(12), workers=1)
    assert all(batch.images.is_shared() for batch in loader)
    loader.close()


def test_commit_only_at_delivered_step_boundaries(manifest):
    loader = make(manifest, until(48))
    batches = iter(loader)
    next(batches)
    next(batches)
    for wrong in (12, 8):
        with pytest.raises(ValueError, match=r"not committed are \[\]"):
            loader.commit(wrong)
    next(batches)
    with pytest.raises(ValueError, match=r"commit of 24.*\[12\]"):
        loader.commit(24)
    loader.commit(12)
    for _ in range(6):
        next(batches)
    loader.commit(24)
    assert loader.consumed == 36
    assert loader.state_dict()["consumed"] == 36
    assert [b.positions[0].item() for b in loader] == [36, 40, 44]
    assert list(batches) == []  # the earlier iterator has ended


def test_uneven_batch_is_refused_with_its_numbers(manifest):
    with pytest.raises(PlanError, match="train_batch_size 10 at sample 0 .* world 3 x micro-batch 2"):
        list(make(manifest, until(20, 10, 2), world=3))


def test_a_checkpoint_of_another_run_is_refused_naming_both_values(manifest, tmp_path):
    state = make(manifest, until(12)).state_dict()
    with pytest.raises(CheckpointError, match="seed: checkpoint 5, here 6"):
        make(manifest, until(12), seed=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match="shuffle_block: checkpoint 16, here 17"):
        make(manifest, until(12), shuffle_block=17).load_state_dict(state)
    with pytest.raises(CheckpointError, match="streams: checkpoint 12, here 24"):
        make(manifest, until(12), streams=24).load_state_dict(state)
    other = write_split(tmp_path / "other", (5, 5))
    with pytest.raises(CheckpointError, match=f"{manifest.digest}.*{other.digest}"):
        make(other, until(12)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="order: checkpoint 'x', here"):
        make(manifest, until(12)).load_state_dict({**state, "order": "x"})
    with pytest.raises(CheckpointError, match="consumed: checkpoint None"):
        make(manifest, until(12)).load_state_dict({k: v for k, v in state.items() if k != "consumed"})


def test_default_streams_of_the_first_start_survive_a_resume_with_another_world(manifest):
    first = make(manifest, until(12), world=1, streams=None)
    later = make(manifest, until(12), world=4, streams=None)
    assert (first.order.streams, later.order.streams) == (36, 120)
    later.load_state_dict(first.state_dict())
    assert later.order.streams == 36
    assert later.state_dict() == first.state_dict()


def bad_rows():
    jpeg = picture(1, "JPEG")
    return {
        3: jpeg[: len(jpeg) // 2],
        20: bytes(range(256)),
        40: picture(40, "PNG"),  # a PNG in a member named .jpg is a good sample
        50: b"\0" * 64,
        60: b"",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_masked_counted_and_written_to_the_ledger(tmp_path, workers):
    manifest = write_split(tmp_path / "split", replace=bad_rows(), labels={70: 10, 71: -1})
    ledger = tmp_path / "out" / "quarantine.jsonl"
    loader = make(
        manifest, until(96, 16, 8), workers=workers, max_bad_fraction=0.1, quarantine=ledger, decoded_cache_mb=1
    )
    bad, valid = {}, 0
    for batch in loader:
        valid += int(batch.valid.sum())
        assert torch.equal(batch.labels == -100, ~batch.valid)
        for i in torch.nonzero(~batch.valid).flatten().tolist():
            assert not batch.images[i].any()
            bad[int(batch.ids[i])] = int(batch.positions[i])
        if loader._steps:
            loader.commit(16)
    loader.close()
    last = set(range(N)) - set(loader.order.ids(0, 96).tolist())
    assert set(bad) == {3, 20, 50, 60, 70, 71} - last
    assert valid + len(bad) == loader.consumed == 96
    assert loader.bad_samples == {"decode": 3, "read": 1, "label": 2}
    entries = {e["row"]: e for e in map(json.loads, ledger.read_text().splitlines())}
    assert {row: e["position"] for row, e in entries.items()} == bad
    assert entries[20]["digest"] == hashlib.sha256(bytes(range(256))).hexdigest()[:16]
    assert entries[20]["shard"] == "shard-001.tar"
    assert "label 10 is not in 0..9" in entries[70]["error"]


def test_too_many_bad_samples_stop_the_run_with_a_summary(tmp_path):
    manifest = write_split(tmp_path / "split", replace=bad_rows())
    with pytest.raises(ShardError, match=r"2 bad samples of \d+ read by rank 0 \(.*max_bad_fraction 0.0001 allows 1"):
        list(make(manifest, until(96)))
    one = write_split(tmp_path / "one", replace={3: b"x"})
    assert sum(int((~b.valid).sum()) for b in make(one, until(96, 8, 8))) <= 1
    with pytest.raises(ShardError, match="allows 0"):
        list(make(one, until(2 * 96), max_bad_fraction=0.0))


def test_a_failing_read_is_tried_once_more(manifest):
    loader = make(manifest, until(96))
    reader, real, failed = loader._samples.reader, loader._samples.reader.payload, []

    def flaky(shard, offset, size):
        if (shard, offset) not in failed:
            failed.append((shard, offset))
            raise ShardError("lost connection")
        return real(shard, offset, size)

    reader.payload = flaky
    assert all(batch.valid.all() for batch in loader)
    assert len(failed) == 96


def test_a_shard_of_another_size_stops_before_the_first_sample(tmp_path):
    manifest = write_split(tmp_path / "split")
    path = manifest.shard_path(3)
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(ShardError, match=r"shard-003\.tar: \d+ bytes, the manifest says \d+"):
        make(manifest, until(12))


def test_decoded_cache_changes_no_pixel_and_reads_each_sample_once(manifest):
    plain = by_position([make(manifest, until(288, 24, 24))])
    loader = make(manifest, until(288, 24, 24), decoded_cache_mb=1)
    reader, real, reads = loader._samples.reader, loader._samples.reader.payload, []
    reader.payload = lambda *args: reads.append(args) or real(*args)
    assert by_position([loader]) == plain
    assert len(reads) == N


def test_decoded_cache_stays_within_its_bytes_and_drops_the_oldest():
    cache = DecodedCache(100)
    for row in range(3):
        cache.put(row, np.zeros(40, np.uint8))
        cache.get(0)
    assert cache.get(1) is None
    assert cache.get(0) is not None
    assert cache.get(2) is not None
    assert cache.bytes == 80
    cache.put(9, np.zeros(101, np.uint8))
    assert cache.get(9) is None


def test_warnings_for_poor_mixing_and_little_shared_memory(manifest, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger=loader_module.__name__):
        make(manifest, until(12), world=1)
        assert not caplog.records
        make(manifest, until(12), world=2)
        assert "12 streams for 2 ranks" in caplog.text
        caplog.clear()
        usage = loader_module.shutil.disk_usage("/")._replace(free=10_000)
        monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(loader_module, "_SHM", loader_module.Path("/"))
        loader = make(manifest, until(24), workers=2)
        assert len(list(loader.tickets(0, TicketSpec(12, 4)))) == 3
        assert not caplog.records  # 4 x 3 x 8 x 8 x (2 x 2 + 2) = 4608 bytes
        list(loader.tickets(0, TicketSpec(12, 12)))
        list(loader.tickets(12, TicketSpec(12, 12)))
        assert [r.levelname for r in caplog.records] == ["WARNING"]  # once
        assert "--shm-size" in caplog.text
