"""Opening a data set wherever it lies: bundled, a local folder, or a remote folder with a manifest."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..core.errors import ShardError
from . import bundled
from .cache import BadCopy, ShardCache, verify
from .locks import exclusive
from .manifest import INDEX, MANIFEST, ROW, Manifest, load_manifest
from .reader import check_sizes
from .transport import RemoteFolder, is_remote

logger = logging.getLogger(__name__)


def open_data(
    where: str,
    *,
    cache_dir: str | Path | None = None,
    cache_gb: float = 200.0,
    allow_pipe: bool = False,
    index: bool = True,
    retry_s: float = 1.0,
    stall_s: float = 60.0,
) -> Manifest:
    """The manifest of a data path of the configuration; its shards are read through `ShardReader` as any others.

    Of a remote folder the manifest is fetched at every call and the index where it is not in the cache. Where the
    protocol can list a folder (all but http and pipe), the sizes of all shards are compared with the manifest.

    Args:
        where: local folder, ``bundled:...``, a URL of a folder, or ``pipe:COMMAND`` (see `RemoteFolder`).
        cache_dir: folder for copies of remote files; None takes ``$EFFTRAIN_CACHE``, else ``shards``, and ``remote``
            in it.
        cache_gb: bytes of all shards kept there, in GB (10^9).
        allow_pipe: let ``pipe:`` run its command.
        index: False fetches the manifest alone, for planning; nothing can be read then.
        retry_s: pause before the second try of a transfer, in seconds.
        stall_s: seconds without a byte after which a transfer fails.

    Raises:
        ShardError: nothing there, not readable, or not what the manifest says.
    """
    if not is_remote(where):
        return load_manifest(bundled.resolve(where))
    remote = RemoteFolder(where, stall_s)
    remote.check(allow_pipe)
    root = Path(cache_dir or Path(os.environ.get(bundled.CACHE_VARIABLE) or "shards") / "remote")
    cache = ShardCache(remote, root, round(cache_gb * 1e9), retry_s)
    manifest = replace(_fetch_manifest(remote, cache), store=cache)
    if index:
        _fetch_index(manifest, cache)
        _check(manifest, remote, cache)
    return manifest


def _fetch_manifest(remote: RemoteFolder, cache: ShardCache) -> Manifest:
    """The manifest, in a folder of its own in the cache."""
    url = hashlib.sha256(remote.identity().encode()).hexdigest()[:16]
    sets = cache.root / "sets"
    try:
        sets.mkdir(parents=True, exist_ok=True)
        arriving = Path(tempfile.mkdtemp(prefix=f"{url}.", suffix=".new", dir=sets))  # hosts may share the folder
        try:
            cache.fetch_file(MANIFEST, arriving / MANIFEST, _retried(load_manifest))
            manifest = load_manifest(arriving)
            folder = sets / f"{url}.{manifest.digest[:16]}"
            folder.mkdir(exist_ok=True)
            (arriving / MANIFEST).replace(folder / MANIFEST)
        finally:
            (arriving / MANIFEST).unlink(missing_ok=True)
            arriving.rmdir()
    except OSError as error:
        raise ShardError(f"efftrain.data.cache_dir: {cache.root}: {error}") from error
    manifest = replace(manifest, folder=folder)
    for shard in manifest.shards:
        remote.join(shard.name)  # refuses names that are no plain file names
    return manifest


def _fetch_index(manifest: Manifest, cache: ShardCache) -> None:
    """One process of a node fetches the index, the others wait; an index that is there is verified."""
    index = manifest.folder / INDEX

    def check(path: Path) -> None:
        verify(path, manifest.samples * ROW.itemsize, manifest.index_sha256)

    with exclusive(cache.root / "locks" / f"{manifest.folder.name}.index", threading.Event()):
        try:
            check(index)
        except (OSError, BadCopy):
            cache.fetch_file(INDEX, index, check)


def _check(manifest: Manifest, remote: RemoteFolder, cache: ShardCache) -> None:
    """What can be known before the first shard is fetched.

    Raises:
        ShardError: a shard is larger than the whole cache, or the remote folder lacks shards or has others.
    """
    largest = max(manifest.shards, key=lambda shard: shard.bytes)
    if largest.bytes > cache.limit:
        raise ShardError(
            f"efftrain.data.cache_gb {cache.limit / 1e9:g} is less than one shard: {largest.name} has "
            f"{largest.bytes / 1e9:.3g} GB"
        )
    try:
        sizes = remote.sizes()
    except Exception as error:  # many stores allow reading without listing
        logger.warning(
            "%s cannot be listed (%s); shards are checked as they come", remote.shown(), remote.clean(str(error))
        )
        return
    if sizes is not None:
        found = [(shard, sizes.get(shard.name)) for shard in manifest.shards]
        check_sizes(remote.shown(), [(remote.shown(s.name), s.bytes, n) for s, n in found])


def _retried(load: Callable[[Path], Manifest]) -> Callable[[Path], None]:
    """A check for `ShardCache.fetch_file`: what cannot be read may have been cut on its way."""

    def check(path: Path) -> None:
        try:
            load(path)
        except ShardError as error:
            raise BadCopy(str(error)) from error

    return check
