"""Replay: samples that were loaded once are used several times, so that a slow pipeline can feed cheap steps.

After EfficientTrain++ (TPAMI 2024, arXiv 2405.08768) and its code release, with these differences: samples are kept as
they leave the workers (cropped to the full resolution, uint8) and augmented anew at every use; single samples are drawn
instead of chunks; no sample comes twice in one step; a stage begins with steps of new samples only, where the release
repeats its first batch r times.

What a step loads and draws is a pure function of (seed, step, rank), so a resume that reads the last S steps' samples
again goes on exactly as if nothing had happened.

Shape legend: N images of C x H x W pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import torch

from ..core.batch import Batch
from ..core.draws import words
from ..core.errors import ConfigError
from ..core.ranks import agree, local_world
from ..core.replay import capacity, fresh_batch, loaded, mean_uses, replays, step_after, total_loaded, window_start
from ..core.text import bytes_text
from ..core.timeline import Schedule, Stage
from .loader import TicketSpec, TrainLoader

logger = logging.getLogger(__name__)

_ROW_BYTES = 33  # beside the pixels: label, id, place, step and a flag


def fresh_spec(schedule: Schedule, consumed: int) -> TicketSpec | None:
    """What the loader is asked for in the optimizer step that begins after `consumed` loaded samples (over all ranks).

    None at the end of the run.

    Raises:
        PlanError: no step begins there.
    """
    if consumed >= total_loaded(schedule):
        return None
    step = step_after(schedule, consumed)
    stage = schedule.stage_at(step)
    fresh = fresh_batch(stage, step)
    if fresh == stage.batch:
        return TicketSpec(stage.batch, stage.micro_batch)
    local = fresh // schedule.spec.world
    return TicketSpec(fresh, max(d for d in range(1, min(local, stage.micro_batch) + 1) if local % d == 0))


def distinct(seed: int, stream: str, step: int, n: int, k: int) -> np.ndarray:
    """`k` different integers in 0..n-1 in random order, a pure function of the arguments; [k] int64.

    Raises:
        ValueError: k > n.
    """
    if k > n:
        raise ValueError(f"{k} different numbers below {n}")
    if 4 * k > n:
        return np.argsort(words(seed, stream, np.asarray([step]), n)[0], kind="stable")[:k].astype(np.int64)
    count = k + k // 2 + 8
    while True:  # the high word of key x n: of numbers this small no remainder is favoured measurably
        keys = words(seed, stream, np.asarray([step]), count)[0] >> np.uint64(32)
        found = ((keys * np.uint64(n)) >> np.uint64(32)).astype(np.int64)
        first = np.sort(np.unique(found, return_index=True)[1])
        if len(first) >= k:
            return found[first[:k]]
        count *= 2


class ReplayBuffer:
    """Ring of the samples that were loaded last, one allocation for the whole run.

    Args:
        rows: samples it can hold.
        shape: (C, H, W) of an image.
        device: where pixels, labels and flags lie.

    Attributes:
        count: samples held.
        positions: [rows] int64 on the host, place in the loader's order of each sample.
        steps: [rows] int64 on the host, optimizer step that loaded each sample.
    """

    def __init__(self, rows: int, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        self.images = torch.empty((rows, *shape), dtype=torch.uint8, device=device)
        self.labels = torch.empty(rows, dtype=torch.int64, device=device)
        self.valid = torch.empty(rows, dtype=torch.bool, device=device)
        self.ids = torch.empty(rows, dtype=torch.int64, device=device)
        self.positions = np.empty(rows, np.int64)
        self.steps = np.empty(rows, np.int64)
        self.clear(rows)

    def clear(self, limit: int) -> None:
        """Forget everything; hold `limit` samples from now on."""
        assert 0 < limit <= len(self.images), f"{limit} rows of {len(self.images)}"
        self.limit, self.count, self._head = limit, 0, 0

    def push(self, batch: Batch, step: int) -> None:
        """Take the samples of a batch, in the place of the oldest ones."""
        n, done = len(batch), 0
        assert n <= self.limit
        assert batch.positions is not None
        while done < n:
            take = min(n - done, self.limit - self._head)
            own, theirs = slice(self._head, self._head + take), slice(done, done + take)
            for name in ("images", "labels", "valid", "ids"):
                getattr(self, name)[own].copy_(getattr(batch, name)[theirs], non_blocking=True)
            self.positions[own] = batch.positions[theirs].numpy()
            self.steps[own] = step
            self._head, done = (self._head + take) % self.limit, done + take
        self.count = min(self.count + n, self.limit)

    def rows(self, ages: np.ndarray) -> np.ndarray:
        """Rows of samples by how many were pushed after them (0 = the newest), [n] int64."""
        return (self._head - 1 - ages) % self.limit

    def take(self, rows: np.ndarray, pin: bool = False) -> Batch:
        """Copies of the samples in these rows; `positions` are their places in the loader's order.

        Args:
            rows: [N] integers.
            pin: put the images into page-locked memory.
        """
        index = torch.from_numpy(rows).to(self.images.device)
        images = None
        if pin and self.images.device.type == "cpu":
            images = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=True)
        return Batch(
            images=torch.index_select(self.images, 0, index, out=images),
            labels=self.labels[index],
            valid=self.valid[index],
            ids=self.ids[index],
            positions=torch.from_numpy(self.positions[rows]),
        )


class ReplayFeed:
    """Micro-batches of one rank, of new and of replayed samples; takes the place of its `TrainLoader` in the loop.

    `Batch.positions` counts uses: place i of the run's stream of batches, as without replay, so every use of a sample
    draws its flip, its RandAugment and its erased box anew. (Its random crop is the worker's, drawn when it is loaded.)
    The buffer is emptied where a stage begins.

    Args:
        loader: asks `fresh_spec` what to load.
        schedule: stages of the run.
        device: where the buffer lies.
        record: writes a journal event.

    Attributes:
        buffer: the samples held, None before a stage with replay and after the last one.
        tick: called while the buffer is filled anew, which may take minutes.

    Raises:
        ConfigError: on all ranks, where the memory of one is too small for the buffer. Collective.
    """

    def __init__(
        self,
        loader: TrainLoader,
        schedule: Schedule,
        *,
        device: torch.device | str = "cpu",
        record: Callable[..., None] = lambda *_, **__: None,
    ):
        self.loader, self.schedule, self.device, self.record = loader, schedule, torch.device(device), record
        self.world = schedule.spec.world
        self.rows = max(capacity(stage, self.world) for stage in schedule.stages)
        self.buffer: ReplayBuffer | None = None
        self.tick: Callable[[], None] = lambda: None
        self._stage: Stage | None = None
        self._generation = 0
        agree(self._memory_problem(), ConfigError)

    @property
    def bytes(self) -> int:
        """Memory of the buffer on this rank."""
        return self.rows * (3 * self.loader.resolution**2 + _ROW_BYTES)

    def _memory_problem(self) -> str | None:
        if self.device.type == "cuda":
            free, where = torch.cuda.mem_get_info(self.device)[0], "the device"
        else:
            free, where = psutil.virtual_memory().available // local_world(), "a rank's share of the host"
        if self.bytes <= free:
            return None
        return (
            f"the replay buffer needs {bytes_text(self.bytes)} ({self.rows:,} images of {self.loader.resolution} px), "
            f"{where} has {bytes_text(free)} free: lower its capacity (efftrain.methods), or see "
            "efftrain.data.replay_memory"
        )

    # -- the loader's part -------------------------------------------------------------------------------------

    @property
    def consumed(self) -> int:
        """Loaded samples (over all ranks) whose optimizer step is done."""
        return self.loader.consumed

    @property
    def bad_samples(self) -> dict[str, int]:
        """See `TrainLoader`."""
        return self.loader.bad_samples

    def commit(self, n_samples: int) -> None:
        """The optimizer step whose batch has `n_samples` samples (over all ranks) is done.

        Raises:
            ValueError: `n_samples` is not the batch of the next step.
        """
        step = step_after(self.schedule, self.loader.consumed)
        stage = self.schedule.stage_at(step)
        if n_samples != stage.batch:
            raise ValueError(f"commit of {n_samples} samples; step {step} has {stage.batch}")
        self.loader.commit(fresh_batch(stage, step))

    def state_dict(self) -> dict[str, Any]:
        """That of the loader: the buffer is filled anew, from the samples' places."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainLoader`."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Stop the loader and free the buffer."""
        self._generation += 1
        self.buffer = None
        self.loader.close()

    def scalars(self, done: int, images_per_s: float | None) -> dict[str, float]:
        """What the log shows, apart: samples loaded and replayed so far, and the rate that the loader must keep up.

        Args:
            done: optimizer steps done.
            images_per_s: of one rank, of both kinds.
        """
        fresh, stage = loaded(self.schedule, done), self.schedule.stage_at(max(done - 1, 0))
        share = fresh_batch(stage, max(done - 1, 0)) / stage.batch
        values = {
            "data/fresh": float(fresh),
            "data/replayed": float(self.schedule.consumed(done) - fresh),
            "data/fresh_share": share,
        }
        return values if images_per_s is None else {**values, "data/loader_img_s_needed": share * images_per_s}

    # -- batches -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches from the loader's position on; in mid-stage the buffer is first filled anew.

        Raises:
            ShardError: too many bad samples.
            PlanError: the position is not at a step of this schedule.
        """
        self._generation += 1
        step = step_after(self.schedule, self.loader.consumed)
        stage = self.schedule.stage_at(step)
        first = window_start(stage, step) if step < self.schedule.total_steps else step
        batches = self.loader.batches_from(loaded(self.schedule, first))
        self._enter(stage)
        if first < step:
            self._refill(batches, stage, first, step)
        return self._iterate(batches, step, self._generation)

    def _refill(self, batches: Iterator[Batch], stage: Stage, first: int, step: int) -> None:
        assert self.buffer is not None
        start, count = time.monotonic(), 0
        for earlier in range(first, step):
            for batch in self._loaded(batches, stage, earlier):
                self.buffer.push(batch, earlier)
                count += len(batch)
                self.tick()
        seconds = time.monotonic() - start
        logger.info("replay: %d samples read again in %.1f s", count, seconds)
        self.record("replay_refill", samples=count, steps=step - first, seconds=seconds)

    def _enter(self, stage: Stage) -> None:
        """Empty the buffer for a new stage; free it after the last one that replays."""
        self._stage = stage
        if mean_uses(stage) > 1:
            if self.buffer is None:
                side = self.loader.resolution
                self.buffer = ReplayBuffer(self.rows, (3, side, side), self.device)
            self.buffer.clear(capacity(stage, self.world))
        elif all(mean_uses(later) == 1 for later in self.schedule.stages[stage.index :]):
            self.buffer = None

    def _loaded(self, batches: Iterator[Batch], stage: Stage, step: int) -> Iterator[Batch]:
        """What the loader delivers for one step; less where it has ended."""
        left = fresh_batch(stage, step) // self.world
        while left > 0 and (batch := next(batches, None)) is not None:
            left -= len(batch)
            yield batch

    def _iterate(self, batches: Iterator[Batch], step: int, generation: int) -> Iterator[Batch]:
        while step < self.schedule.total_steps:
            stage = self.schedule.stage_at(step)
            if stage is not self._stage:
                self._enter(stage)
            start = self.schedule.consumed(step) + self.loader.rank
            for batch in self._step(batches, stage, step):
                positions = np.arange(start, start + len(batch) * self.world, self.world, dtype=np.int64)
                batch.positions = torch.from_numpy(positions)
                start += len(batch) * self.world
                yield batch
                if generation != self._generation:
                    return
            if start - self.loader.rank != self.schedule.consumed(step + 1):
                return  # the loader has ended: another iteration began
            step += 1

    def _step(self, batches: Iterator[Batch], stage: Stage, step: int) -> Iterator[Batch]:
        """The micro-batches of one step."""
        buffer = self.buffer if mean_uses(stage) > 1 else None
        if fresh_batch(stage, step) == stage.batch:
            for batch in self._loaded(batches, stage, step):
                if buffer is not None:
                    buffer.push(batch, step)
                yield batch
            return
        assert buffer is not None
        fresh = 0
        for batch in self._loaded(batches, stage, step):
            buffer.push(batch, step)
            fresh += len(batch)
        if fresh < fresh_batch(stage, step) // self.world:
            return
        rows = buffer.rows(self.ages(step, fresh, buffer.count))
        for low in range(0, len(rows), stage.micro_batch):
            yield buffer.take(rows[low : low + stage.micro_batch], self.loader.pin_memory)

    def ages(self, step: int, fresh: int, count: int) -> np.ndarray:
        """The samples of one step by how many were pushed after them: the new ones once, and others once at most.

        Args:
            step: optimizer step.
            fresh: new samples of this rank.
            count: samples in the buffer, with the new ones.

        Returns:
            [samples of this rank in a step] int64, in random order.
        """
        seed, stream = self.loader.seed, f"replay/{self.loader.rank}"
        local = self.schedule.stage_at(step).batch // self.world
        drawn = fresh + distinct(seed, stream, step, count - fresh, local - fresh)
        both = np.concatenate([np.arange(fresh, dtype=np.int64), drawn])
        return both[distinct(seed, f"{stream}/order", step, local, local)]


def make_training_feed(
    loader: TrainLoader, schedule: Schedule, *, device: torch.device | str, record: Callable[..., None]
) -> TrainLoader | ReplayFeed:
    """The loader itself where no stage replays."""
    return ReplayFeed(loader, schedule, device=device, record=record) if replays(schedule) else loader
