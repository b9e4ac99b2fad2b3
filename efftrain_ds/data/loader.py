"""The training loader: tickets made in the trainer process, stateless workers, one integer of state.

A ticket names the rows and places of one micro-batch. The ticket sampler runs ahead of training by the prefetch depth
with a position of its own and asks for the batch size at each optimizer step it issues, so that a planned change needs
no flush. What was prefetched but not trained on is simply issued again after a resume: only `consumed` is state.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..core.batch import Batch
from ..core.errors import CheckpointError, PlanError
from ..core.ranks import local_world
from .feed import make_feed
from .manifest import Manifest
from .order import PLAN_VERSION, SampleOrder, default_streams
from .quarantine import Quarantine
from .reader import ShardReader, check_shards
from .worker import Ticket, TrainSamples, delivered, identity, init_worker, shutdown

logger = logging.getLogger(__name__)

_MIN_STREAMS_PER_RANK = 8
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class TicketSpec:
    """Sizes of one optimizer step: `batch` samples over all ranks, `micro_batch` samples a rank at a time."""

    batch: int
    micro_batch: int


class _TicketSampler:
    """Issues the tickets of one rank from the place where the loader's iteration begins."""

    def __init__(self, loader: TrainLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[Ticket]:
        loader = self._loader
        position = loader.start
        while (spec := loader.spec_at(position)) is not None:
            for ticket in loader.tickets(position, spec):
                if loader.feed is not None:
                    loader.look_ahead(position)
                    loader.feed.hold(ticket.ids)
                yield ticket
            position += spec.batch


class TrainLoader:
    """Endless, exactly resumable training batches of one rank.

    Args:
        manifest: the data set; every shard's size is checked here.
        seed: seed of order and crops.
        rank: data-parallel rank.
        world: number of data-parallel ranks.
        spec_at: sizes of the optimizer step that begins after so many samples, or None at the end of training. Pure:
            it is asked ahead of training, and again after a resume.
        resolution: side of the images in pixels.
        workers: loader processes; 0 reads in the trainer process.
        prefetch: micro-batches each worker prepares ahead.
        streams: streams of the sample order; None takes `default_streams` or, on resume, the checkpoint's number.
        shuffle_block: samples shuffled together inside a stream.
        scale: area range of RandomResizedCrop.
        ratio: aspect range of RandomResizedCrop.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        decoded_cache_mb: MiB of decoded images kept by each worker.
        max_bad_fraction: tolerated share of bad samples (see `Quarantine`).
        quarantine: JSON-lines ledger of bad samples, or None.
        num_classes: number of valid labels; None takes the manifest's.
        pin_memory: copy images to page-locked memory.

    Raises:
        ShardError: a shard is missing or has another size than the manifest says.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        rank: int,
        world: int,
        spec_at: Callable[[int], TicketSpec | None],
        resolution: int,
        workers: int,
        prefetch: int = 2,
        streams: int | None = None,
        shuffle_block: int = 4096,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        decoded_cache_mb: int = 0,
        max_bad_fraction: float = 1e-4,
        quarantine: Path | None = None,
        num_classes: int | None = None,
        pin_memory: bool = False,
    ):
        check_shards(manifest)
        if manifest.rendition is not None and manifest.rendition.short_side < resolution:
            logger.warning(
                "%s: images are reduced to a short side of %d px, below efftrain.data.resolution %d",
                manifest.folder,
                manifest.rendition.short_side,
                resolution,
            )
        self.manifest = manifest
        self.seed = seed
        self.rank = rank
        self.world = world
        self.spec_at = spec_at
        self.resolution = resolution
        self.workers = workers
        self.prefetch = prefetch
        self.shuffle_block = shuffle_block
        self.pin_memory = pin_memory
        self.consumed = 0
        """Samples (over all ranks) whose optimizer step is done."""
        self.start = 0
        """Place of the order where the current iteration began."""
        self._given_streams = streams
        self.order = self._make_order(streams if streams is not None else default_streams(world))
        self.quarantine = Quarantine(quarantine, max_bad_fraction, self.order.samples_per_epoch // world)
        self._samples = TrainSamples(
            ShardReader(manifest),
            seed=seed,
            resolution=resolution,
            scale=scale,
            ratio=ratio,
            interpolation=interpolation,
            num_classes=num_classes if num_classes is not None else len(manifest.classes) or 1 << 31,
            decoded_cache_mb=decoded_cache_mb,
        )
        self.feed = make_feed(manifest)
        """Fetches the shards of a remote data set, None where they are local."""
        self._followed = range(0)
        self._steps: deque[int] = deque()
        self._generation = 0
        self._checked_bytes = 0
        self._loader: DataLoader | None = None

    @property
    def bad_samples(self) -> dict[str, int]:
        """Bad samples delivered by this rank since the process started, by reason."""
        return dict(self.quarantine.counts)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches in order, from `consumed` on, until `spec_at` returns None.

        A second call throws away what was prefetched and starts again at `consumed`, with the same worker processes;
        an earlier iterator then ends.

        Raises:
            ShardError: too many bad samples.
            PlanError: a batch that does not divide by world x micro-batch.
        """
        return self.batches_from(None)

    def batches_from(self, start: int | None) -> Iterator[Batch]:
        """As `iter`, but from an earlier step boundary `start` on; None = `consumed`.

        What lies before `consumed` is delivered again, with the same pixels; it is neither committed nor counted.

        Raises:
            ShardError: too many bad samples.
            PlanError: a batch that does not divide by world x micro-batch.
        """
        self._generation += 1
        return self._iterate(self._generation, start)

    def _iterate(self, generation: int, start: int | None) -> Iterator[Batch]:
        self.start = self.consumed if start is None else start
        if self._loader is None:
            # A generator of its own: the loader draws a seed for its workers, which must not move torch's global one.
            self._loader = DataLoader(
                self._samples,
                batch_size=None,
                sampler=_TicketSampler(self),
                num_workers=self.workers,
                collate_fn=identity,
                worker_init_fn=init_worker,
                prefetch_factor=self.prefetch if self.workers else None,
                persistent_workers=self.workers > 0,
                generator=torch.Generator(),
                in_order=True,
            )
        self._steps.clear()
        self._followed = range(0)
        if self.feed is not None:
            self.feed.release_all()
        for item in delivered(self._loader):
            if generation != self._generation:
                return
            ticket = item.ticket
            if self.feed is not None:
                self.feed.release()
            if ticket.positions[0] >= self.consumed:  # not one that is delivered again
                self.quarantine.update(len(ticket.ids), item.bad, self.rank)
                if ticket.step_samples:
                    self._steps.append(ticket.step_samples)
            yield Batch(
                images=item.images.pin_memory() if self.pin_memory else item.images,
                labels=torch.from_numpy(item.labels),
                valid=torch.from_numpy(item.valid),
                positions=torch.from_numpy(ticket.positions),
                ids=torch.from_numpy(ticket.ids),
            )
            if generation != self._generation:
                return

    def tickets(self, position: int, spec: TicketSpec) -> Iterator[Ticket]:
        """Tickets of this rank for the optimizer step that begins at `position`.

        Raises:
            PlanError: the batch is not a multiple of world x micro-batch.
        """
        if spec.batch < 1 or spec.micro_batch < 1 or spec.batch % (self.world * spec.micro_batch):
            raise PlanError(
                f"train_batch_size {spec.batch} at sample {position} is not a multiple of world {self.world} x "
                f"micro-batch {spec.micro_batch}"
            )
        self._check_shared_memory(spec.micro_batch)
        ids = self.order.ids(position, spec.batch)[self.rank :: self.world]
        positions = np.arange(position + self.rank, position + spec.batch, self.world, dtype=np.int64)
        for start in range(0, len(ids), spec.micro_batch):
            stop = start + spec.micro_batch
            yield Ticket(ids[start:stop].copy(), positions[start:stop], spec.batch if stop == len(ids) else 0)

    def look_ahead(self, position: int) -> None:
        """Let the feed fetch what comes after `position`, as far as a sample may be moved by the shuffle."""
        assert self.feed is not None
        span = min(self.order.streams * self.shuffle_block, self.order.samples_per_epoch)
        if self._followed.start <= position < self._followed.stop:
            return
        self._followed = range(position, position + max(1, span // 8))
        self.feed.follow(self.order.ids(position, span)[self.rank :: self.world])

    def commit(self, n_samples: int) -> None:
        """Move `consumed` by the samples (over all ranks) of one or more completed optimizer steps.

        Raises:
            ValueError: `n_samples` does not end at a step whose micro-batches were all delivered.
        """
        ready = list(self._steps)
        total, steps = 0, 0
        while total < n_samples and steps < len(ready):
            total, steps = total + ready[steps], steps + 1
        if total != n_samples:
            raise ValueError(f"commit of {n_samples} samples; the steps delivered and not committed are {ready}")
        for _ in range(steps):
            self._steps.popleft()
        self.consumed += n_samples

    def state_dict(self) -> dict[str, Any]:
        """Plain types; equal on every rank and independent of world, workers and prefetch."""
        return {
            "manifest": self.manifest.digest,
            "order": self.order.digest,
            "seed": self.seed,
            "streams": self.order.streams,
            "shuffle_block": self.shuffle_block,
            "version": self.order.version,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a checkpoint's position; call before iterating, or iterate anew afterwards.

        Raises:
            CheckpointError: the checkpoint was made with other data, seed, order or order version; names both values.
        """
        streams = state.get("streams") if self._given_streams is None else self._given_streams
        own = {
            "version": PLAN_VERSION,
            "manifest": self.manifest.digest,
            "seed": self.seed,
            "streams": streams,
            "shuffle_block": self.shuffle_block,
        }
        found = [f"{key}: checkpoint {state.get(key)!r}, here {value!r}" for key, value in own.items()]
        found = [text for text, (key, value) in zip(found, own.items(), strict=True) if state.get(key) != value]
        consumed = state.get("consumed")
        if not isinstance(consumed, int) or consumed < 0:
            found.append(f"consumed: checkpoint {consumed!r}, allowed are integers from 0 on")
        if found or not isinstance(streams, int):
            raise CheckpointError("the loader cannot resume this checkpoint: " + "; ".join(found or ["no streams"]))
        order = self.order if streams == self.order.streams else self._make_order(streams)
        if state.get("order") != order.digest:
            raise CheckpointError(
                f"the loader cannot resume this checkpoint: order: checkpoint {state.get('order')!r}, "
                f"here {order.digest!r}"
            )
        self.order = order
        self.consumed = consumed
        self._generation += 1
        self._steps.clear()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers (for diagnostics and tests)."""
        iterator = getattr(self._loader, "_iterator", None)
        return [process.pid for process in getattr(iterator, "_workers", [])]

    def close(self) -> None:
        """Stop the workers and close all files."""
        self._generation += 1
        shutdown(self._loader)
        self._loader = None
        self._samples.reader.close()
        if self.feed is not None:
            self.feed.close()

    def _make_order(self, streams: int) -> SampleOrder:
        if streams / self.world < _MIN_STREAMS_PER_RANK:
            logger.warning(
                "sample order: %d streams for %d ranks; below %d a rank, the samples of a batch come from few shards",
                streams,
                self.world,
                _MIN_STREAMS_PER_RANK,
            )
        return SampleOrder(
            [shard.n for shard in self.manifest.shards],
            seed=self.seed,
            streams=streams,
            shuffle_block=self.shuffle_block,
            exclude=self.manifest.left_out,
        )

    def _check_shared_memory(self, micro_batch: int) -> None:
        size = micro_batch * 3 * self.resolution**2
        if self.workers == 0 or size <= self._checked_bytes or not _SHM.is_dir():
            return
        self._checked_bytes = size
        ranks = local_world()
        needed = size * (self.prefetch * self.workers + 2) * ranks
        free = shutil.disk_usage(_SHM).free
        if needed > free:
            logger.warning(
                "%s has %.0f MB free, the loaders of this node need up to %.0f MB: give it more space (containers: "
                "--shm-size), or lower data.workers or data.prefetch",
                _SHM,
                free / 1e6,
                needed / 1e6,
            )
