"""Positioned reads: one ``pread`` for one sample, no tar parsing."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..core import faults
from ..core.errors import ShardError
from .manifest import Manifest

_MAX_REPORTED = 5


def check_shards(manifest: Manifest) -> None:
    """Compare every shard file with the manifest by size, before the first sample is read.

    A tar file cut at a member boundary is still a valid, shorter tar file, so the count of bytes is the only cheap
    check that finds it. Damage that keeps the size is found by the SHA-256 of ``efftrain shards audit``. Remote shards
    are checked, by both, as they arrive.

    Raises:
        ShardError: a shard file is missing or has another size; names the first few and their number.
    """
    if manifest.store is not None:
        return
    found: list[tuple[str, int, int | None | str]] = []
    for number, shard in enumerate(manifest.shards):
        path = manifest.shard_path(number)
        try:
            found.append((str(path), shard.bytes, path.stat().st_size))
        except OSError as error:
            found.append((str(path), shard.bytes, error.strerror or str(error)))
    check_sizes(str(manifest.folder), found)


def check_sizes(folder: str, shards: Sequence[tuple[str, int, int | None | str]]) -> None:
    """Compare sizes that were found with those of a manifest.

    Args:
        folder: where the manifest is, for the message.
        shards: (place, bytes in the manifest, bytes found; None = missing, or why they are not known) of each shard.

    Raises:
        ShardError: a size differs or is not known; names the first few and their number.
    """
    findings = []
    for place, expected, found in shards:
        if isinstance(found, int) and found != expected:
            findings.append(f"{place}: {found} bytes, the manifest says {expected}")
        elif not isinstance(found, int):
            findings.append(f"{place}: {found or 'missing'}")
    if findings:
        more = f"\n... and {len(findings) - _MAX_REPORTED} more" if len(findings) > _MAX_REPORTED else ""
        raise ShardError(
            f"{len(findings)} of {len(shards)} shards do not match {folder}:\n"
            + "\n".join(findings[:_MAX_REPORTED])
            + more
        )


class ShardReader:
    """Reads the payload of samples by row, through a bounded cache of open files.

    Positioned reads share no file offset, so a reader may be inherited by forked workers. Pickling keeps the manifest
    and drops the open files. Shards of a remote data set must be on the disk already, see `feed`.

    Args:
        manifest: the data set.
        max_open: files kept open at most.
    """

    def __init__(self, manifest: Manifest, max_open: int = 256):
        self.manifest = manifest
        self.max_open = max_open
        self._files: OrderedDict[int, int] = OrderedDict()

    def rows(self, ids: np.ndarray) -> list[tuple[int, int, int, int, int, int]]:
        """Index rows as plain Python numbers: (shard, offset, size, label, width, height) for each id.

        Args:
            ids: rows of the index, [n] int64.
        """
        return self.manifest.table[ids].tolist()

    def payload(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of shard number `shard` from `offset` on.

        Raises:
            ShardError: the file cannot be read or ends before the payload does.
        """
        try:
            faults.point("reader.read")
            data = os.pread(self._file(shard), size, offset)
            # A read may legally return less, on network file systems and for payloads above 2 GB.
            while 0 < len(data) < size:
                more = os.pread(self._file(shard), size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise ShardError(f"{self.manifest.shard_path(shard)}: offset {offset}: {error}") from error
        if len(data) != size or size == 0:
            raise ShardError(
                f"{self.manifest.shard_path(shard)}: offset {offset}: {len(data)} bytes read, the index says {size}"
            )
        return data

    def read(self, ids: Sequence[int] | np.ndarray) -> list[tuple[bytes, int]]:
        """Payload and label of several samples."""
        payload = self.payload
        return [(payload(row[0], row[1], row[2]), row[3]) for row in self.rows(np.asarray(ids, dtype=np.int64))]

    def forget(self, shard: int) -> None:
        """Close one file, so that the next read opens it again (after a failed read)."""
        descriptor = self._files.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def finish(self) -> None:
        """End of a batch: files of remote shards are closed, as an open one keeps its place on a full disk."""
        if self.manifest.store is not None:
            self.close()

    def close(self) -> None:
        """Close all files; the reader can be used again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, shard: int) -> int:
        files = self._files
        descriptor = files.get(shard)
        if descriptor is not None:
            files.move_to_end(shard)
            return descriptor
        if not 0 <= shard < len(self.manifest.shards):
            raise ShardError(
                f"{self.manifest.folder}: the index names shard {shard}, there are {len(self.manifest.shards)}"
            )
        while len(files) >= self.max_open:
            os.close(files.popitem(last=False)[1])
        descriptor = os.open(self.manifest.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        files[shard] = descriptor
        return descriptor

    def __getstate__(self) -> dict:
        # A fresh manifest: its cached memory map would be pickled as a full array.
        return {"manifest": replace(self.manifest), "max_open": self.max_open, "_files": OrderedDict()}

    def __del__(self) -> None:
        if os is not None and getattr(self, "_files", None):
            self.close()
