"""Evaluation that counts every held-out sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .core import faults
from .core.batch import Batch
from .core.errors import ShardError


@torch.no_grad()
def evaluate(
    engine: Any,
    loader: Any,
    prepare: Callable[[Batch], Batch],
    samples: int,
    *,
    ema: bool = False,
    variant: str | None = None,
    stop: Callable[[], bool] | None = None,
    strict: bool = True,
    missed: Callable[[int], None] | None = None,
) -> dict[str, float] | None:
    """Means over the whole held-out split.

    They are top-1, top-5 (where there are more than five classes) and cross-entropy, or what the method that owns the
    loss measures instead (`Method.evaluate`).

    Args:
        engine: the `EfficientEngine`.
        loader: evaluation batches of this rank; every rank has the same number of steps.
        prepare: moves a batch to the device and normalises it.
        samples: size of the split; the sum over all ranks is checked against it.
        ema: evaluate the average of the weights.
        variant: one of the methods' `variants`, whose name then stands before those of the results.
        stop: asked before each batch, on all ranks; True breaks the evaluation off.
        strict: False takes the means over the samples that could be read, at least one.
        missed: told how many could not, where there are some.

    Returns:
        E.g. ``{"top1": share, "loss": mean, "top5": share}``, or None where it was broken off.

    Raises:
        ShardError: samples were lost, with `strict` False all of them, or counted twice.
    """
    owner = next((method for method in engine.methods if method.owns_loss), None)
    names: list[str] = []
    totals: torch.Tensor | None = None
    with engine.evaluating(ema=ema, variant=variant):
        for batch in loader:
            faults.point("eval.batch")
            if stop is not None and stop():
                return None
            batch = prepare(batch)
            values = owner.evaluate(engine.context, batch) if owner is not None else None
            if values is None:
                values = _classified(engine(batch.images).float(), batch)
            names = list(values)
            parts = [batch.valid.sum(), *(torch.where(batch.valid, each, 0).sum() for each in values.values())]
            sums = torch.stack([part.double() for part in parts])
            totals = sums if totals is None else totals + sums
    assert totals is not None, "the loader has no batches"
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    count, *found = totals.tolist()
    if not (1 if not strict else samples) <= int(count) <= samples:
        raise ShardError(f"evaluation saw {int(count)} samples, the split has {samples}")
    if count < samples and missed is not None:
        missed(samples - int(count))
    prefix = f"{variant + '_' if variant else ''}{'ema_' if ema else ''}"
    return {f"{prefix}{name}": total / count for name, total in zip(names, found, strict=True)}


def _classified(logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """Top-1, cross-entropy and top-5 of every sample, from logits [N, K]."""
    labels = torch.where(batch.valid, batch.labels, 0)
    classes = logits.shape[1]
    top = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    values = {"top1": top[:, 0], "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none")}
    return values | {"top5": top.any(dim=1)} if classes > 5 else values
