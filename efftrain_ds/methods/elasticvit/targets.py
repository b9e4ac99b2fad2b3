"""What each pass of a step learns: labels, teachers' predictions, or those of the sub-networks before it."""

from __future__ import annotations

import math
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
        self._valid = batch.valid
        if len(self.teachers) < 2:
            if batch.labels is None:
                raise ConfigError(f"{KEY}: labels are needed with fewer than two teachers")
            self._labels = self._only_valid(soft_labels(batch, self.num_classes, self.config.label_smoothing))
        if self.teachers:
            logits = [teacher(batch.images, batch.mean, batch.std) for teacher in self.teachers]
            self._taught = self._only_valid(soft_targets(logits, self.config.temperature))

    def end(self) -> None:
        """Forget the micro-batch."""
        self._labels: Tensor | None = None
        self._taught: Tensor | None = None
        self._seen: Tensor | None = None
        self._count = 0
        self._leader = False
        self._valid: Tensor | None = None

    def _only_valid(self, targets: Tensor) -> Tensor:
        return targets if self._valid is None else targets * self._valid[:, None]

    def loss(self, mode: str, logits: Tensor) -> Tensor:
        """Loss of the sub-network of one pass, mean over the valid samples.

        Args:
            mode: "largest", "random" or "smallest".
            logits: [B, classes].
        """
        learns = self._seen is not None and (mode == "smallest" or self._leader)
        if learns:
            assert self._seen is not None
            loss = self._divergence(logits, self._seen / self._count)
        else:
            loss = self._share(taught_loss(logits, self._labels, self._taught, len(self.teachers)))
        if mode == "largest" or (mode == "random" and not self._leader):
            prediction = logits.detach().float().softmax(-1)
            self._seen = prediction if self._seen is None else self._seen + prediction
            self._count += 1
            self._leader = mode == "largest"
        return loss

    def _share(self, mean: Tensor) -> Tensor:
        """Mean over the valid samples from one over all, to which the others added nothing."""
        if self._valid is None:
            return mean
        return mean * (len(self._valid) / self._valid.sum().clamp(min=1))

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        cap = self.config.alpha_cap
        if self._valid is None:
            return alpha_div(logits, target, cap)
        # samples that are not valid get equal logits and targets, whose loss is a known constant
        keep, classes = self._valid[:, None], logits.shape[1]
        mean = alpha_div(torch.where(keep, logits, 0.0), torch.where(keep, target, 1 / classes), cap)
        return self._share(mean - (1 - self._valid.float().mean()) * math.log(classes))


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
