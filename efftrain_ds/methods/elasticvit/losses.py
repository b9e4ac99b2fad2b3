"""Losses of supernet training: soft targets of teachers, and the adaptive alpha-divergence for distillation in place.

The alpha-divergence is AlphaNet's (arXiv 2102.07954): for each sample the larger one of two divergences counts, one
that punishes a student which is too sure and one that punishes a student which is not sure enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ModelError

LEAST = 1e-8
CAP = 5.0
TEMPERATURE = 0.2
Reduction = Literal["mean", "none"]
"""Mean over the batch, or the losses [B] of its samples."""


def _wide(x: Tensor) -> Tensor:
    """fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same(logits: Tensor, target: Tensor) -> None:
    if logits.shape != target.shape:
        raise ModelError(f"logits {list(logits.shape)}, targets {list(target.shape)}; the same classes are needed")


def soft_targets(logits: Sequence[Tensor], temperature: float = TEMPERATURE) -> Tensor:
    """Mean prediction of the teachers.

    Args:
        logits: [B, C] of each teacher.
        temperature: that divides the logits; below 1 it sharpens (published: 0.2).

    Returns:
        [B, C] probabilities without gradient, fp32 at least.

    Raises:
        ModelError: no teacher, or teachers with different classes.
    """
    if not logits:
        raise ModelError("soft targets need at least one teacher")
    for other in logits[1:]:
        _same(logits[0], other)
    with torch.no_grad():
        return torch.stack([(_wide(x) / temperature).softmax(-1) for x in logits]).mean(0)


def _reduced(each: Tensor, reduction: Reduction) -> Tensor:
    return each.mean() if reduction == "mean" else each


def soft_cross_entropy(logits: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy to probabilities, in fp32 at least.

    Args:
        logits: [B, C].
        target: [B, C] probabilities; no gradient goes there.
        reduction: "mean" over the batch, or "none" for the losses [B] of its samples.

    Raises:
        ModelError: other shapes.
    """
    _same(logits, target)
    return _reduced(-(_wide(target).detach() * _wide(logits).log_softmax(-1)).sum(-1), reduction)


def taught_loss(
    logits: Tensor, labels: Tensor | None, targets: Tensor | None, teachers: int, reduction: Reduction = "mean"
) -> Tensor:
    """Loss of a random sub-network: of labels without a teacher, half and half with one, of targets alone with more.

    Args:
        logits: [B, C].
        labels: classes [B] or probabilities [B, C]; may be None with two teachers and more.
        targets: of the teachers (`soft_targets`), None without a teacher.
        teachers: how many there are.
        reduction: "mean" over the batch, or "none" for the losses [B] of its samples.
    """
    if teachers == 0:
        return _label_loss(logits, labels, reduction)
    assert targets is not None
    soft = soft_cross_entropy(logits, targets, reduction)
    return soft if teachers > 1 else 0.5 * _label_loss(logits, labels, reduction) + 0.5 * soft


def _label_loss(logits: Tensor, labels: Tensor | None, reduction: Reduction) -> Tensor:
    assert labels is not None
    if labels.ndim == 1:
        return F.cross_entropy(_wide(logits), labels, reduction=reduction)
    return soft_cross_entropy(logits, labels, reduction)


def _ratios(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log q, q, p / q, q / p), all but the first without gradient."""
    _same(logits, target)
    log_q = _wide(logits).log_softmax(-1)
    q = log_q.detach().exp().clamp_min(LEAST)
    p = _wide(target).detach().clamp_min(LEAST)
    return log_q, q, p / q, q / p


def divergences(logits: Tensor, target: Tensor, cap: float = CAP) -> tuple[Tensor, Tensor]:
    """The two divergences of each sample, without gradient.

    With q = softmax(logits) and target p: ``D(-1) = 1/2 sum q (min(q/p, cap) - 1)``, ``D(1) = sum p ln(p/q)``.

    Args:
        logits: [B, C].
        target: [B, C] probabilities.
        cap: largest q/p that counts.

    Returns:
        (D(-1) [B], D(1) [B]).
    """
    _, q, forth, back = _ratios(logits, target)
    return 0.5 * (q * (back.clamp_max(cap) - 1)).sum(-1), (q * forth * forth.log()).sum(-1)


def alpha_div(logits: Tensor, target: Tensor, cap: float = CAP, reduction: Reduction = "mean") -> Tensor:
    """Adaptive alpha-divergence with alpha in {-1, 1}, in fp32 at least.

    The gradient is that of the larger divergence of each sample (where no cap is active; a capped ratio counts as a
    constant weight). The number itself is that of the surrogate with this gradient, ``-sum stop(q w) ln q``, and may be
    negative; `divergences` gives the divergences.

    Args:
        logits: [B, C] of the student.
        target: [B, C] probabilities, e.g. the mean prediction of other sub-networks; no gradient goes there.
        cap: largest q/p that counts.
        reduction: "mean" over the batch, or "none" for the losses [B] of its samples.

    Raises:
        ModelError: other shapes.
    """
    log_q, q, forth, back = _ratios(logits, target)
    capped = back.clamp_max(cap)
    sure = 0.5 * (q * (capped - 1)).sum(-1)
    unsure = (q * forth * forth.log()).sum(-1)
    weight = torch.where((sure > unsure)[:, None], 0.5 - capped, forth)
    return _reduced(-(q * weight * log_q).sum(-1), reduction)
