"""What each pass of a step learns: labels, teachers' predictions, or those of the sub-networks before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.batch import Batch
from ...core.errors import ConfigError
from .config import KEY, ElasticViTConfig
from .losses import alpha_div, soft_targets, taught_loss
from .teacher import Teacher


class Targets:
    """Losses of the passes over one micro-batch. Samples that are not valid have no part in them.

    Args:
        config: of the method.
        teachers: frozen networks; their predictions are made once for all passes.
        num_classes: of the classifier.
    """

    def __init__(self, config: ElasticViTConfig, teachers: Sequence[Teacher], num_classes: int) -> None:
        self.config, self.teachers, self.num_classes = config, teachers, num_classes
        self.end()

    def begin(self, batch: Batch) -> None:
        """A new micro-batch.

        Raises:
            ConfigError: no labels where they are needed.
        """
        self.end()
        self._valid, self._denominator = batch.valid, batch.denominator
        if len(self.teachers) < 2:
            if batch.labels is None:
                raise ConfigError(f"{KEY}: labels are needed with fewer than two teachers")
            self._labels = soft_labels(batch, self.num_classes, self.config.label_smoothing)
        if self.teachers:
            logits = [teacher(batch.images, batch.mean, batch.std) for teacher in self.teachers]
            self._taught = soft_targets(logits, self.config.temperature)

    def end(self) -> None:
        """Forget the micro-batch."""
        self._labels: Tensor | None = None
        self._taught: Tensor | None = None
        self._seen: Tensor | None = None
        self._count = 0
        self._leader = False
        self._valid: Tensor | None = None
        self._denominator: Tensor | None = None

    def loss(self, mode: str, logits: Tensor) -> Tensor:
        """Loss of the sub-network of one pass: mean over the valid samples.

        With `Batch.denominator` it is the micro-batch's share of the mean over all ranks and micro-batches of the step.

        Args:
            mode: "largest", "random" or "smallest".
            logits: [B, classes].
        """
        learns = self._seen is not None and (mode == "smallest" or self._leader)
        if learns:
            assert self._seen is not None
            loss = self._mean(alpha_div(logits, self._seen / self._count, self.config.alpha_cap, "none"))
        else:
            loss = self._mean(taught_loss(logits, self._labels, self._taught, len(self.teachers), "none"))
        if mode == "largest" or (mode == "random" and not self._leader):
            prediction = logits.detach().float().softmax(-1)
            self._seen = prediction if self._seen is None else self._seen + prediction
            self._count += 1
            self._leader = mode == "largest"
        return loss

    def _mean(self, each: Tensor) -> Tensor:
        """Of the losses [B] of the samples."""
        count = self._denominator
        if self._valid is not None:
            each = torch.where(self._valid, each, 0.0)
            count = self._valid.sum().clamp(min=1) if count is None else count
        return each.mean() if count is None else each.sum() / count


def soft_labels(batch: Batch, classes: int, smoothing: float) -> Tensor:
    """Probabilities [B, classes] of labels, mixed as the images are and smoothed; fp32.

    Labels below 0 (of samples that are not valid) read class 0.
    """
    assert batch.labels is not None
    target = torch.nn.functional.one_hot(batch.labels.clamp(min=0), classes).float()
    if batch.labels_b is not None:
        other = torch.nn.functional.one_hot(batch.labels_b.clamp(min=0), classes).float()
        target = batch.lam * target + (1 - batch.lam) * other
    return target * (1 - smoothing) + smoothing / classes
