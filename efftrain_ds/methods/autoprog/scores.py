"""Training-free scores of a candidate, and the vote between candidates (AutoProg-Zero, arXiv 2410.00350).

Two scores, both "higher is better": the condition of the neural tangent kernel (how evenly gradient descent can fit
the samples) and ZiCo (Li et al., ICLR 2023, arXiv 2301.11300: large gradients that agree between batches). No weight
changes and no ``.grad`` is written.

Shape legend: n samples, P entries of all tensors, b batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FLOOR = 1e-12
"""Smallest eigenvalue of a kernel relative to its largest: rank-deficient kernels stay comparable."""
_TIE = 1e-6

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Vote:
    """Outcome of a vote: the chosen candidate and every candidate's votes (smaller is better)."""

    index: int
    votes: tuple[float, ...]


def ntk_score(jacobian: Tensor) -> float:
    """Score of per-sample gradients [n, P]: `gram_score` of ``J J^T``."""
    return gram_score(jacobian.double() @ jacobian.double().T)


def gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gram matrix ``J J^T`` accumulated tensor by tensor, without the matrix J.

    Args:
        gradients: for each of n samples, its gradients of the same list of tensors.

    Returns:
        [n, n] float64 on the host.
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for parts in zip(*gradients, strict=True):
        # one tensor at a time in double: the difference of eigenvalues 1e12 apart is the score
        rows = torch.stack([part.detach().flatten() for part in parts]).double()
        total += (rows @ rows.T).cpu()
    return total


