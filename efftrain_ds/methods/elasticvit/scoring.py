"""Scores of sub-networks on given images: minus the cross-entropy, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...core.context import Context
from ...core.errors import ConfigError
from ...core.ranks import agree, gather, text_of
from ...data.augment.chain import normalize
from .calibrate import unwritten_statistics


@dataclass
class Images:
    """A batch of images of one rank.

    Attributes:
        images: [B, C, H, W], uint8 or normalised.
        labels: [B].
        valid: [B] bool, None where all are.
        mean: to normalise uint8 images.
        std: likewise.
    """

    images: Tensor
    labels: Tensor
    valid: Tensor | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def ready(self, ctx: Context) -> Tensor:
        """The images as the model takes them, on its device.

        Raises:
            ConfigError: uint8 images without mean and std.
        """
        kind = next(ctx.engine.module.parameters()).dtype
        images = self.images.to(ctx.device)
        if images.dtype == torch.uint8:
            if self.mean is None or self.std is None:
                raise ConfigError("efftrain.data: uint8 images arrived without mean and std (Batch.mean, Batch.std)")
            images = normalize(images, self.mean, self.std, kind)
        return images.to(kind)

    def on(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """What counts, for networks that normalise by batch: rows that are not valid stay away from it.

        Where parameters are partitioned every rank must run every batch, so there are always images: a single valid row
        comes twice (one position of one image has no variance), and a batch without any comes as it is.

        Returns:
            (images [at least 2, C, H, W] with the valid ones first, labels [n] of the n valid ones), on the device.
        """
        rows = torch.arange(len(self.images), device=self.images.device)
        if self.valid is not None:
            rows = rows[self.valid.to(rows.device)]
        run = rows if len(rows) else torch.arange(len(self.images), device=rows.device)
        run = run if len(run) > 1 else run.repeat(2)
        part = Images(self.images[run], self.labels, None, self.mean, self.std)
        return part.ready(ctx), self.labels[rows.to(self.labels.device)].to(ctx.device)


@torch.no_grad()
def score(ctx: Context, configs: Sequence[Any], batches: Sequence[Images]) -> list[float]:
    """Minus the mean cross-entropy with hard labels of each sub-network, equal on all ranks. Collective.

    Sub-networks run as in training (batch normalisation by batch), but without gradients and without a trace in the
    running statistics. Only valid images run, so scores do not depend on how batches were filled up. The last
    sub-network stays set.
    """
    engine, module = ctx.engine.deepspeed_engine, ctx.engine.module
    sums = torch.zeros(len(configs), 2, dtype=torch.float64, device=ctx.device)
    with unwritten_statistics(module):
        for batch in batches:
            images, labels = batch.on(ctx)
            for row, config in zip(sums, configs, strict=True):
                module.set_config(config)
                logits = engine(images)[: len(labels)].float()
                row[0] += F.cross_entropy(logits, labels, reduction="sum").double()
                row[1] += len(labels)
    if ctx.world > 1:
        dist.all_reduce(sums)
    return (-sums[:, 0] / sums[:, 1]).tolist()


def probe_images(ctx: Context, count: int, what: str) -> list[Images]:
    """This rank's fixed training samples. Collective: what one rank cannot read all ranks hear of.

    Args:
        ctx: of the run; it has `probe_batches`.
        count: samples of all ranks together.
        what: what errors call the caller.

    Raises:
        ConfigError: they cannot be read, have no labels, or the ranks have different numbers of batches.
    """
    problem, found = None, []
    try:
        assert ctx.probe_batches is not None
        for batch in ctx.probe_batches(count):
            if batch.labels is None:
                raise ConfigError("the probe batches have no labels")
            found.append(Images(batch.images, batch.labels, batch.valid, batch.mean, batch.std))
    except Exception as error:
        problem = text_of(error)
    agree(problem, ConfigError, what)
    counts = gather(len(found))
    if len(set(counts)) > 1:
        raise ConfigError(f"{what}: the ranks have different numbers of probe batches: {counts}")
    return found


class Probes:
    """This rank's fixed training samples on the host, read once for each number of them.

    Args:
        what: what errors call the caller.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._kept: dict[int, list[Images]] = {}

    def of(self, ctx: Context, count: int) -> list[Images]:
        """So many samples of all ranks together; none without a trainer. Collective, see `probe_images`."""
        if ctx.probe_batches is None:
            return []
        if count not in self._kept:
            self._kept[count] = probe_images(ctx, count, self.what)
        return self._kept[count]
