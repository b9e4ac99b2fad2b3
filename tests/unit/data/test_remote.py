"""Remote shards: transfers from real servers on loopback, the cache, and the loaders on top of both."""

import hashlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pytest

from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import PlanError, ShardError
from efftrain_ds.data import bundled
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.cache import ShardCache, ShardLost
from efftrain_ds.data.evaluation import EvalLoader
from efftrain_ds.data.feed import ShardFeed
from efftrain_ds.data.loader import TicketSpec, TrainLoader
from efftrain_ds.data.locks import try_lock
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.remote import open_data
from efftrain_ds.data.sources import IdxSource
from efftrain_ds.data.transport import RemoteFolder
from efftrain_ds.planning import data_facts
from tests.secret_values import VALUES, seen

N, SHARDS = 60, 6
_spec = importlib.util.spec_from_file_location("remote_server", Path(__file__).with_name("remote_server.py"))
remote_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(remote_server)


class Some(IdxSource):
    """The first pictures of the bundled data."""

    def __init__(self, first=0):
        whole = bundled.source("bundled:fashion_mnist/val")
        self._images, self._labels = whole._images[first : first + N], whole._labels[first : first + N]
        self.classes, self._name = whole.classes, "some"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "data"
    build_shards(Some(), folder, split="train", samples_per_shard=N // SHARDS)
    return folder


@pytest.fixture
def server(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "served" / "data")
    server = remote_server.FaultServer(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def open_remote(server, tmp_path):
    """``open_remote(url=..., **changes)``: the served data set with short pauses and a cache of its own."""

    def run(url=None, **changes):
        options = {"cache_dir": tmp_path / "cache", "retry_s": 0.001, "stall_s": 5.0, **changes}
        return open_data(url or f"{server.url}/data", **options)

    return run


def files(folder):
    return sorted(p.name for p in (folder / "shards").iterdir())


def make(manifest, *, steps=5, workers=0, rank=0, world=1, **changes):
    return TrainLoader(
        manifest,
        seed=3,
        rank=rank,
        world=world,
        spec_at=lambda consumed: TicketSpec(12, 4) if consumed < 12 * steps else None,
        resolution=16,
        workers=workers,
        streams=12,
        shuffle_block=16,
        **changes,
    )


def everything(loader):
    found = [(b.positions.tolist(), b.ids.tolist(), b.labels.tolist(), b.images.numpy().tobytes()) for b in loader]
    loader.close()
    return found


# -- loaders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_data_gives_the_same_batches_as_local_data(server, open_remote, packed, tmp_path, workers):
    manifest = open_remote()
    local = load_manifest(packed)
    assert manifest.digest == local.digest
    assert not files(tmp_path / "cache")  # nothing is fetched before it is needed
    assert everything(make(manifest, workers=workers)) == everything(make(local))
    assert all(count == 1 for count in server.requests.values()), server.requests
    assert len(files(tmp_path / "cache")) == SHARDS
    # a second run finds all in the cache
    loader = make(open_remote(), workers=workers)
    assert everything(loader) == everything(make(local))
    assert loader.feed.counts.fetched == 0
    assert {name: count for name, count in server.requests.items() if name.endswith(".tar")} == {
        shard.name: 1 for shard in manifest.shards
    }
    assert server.requests["index.bin"] == 1


def test_remote_data_is_evaluated(open_remote, packed):
    for options in ({"workers": 0}, {"workers": 1}, {"workers": 0, "limit": 7}):
        ids = []
        for manifest in (open_remote(), load_manifest(packed)):
            loader = EvalLoader(manifest, rank=0, world=1, batch=8, resolution=16, **options)
            ids.append([(b.ids.tolist(), b.images.numpy().tobytes()) for _ in range(2) for b in loader])
            loader.close()
        assert ids[0] == ids[1]


def test_a_cache_of_two_shards_is_enough(server, open_remote, packed, tmp_path):
    size = load_manifest(packed).shards[0].bytes
    manifest = open_remote(cache_gb=2.1 * size / 1e9)
    loader = EvalLoader(manifest, rank=0, world=1, batch=10, resolution=16)
    seen = [row for batch in loader for row in batch.ids.tolist()]
    assert seen == list(range(N))
    loader.close()
    assert len(files(tmp_path / "cache")) <= 2
    assert loader.feed.counts.evicted >= SHARDS - 2


def test_shards_of_open_tickets_stay_and_are_let_go(open_remote, packed):
    size = load_manifest(packed).shards[0].bytes
    manifest = open_remote(cache_gb=3.1 * size / 1e9)
    feed = ShardFeed(manifest, manifest.store, threads=0)
    path = manifest.shard_path(0)
    feed.hold(np.array([0, 1, -1]))
    feed.hold(np.array([2]))
    feed.release()
    for shard in range(1, SHARDS):
        manifest.store.acquire(manifest.shards[shard]).release()
        assert path.is_file()
    feed.release()
    assert not feed._pins
    for shard in range(1, SHARDS):
        manifest.store.acquire(manifest.shards[shard]).release()
    assert not path.is_file()


def test_what_comes_next_is_fetched_in_the_order_of_use(server, open_remote, packed):
    manifest = open_remote()
    loader = make(manifest)
    feed, size = loader.feed, manifest.shards[0].bytes
    feed.threads = 1
    feed.cache.limit = round(4.5 * size)
    order = list(dict.fromkeys(manifest.table["shard"][loader.order.ids(0, N)].tolist()))
    assert sorted(order) == list(range(SHARDS))

    def fetched():
        with feed._change:
            assert feed._change.wait_for(lambda: not feed._busy and len(feed._ahead) == 2, 30)
        return [shard for shard in order if server.requests[manifest.shards[shard].name]]

    loader.look_ahead(0)
    assert fetched() == order[:2]  # half of the cache
    feed.hold(np.flatnonzero(manifest.table["shard"] == order[0]))
    assert fetched() == order[:3]
    feed.hold(np.flatnonzero(manifest.table["shard"] == order[1]))
    assert fetched() == order[:4]
    loader.close()
    assert max(server.requests.values()) == 1


def test_a_plan_is_made_from_the_remote_manifest(server, tmp_path):
    file = Path(__file__).parents[3] / "ds_configs" / "smoke_et_vit_fmnist.json"
    where = [f'efftrain.data.train="{server.url}/data"', f'efftrain.data.cache_dir="{tmp_path / "cache"}"']
    facts = data_facts(load_config(file, overrides=where, world=1))
    assert (facts.samples, facts.num_classes) == (N, 10)
    assert dict(server.requests) == {"manifest.json": 1}
    given = [*where, "efftrain.data.samples=60", "efftrain.model.num_classes=10"]
    assert data_facts(load_config(file, overrides=given, world=1)) == facts
    assert dict(server.requests) == {"manifest.json": 1}  # nothing is fetched where the file says all
    with pytest.raises(PlanError, match="efftrain.data.samples is 61, but http://.* holds 60 samples"):
        data_facts(load_config(file, overrides=[*where, "efftrain.data.samples=61"], world=1))


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (["cut"], ""),
        (["short"], "bytes came, the manifest says"),
        (["wrong"], "the content has sha256"),
        ([500, 500], "500"),
        ([404, 503], ""),
        (["stall"], ""),
        (["cut", "short", "wrong", 500], ""),
    ],
)
def test_a_transfer_that_fails_is_repeated(server, open_remote, tmp_path, faults, cause, caplog):
    manifest = open_remote(stall_s=2.0)  # a busy machine must not look like a server that stalls
    shard = manifest.shards[2]
    server.faults[shard.name].extend(faults)
    with caplog.at_level("WARNING"):
        manifest.store.acquire(shard).release()
    path = manifest.shard_path(2)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert files(tmp_path / "cache") == [path.name]
    assert manifest.store.counts.failed_tries == len(faults)
    assert server.requests[shard.name] == len(faults) + 1
    assert f"{server.url}/data/{shard.name}: try 1 of 5 failed" in caplog.text
    assert cause in caplog.text


