"""Local copies of remote shards: verified, shared by all processes of a node, bounded in bytes.

Three files stand for a shard in ``locks/``: ``.get`` is held while it is downloaded, so that one process of a node
does it and the others wait; ``.pin`` is held (shared) while it is in use, so that it is not removed; ``.failed`` says
why the last download failed, for those who waited for it. A shard gets its final name only after its size and SHA-256
were those of the manifest and its bytes are on the disk. Its modification time is then set to a number made from the
hash: a file with another time was written to since, and is hashed again before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import ShardError
from .locks import FileLock, exclusive, try_lock
from .manifest import Shard
from .scan import file_sha256
from .transport import RemoteFolder, Stopped

logger = logging.getLogger(__name__)

TRIES = 5
_NEVER = threading.Event()


class ShardLost(ShardError):
    """A remote file could not be had; the text names its URL, the tries and the last cause."""


@dataclass
class CacheCounts:
    """What one process did: shards it found, fetched, and removed; failed tries; bytes fetched."""

    hits: int = 0
    fetched: int = 0
    evicted: int = 0
    failed_tries: int = 0
    bytes: int = 0


@dataclass
class ShardCache:
    """Copies of the shards of one remote folder. Every method may be called from several threads and processes.

    Args:
        remote: the folder.
        root: cache folder, shared with other data sets and processes of the node.
        limit: bytes of all shards in `root`; the least recently used ones go first. Shards in use stay, even above it.
        retry_s: pause before the second try; doubled for each further one, with jitter.
        tries: attempts to get a file.
    """

    remote: RemoteFolder
    root: Path
    limit: int
    retry_s: float = 1.0
    tries: int = TRIES
    counts: CacheCounts = field(default_factory=CacheCounts, compare=False)

    def __post_init__(self) -> None:
        self._warned = False
        try:
            for name in ("shards", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(f"efftrain.data.cache_dir: {self.root} cannot be written ({error})") from error

    def path(self, shard: Shard) -> Path:
        """Local path of a shard: its URL, its content and its name tell it from every other."""
        url = hashlib.sha256(self.remote.identity(shard.name).encode()).hexdigest()[:16]
        return self.root / "shards" / f"{url}.{shard.sha256[:8]}.{shard.name}"

    def present(self, shard: Shard) -> bool:
        """A verified copy is there."""
        return _intact(self.path(shard), shard)

    def acquire(self, shard: Shard, stop: threading.Event = _NEVER) -> FileLock:
        """Have a verified copy at `path` and keep it there until the lock that is returned is released.

        Raises:
            ShardLost: it could not be had after all tries.
            Stopped: `stop` was set.
        """
        try:
            pin = _shared(self._lock(shard, "pin"))
            try:
                if self.present(shard):
                    self.counts.hits += 1
                else:
                    self._obtain(shard, stop)
                os.utime(self._lock(shard, "pin"))
            except BaseException:
                pin.release()
                raise
        except OSError as error:
            raise ShardLost(f"efftrain.data.cache_dir: {self.root}: {error}") from error
        return pin

    def _lock(self, shard: Shard, kind: str) -> Path:
        return self.root / "locks" / f"{self.path(shard).name}.{kind}"

    def _obtain(self, shard: Shard, stop: threading.Event) -> None:
        """Download, or wait for the process that does."""
        path, failed = self.path(shard), self._lock(shard, "failed")
        before = _failure(failed)  # told apart by a name, as clocks jump and those of two hosts differ
        done: Callable[[], bool] = lambda: self.present(shard) or _failure(failed) not in (None, before)  # noqa: E731
        with exclusive(self._lock(shard, "get"), stop, done) as lock:
            if self.present(shard):
                return
            if (failure := _failure(failed)) is not None and failure != before:
                raise ShardLost(failure[1])
            if lock is None:
                raise Stopped
            if path.is_file():  # left by another program, or written to since
                if path.stat().st_size == shard.bytes and file_sha256(path) == shard.sha256:
                    _stamp(path, shard)
                    return
                logger.warning("%s: damaged, it is downloaded again", path)  # and replaced while others may read it
            try:
                self._retry(shard.name, lambda: self._download(shard, path, stop), stop)
            except ShardLost as error:
                failed.write_text(json.dumps({"id": uuid.uuid4().hex, "error": str(error)}))
                raise

    def _download(self, shard: Shard, path: Path, stop: threading.Event) -> None:
        partial, reserve = path.with_name(path.name + ".partial"), path.with_name(path.name + ".reserve")
        try:
            self._make_room(shard, reserve, stop)
            self.remote.fetch(shard.name, partial, stop)
            verify(partial, shard.bytes, shard.sha256)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o444)
            _stamp(partial, shard)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            reserve.unlink(missing_ok=True)
        self.counts.fetched += 1
        self.counts.bytes += shard.bytes

    def _retry(self, name: str, action: Callable[[], None], stop: threading.Event) -> None:
        """Run `action` until it succeeds, at most `tries` times."""
        for attempt in range(1, self.tries + 1):
            try:
                return action()
            except (ShardLost, Stopped):
                raise
            except Exception as error:  # a transfer fails with the types of its protocol's package
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise ShardLost(
                        f"{self.root}: {error}; make room there or lower efftrain.data.cache_gb ({self.limit / 1e9:g})"
                    ) from error
                if isinstance(error, ShardError) and not isinstance(error, BadCopy):
                    raise
                self.counts.failed_tries += 1
                url, cause = self.remote.shown(name), self.remote.clean(f"{type(error).__name__}: {error}")
                if attempt == self.tries:
                    raise ShardLost(f"{url}: all {self.tries} tries failed, the last with {cause}") from error
                pause = self.retry_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                logger.warning("%s: try %d of %d failed (%s), next in %.1f s", url, attempt, self.tries, cause, pause)
                if stop.wait(pause):
                    raise Stopped from error
        raise AssertionError

    def fetch_file(self, name: str, target: Path, check: Callable[[Path], None]) -> None:
        """Download a file that is no shard to `target`, retried until `check` accepts it.

        Raises:
            ShardLost: it could not be had after all tries.
        """
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.partial")

        def once() -> None:
            self.remote.fetch(name, partial)
            check(partial)
            partial.replace(target)

        try:
            self._retry(name, once, _NEVER)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, shard: Shard, reserve: Path, stop: threading.Event) -> None:
        """Remove the least recently used shards that nobody uses, and put aside the bytes of the new one."""
        with exclusive(self.root / "locks" / "room", stop) as lock:
            if lock is None:
                raise Stopped
            used, idle = 0, []
            for entry in os.scandir(self.root / "shards"):
                with suppress(FileNotFoundError):  # renamed or removed by another process just now
                    if entry.name.endswith(".partial"):  # its `.reserve` counts
                        continue
                    used += entry.stat().st_size
                    idle.append((self._last_use(entry.name), entry.name, entry.stat().st_size))
            for _, name, size in sorted(idle):
                if used + shard.bytes <= self.limit:
                    break
                used -= size if self._remove(name) else 0
            if used + shard.bytes > self.limit and not self._warned:
                self._warned = True
                logger.warning(
                    "%s: the shards in use need more than efftrain.data.cache_gb %g; raise it, or lower "
                    "efftrain.data.streams or shuffle_block",
                    self.root,
                    self.limit / 1e9,
                )
            with reserve.open("wb") as file:  # a hole, not bytes: it only has a size
                file.truncate(shard.bytes)

    def _last_use(self, name: str) -> float:
        try:
            return (self.root / "locks" / f"{name}.pin").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _remove(self, name: str) -> bool:
        """Remove one shard, or what a killed download left; False where it is in use."""
        left = name.endswith(".reserve")
        stem = name.removesuffix(".reserve")
        lock = try_lock(self.root / "locks" / f"{stem}.{'get' if left else 'pin'}")
        if lock is None:
            return False
        try:
            (self.root / "shards" / name).unlink(missing_ok=True)
            if left:
                (self.root / "shards" / f"{stem}.partial").unlink(missing_ok=True)
            else:
                self.counts.evicted += 1
        finally:
            lock.release()
        return True


class BadCopy(ShardError):
    """A download that is not what the manifest says; worth another try."""


def verify(path: Path, size: int, sha256: str) -> None:
    """Compare a file with its size and SHA-256.

    Raises:
        BadCopy: they differ.
    """
    found = path.stat().st_size
    if found != size:
        raise BadCopy(f"{found} bytes came, the manifest says {size}")
    if (digest := file_sha256(path)) != sha256:
        raise BadCopy(f"the content has sha256 {digest}, the manifest says {sha256}")


def _time_of(shard: Shard) -> int:
    return int(shard.sha256[:8], 16) >> 1  # 31 bits: every file system keeps it


def _stamp(path: Path, shard: Shard) -> None:
    os.utime(path, (_time_of(shard), _time_of(shard)))


def _intact(path: Path, shard: Shard) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == shard.bytes and found.st_mtime_ns == _time_of(shard) * 10**9


def _failure(path: Path) -> tuple[str, str] | None:
    """Name and text of the last failure."""
    try:
        found = json.loads(path.read_text())
        return found["id"], found["error"]
    except (OSError, ValueError, KeyError):
        return None


def _shared(path: Path) -> FileLock:
    """A shared lock; it is free but for the moment in which somebody removes the shard."""
    while (lock := try_lock(path, shared=True)) is None:
        time.sleep(0.001)
    return lock
