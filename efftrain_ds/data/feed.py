"""Remote shards for one loader: those of open tickets are held on the local disk, those that come next are fetched.

It runs in the trainer process, which makes the tickets and so knows every sample before a worker does. Workers see
local paths only, and never a network.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np

from ..core.errors import ShardError
from ..core.ranks import local_world
from .cache import CacheCounts, ShardCache
from .locks import FileLock
from .manifest import Manifest
from .transport import Stopped

logger = logging.getLogger(__name__)

_THREADS = 4
_AHEAD_SHARE = 0.5  # of the cache; the rest holds what is in use


def make_feed(manifest: Manifest) -> ShardFeed | None:
    """A feed for a data set with remote shards, None for a local one."""
    return ShardFeed(manifest, manifest.store) if isinstance(manifest.store, ShardCache) else None


class ShardFeed:
    """Holds and fetches the shards of one loader.

    Args:
        manifest: the data set.
        cache: local copies of its shards.
        threads: downloads at a time.
    """

    def __init__(self, manifest: Manifest, cache: ShardCache, threads: int = _THREADS):
        self.manifest = manifest
        self.cache = cache
        self.threads = threads
        self._pins: dict[int, FileLock] = {}
        self._uses: Counter[int] = Counter()
        self._open: deque[list[int]] = deque()
        self._stop = threading.Event()
        self._wanted: deque[int] = deque()  # still to be looked at by the background
        self._ahead: dict[int, int] = {}  # bytes of the shards that were fetched and not yet held
        self._busy = 0
        self._change = threading.Condition()
        self._workers: list[threading.Thread] = []

    @property
    def counts(self) -> CacheCounts:
        """What this process fetched so far."""
        return self.cache.counts

    def hold(self, ids: np.ndarray) -> None:
        """Have the shards of a ticket's rows on the disk, until `release` is called for that ticket.

        Raises:
            ShardError: one of them could not be had.
        """
        shards = np.unique(self.manifest.table["shard"][ids[ids >= 0]]).tolist()
        held = []
        try:
            for shard in shards:
                if not self._uses[shard]:
                    self._check(shard)
                    self._pins[shard] = self.cache.acquire(self.manifest.shards[shard], self._stop)
                self._uses[shard] += 1
                held.append(shard)
                with self._change:
                    if self._ahead.pop(shard, None) is not None:
                        self._change.notify()
        except BaseException as error:
            self._give_back(held)
            if isinstance(error, Stopped):
                raise ShardError("the loader was closed while it waited for a shard") from error
            raise
        self._open.append(held)

    def release(self) -> None:
        """Let go of the oldest ticket's shards."""
        if self._open:
            self._give_back(self._open.popleft())

    def release_all(self) -> None:
        """Let go of the shards of all tickets."""
        while self._open:
            self.release()

    def follow(self, ids: np.ndarray) -> None:
        """Fetch the shards of these rows in the background, in the order of the rows; replaces the earlier list.

        The background runs ahead of `hold` by a share of the cache, so that it does not push out what is needed sooner.

        Args:
            ids: rows that come next, [n].
        """
        wanted = first_uses(self.manifest.table["shard"][ids])
        with self._change:
            self._ahead = {shard: self._ahead[shard] for shard in wanted if shard in self._ahead}
            self._wanted = deque(s for s in wanted if s not in self._ahead and not self._uses[s])
            self._change.notify_all()
        if not self._workers:
            self._workers = [
                threading.Thread(target=self._fetch, name="shard-feed", daemon=True) for _ in range(self.threads)
            ]
            for worker in self._workers:
                worker.start()

    def close(self) -> None:
        """Stop the background and let go of everything; the feed can be used again."""
        self._stop.set()
        with self._change:
            self._wanted.clear()
            self._ahead.clear()
            self._change.notify_all()
        for worker in self._workers:
            worker.join(timeout=1)
        self._workers = []
        self._stop = threading.Event()
        self.release_all()

    def _check(self, shard: int) -> None:
        if not 0 <= shard < len(self.manifest.shards):
            raise ShardError(
                f"{self.manifest.folder}: the index names shard {shard}, there are {len(self.manifest.shards)}"
            )

    def _give_back(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._uses[shard] -= 1
            if not self._uses[shard]:
                del self._uses[shard]
                self._pins.pop(shard).release()

    def _next(self) -> int | None:
        """The next shard for the background, None while it is far enough ahead. Call with `_change` held."""
        while self._wanted:
            shard = self._wanted[0]
            if self._uses[shard] or not 0 <= shard < len(self.manifest.shards):
                self._wanted.popleft()
                continue
            size = self.manifest.shards[shard].bytes
            limit = self.cache.limit * _AHEAD_SHARE / local_world()
            if self._ahead and sum(self._ahead.values()) + size > limit:
                return None
            self._wanted.popleft()
            self._ahead[shard] = size
            return shard
        return None

    def _fetch(self) -> None:
        """One background thread. A failure here is only logged: who needs the shard tries again and then says so."""
        stop = self._stop
        while True:
            with self._change:
                while not stop.is_set() and (shard := self._next()) is None:
                    self._change.wait()
                if stop.is_set():
                    return
                assert shard is not None
                self._busy += 1
            try:
                self.cache.acquire(self.manifest.shards[shard], stop).release()
            except Stopped:
                pass
            except Exception as error:
                logger.warning("shard %s is not there yet: %s", self.manifest.shards[shard].name, error)
            finally:
                with self._change:
                    self._busy -= 1
                    self._change.notify_all()


def first_uses(shards: np.ndarray | Sequence[int]) -> list[int]:
    """Distinct values in the order of their first place."""
    values, first = np.unique(np.asarray(shards), return_index=True)
    return values[np.argsort(first)].tolist()