def gram_score(matrix: Tensor) -> float:
    """``-lambda_max / lambda_min`` of a Gram matrix [n, n], lambda_min at least 1e-12 lambda_max.

    Returns:
        A value in [-1e12, -1]; -inf where all gradients are zero or one is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        return -math.inf
    values = torch.linalg.eigvalsh(matrix.double())
    smallest, largest = float(values[0]), float(values[-1])
    if largest <= 0:
        return -math.inf
    return -largest / max(smallest, _FLOOR * largest)


def zico_score(layers: Iterable[Tensor]) -> float:
    """ZiCo: ``sum over layers of ln sum_i mean_b |g_bi| / std_b(g_bi)``; it grows with the number of layers.

    Args:
        layers: for each layer the gradients of its weight by batch, [b, ...].

    Returns:
        The score. Entries without spread are left out (population standard deviation), layers of only such entries
        too; 0 where no layer is left.
    """
    total = 0.0
    for samples in layers:
        samples = samples.double().flatten(1)
        # differences to the first sample: equal gradients give exactly 0, whatever their number
        spread = (samples - samples[:1]).std(0, correction=0)
        moved = spread > 0
        if bool(moved.any()):
            total += math.log(float((samples.abs().mean(0)[moved] / spread[moved]).sum()))
    return total


def competition_ranks(values: Sequence[float], descending: bool, tol: float = _TIE) -> tuple[int, ...]:
    """Ranks from 1, where equal values share the best one ("1224").

    Args:
        values: [n] numbers; nan ranks last.
        descending: True where large values are good.
        tol: values closer than ``tol * max(1, |a|, |b|)`` are equal.
    """
    signed = [math.inf if math.isnan(v) else (-v if descending else v) for v in values]

    def better(a: float, b: float) -> bool:
        finite = math.isfinite(a) and math.isfinite(b)
        return a < b - (tol * max(1.0, abs(a), abs(b)) if finite else 0.0)

    return tuple(1 + sum(better(other, own) for other in signed) for own in signed)


def vote(times: Sequence[float], ntk: Sequence[float], zico: Sequence[float]) -> Vote:
    """Choose by ranks: ``V = rank_T + rank_NTK / 2 + rank_ZiCo / 2``; the smallest V wins, of equals the faster.

    Args:
        times: [n] seconds or MACs of a step, smaller is better.
        ntk: [n] scores, higher is better.
        zico: [n] scores, higher is better.
    """
    ranks = zip(
        competition_ranks(times, False), competition_ranks(ntk, True), competition_ranks(zico, True), strict=True
    )
    votes = tuple(t + n / 2 + z / 2 for t, n, z in ranks)
    index = min(range(len(votes)), key=lambda i: (votes[i], times[i], i))
    return Vote(index, votes)


def per_sample_gradients(module: nn.Module, images: Tensor, parameters: Collection[str]) -> list[list[Tensor]]:
    """Gradients of the sum of each sample's outputs, one forward and backward a sample.

    Args:
        module: maps [n, C, H, W] to one tensor of outputs [n, ...].
        images: [n, C, H, W].
        parameters: names of the tensors; they must require gradients.

    Returns:
        For each sample the gradients in the order of `parameters`, zeros where a tensor does not matter.
    """
    found = dict(module.named_parameters())
    tensors = [found[name] for name in parameters]
    rows = []
    with torch.enable_grad():
        for i in range(len(images)):
            rows.append(_gradients(module(images[i : i + 1]).sum(), tensors))
    return rows


def score_module(
    module: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    trainable: Collection[str],
    *,
    ntk_batches: int = 2,
    zico_batches: int = 2,
) -> tuple[float, float]:
    """Both scores of a module whose `trainable` parameters would train.

    The tangent kernel takes the trainable tensors named "weight" and the sum of the outputs, ZiCo the trainable weights
    of linear and convolution layers and the cross-entropy. The module runs in evaluation mode (no drop path, no
    dropout); modes, ``requires_grad`` and ``.grad`` are afterwards as before. Under data parallelism the scores are
    this rank's; average them before a vote.

    Args:
        module: a classifier, [n, C, H, W] to [n, classes], with whole (not partitioned) parameters.
        batches: (images, labels), at least `ntk_batches` + `zico_batches`, used in this order.
        trainable: names of the parameters that would train.
        ntk_batches: batches over which the kernel's score is averaged.
        zico_batches: batches that give ZiCo its gradient samples.

    Returns:
        (NTK score, ZiCo score), higher is better.

    Raises:
        ValueError: too few batches, or a name that the module does not have.
    """
    if len(batches) < ntk_batches + zico_batches:
        raise ValueError(f"{ntk_batches} + {zico_batches} scoring batches needed, found {len(batches)}")
    parameters = dict(module.named_parameters())
    unknown = sorted(set(trainable) - set(parameters))
    if unknown:
        raise ValueError(f"{type(module).__name__} has no parameter {unknown[0]!r}")
    weights = [n for n in parameters if n in trainable and n.rpartition(".")[2] == "weight"]
    layers = [
        parameter
        for layer in module.modules()
        if isinstance(layer, _LAYERS)
        for parameter in [layer.weight]
        if any(parameters[name] is parameter for name in weights)
    ]
    with _scoring(module, trainable):
        ntk = [gram_score(gram(per_sample_gradients(module, images, weights))) for images, _ in batches[:ntk_batches]]
        samples = []
        for images, labels in batches[ntk_batches : ntk_batches + zico_batches]:
            samples.append(_gradients(F.cross_entropy(module(images).float(), labels), layers))
    zico = zico_score(torch.stack(layer) for layer in zip(*samples, strict=True))
    return sum(ntk) / len(ntk), zico


def _gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, zeros for tensors that it does not depend on; no ``.grad`` is written."""
    if not value.requires_grad:  # nothing trainable in the way, or no tensors asked for
        return [torch.zeros_like(tensor) for tensor in tensors]
    if not tensors:
        return []
    return list(torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True))


@contextmanager
def _scoring(module: nn.Module, trainable: Collection[str]) -> Iterator[None]:
    """Evaluation mode with gradients for `trainable` only; every flag is put back."""
    modes = [(m, m.training) for m in module.modules()]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.eval()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trainable)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for m, training in modes:
            m.training = training
