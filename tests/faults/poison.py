"""A method registered from outside the package that makes a run go wrong on one rank, as a bug in a loop would."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method
from efftrain_ds.core.strict import StrictModel


class PoisonConfig(StrictModel):
    """Steps at which rank 1's loss (or one gradient) is not a number, and at which it decides otherwise.

    `elsewhere`: step at which it goes into a collective that the others do not call.
    """

    loss: list[int] = []
    gradient: list[int] = []
    decision: int | None = None
    elsewhere: int | None = None


@register_method
class Poison(Method):
    """Adds NaN to the loss, or to the gradient of the head, on rank 1."""

    name: ClassVar[str] = "poison"
    Config: ClassVar[type[PoisonConfig]] = PoisonConfig
    config: PoisonConfig
    _other: Any = None

    def on_stage_enter(self, ctx, stage):
        # a group of its own: in the common one gloo would notice that the sizes do not fit
        if self.config.elsewhere is not None and self._other is None:
            self._other = dist.new_group()

    def loss_term(self, ctx, outputs, batch):
        if ctx.rank != 1:
            return None
        if ctx.step == self.config.elsewhere:
            dist.barrier(group=self._other)
        if ctx.step in self.config.loss:
            return outputs.sum() * float("nan")
        if ctx.step in self.config.gradient:
            outputs.register_hook(lambda grad: torch.full_like(grad, float("nan")))
        return None

    def decision(self, ctx):
        other = self.config.decision is not None and ctx.step >= self.config.decision
        return f"sub-network {os.environ['RANK'] if other else 0}"
