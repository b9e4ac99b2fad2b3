"""Adaptive gradient clipping by unit, on whatever part of the gradient a rank holds.

A unit is a row of a matrix or of a convolution's kernels (all that makes one output), or the whole of a vector. Its
gradient is shortened to a share of the norm of its weight (Brock et al., "High-Performance Large-Scale Image
Recognition Without Normalization", arXiv 2102.06171, in the form of timm).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.errors import ConfigError
from ..core.ranks import gather, world_size
from . import access
from .access import Fragment, Layout

EPS = 1e-3
"""Least norm of a weight that counts, so that what starts at zero can move (published)."""
_TINY = 1e-6
_Unit = tuple[int, str, int]
"""Flat, parameter and row; sorts alike on all ranks."""


@dataclass
class _Units:
    """Units of one flat.

    Attributes:
        sizes: lengths of the stretches into which the flat is cut: neighbouring rows, a part of one row, or padding.
        shapes: (rows, elements of each that this rank holds) of every stretch; None for padding.
        count: of units.
        split: units of which this rank holds a part, by their index.
        own: the same as a tensor, in the order of `place`.
        place: where they stand among the split units of this flat on all ranks.
        splits: how many those are.
    """

    sizes: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int] | None] = field(default_factory=list)
    count: int = 0
    split: dict[_Unit, int] = field(default_factory=dict)
    own: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    place: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    splits: int = 0

    @classmethod
    def of(cls, flat: int, layout: Layout) -> _Units:
        """Those of one flat of a layout."""
        units, end = cls(), 0
        for fragment in sorted((f for f in layout.fragments if f.flat == flat), key=lambda f: f.offset):
            units._pad(fragment.offset - end)
            units._add(fragment, layout.shapes[fragment.name])
            end = fragment.offset + fragment.length
        units._pad(layout.flats[flat].master.numel() - end)
        return units

    def _pad(self, length: int) -> None:
        if length:
            self.sizes.append(length)
            self.shapes.append(None)

    def _add(self, fragment: Fragment, shape: torch.Size) -> None:
        """The rows of a stretch of a parameter, and the parts of rows at its ends."""
        size = shape.numel() if len(shape) <= 1 else shape[1:].numel()
        place, end = fragment.start, fragment.start + fragment.length
        while place < end:
            row, inside = divmod(place, size)
            whole = (end - place) // size if inside == 0 else 0
            length = whole * size or min(size - inside, end - place)
            if not whole:
                self.split[(fragment.flat, fragment.name, row)] = self.count
            rows = max(whole, 1)
            self.sizes.append(length)
            self.shapes.append((rows, length // rows))
            self.count += rows
            place += length

    def views(self, flat: Tensor) -> list[Tensor]:
        """The stretches of a flat that hold units, each [rows, elements], in place."""
        parts = zip(flat.view(-1).split(self.sizes), self.shapes, strict=True)
        return [part.view(shape) for part, shape in parts if shape is not None]

    def norms(self, flat: Tensor) -> Tensor:
        """Norm in fp32 of what this rank holds of each unit, [units]."""
        found = [torch.linalg.vector_norm(view, dim=1, dtype=torch.float32) for view in self.views(flat)]
        return torch.cat(found) if found else torch.zeros(0, device=flat.device)


class UnitClip:
    """Clips the gradient by unit in every step of the base optimizer that is applied, until it is removed.

    What is clipped is what the optimizer would see: summed over passes, averaged over micro-batches and ranks, without
    loss scale, in the precision of the masters. A step that DeepSpeed skips does not get here. Parameters without a
    gradient, and rows whose gradient is zero, stay as they are.

    Units that lie on several ranks cost one all-reduce of two numbers for each of them, for every group of parameters
    that is stepped by itself; nothing else is communicated. Collective when it is made.

    Args:
        engine: a DeepSpeedEngine.
        factor: largest norm of a unit's gradient over that of its weight.
        eps: least norm of a weight that counts.

    Attributes:
        splits: units that lie on several ranks.

    Raises:
        ConfigError: DeepSpeed clips too, or a feature of it with which the gradient is not where it is looked for.
        EffTrainError: the optimizer is not supported.
    """

    def __init__(self, engine: Any, factor: float, eps: float = EPS) -> None:
        why = access.unsupported(engine, "with clipping by unit") or access.gradients_beside(engine)
        if why is not None:
            raise ConfigError(why)
        if engine.gradient_clipping() > 0:
            raise ConfigError(
                f"gradient_clipping: {engine.gradient_clipping():g} beside clipping by unit (agc); write "
                '"gradient_clipping": 0.0, or switch the other off'
            )
        self.factor, self.eps = factor, eps
        self._layout = layout = access.layout_of(engine)
        self._device = torch.device(engine.device)
        self._flats = [_Units.of(place, layout) for place in range(len(layout.flats))]
        self.splits = 0
        if not layout.replicated and world_size() > 1:
            self._share([unit for units in self._flats for unit in units.split])
        self._hook = layout.base.register_step_pre_hook(self._before_step)

    def _share(self, own: list[_Unit]) -> None:
        """Number the units that lie on several ranks. Collective."""
        every = sorted({unit for part in gather(own) for unit in part})
        self.splits = len(every)
        numbers: list[dict[_Unit, int]] = [{} for _ in self._flats]
        for unit in every:
            numbers[unit[0]][unit] = len(numbers[unit[0]])
        for units, of_flat, flat in zip(self._flats, numbers, self._layout.flats, strict=True):
            device = flat.master.device
            units.splits = len(of_flat)
            units.own = torch.tensor(list(units.split.values()), dtype=torch.long, device=device)
            units.place = torch.tensor([of_flat[unit] for unit in units.split], dtype=torch.long, device=device)

    def remove(self) -> None:
        """Clip no more."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """Clip the gradients of the flats that are stepped now: all, or those of one group after the other."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        found = [
            (units, flat.master, torch.stack([units.norms(flat.master.grad), units.norms(flat.master.detach())]))
            for units, flat in zip(self._flats, self._layout.flats, strict=True)
            if id(flat.master) in stepped
        ]
        if self.splits:
            self._reduce([(units, norms) for units, _, norms in found])
        for units, master, (gradient, weight) in found:
            limit = weight.clamp_(min=self.eps).mul_(self.factor)
            ratio = torch.where(gradient < limit, 1.0, limit / gradient.clamp(min=_TINY))
            views = units.views(master.grad)
            for view, scale in zip(views, ratio.split([len(view) for view in views]), strict=True):
                view.mul_(scale[:, None])

    def _reduce(self, found: Iterable[tuple[_Units, Tensor]]) -> None:
        """Make the norms of units that lie on several ranks whole, in place. Collective."""
        found = list(found)
        parts = [torch.zeros(2, units.splits, device=norms.device) for units, norms in found]
        for part, (units, norms) in zip(parts, found, strict=True):
            part.index_copy_(1, units.place, norms.index_select(1, units.own).square())
        whole = torch.cat([part.to(self._device) for part in parts], 1) if parts else torch.zeros(2, 0)
        if not whole.numel():
            return
        dist.all_reduce(whole)
        for part, (units, norms) in zip(whole.split([u.splits for u, _ in found], 1), found, strict=True):
            norms.index_copy_(1, units.own, part.sqrt().to(norms.device).index_select(1, units.place))
