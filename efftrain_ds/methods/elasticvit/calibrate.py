"""Batch normalisation of one sub-network: its own statistics, estimated on some images across all ranks.

Running statistics are shared by all sub-networks of a supernet and describe none. Here they are those of the given
images: mean over all images and positions, and variance within and between batches (the law of total variance), pooled
over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.ranks import world_size


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch normalisations that keep running statistics."""
    found = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in found if m.running_mean is not None]


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Put running statistics, momentum and mode of all batch normalisations back at the end."""
    norms = batch_norms(module)
    before = [(m.momentum, m.training, {k: b.clone() for k, b in m._buffers.items() if b is not None}) for m in norms]
    try:
        yield
    finally:
        for m, (momentum, training, buffers) in zip(norms, before, strict=True):
            m.momentum, m.training = momentum, training
            for name, value in buffers.items():
                m._buffers[name].copy_(value)  # type: ignore[union-attr]


@contextmanager
def unwritten_statistics(module: nn.Module) -> Iterator[None]:
    """Let forward passes of training leave the running statistics alone."""
    norms = batch_norms(module)
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum


@torch.no_grad()
def calibrate(
    module: nn.Module,
    forward: Callable[[Tensor], object],
    batches: Iterable[tuple[Tensor, int]],
    *,
    pooled: bool = True,
) -> int:
    """Estimate the running statistics that a sub-network uses. Collective where they are pooled.

    Everything but batch normalisation runs in evaluation mode; modes and momenta are put back, the statistics stay.
    Channels that the sub-network does not use get mean 0 and variance 1.

    Args:
        module: whose batch normalisations are set; its sub-network is chosen.
        forward: runs it on images, e.g. a DeepSpeed engine.
        batches: (images [B, C, H, W], weight) of this rank, equally many on every rank. Images of weight 0 run, where
            parameters are partitioned they must, but do not count.
        pooled: over all ranks; False takes this rank's images only.

    Returns:
        Images that counted.
    """
    norms = batch_norms(module)
    if not norms:
        return 0
    modes = [(m, m.training) for m in module.modules()]
    momenta = [m.momentum for m in norms]
    means = [m.running_mean for m in norms]
    variances = [m.running_var for m in norms]
    first = [torch.zeros_like(mean, dtype=torch.float64) for mean in means]  # type: ignore[arg-type]
    second = [torch.zeros_like(mean, dtype=torch.float64) for mean in means]  # type: ignore[arg-type]
    total = 0
    try:
        module.eval()
        for m in norms:
            m.train()
            m.momentum = 1.0  # what is written is the batch's own
            m.reset_running_stats()
        for images, weight in batches:
            forward(images)
            if weight:
                total += weight
                for mean, variance, one, two in zip(means, variances, first, second, strict=True):
                    wide = mean.double()  # type: ignore[union-attr]
                    one.add_(wide, alpha=weight)
                    two.add_(variance.double() + wide * wide, alpha=weight)  # type: ignore[union-attr]
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for m, training in modes:
            m.training = training
    flat = torch.cat([torch.tensor([total], dtype=torch.float64, device=first[0].device), *first, *second])
    if pooled and world_size() > 1:
        dist.all_reduce(flat)
    count = int(flat[0])
    if not count:
        raise ValueError("calibration without images")
    flat[1:] /= count
    found = flat[1:].split([len(one) for one in (*first, *second)])
    for mean, variance, one, two in zip(means, variances, found, found[len(norms) :], strict=False):
        mean.copy_(one)  # type: ignore[union-attr]
        variance.copy_((two - one * one).clamp_(min=0))  # type: ignore[union-attr]
    return count
