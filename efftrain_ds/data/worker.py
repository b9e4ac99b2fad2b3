"""What runs in the loader's worker processes: from a ticket to a finished micro-batch, without any state but caches."""

from __future__ import annotations

import hashlib
import signal
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..core.errors import ShardError
from .crops import SmallCrops, crop_boxes, resized_crop, scale_box
from .decode import decode
from .quarantine import BadSample
from .reader import ShardReader

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Ticket:
    """One micro-batch of one rank.

    Attributes:
        ids: [n] int64 rows of the index.
        positions: [n] int64 places in the endless order.
        step_samples: global batch size if this is the step's last micro-batch, else 0.
    """

    ids: np.ndarray
    positions: np.ndarray
    step_samples: int


@dataclass
class Assembled:
    """What a worker sends back; only the images are tensors (in shared memory), the rest is small and pickled."""

    images: Tensor
    labels: np.ndarray
    valid: np.ndarray
    ticket: Ticket
    bad: list[BadSample]


class TrainSamples(Dataset):
    """Map from a ticket to a finished micro-batch; runs in the workers and keeps nothing but caches.

    Args:
        reader: positioned reads.
        seed: seed of the crops.
        resolution: side R of the images in pixels.
        scale: area range of RandomResizedCrop.
        ratio: aspect range of RandomResizedCrop.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        num_classes: labels outside 0..num_classes-1 are bad.
        decoded_cache_mb: bytes (in MiB) of decoded images kept by this process.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        seed: int,
        resolution: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: str,
        num_classes: int,
        decoded_cache_mb: int,
    ):
        self.reader = reader
        self.seed = seed
        self.resolution = resolution
        self.scale = scale
        self.ratio = ratio
        self.interpolation = interpolation
        self.num_classes = num_classes
        self.small = SmallCrops(resolution, interpolation)
        self.cache = DecodedCache(decoded_cache_mb << 20)

    def __getitem__(self, ticket: Ticket) -> Assembled:
        table = self.reader.manifest.table[ticket.ids]
        boxes = crop_boxes(self.seed, ticket.positions, table["width"], table["height"], self.scale, self.ratio)
        n = len(ticket.ids)
        images = empty_images(n, self.resolution)
        labels = self.reader.manifest.labels_of(table)
        valid = np.ones(n, dtype=bool)
        bad: list[BadSample] = []
        cuts: list[np.ndarray] = []
        cut_rows: list[int] = []
        for i, (row_id, row, box) in enumerate(zip(ticket.ids.tolist(), table.tolist(), boxes.tolist(), strict=True)):
            pixels = self.cache.get(row_id)
            if pixels is None:
                pixels = self._load(row_id, row, int(labels[i]))
            if isinstance(pixels, BadSample):
                images[i] = 0
                labels[i], valid[i] = IGNORED_LABEL, False
                bad.append(replace(pixels, position=int(ticket.positions[i])))
                continue
            indexed = (row[5], row[4])
            if pixels.shape[:2] != indexed:
                box = scale_box(box, indexed, pixels.shape[:2])
            if self.small.fits(box):
                top, left, height, width = box
                cuts.append(pixels[top : top + height, left : left + width])
                cut_rows.append(i)
            else:
                resized_crop(pixels, box, images[i], self.interpolation)
        self.small.run(cuts, cut_rows, images)
        self.reader.finish()
        return Assembled(images, labels, valid, ticket, bad)

    def _load(self, row_id: int, row: tuple[int, int, int, int, int, int], label: int) -> np.ndarray | BadSample:
        """Pixels of one sample of class `label`, or the finding after the second attempt."""
        shard, offset, size, stored, width, height = row
        reason, payload, text = "", b"", ""
        if not 0 <= label < self.num_classes:
            mapped = "" if self.reader.manifest.labels is None else f" (in the shards: {stored})"
            reason, text = "label", f"label {label}{mapped} is not in 0..{self.num_classes - 1}"
        elif width == 0 or height == 0:
            reason, text = "size", f"the index says {width} x {height} pixels"
        else:
            for attempt in range(2):
                try:
                    reason, payload = "read", b""
                    payload = self.reader.payload(shard, offset, size)
                    reason = "decode"
                    pixels = decode(payload)
                except ShardError as error:
                    text = str(error)
                    if attempt == 0:
                        self.reader.forget(shard)
                    continue
                self.cache.put(row_id, pixels)
                return pixels
        shards = self.reader.manifest.shards
        name = shards[shard].name if shard < len(shards) else f"#{shard}"
        digest = hashlib.sha256(payload).hexdigest()[:16] if payload else ""
        return BadSample(reason, name, row_id, offset, -1, digest, text)


class DecodedCache:
    """Least-recently-used decoded images by row, bounded by bytes (0 = keep nothing)."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.bytes = 0
        self._images: OrderedDict[int, np.ndarray] = OrderedDict()

    def get(self, row: int) -> np.ndarray | None:
        """The image of `row`, or None."""
        image = self._images.get(row)
        if image is not None:
            self._images.move_to_end(row)
        return image

    def put(self, row: int, image: np.ndarray) -> None:
        """Keep an image, dropping the least recently used ones."""
        if image.nbytes > self.capacity:
            return
        self._images[row] = image
        self.bytes += image.nbytes
        while self.bytes > self.capacity:
            self.bytes -= self._images.popitem(last=False)[1].nbytes


def empty_images(n: int, resolution: int) -> Tensor:
    """Uninitialised images [n, 3, R, R] uint8; in a worker straight in shared memory, which saves a copy."""
    shape = (n, 3, resolution, resolution)
    if get_worker_info() is None or n == 0:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(n * 3 * resolution * resolution)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def identity(item: Any) -> Any:
    """Collate function: a worker's answer is a finished batch."""
    return item


def init_worker(_: int) -> None:
    """One thread a worker; an interrupt from the terminal is the trainer's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a scheduler signals the whole process group; the loader must still deliver what the last step needs
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def delivered(loader: Any) -> Iterator[Any]:
    """Everything a DataLoader delivers, with a clear error where one of its processes is gone.

    Raises:
        ShardError: a process was killed (out of memory, or /dev/shm is full) or ended by itself.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ShardError(
            f"a loader process has ended: {str(error).splitlines()[0]} Usual causes: out of memory, or too little "
            "/dev/shm; lower efftrain.data.workers, prefetch or decoded_cache_mb. A new start goes on from the last "
            "checkpoint"
        ) from error


def shutdown(loader: DataLoader | None) -> None:
    """Stop the persistent workers of a DataLoader now, not when the garbage collector finds it."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
