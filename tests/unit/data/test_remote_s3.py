"""Remote shards on an S3-compatible server on loopback, which the tests start themselves."""

import pytest

from efftrain_ds.core.errors import ShardError
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.bundled import source
from efftrain_ds.data.cache import ShardLost
from efftrain_ds.data.evaluation import EvalLoader
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.remote import open_data
from efftrain_ds.data.sources import IdxSource

pytest.importorskip("s3fs")
pytest.importorskip("flask_cors")
moto_server = pytest.importorskip("moto.server")
N = 40


class Some(IdxSource):
    """The first pictures of the bundled data."""

    def __init__(self):
        whole = source("bundled:fashion_mnist/val")
        self._images, self._labels = whole._images[:N], whole._labels[:N]
        self.classes, self._name = whole.classes, "some"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3") / "data"
    build_shards(Some(), folder, split="val", samples_per_shard=10)
    return folder


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, packed, monkeypatch):
    """A fresh bucket with the shards in a folder; returns its file system and the URL of the folder."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem(use_listings_cache=False)
    if system.exists("shards"):
        system.rm("shards", recursive=True)
    system.mkdir("shards")
    for path in packed.iterdir():
        system.put_file(str(path), f"shards/fm/val/{path.name}")
    yield system, "s3://shards/fm/val"
    s3fs.S3FileSystem.clear_instance_cache()


def rows(manifest, workers=0):
    loader = EvalLoader(manifest, rank=0, world=1, batch=8, resolution=16, workers=workers)
    found = [(b.ids.tolist(), b.labels.tolist(), b.images.numpy().tobytes()) for b in loader]
    loader.close()
    return found


def test_s3_data_is_read_and_kept(bucket, packed, tmp_path):
    system, url = bucket
    manifest = open_data(url, cache_dir=tmp_path, retry_s=0.001)
    assert manifest.digest == load_manifest(packed).digest
    assert rows(manifest, workers=1) == rows(load_manifest(packed))
    assert manifest.store.counts.fetched == 4
    again = open_data(url + "/", cache_dir=tmp_path, retry_s=0.001)
    assert rows(again) == rows(load_manifest(packed))
    assert again.store.counts.fetched == 0


def test_missing_and_other_objects_are_found_before_the_first_sample(bucket, tmp_path):
    system, url = bucket
    system.rm("shards/fm/val/val-000001.tar")
    system.pipe_file("shards/fm/val/val-000002.tar", b"cut")
    with pytest.raises(
        ShardError, match=r"2 of 4 shards do not match s3://shards/fm/val:\n.*000001.tar: missing\n.*3 b"
    ):
        open_data(url, cache_dir=tmp_path, retry_s=0.001)


def test_objects_that_change_later_are_one_error(bucket, tmp_path):
    system, url = bucket
    manifest = open_data(url, cache_dir=tmp_path, retry_s=0.001)
    good = system.cat_file("shards/fm/val/val-000000.tar")
    system.pipe_file("shards/fm/val/val-000000.tar", good[:800] + bytes([good[800] ^ 1]) + good[801:])
    system.rm("shards/fm/val/val-000003.tar")
    with pytest.raises(ShardLost, match=r"s3://shards/fm/val/val-000000.tar: all 5 tries failed.*sha256"):
        manifest.store.acquire(manifest.shards[0])
    system.pipe_file("shards/fm/val/val-000000.tar", good)
    with pytest.raises(ShardLost, match=r"s3://shards/fm/val/val-000003.tar: all 5 tries failed.*FileNotFound"):
        rows(manifest)


def test_no_such_bucket(bucket, tmp_path):
    with pytest.raises(ShardLost, match="s3://elsewhere/data/manifest.json: all 5 tries failed"):
        open_data("s3://elsewhere/data", cache_dir=tmp_path, retry_s=0.001)
