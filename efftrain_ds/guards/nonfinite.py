"""Where a non-finite loss or gradient came from: flags on the device, read once a step.

A table on the device has one row for each micro-batch of a step: the sum of the gradient of every parameter, written
by hooks that run before DeepSpeed reduces it (so the rank is known), and the loss. A sum is non-finite where an element
is. Nothing waits for the device until the vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import Batch

MAX_HELD_BYTES = 256 << 20
"""Inputs of the micro-batches of one step that are held for a replay file; older ones are let go."""


@dataclass
class Micro:
    """One micro-batch of the current step, as the network saw it.

    Attributes:
        tensors: "images", "labels", "labels_b", "ids", "positions", "rng" and "rng_device", those that are known.
        values: plain values, e.g. "lam".
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def note(self, batch: Batch) -> None:
        """Take over what a batch says of itself; its images are those that the engine was called with."""
        for name in ("labels", "labels_b", "ids", "positions", "valid"):
            value = getattr(batch, name)
            if isinstance(value, Tensor):
                self.tensors[name] = value.detach()
        self.values["lam"] = float(batch.lam)

    def ids(self) -> list[int]:
        """Known sample ids."""
        found = self.tensors.get("ids")
        return [i for i in found.reshape(-1).tolist() if i >= 0] if found is not None else []


@dataclass
class Finding:
    """What one rank found in one step; plain types, sent to all ranks.

    Attributes:
        rank: the rank.
        what: "loss", "gradient of NAME", or "" where this rank found nothing.
        value: the loss ("nan", "inf"), or the sum of the gradient.
        ids: samples of the micro-batches concerned (at most 64).
        losses: loss of every micro-batch.
        replay: path of the replay file, or "".
    """

    rank: int
    what: str = ""
    value: str = ""
    ids: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    replay: str = ""


class Watch:
    """Flags of one rank for one module.

    Args:
        module: its trainable parameters get hooks.
        device: of the gradients.
        gradients: look at gradients, not only at the loss.
    """

    def __init__(self, module: nn.Module, device: torch.device, gradients: bool):
        self.device = device
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad] if gradients else []
        self.names = [name for name, _ in named]
        self.micros: list[Micro] = []
        self._row = 0
        self._fired: list[int] = []
        self._order: list[int] = []
        self._grow(1)
        self._handles = [param.register_hook(self._hook(i)) for i, (_, param) in enumerate(named)]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _grow(self, rows: int) -> None:
        old = getattr(self, "_table", None)
        self._table = torch.zeros(rows, len(self.names) + 1, dtype=torch.float32, device=self.device)
        if old is not None:
            self._table[: len(old)] = old
        self._views = [list(row.unbind()) for row in self._table.unbind()]
        self._now = self._views[self._row]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def look(grad: Tensor) -> None:
            self._fired.append(index)
            values = grad._values() if grad.is_sparse else grad
            # added, not written: a second backward pass before the step must not wipe out what the first one showed
            self._now[index].add_(values.detach().sum(dtype=torch.float32))

        return look

    @property
    def micro(self) -> Micro:
        """The micro-batch that is being computed."""
        while len(self.micros) <= self._row:
            self.micros.append(Micro())
        return self.micros[self._row]

    @property
    def pending(self) -> bool:
        """True where gradients came in since the last `advance` (a backward pass that the engine was not told of)."""
        return bool(self._fired)

    def advance(self, loss: Tensor | None = None) -> None:
        """End of a micro-batch's backward pass."""
        if loss is not None:
            self._now[-1].copy_(loss.detach().reshape(()), non_blocking=True)
        self._order, self._fired = self._fired or self._order, []
        self._let_go()
        self._row += 1
        if self._row == len(self._table):
            self._grow(2 * self._row)
        self._now = self._views[self._row]

    def _let_go(self) -> None:
        if self.device.type == "cpu" and self._row < len(self.micros):  # reading costs nothing here
            if bool(torch.isfinite(self._table[self._row]).all()):
                self.micros[self._row].tensors.pop("images", None)
        held = 0
        for micro in reversed(self.micros):
            images = micro.tensors.get("images")
            held += images.nbytes if images is not None else 0
            if held > MAX_HELD_BYTES:
                micro.tensors.pop("images", None)

    def flag(self) -> Tensor:
        """0-dim bool on the device: something of this step is not finite."""
        return ~torch.isfinite(self._table).all()

    def finding(self, rank: int) -> tuple[Finding, list[int]]:
        """What was found, and the rows of the micro-batches concerned. Waits for the device."""
        table = self._table[: max(self._row, 1)].cpu()
        bad = ~torch.isfinite(table)
        rows = bad.any(dim=1).nonzero().flatten().tolist()
        found = Finding(rank, losses=[_number(v) for v in table[:, -1].tolist()])
        for row in rows:
            if not found.what:
                found.what, found.value = self._first(table[row], bad[row])
            if row < len(self.micros):
                found.ids += self.micros[row].ids()
        found.ids = found.ids[:64]
        return found, rows

    def _first(self, values: Tensor, bad: Tensor) -> tuple[str, str]:
        if bad[-1]:
            return "loss", str(float(values[-1]))
        order = [*self._order, *range(len(self.names))]
        index = next(i for i in order if bad[i])
        return f"gradient of {self.names[index]}", str(float(values[index]))

    def clear(self) -> None:
        """Begin the next step."""
        self._table.zero_()
        self.micros.clear()
        self._row, self._fired = 0, []
        self._now = self._views[0]


def _number(value: float) -> float:
    return round(value, 6) if math.isfinite(value) else value
