"""Exponential moving average of the fp32 masters, sharded exactly like them.

Each rank averages only the masters it holds: the average costs 4 N / W bytes a rank under ZeRO 1-3 and no
communication in a step. Averaging the low-precision weights instead would lose updates smaller than their spacing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .access import Layout


class ShardedEma:
    """Average of the masters of one engine.

    Args:
        layout: where the masters are.
        decay: weight of the old average in one step, in [0, 1).
        warmup: use ``min(decay, (1 + t) / (10 + t))`` at step t.
        shadow: tensors of the average, parallel to the flats; None starts with copies of the masters.
    """

    def __init__(self, layout: Layout, decay: float, warmup: bool = True, shadow: list[Tensor] | None = None):
        self.layout = layout
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.shadow: list[Tensor] = [t.clone() for t in layout.tensors("fp32")] if shadow is None else shadow
        self.swapped = False
        """True while the model computes with the average."""
        self.stale = False
        """True after an evaluation ended in an exception: the working weights still are the average."""

    @torch.no_grad()
    def update(self) -> None:
        """Fold the current masters in; call once after each applied optimizer step."""
        assert not self.swapped, "the average is swapped in; leave the evaluation first"
        self.updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        masters = self.layout.tensors("fp32")
        if masters:
            torch._foreach_lerp_(self.shadow, masters, 1.0 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the current masters."""
        assert not self.swapped, "the average is swapped in; leave the evaluation first"
        self.updates = 0
        for average, master in zip(self.shadow, self.layout.tensors("fp32"), strict=True):
            average.copy_(master)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Let the model compute with the average; the masters come back unchanged, to the bit. Collective."""
        kept = [tensor.clone() for tensor in self.layout.tensors("fp32")]
        self._write(self.shadow)
        self.swapped = True
        try:
            yield
        except BaseException:
            # another rank may not get here: no collective now, the next forward pass refreshes the weights
            self._write(kept, push=False)
            self.swapped, self.stale = False, True
            raise
        self._write(kept)
        self.swapped = False

    def refresh(self) -> None:
        """Put the masters back into the working weights after an evaluation that failed. Collective."""
        self.layout.push()
        self.stale = False

    @torch.no_grad()
    def _write(self, values: list[Tensor], push: bool = True) -> None:
        for master, value in zip(self.layout.tensors("fp32"), values, strict=True):
            master.copy_(value)
        if push:
            self.layout.push()