@pytest.mark.parametrize(
    ("fault", "cause"), [(404, "FileNotFoundError"), ("short", "bytes came"), ("wrong", "has sha256"), ("cut", "")]
)
def test_a_shard_that_never_comes_is_one_error(server, open_remote, tmp_path, fault, cause):
    manifest = open_remote()
    shard = manifest.shards[1]
    server.always[shard.name] = fault
    with pytest.raises(ShardLost, match=f"{server.url}/data/{shard.name}: all 5 tries failed, the last with .*{cause}"):
        manifest.store.acquire(shard)
    assert server.requests[shard.name] == 5
    assert not files(tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_shard_stops_the_loader(server, open_remote, packed, workers):
    manifest = open_remote()
    loader = make(manifest, workers=workers)
    lost = manifest.shards[int(manifest.table["shard"][loader.order.ids(0, N)[-1]])]
    server.always[lost.name] = 404
    with pytest.raises(ShardLost, match=f"{lost.name}: all 5 tries failed") as error:
        everything(loader)
    assert len(str(error.value)) < 300
    loader.close()


def test_who_waited_for_a_shard_gets_the_same_error(server, open_remote):
    """Four ranks ask for a shard that is not there: one of them tries, all of them hear of it."""
    manifest = open_remote()
    shard, errors, waiting = manifest.shards[0], [], threading.Semaphore(0)
    server.always[shard.name] = 404
    holder = try_lock(manifest.store._lock(shard, "get"))  # all four wait here

    class Wait(threading.Event):
        def wait(self, timeout=None):
            waiting.release()
            return super().wait(timeout)

    def ask():
        cache = ShardCache(manifest.store.remote, manifest.store.root, 10**9, 0.001)
        with pytest.raises(ShardLost) as error:
            cache.acquire(shard, Wait())
        errors.append(str(error.value))

    ranks = [threading.Thread(target=ask) for _ in range(4)]
    for rank in ranks:
        rank.start()
        assert waiting.acquire(timeout=30)
    holder.release()
    for rank in ranks:
        rank.join()
    assert len(errors) == 4
    assert len(set(errors)) == 1
    assert server.requests[shard.name] == 5
    # the next one who asks tries anew
    server.always.clear()
    manifest.store.acquire(shard).release()


@pytest.mark.parametrize(
    ("name", "fault", "text"),
    [
        ("manifest.json", 404, "manifest.json: all 5 tries failed"),
        ("manifest.json", "short", "manifest.json: all 5 tries failed.*not a shard manifest"),
        ("index.bin", 404, "index.bin: all 5 tries failed"),
        ("index.bin", "short", "index.bin: all 5 tries failed.*720 bytes came, the manifest says 1440"),
        ("index.bin", "wrong", "index.bin: all 5 tries failed.*has sha256"),
    ],
)
def test_manifest_and_index_are_verified(server, open_remote, tmp_path, name, fault, text):
    server.always[name] = fault
    with pytest.raises(ShardLost, match=text):
        open_remote()
    assert server.requests[name] == 5
    del server.always[name]
    server.faults[name].extend([fault] * 4)
    assert open_remote().samples == N
    assert not list((tmp_path / "cache" / "sets").glob("*/*.partial"))


def test_shard_names_cannot_leave_the_folder(server, open_remote):
    path = server.root / "data" / "manifest.json"
    text = path.read_text()
    for name in ("../secret.tar", "a/b.tar", "$(id).tar", ".hidden"):
        path.write_text(text.replace("train-000003.tar", name))
        with pytest.raises(ShardError, match="needed are a plain file name|file name .*allowed are letters"):
            open_remote()


def test_a_cache_smaller_than_a_shard_is_refused(open_remote):
    with pytest.raises(ShardError, match="efftrain.data.cache_gb 1e-06 is less than one shard"):
        open_remote(cache_gb=1e-6)


# -- cache ------------------------------------------------------------------------------------------------------------


def test_least_recently_used_shards_go_first(open_remote, packed):
    size = load_manifest(packed).shards[0].bytes
    manifest = open_remote(cache_gb=3.1 * size / 1e9)
    cache, shards = manifest.store, manifest.shards
    for use, shard in enumerate((0, 1, 2, 0, 3)):
        cache.acquire(shards[shard]).release()
        os.utime(cache._lock(shards[shard], "pin"), (use, use))  # instead of waiting for the clock
    assert [cache.present(shard) for shard in shards] == [True, False, True, True, False, False]
    assert cache.counts.evicted == 1


def test_shards_in_use_stay_even_above_the_limit(open_remote, packed, caplog):
    size = load_manifest(packed).shards[0].bytes
    manifest = open_remote(cache_gb=2.1 * size / 1e9)
    pins = [manifest.store.acquire(shard) for shard in manifest.shards[:4]]
    assert all(map(manifest.store.present, manifest.shards[:4]))
    assert caplog.text.count("the shards in use need more than efftrain.data.cache_gb") == 1
    for pin in pins:
        pin.release()
    manifest.store.acquire(manifest.shards[4]).release()
    assert sum(map(manifest.store.present, manifest.shards)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "touched"])
