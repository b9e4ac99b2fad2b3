"""The plan of one training run: place in the endless sample order -> row of the data set's index.

A pure function of (shard sizes, seed, streams, shuffle block, epoch). Ranks, workers, prefetch depth and batch size do
not enter, so one integer (samples consumed) is the whole state of a loader, and a resume with another world is exact.

Within an epoch: shards are permuted and laid end to end; the line of samples is cut into C equal streams (a cut may
fall inside a shard); each stream is permuted in blocks; the streams are interleaved round robin. Reads stay local
(a stream walks through its shards one after another) while a batch mixes samples of C places.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..core.draws import words
from ..core.errors import ConfigError

PLAN_VERSION = 1
# A stream shorter than this would hardly be shuffled, so a small data set is cut into fewer streams than asked.
_MIN_STREAM = 64
_SLICE = 1 << 17  # keys sorted at a time, 1 MB
# Numbers with more divisors than any smaller one: almost every world size divides the number of streams.
_HIGHLY_COMPOSITE = (
    *(36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120, 20160, 25200, 27720),
    *(45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400, 665280, 720720),
)


def default_streams(world: int) -> int:
    """Streams for a run first started on `world` ranks: a multiple of `world`, at least 30 times it.

    Only with a multiple does every rank keep to its own streams, and a node to its share of the shards: with 2,520
    streams, which 64 does not divide, each of 8 nodes reads every shard in every epoch. Taken is the first highly
    composite number from ``30 * world`` on, where `world` divides it, else the multiple up to 60 times that has the
    most divisors: a resume with another world keeps much of it then.
    """
    first = next((c for c in _HIGHLY_COMPOSITE if c >= 30 * world), 0)
    if first and first % world == 0:
        return first
    return max((world * k for k in range(30, 61)), key=lambda n: (_divisors(n), -n))


def _divisors(n: int) -> int:
    """Number of divisors."""
    count, factor = 1, 2
    while factor * factor <= n:
        power = 1
        while n % factor == 0:
            n, power = n // factor, power + 1
        count, factor = count * power, factor + 1
    return count * (2 if n > 1 else 1)


class SampleOrder:
    """The endless order of training samples: epoch e + 1 follows epoch e without a break.

    Args:
        shard_sizes: samples of each shard, in the order of the index (zeros allowed).
        seed: seed of the run.
        streams: number of streams C that are interleaved (fewer where a stream would have less than 64 samples).
        shuffle_block: samples permuted together inside a stream.
        version: version of this algorithm; an order is only comparable within one version.
        exclude: rows of the index to leave out, [n] integers, or None.

    Raises:
        ConfigError: no samples are left, or a setting is out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        *,
        seed: int,
        streams: int,
        shuffle_block: int,
        version: int = PLAN_VERSION,
        exclude: np.ndarray | None = None,
    ):
        if version != PLAN_VERSION:
            raise ConfigError(f"sample order version {version} is not known; this release has version {PLAN_VERSION}")
        if streams < 1 or not 1 <= shuffle_block <= 1 << 24:
            raise ConfigError(
                f"sample order: streams {streams} must be >= 1 and shuffle_block {shuffle_block} in 1..{1 << 24}"
            )
        self.seed = int(seed)
        self.streams = int(streams)
        self.shuffle_block = int(shuffle_block)
        self.version = version
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        rows = int(self._starts[-1])
        self._excluded = np.asarray([] if exclude is None else exclude, dtype=np.int64)
        if (np.diff(self._excluded) <= 0).any():  # millions of rows come sorted, and sorting them takes seconds
            self._excluded = np.unique(self._excluded)
        if self._excluded.size and not 0 <= self._excluded[0] <= self._excluded[-1] < rows:
            raise ConfigError(
                f"sample order: excluded rows {self._excluded[0]}..{self._excluded[-1]} are not in 0..{rows - 1}"
            )
        self.samples_per_epoch: int = rows - self._excluded.size
        if self.samples_per_epoch <= 0:
            raise ConfigError(f"sample order: {rows} samples, {self._excluded.size} excluded: nothing to train on")
        self._row_type = np.uint32 if rows < 1 << 32 else np.int64
        # Two epochs: a global batch, or a loader that runs ahead, may straddle the boundary.
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def digest(self) -> str:
        """SHA-256 of everything the order depends on."""
        head = f"{self.version},{self.seed},{self.streams},{self.shuffle_block},{self._sizes.size}"
        hasher = hashlib.sha256(head.encode())
        hasher.update(self._sizes.astype("<i8").tobytes())
        hasher.update(self._excluded.astype("<i8").tobytes())
        return hasher.hexdigest()

    def ids(self, start: int, count: int) -> np.ndarray:
        """Rows at places `start` .. `start + count - 1` of the endless order, [count] int64.

        Raises:
            ValueError: a negative place or count.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start {start} and count {count} must not be negative")
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.samples_per_epoch)
            part = self.epoch(epoch)[offset : offset + count]
            parts.append(part.astype(np.int64))
            start += part.size
            count -= part.size
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, [samples_per_epoch] unsigned integers; cached, not to be written to."""
        if epoch in self._cache:
            self._cache.move_to_end(epoch)
            return self._cache[epoch]
        while len(self._cache) >= 2:
            self._cache.popitem(last=False)
        permutation = self._permutation(epoch)
        permutation.flags.writeable = False
        self._cache[epoch] = permutation
        return permutation

    def _permutation(self, epoch: int) -> np.ndarray:
        n = self.samples_per_epoch
        streams = min(self.streams, max(1, n // _MIN_STREAM))
        line = self._line(epoch)
        # The first `longer` streams hold one sample more than the others.
        length, longer = divmod(n, streams)
        cut = longer * (length + 1)
        order = np.empty(n, self._row_type)
        body = order[: length * streams].reshape(length, streams)
        if longer:
            shuffled = self._shuffle(line[:cut].reshape(longer, length + 1), epoch, first=0)
            body[:, :longer] = shuffled[:, :length].T
            order[length * streams :] = shuffled[:, length]
        if length:
            shuffled = self._shuffle(line[cut:].reshape(streams - longer, length), epoch, first=longer)
            body[:, longer:] = shuffled.T
        return order

    def _line(self, epoch: int) -> np.ndarray:
        """All rows of the epoch, shard after shard in the epoch's shard order, [samples_per_epoch]."""
        shards = _sorted_low_bits(words(self.seed, f"shards/{epoch}", np.arange(max(self._sizes.size, 1)), 1).T)[0]
        shards = shards[: self._sizes.size]
        sizes = self._sizes[shards]
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # In the small type throughout: a negative shift wraps around, and back when the row's place is added.
        line = np.repeat((self._starts[:-1][shards] - first).astype(self._row_type), sizes)
        line += np.arange(self._starts[-1], dtype=self._row_type)
        if self._excluded.size:
            kept = np.ones(len(line), dtype=bool)
            kept[self._excluded] = False
            line = line[kept[line]]
        return line

    def _shuffle(self, rows: np.ndarray, epoch: int, first: int) -> np.ndarray:
        """Permute each of the streams [streams, length] within blocks; `first` is the number of the first stream."""
        streams, length = rows.shape
        block = self.shuffle_block
        full = length // block * block
        out = np.empty_like(rows)
        for start, stop, size in ((0, full, block), (full, length, length - full)):
            if stop == start:
                continue
            blocks = rows[:, start:stop].reshape(-1, size)
            # Every block has a number of its own in the epoch: (stream, block of the stream).
            per_stream = (stop - start) // size
            number = (first + np.arange(streams))[:, None] * (length // block + 2) + start // block
            number = (number + np.arange(per_stream)).reshape(-1)
            # In slices that fit the cache: the 64-bit keys of a large data set are never all in memory.
            whole = out if stop - start == length else np.empty((streams, stop - start), rows.dtype)
            shuffled = whole.reshape(-1, size)
            step = max(1, _SLICE // size)
            for low in range(0, len(blocks), step):
                part = slice(low, low + step)
                picks = _sorted_low_bits(words(self.seed, f"samples/{epoch}", number[part], size))
                shuffled[part] = np.take_along_axis(blocks[part], picks, axis=1)
            if whole is not out:
                out[:, start:stop] = whole
        return out


def _sorted_low_bits(keys: np.ndarray) -> np.ndarray:
    """Random permutations of 0..n-1, one a row, from random words [rows, n] uint64; int64 of the same shape.

    Each word's low bits are replaced by its column and the row is sorted. The keys are distinct, so that every
    sorting algorithm, on every platform, gives the same result (NumPy promises no stable random permutations).
    """
    n = keys.shape[1]
    mask = np.uint64((1 << max(n - 1, 1).bit_length()) - 1)
    keyed = (keys & ~mask) | np.arange(n, dtype=np.uint64)
    keyed.sort(axis=1)
    return (keyed & mask).astype(np.int64)
