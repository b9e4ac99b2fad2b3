import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from efftrain_ds.core.draws import uniforms
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.data.order import SampleOrder, default_streams

SIZES = (5, 17, 9, 30, 0, 2, 11, 23)


def make(sizes=SIZES, **changes):
    return SampleOrder(sizes, **{"seed": 3, "streams": 12, "shuffle_block": 64, **changes})


@pytest.mark.parametrize(
    ("sizes", "streams", "block"),
    [(SIZES, 12, 4096), (SIZES, 1, 3), (SIZES, 200, 1), ([0, 0, 7], 4, 2), ([1000, 0, 333, 4000], 60, 17), ([1], 1, 1)],
)
def test_every_epoch_holds_every_sample_once(sizes, streams, block):
    order = make(sizes, streams=streams, shuffle_block=block)
    total = sum(sizes)
    for epoch in range(3):
        assert sorted(order.ids(epoch * total, total)) == list(range(total))


def test_any_window_is_a_part_of_the_same_endless_sequence():
    order = make()
    whole = order.ids(0, 5 * 97)
    assert whole.dtype == np.int64
    rng = np.random.default_rng(0)
    for start in rng.integers(0, 400, 40):
        count = int(rng.integers(0, 85))
        # A fresh object: nothing may depend on what was asked before.
        assert np.array_equal(make().ids(int(start), count), whole[start : start + count])
    assert np.array_equal(make().ids(10, 300), whole[10:310])


def test_epochs_and_seeds_differ():
    order = make()
    assert not np.array_equal(order.ids(0, 97), order.ids(97, 97))
    assert not np.array_equal(order.ids(0, 97), make(seed=4).ids(0, 97))


def test_streams_keep_reads_local_and_mix_places():
    sizes = [100] * 100
    order = make(sizes, streams=20, shuffle_block=50)
    shard_of = order.ids(0, 10_000) // 100
    # One stream is 500 samples long: it touches 5 whole shards, or 6 in parts.
    for stream in range(20):
        assert len(set(shard_of[stream::20])) <= 6
    # Any 20 neighbours come from 20 streams, hence from about 20 shards.
    assert min(len(set(shard_of[i : i + 20])) for i in range(0, 10_000, 20)) >= 19


def test_a_small_data_set_is_fully_shuffled_whatever_the_number_of_streams():
    ids = make([50] * 2, streams=1000, shuffle_block=4096).ids(0, 100)
    assert np.corrcoef(ids, np.arange(100))[0, 1] < 0.5


def test_block_shuffle_stays_in_its_block():
    ids = make([640], streams=1, shuffle_block=10).ids(0, 640)
    assert np.array_equal(np.sort(ids.reshape(64, 10), axis=1), np.arange(640).reshape(64, 10))
    assert (np.diff(ids.reshape(64, 10), axis=1) < 0).any(axis=1).all()


def test_excluded_rows_leave_the_plan_and_change_the_digest():
    order = make(exclude=np.array([0, 96, 40]))
    assert order.samples_per_epoch == 94
    assert set(order.ids(0, 94)) == set(range(97)) - {0, 40, 96}
    assert order.digest != make().digest
    with pytest.raises(ConfigError, match=r"97.*not in 0\.\.96"):
        make(exclude=np.array([97]))


def test_digest_depends_on_every_setting():
    digests = {
        make().digest,
        make(seed=4).digest,
        make(streams=24).digest,
        make(shuffle_block=65).digest,
        make((17, 5, 9, 30, 0, 2, 11, 23)).digest,
    }
    assert len(digests) == 5
    assert make().digest == make().digest


def test_bad_settings_are_refused():
    for bad in ({"streams": 0}, {"shuffle_block": 0}, {"version": 2}):
        with pytest.raises(ConfigError):
            make(**bad)
    with pytest.raises(ConfigError, match="nothing to train on"):
        make((0, 0))
    with pytest.raises(ValueError, match="negative"):
        make().ids(-1, 3)


GOLDEN = "65698dbebb0097a69acf1553fda074b7f5fcbd59cba9e3b625d84452f59de031"
PROGRAM = """
import hashlib
from efftrain_ds.data.order import SampleOrder
order = SampleOrder([300, 0, 170, 221, 9], seed=11, streams=36, shuffle_block=32)
print(hashlib.sha256(order.ids(0, 1000).astype("<i8").tobytes()).hexdigest())
"""


def test_golden_order_of_plan_version_1():
    # A change here breaks the resume of every existing checkpoint: raise PLAN_VERSION instead.
    order = SampleOrder([300, 0, 170, 221, 9], seed=11, streams=36, shuffle_block=32)
    assert hashlib.sha256(order.ids(0, 1000).astype("<i8").tobytes()).hexdigest() == GOLDEN


def test_order_is_the_same_in_a_process_with_another_hash_seed():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == GOLDEN


def test_default_streams_are_at_least_30_a_rank_and_divide_well():
    assert [default_streams(world) for world in (1, 2, 7, 8, 64)] == [36, 60, 420, 240, 2880]
    for world in (*range(1, 130), 256, 1000, 100_000):
        assert default_streams(world) % world == 0  # else a rank would not keep to its own streams
        assert default_streams(world) >= 30 * world


def test_with_the_default_streams_a_node_reads_its_share_of_the_shards():
    world = 32
    order = SampleOrder([200] * 1440, seed=0, streams=default_streams(world), shuffle_block=64)
    shards = (order.ids(0, 288_000) // 200).reshape(-1, 4, 8)  # steps, nodes, ranks of a node
    assert [len(np.unique(shards[:, node])) for node in range(4)] == [360] * 4


def test_uniforms_are_pure_and_uniform():
    positions = np.arange(50_000)
    u = uniforms(5, "crop", positions, 4)
    assert u.shape == (50_000, 4)
    assert (u >= 0).all()
    assert (u < 1).all()
    assert np.allclose(u.mean(0), 0.5, atol=0.01)
    assert np.allclose(u.var(0), 1 / 12, atol=0.002)
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.02
    # A draw depends on its own position only, and on the number of draws not at all.
    assert np.array_equal(uniforms(5, "crop", np.array([77, 5]), 2), u[[77, 5], :2])
    assert not np.array_equal(uniforms(5, "flip", positions[:9], 4), u[:9])
    assert not np.array_equal(uniforms(6, "crop", positions[:9], 4), u[:9])
    assert np.isfinite(uniforms(5, "crop", np.array([-1]), 1)).all()