def test_a_copy_that_was_written_to_is_not_trusted(server, open_remote, damage, caplog):
    manifest = open_remote()
    shard, path = manifest.shards[0], manifest.shard_path(0)
    manifest.store.acquire(shard).release()
    good = path.read_bytes()
    path.chmod(0o644)
    if damage == "cut":
        path.write_bytes(good[:-512])
    elif damage == "flipped":
        path.write_bytes(good[:900] + bytes([good[900] ^ 4]) + good[901:])
    else:
        path.touch()
    manifest.store.acquire(shard).release()
    assert path.read_bytes() == good
    assert server.requests[shard.name] == (1 if damage == "touched" else 2)
    assert ("damaged, it is downloaded again" in caplog.text) == (damage != "touched")


def test_another_data_set_at_the_same_url_is_not_taken_from_the_cache(server, open_remote):
    old = open_remote()
    for shard in old.shards:
        old.store.acquire(shard).release()
    shutil.rmtree(server.root / "data")
    build_shards(Some(first=100), server.root / "data", split="train", samples_per_shard=N // SHARDS)
    new = open_remote()
    assert [s.name for s in new.shards] == [s.name for s in old.shards]
    assert new.digest != old.digest
    for number, shard in enumerate(new.shards):
        new.store.acquire(shard).release()
        assert hashlib.sha256(new.shard_path(number).read_bytes()).hexdigest() == shard.sha256


def test_equal_names_of_two_data_sets_do_not_meet(server, open_remote, packed):
    shutil.copytree(packed, server.root / "other")
    one, two = open_remote(), open_remote(f"{server.url}/other")
    assert one.digest == two.digest
    assert one.shard_path(0) != two.shard_path(0)
    assert one.shard_path(0).name.endswith(one.shards[0].name)


def _fetch_all(url, root, answers):
    manifest = open_data(url, cache_dir=root, retry_s=0.001)
    threads = [
        threading.Thread(target=lambda s=s: manifest.store.acquire(s).release()) for s in manifest.shards for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put(manifest.store.counts.fetched)


def test_processes_and_threads_fetch_each_shard_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [
        context.Process(target=_fetch_all, args=(f"{server.url}/data", tmp_path / "cache", answers)) for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    fetched = [answers.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert sum(fetched) == SHARDS
    assert {name: server.requests[name] for name in server.requests if name != "manifest.json"} == {
        **{f"train-{i:06d}.tar": 1 for i in range(SHARDS)},
        "index.bin": 1,
    }


def _stalled(url, root):
    open_data(url, cache_dir=root).store.acquire(load_shard(url, root))


def load_shard(url, root):
    return open_data(url, cache_dir=root).shards[0]


def test_a_killed_download_leaves_no_lock_and_its_rest_is_removed(server, open_remote, tmp_path, packed):
    server.faults["train-000000.tar"].append("stall")
    process = multiprocessing.get_context("fork").Process(
        target=_stalled, args=(f"{server.url}/data", tmp_path / "cache")
    )
    process.start()
    shards = tmp_path / "cache" / "shards"
    while not (list(shards.glob("*.partial")) if shards.is_dir() else []):
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert any(name.endswith(".reserve") for name in files(tmp_path / "cache"))
    size = load_manifest(packed).shards[0].bytes
    manifest = open_remote(cache_gb=1.5 * size / 1e9)
    manifest.store.acquire(manifest.shards[1]).release()
    assert files(tmp_path / "cache") == [manifest.shard_path(1).name]
    manifest.store.acquire(manifest.shards[0]).release()
    assert files(tmp_path / "cache") == [manifest.shard_path(0).name]


def test_a_full_or_forbidden_disk_is_named(server, open_remote, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="efftrain.data.cache_dir: .*file/cache cannot be written"):
        open_remote(cache_dir=tmp_path / "file" / "cache")
    manifest = open_remote()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RemoteFolder, "fetch", full)
    with pytest.raises(ShardLost, match="No space left on device; make room there or lower efftrain.data.cache_gb"):
        manifest.store.acquire(manifest.shards[0])
    assert manifest.store.counts.failed_tries == 0


# -- protocols --------------------------------------------------------------------------------------------------------


def test_file_urls(packed, open_remote, tmp_path):
    served = tmp_path / "nfs"
    shutil.copytree(packed, served)
    assert everything(make(open_remote(f"file://{served}"))) == everything(make(load_manifest(packed)))
    (served / "train-000002.tar").write_bytes(b"short")
    (served / "train-000004.tar").unlink()
    with pytest.raises(
        ShardError, match=r"2 of 6 shards do not match.*\n.*000002.tar: 5 bytes, the.*\n.*000004.tar: missing"
    ):
        open_remote(f"file://{served}")


def test_pipe_needs_leave_and_a_place_for_the_name(packed, open_remote):
    with pytest.raises(
        ShardError, match=r"pipe:\.\.\. runs a shell command on every node; set efftrain.data.allow_pipe"
    ):
        open_remote(f"pipe:cat {packed}/{{name}}")
    with pytest.raises(ShardError, match="needs {name}"):
        open_remote(f"pipe:cat {packed}/manifest.json", allow_pipe=True)


def test_pipe(packed, open_remote, tmp_path):
    manifest = open_remote(f"pipe:cat '{packed}'/{{name}}", allow_pipe=True)
    assert everything(make(manifest)) == everything(make(load_manifest(packed)))


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("echo first >&2; echo no such bucket >&2; exit 7", "the command ended with status 7: no such bucket"),
        ("cat {folder}/{name}; kill -9 $$", "the command ended with status -9"),
        ("head -c 900 {folder}/{name}", "900 bytes came, the manifest says"),
        ("head -c 900 {folder}/{name}; exec sleep 60", "TimeoutError: no byte in 0.1 s"),
    ],
)
def test_pipe_faults(packed, open_remote, tmp_path, command, cause):
    good = f"case {{name}} in *.tar) {command.replace('{folder}', str(packed))};; *) cat {packed}/{{name}};; esac"
    manifest = open_remote(f"pipe:{good}", allow_pipe=True, stall_s=0.1)
    with pytest.raises(ShardLost, match=f"all 5 tries failed, the last with .*{cause}"):
        manifest.store.acquire(manifest.shards[0])
    assert not files(tmp_path / "cache")


def test_unknown_protocols_and_missing_packages_are_named(open_remote, monkeypatch):
    with pytest.raises(ShardError, match="ftp://host/x: allowed are file://, http://, https://, s3://, gs://"):
        open_remote("ftp://user:secret@host/x")

    def missing(protocol, **_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(ShardError, match=r"gs:// needs: pip install 'efftrain-ds\[gs\]'"):
        open_remote("gs://bucket/data")


@pytest.mark.parametrize(
    ("user", "query"),
    [("user:secret@", "token=hidden"), ("", "sv=2024&sig=aB%2Fc%2BdEf%3D&se=SECRET"), ("hunter2@", "")],
)
def test_secrets_of_a_url_are_not_shown(server, open_remote, caplog, user, query):
    url = server.url.replace("http://", f"http://{user}") + f"/data?{query}"
    for fault in (403, "cut"):
        server.always["manifest.json"] = fault
        with pytest.raises(ShardLost, match=f"{server.url}/data/manifest.json: all 5 tries") as error:
            open_remote(url)
        for text in (str(error.value), caplog.text):
            assert "hidden" not in text
            assert "secret" not in text
            assert not seen(text)
    server.always.clear()
    assert open_remote(url).samples == N


@pytest.mark.parametrize("name", VALUES)
def test_secrets_are_not_shown_by_any_message(name, tmp_path, caplog):
    remote = RemoteFolder(VALUES[name])
    said = [remote.shown(), remote.shown("a.tar"), remote.clean(f"no {remote.join('a.tar')}: 403")]
    said += [remote.clean(f"{unquote(VALUES[name])} and {quote(VALUES[name])}")]
    for where, leave in ((VALUES[name], False), (VALUES[name].replace("{name}", "x"), True)):
        if where.startswith("pipe:"):
            with pytest.raises(ShardError) as error:
                open_data(where, cache_dir=tmp_path, allow_pipe=leave)
            said.append(str(error.value))
    with pytest.raises(ShardError, match="allowed are letters") as error:
        remote.join("../a")
    assert not seen([*said, str(error.value), caplog.text])


def test_what_a_command_says_is_shown_without_the_command(open_remote, tmp_path, caplog):
    (tmp_path / "get").write_text('echo "refused: $2 for https://u:hunter2@host/$1?sig=SECRET" >&2; exit 3\n')
    with pytest.raises(ShardLost) as error:
        open_remote(f"pipe:sh {tmp_path}/get {{name}} SECRET+1234=", allow_pipe=True)
    cause = "the command ended with status 3: refused: ...= for https://host/manifest.json"
    assert str(error.value) == f"pipe:... (manifest.json): all 5 tries failed, the last with OSError: {cause}"
    assert not seen(str(error.value) + caplog.text)


def test_a_new_token_finds_what_the_old_one_fetched(server, open_remote):
    for query in ("?sig=old", "?sig=new", ""):
        manifest = open_remote(f"{server.url}/data{query}")
        manifest.store.acquire(manifest.shards[0]).release()
    assert server.requests[manifest.shards[0].name] == 1
    assert server.requests["index.bin"] == 1


def test_clocks_that_jump_do_not_matter_to_the_cache(server, open_remote, monkeypatch):
    """A failure noted in what is the future now is no news to those who ask later."""
    manifest = open_remote()
    shard = manifest.shards[0]
    server.always[shard.name] = 404
    for hours in (5, -3):
        monkeypatch.setattr(time, "time", lambda hours=hours, real=time.time: real() + 3600 * hours)
        with pytest.raises(ShardLost, match="all 5 tries failed"):
            manifest.store.acquire(shard)
        monkeypatch.undo()
    server.always.clear()
    manifest.store.acquire(shard).release()
    assert server.requests[shard.name] == 11
