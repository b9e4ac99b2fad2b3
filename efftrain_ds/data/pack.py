"""The plan of a build, and the writing of single shards (in this process or in several)."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset import TarWriter

from ..core.errors import ShardError
from ..core.files import sync
from ..core.rng import numpy_rng
from .checks import SampleRejected, check_image
from .manifest import FORMAT, ROW, Rendition
from .rendition import render
from .scan import payload_hash
from .sources import Source, SourceItem

_BLOCK = 512


@dataclass(frozen=True)
class PackPlan:
    """Order and cuts. `order` [N] is the permutation of the source, shard i holds positions starts[i]:starts[i+1]."""

    order: np.ndarray
    starts: np.ndarray
    split: str
    min_side: int
    classes: int
    width: int
    header: dict[str, Any]
    rendition: Rendition | None = None

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{self.split}-{shard:06d}.tar"

    def key(self, position: int) -> str:
        """Key of the sample at a place in the shuffled order."""
        return f"{position:0{self.width}d}"


@dataclass(frozen=True)
class Packed:
    """One finished shard: what the journal keeps (`record`) and what goes into the index."""

    record: dict[str, Any]
    rows: np.ndarray
    positions: np.ndarray
    hashes: np.ndarray


@dataclass
class _HashingFile:
    """File object that hashes what is written through it."""

    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    bytes: int = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def make_plan(
    source: Source,
    split: str,
    shard_bytes: int,
    samples_per_shard: int | None,
    seed: int,
    min_side: int | None,
    rendition: Rendition | None = None,
) -> PackPlan:
    """Fix order and cuts.

    A rendition does not enter the cuts: shard i of every rendition of a source holds the same samples.

    Args:
        source: images and labels.
        split: name of the split.
        shard_bytes: target size of a shard in bytes, where `samples_per_shard` is None.
        samples_per_shard: largest number of samples of a shard.
        seed: seed of the order.
        min_side: smallest side in pixels; None takes the source's.
        rendition: how images are made smaller, or None.
    """
    count = len(source)
    order = numpy_rng(seed, "pack").permutation(count)
    if samples_per_shard is not None:
        shards = -(-count // samples_per_shard)
        starts = np.arange(shards + 1, dtype=np.int64) * count // shards
    else:
        sizes = np.fromiter((source.size(int(i)) for i in order), np.int64, count)
        ends = np.cumsum(-(-sizes // _BLOCK) * _BLOCK + 3 * _BLOCK)  # two headers and the label's block
        shards = min(count, -(-int(ends[-1]) // shard_bytes))
        inner = np.searchsorted(ends, np.arange(1, shards) * int(ends[-1]) // shards, side="right")
        starts = np.unique(np.concatenate([[0], inner, [count]]))
    side = min_side if min_side is not None else source.min_side
    header = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "samples": count,
        "classes": hashlib.sha256(json.dumps(source.classes).encode()).hexdigest(),
        "split": split,
        "seed": seed,
        "min_side": side,
        "cuts": hashlib.sha256(starts.astype("<i8").tobytes()).hexdigest(),
    }
    if rendition is not None:
        header["rendition"] = asdict(rendition)
    width = max(8, len(str(count - 1)))
    return PackPlan(order, starts, split, side, len(source.classes), width, header, rendition)


def pack_all(source: Source, plan: PackPlan, out: Path, todo: list[int], workers: int) -> Iterator[Packed]:
    """Write the shards `todo` and yield each one as it is finished (in any order with several workers).

    Raises:
        ShardError: an image's file cannot be read.
    """
    if workers == 1 or len(todo) == 1:
        for shard in todo:
            yield _pack(source, plan, out, shard)
        return
    # "spawn": the caller may have threads, and a forked copy of their locks can hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (source, plan, out))
    try:
        for future in as_completed([pool.submit(_pack_here, shard) for shard in todo]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Source, PackPlan, Path] | None = None


def _start_worker(source: Source, plan: PackPlan, out: Path) -> None:
    global _worker
    _worker = (source, plan, out)

    def leave() -> None:  # a worker must not go on, or wait for ever, when the build was killed
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _pack_here(shard: int) -> Packed:
    assert _worker is not None
    return _pack(*_worker, shard)


def _pack(source: Source, plan: PackPlan, out: Path, shard: int) -> Packed:
    """Write one shard."""
    name = plan.name(shard)
    partial = out / f"{name}.{os.getpid()}.partial"
    rows: list[tuple[int, ...]] = []
    positions: list[int] = []
    hashes: list[bytes] = []
    rejected: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    try:
        with partial.open("wb") as file:
            tee = _HashingFile(file)
            # fixed owner, mode and time: equal input gives equal bytes
            with TarWriter(tee, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False) as writer:
                for position in range(int(plan.starts[shard]), int(plan.starts[shard + 1])):
                    index, key = int(plan.order[position]), plan.key(position)
                    name_in_source = f"item {index}"
                    try:
                        item = _read(source, index)
                        name_in_source = item.name
                        image = check_image(item.payload, item.extension, plan.min_side)
                        if not 0 <= item.label < plan.classes:
                            raise SampleRejected("label", f"{item.label}, allowed: 0 to {plan.classes - 1}")
                        if plan.rendition is not None:
                            image = render(image, plan.rendition)
                    except SampleRejected as error:
                        entry = {"key": key, "index": index, "name": name_in_source}
                        rejected.append({**entry, "reason": error.reason, "detail": error.detail})
                        continue
                    offset = writer.tarstream.offset + _BLOCK
                    writer.write({"__key__": key, image.suffix: image.payload})
                    writer.write({"__key__": key, "cls": str(item.label).encode()})
                    rows.append((shard, offset, len(image.payload), item.label, image.width, image.height))
                    positions.append(position)
                    hashes.append(payload_hash(image.payload))
                    kinds[image.kind] += 1
                    kinds["exif removed"] += image.exif
                    kinds["resized"] += image.resized
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, out / name)
    sync(out)
    record = {
        "shard": shard,
        "name": name,
        "bytes": tee.bytes,
        "sha256": tee.digest.hexdigest(),
        "n": len(rows),
        "kinds": {kind: count for kind, count in sorted(kinds.items()) if count},
        "rejected": rejected,
    }
    return Packed(record, np.array(rows, ROW), np.array(positions, np.int64), np.array(hashes, "V16"))


def _read(source: Source, index: int) -> SourceItem:
    try:
        return source.get(index)
    except OSError as error:
        if error.errno is not None:  # the disk, not the image: leaving it out would make the result a matter of luck
            raise ShardError(f"item {index} cannot be read: {error}") from error
        raise SampleRejected("decode", str(error)) from error
    except (ValueError, SyntaxError) as error:
        if isinstance(error, ShardError):
            raise
        raise SampleRejected("decode", str(error)) from error
