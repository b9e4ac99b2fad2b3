"""The validation loader: every sample exactly once, equal step counts on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.batch import Batch
from ..core.errors import ShardError
from .crops import eval_resize
from .decode import decode_pil
from .feed import make_feed
from .manifest import Manifest
from .reader import ShardReader, check_shards
from .worker import IGNORED_LABEL, delivered, empty_images, identity, init_worker, shutdown

_AHEAD = 16  # steps between two looks at which shards come next


class EvalSamples(Dataset):
    """Map from rows (-1 = no sample) to images and labels; runs in the workers."""

    def __init__(
        self,
        reader: ShardReader,
        *,
        resolution: int,
        crop: float,
        interpolation: str,
        num_classes: int,
        strict: bool = True,
    ):
        self.reader = reader
        self.resolution = resolution
        self.crop = crop
        self.interpolation = interpolation
        self.num_classes = num_classes
        self.strict = strict

    def __getitem__(self, ids: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        ids = ids.copy()
        images = empty_images(len(ids), self.resolution)
        present = int((ids >= 0).sum())
        images[present:] = 0
        labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
        table = self.reader.manifest.table[ids[:present]]
        mapped = self.reader.manifest.labels_of(table).tolist()
        for i, (row, label) in enumerate(zip(table.tolist(), mapped, strict=True)):
            shard, offset, size = row[:3]
            try:
                if not 0 <= label < self.num_classes:
                    raise ShardError(f"label {label} is not in 0..{self.num_classes - 1}")
                image = decode_pil(self.reader.payload(shard, offset, size))
            except ShardError as error:
                if not self.strict:
                    images[i], ids[i] = 0, -1
                    continue
                where = f"validation sample {ids[i]}, {self.reader.manifest.shard_path(shard)}, offset {offset}"
                raise ShardError(f"{where}: {error}") from error
            pixels = eval_resize(image, self.resolution, self.crop, self.interpolation)
            images[i] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
            labels[i] = label
        self.reader.finish()
        return images, labels, ids


class EvalLoader:
    """Validation batches of one rank, in natural order: sample i goes to rank i mod W.

    Every rank makes ceil(N / (W * batch)) steps of `batch` rows, so that collectives and compiled shapes fit; missing
    rows have ``valid=False``, label -100 and id -1. The valid rows over all ranks are exactly the N samples. With
    `limit` N is at most that, and sample i is row ``floor(i * rows / N)`` of the data set. Rows that a label map leaves
    out do not count.

    Args:
        manifest: the data set; every shard's size is checked here.
        rank: data-parallel rank.
        world: number of data-parallel ranks.
        batch: rows of one step of one rank.
        resolution: side of the images in pixels.
        crop: share of the resized short side that the centre crop keeps.
        interpolation: ``"bicubic"`` or ``"bilinear"`` (Pillow).
        workers: loader processes, kept between evaluations; 0 reads in this process.
        num_classes: number of valid labels; None takes the manifest's.
        limit: number of samples to take, evenly spaced over the data set; None = all.
        strict: False makes an unreadable sample a missing row instead of an error.

    Raises:
        ValueError: a limit below 1.
        ShardError: a shard is missing or has another size; while iterating, any bad sample.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rank: int,
        world: int,
        batch: int,
        resolution: int,
        crop: float = 0.875,
        interpolation: str = "bicubic",
        workers: int = 0,
        num_classes: int | None = None,
        limit: int | None = None,
        strict: bool = True,
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"EvalLoader: limit is at least 1, found {limit}")
        check_shards(manifest)
        self.rows = manifest.kept
        self.samples = self.rows if limit is None else min(limit, self.rows)
        left_out = manifest.left_out
        self.kept = np.delete(np.arange(manifest.samples), left_out) if len(left_out) else None
        """Rows that take part, None = all of them."""
        self.rank = rank
        self.world = world
        self.batch = batch
        self.workers = workers
        self._reader = ShardReader(manifest)
        self._data = EvalSamples(
            self._reader,
            resolution=resolution,
            crop=crop,
            interpolation=interpolation,
            num_classes=num_classes if num_classes is not None else len(manifest.classes) or 1 << 31,
            strict=strict,
        )
        self.feed = make_feed(manifest)
        """Fetches the shards of a remote data set, None where they are local."""
        self._loader: DataLoader | None = None

    def __len__(self) -> int:
        """Steps of one evaluation, equal on every rank."""
        return -(-self.samples // (self.world * self.batch))

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                self._data,
                batch_size=None,
                sampler=_EvalRows(self),
                num_workers=self.workers,
                collate_fn=identity,
                worker_init_fn=init_worker,
                persistent_workers=self.workers > 0,
                generator=torch.Generator(),
            )
        if self.feed is not None:
            self.feed.release_all()
        for images, labels, ids in delivered(self._loader):
            if self.feed is not None:
                self.feed.release()
            rows = torch.from_numpy(ids)
            yield Batch(
                images=images,
                labels=torch.from_numpy(labels),
                valid=rows >= 0,
                positions=torch.full_like(rows, -1),
                ids=rows,
            )

    def close(self) -> None:
        """Stop the workers and close all files."""
        shutdown(self._loader)
        self._loader = None
        self._reader.close()
        if self.feed is not None:
            self.feed.close()


class _EvalRows:
    """Rows of each step of one rank, -1 where the data set has ended."""

    def __init__(self, loader: EvalLoader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[np.ndarray]:
        loader, feed = self._loader, self._loader.feed
        for step in range(len(loader)):
            ids = self.rows(step)
            if feed is not None:
                if step % _AHEAD == 0:
                    steps = range(step, min(step + 2 * _AHEAD, len(loader)))
                    coming = np.concatenate([self.rows(s) for s in steps])
                    feed.follow(coming[coming >= 0])
                feed.hold(ids)
            yield ids

    def rows(self, step: int) -> np.ndarray:
        """Rows of one step, [batch] int64."""
        loader = self._loader
        ids = (step * loader.batch + np.arange(loader.batch, dtype=np.int64)) * loader.world + loader.rank
        rows = np.where(ids < loader.samples, ids * loader.rows // loader.samples, -1)
        return rows if loader.kept is None else np.where(rows < 0, -1, loader.kept[rows])
