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
) -> dict[str, float] | None:
    """Top-1, top-5 (where there are more than five classes) and cross-entropy on the whole held-out split.

    Args:
        engine: the `EfficientEngine`.
        loader: evaluation batches of this rank; every rank has the same number of steps.
        prepare: moves a batch to the device and normalises it.
        samples: size of the split; the sum over all ranks is checked against it.
        ema: evaluate the average of the weights.
        variant: one of the methods' `variants`, whose name then stands before those of the results.
        stop: asked before each batch, on all ranks; True breaks the evaluation off.

    Returns:
        ``{"top1": share, "top5": share, "loss": mean}``, or None where it was broken off.

    Raises:
        ShardError: samples were lost or counted twice.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=engine.device)
    loss = torch.zeros((), dtype=torch.float64, device="cpu")
    classes = 0
    with engine.evaluating(ema=ema, variant=variant):
        for batch in loader:
            faults.point("eval.batch")
            if stop is not None and stop():
                return None
            batch = prepare(batch)
            logits = engine(batch.images).float()
            classes = logits.shape[1]
            valid = batch.valid
            labels = torch.where(valid, batch.labels, 0)
            top = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
            counts[0] += valid.sum()
            counts[1] += (top[:, 0] & valid).sum()
            counts[2] += (top.any(dim=1) & valid).sum()
            each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            loss += (each * valid).sum().double().cpu()
    total = loss.to(engine.device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
        dist.all_reduce(total)
    seen, top1, top5 = (int(v) for v in counts.tolist())
    if seen != samples:
        raise ShardError(f"evaluation saw {seen} samples, the split has {samples}")
    prefix = f"{variant + '_' if variant else ''}{'ema_' if ema else ''}"
    results = {f"{prefix}top1": top1 / seen, f"{prefix}loss": float(total) / seen}
    if classes > 5:
        results[f"{prefix}top5"] = top5 / seen
    return results
