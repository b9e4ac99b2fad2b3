"""Mixup and CutMix of whole batches, and the loss of a mixed batch.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412; Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features", arXiv:1905.04899. Semantics of timm's
``Mixup(mode="batch")``: one weight a micro-batch, the partner of sample i is sample N - 1 - i.

Legend: N samples, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.batch import Batch
from ...core.rng import numpy_rng


@dataclass(frozen=True)
class Mix:
    """How one micro-batch is mixed.

    Attributes:
        lam: weight of a sample's own label, in [0, 1]; 1 = not mixed.
        box: (top, bottom, left, right) in pixels that CutMix takes from the partner; None = mixup.
    """

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None


class BatchMixer:
    """Mixup / CutMix with one draw a micro-batch.

    Args:
        mixup: Beta parameter of mixup; 0 = off.
        cutmix: Beta parameter of CutMix; 0 = off.
        prob: probability that a batch is mixed at all.
        switch: probability of CutMix where both are on.
    """

    def __init__(self, mixup: float = 0.8, cutmix: float = 1.0, prob: float = 1.0, switch: float = 0.5):
        self.mixup = mixup
        self.cutmix = cutmix
        self.prob = prob if mixup > 0 or cutmix > 0 else 0.0
        self.switch = switch

    def draw(self, seed: int, step: int, micro: int, height: int, width: int) -> Mix:
        """The mix of one micro-batch: a pure function of its arguments, equal on every rank.

        Args:
            seed: seed of the run.
            step: optimizer step.
            micro: index of the micro-batch inside the step.
            height: rows of the images in pixels.
            width: columns of the images in pixels.

        Returns:
            Weight and box; CutMix's weight is corrected to the box that lies inside the image.
        """
        if self.prob == 0:
            return Mix()
        rng = numpy_rng(seed, "mixing", step, micro)
        apply, switch, across, down = rng.random(4).tolist()
        if apply >= self.prob:
            return Mix()
        cut = self.cutmix > 0 and (self.mixup == 0 or switch < self.switch)
        alpha = self.cutmix if cut else self.mixup
        lam = float(rng.beta(alpha, alpha))
        if not cut:
            return Mix(lam)
        side = math.sqrt(1 - lam)
        tall, wide = int(height * side), int(width * side)
        y, x = int(down * height), int(across * width)
        top, bottom = max(y - tall // 2, 0), min(y + (tall + 1) // 2, height)
        left, right = max(x - wide // 2, 0), min(x + (wide + 1) // 2, width)
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))

    def __call__(self, batch: Batch, seed: int, step: int, micro: int) -> Batch:
        """Mix a batch in place and set ``labels_b`` and ``lam``.

        A pair with an invalid sample is left alone: each of the two keeps its image and its own label twice, which is
        what a weight of 1 would do.

        Args:
            batch: normalised (floating point) images, changed in place, and labels.
            seed: seed of the run.
            step: optimizer step.
            micro: index of the micro-batch inside the step.

        Returns:
            `batch`.
        """
        images, labels = batch.images, batch.labels
        assert images.is_floating_point(), "mixing takes normalised images"
        assert labels is not None, "mixing needs labels"
        mix = self.draw(seed, step, micro, *images.shape[2:])
        batch.lam, batch.labels_b = mix.lam, None
        if mix.lam == 1:
            return batch
        partner = partners(batch.valid, len(labels), images.device)
        batch.labels_b = labels.index_select(0, partner)
        if mix.box is None:
            # lerp returns the image itself, to the bit, where a sample is its own partner.
            images.lerp_(images.index_select(0, partner), 1 - mix.lam)
        else:
            top, bottom, left, right = mix.box
            part = images[:, :, top:bottom, left:right]
            part.copy_(part.index_select(0, partner))
        return batch


def partners(valid: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Partner of each sample: the batch reversed, or the sample itself where one of the pair is invalid.

    Args:
        valid: [N] bool, or None when all are valid.
        count: N.
        device: where the result is needed.

    Returns:
        [N] int64.
    """
    own = torch.arange(count, device=device)
    other = own.flip(0)
    return other if valid is None else torch.where(valid & valid.flip(0), other, own)


def mixed_cross_entropy(
    logits: Tensor, batch: Batch, smoothing: float = 0.0, denominator: float | Tensor | None = None
) -> Tensor:
    """Cross-entropy against lam * one_hot(labels) + (1 - lam) * one_hot(labels_b), smoothed; in float32.

    Args:
        logits: [N, K] of any floating dtype.
        batch: labels, ``labels_b`` and ``lam``; samples with ``valid`` False add neither loss nor gradient.
        smoothing: label smoothing; that share of the target is spread evenly over the K classes.
        denominator: what the sum over the valid samples is divided by, e.g. the global count of valid samples over
            the number of ranks; None = the number of valid samples of this batch, at least 1.

    Returns:
        Scalar float32.
    """
    labels = batch.labels
    assert labels is not None, "the loss needs labels"
    log_prob = logits.float().log_softmax(1)
    picked = _pick(log_prob, labels)
    if batch.labels_b is not None:
        picked = batch.lam * picked + (1 - batch.lam) * _pick(log_prob, batch.labels_b)
    loss = -(1 - smoothing) * picked
    if smoothing:
        loss = loss - smoothing * log_prob.mean(1)
    if batch.valid is not None:
        loss = torch.where(batch.valid, loss, 0)
        if denominator is None:
            denominator = batch.valid.sum().clamp(min=1)
    return loss.sum() / (max(len(labels), 1) if denominator is None else denominator)


def _pick(log_prob: Tensor, labels: Tensor) -> Tensor:
    """Entry of each row at its label; labels below 0 (invalid samples) read class 0."""
    return log_prob.gather(1, labels.clamp(min=0)[:, None])[:, 0]
