"""Chosen entries of the training state, written on any stage: masters, optimizer state, working weights, average.

Each rank writes what it holds itself, so nothing is communicated; only `ShardedMasks.magnitudes` gathers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.errors import EffTrainError
from ..core.ranks import world_size
from . import access
from .access import Fragment, Layout
from .ema import ShardedEma

BUCKET_ELEMENTS = 1 << 24
"""Elements gathered by one all-reduce (64 MiB of fp32), unless one tensor is larger."""


class ShardedMasks:
    """Writes into, and reads, sharded training state by parameter name.

    Holds no state of its own: the layout is looked up at each call, so an object made for an `EfficientEngine` stays
    valid when its partitions are rebuilt.

    Args:
        engine: a DeepSpeedEngine, or the proxy around one.
        ema: average to keep in step; None takes the proxy's.
    """

    def __init__(self, engine: Any, ema: ShardedEma | None = None):
        self._engine = engine
        self._ema = ema

    @property
    def engine(self) -> Any:
        """The current DeepSpeedEngine."""
        return getattr(self._engine, "deepspeed_engine", self._engine)

    @property
    def average(self) -> ShardedEma | None:
        """The average that is kept in step."""
        return self._ema if self._ema is not None else getattr(self._engine, "ema", None)

    @torch.no_grad()
    def magnitudes(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Full fp32 masters with their signs, on all ranks, on the engine's device. Collective; same names everywhere.

        Frozen parameters have no master; their weight is returned.

        Raises:
            EffTrainError: a name is not a parameter.
        """
        layout, names = access.layout_of(self.engine), list(names)
        parameters = self._parameters(names)
        device = torch.device(self.engine.device)
        held: dict[str, list[Fragment]] = {}
        for fragment in layout.fragments:
            held.setdefault(fragment.name, []).append(fragment)
        masters = layout.tensors("fp32")
        found: dict[str, Tensor] = {}
        for bucket in _buckets([n for n in names if n in layout.shapes], layout):
            sizes = [layout.shapes[name].numel() for name in bucket]
            whole = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
            for name, full in zip(bucket, whole.split(sizes), strict=True):
                for part in held.get(name, ()):
                    full.narrow(0, part.start, part.length).copy_(layout.values(part, masters))
                found[name] = full.view(layout.shapes[name])
            if not layout.replicated and world_size() > 1:
                dist.all_reduce(whole)  # every element is held by one rank, the others add zeros: exact
        for name in names:
            if name not in found:
                with access.gather_full([parameters[name]]):
                    found[name] = parameters[name].detach().to(device=device, dtype=torch.float32, copy=True)
        return {name: found[name] for name in names}

    def zero_(self, entries: Mapping[str, Tensor], moments: bool = True) -> None:
        """Write zeros where `entries` is True, between two optimizer steps. No communication.

        Args:
            entries: bool, in the full shape of the parameter, by name; the same on all ranks.
            moments: write the optimizer state of these entries too.

        Raises:
            EffTrainError: a name is not a parameter, a shape is not its, or the average is swapped in. Nothing was
                written.
        """
        self.write_({name: (chosen, 0.0) for name, chosen in entries.items()}, moments)

    @torch.no_grad()
    def write_(self, entries: Mapping[str, tuple[Tensor, Tensor | float]], moments: bool = True) -> None:
        """Write values into masters, working weights and average, and zeros into the optimizer state beside them.

        Between two optimizer steps. No communication.

        Args:
            entries: (chosen, values) by name, the same on all ranks: bool in the full shape of the parameter, True
                where to write, and fp32 in that shape (or one number).
            moments: write the optimizer state of these entries.

        Raises:
            EffTrainError: a name is not a parameter, a shape is not its, or the average is swapped in. Nothing was
                written.
        """
        parameters = self._parameters(entries)
        for name, (chosen, values) in entries.items():
            shape = access.full_shape(parameters[name])
            if chosen.shape != shape or chosen.dtype != torch.bool:
                raise EffTrainError(
                    f"{name} has shape {list(shape)}; entries of shape {list(chosen.shape)}, {chosen.dtype} do not fit "
                    "(allowed: that shape, torch.bool)"
                )
            if isinstance(values, Tensor) and values.shape != shape:
                raise EffTrainError(f"{name} has shape {list(shape)}; values of shape {list(values.shape)} do not fit")
        average = self.average
        if average is not None and average.swapped:
            raise EffTrainError("masters cannot be written while the average is swapped in (evaluating)")
        layout = access.layout_of(self.engine)
        if any(flat.master.device.type == "cpu" for flat in layout.flats) and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies between an offloaded optimizer and the device may be on their way
        for fragment in layout.fragments:
            if fragment.name in entries:
                chosen, values = (_cut(each, fragment.start, fragment.length) for each in entries[fragment.name])
                for view in _views(layout, fragment, average):
                    _write(view, chosen, values)
                for view in _moments(layout, fragment) if moments else ():
                    view.masked_fill_(chosen.to(view.device), 0.0)
        for name, (chosen, values) in entries.items():
            _write_working(parameters[name], chosen, values)

    def apply(self, masks: Mapping[str, Tensor], moments: bool = True) -> None:
        """Write zeros outside of `masks`: at the start, after a load, or after every step that does not keep them.

        Args:
            masks: bool, in the full shape of the parameter, by name; True stays.
            moments: as in `zero_`; False leaves the optimizer state as dense gradients have made it.
        """
        self.zero_({name: ~mask for name, mask in masks.items()}, moments)

    @torch.no_grad()
    def strays(self, masks: Mapping[str, Tensor], moments: bool = True) -> dict[str, int]:
        """Non-zero masters (and optimizer state) outside of `masks` among what this rank holds; {} where all is well.

        No communication; reads from the device.
        """
        layout, found = access.layout_of(self.engine), {}
        for fragment in layout.fragments:
            if fragment.name not in masks:
                continue
            outside = ~masks[fragment.name].reshape(-1).narrow(0, fragment.start, fragment.length)
            views = [*_views(layout, fragment, None), *(_moments(layout, fragment) if moments else ())]
            count = sum(int(torch.count_nonzero(view[outside.to(view.device)])) for view in views)
            if count:
                found[fragment.name] = found.get(fragment.name, 0) + count
        return found

    def _parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        named = dict(self.engine.module.named_parameters())
        missing = [name for name in names if name not in named]
        if missing:
            raise EffTrainError(f"the model has no parameter {', '.join(missing[:3])}")
        return named


def _buckets(names: Iterable[str], layout: Layout) -> Iterator[list[str]]:
    bucket, size = [], 0
    for name in names:
        numel = layout.shapes[name].numel()
        if bucket and size + numel > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += numel
    if bucket:
        yield bucket


def _views(layout: Layout, fragment: Fragment, average: ShardedEma | None) -> Iterator[Tensor]:
    """Master and average of one fragment, each [length]; only what exists."""
    yield _part(layout.flats[fragment.flat].master.data, fragment)
    if average is not None:
        yield _part(average.shadow[fragment.flat], fragment)


def _moments(layout: Layout, fragment: Fragment) -> Iterator[Tensor]:
    """Optimizer state of one fragment, each [length]; only what exists."""
    master = layout.flats[fragment.flat].master
    for value in layout.base.state.get(master, {}).values():
        if torch.is_tensor(value) and value.shape == master.shape:
            yield _part(value, fragment)


def _part(tensor: Tensor, fragment: Fragment) -> Tensor:
    return tensor.view(-1).narrow(0, fragment.offset, fragment.length)


def _cut(entries: Tensor | float, start: int, length: int) -> Any:
    """A stretch of the flattened entries; a number is the same everywhere."""
    return entries.reshape(-1).narrow(0, start, length) if isinstance(entries, Tensor) else entries


def _write(target: Tensor, chosen: Tensor, values: Tensor | float) -> None:
    """`values` where `chosen`, in place; the target may lie elsewhere and be less precise."""
    chosen = chosen.to(target.device)
    if isinstance(values, Tensor):
        target.copy_(torch.where(chosen, values.to(device=target.device, dtype=target.dtype), target))
    else:
        target.masked_fill_(chosen, values)


def _write_working(parameter: nn.Parameter, chosen: Tensor, values: Tensor | float) -> None:
    """Values in the weight that the forward pass reads, as far as this rank holds it."""
    data = parameter.data
    if data.shape == chosen.shape:  # stages 0 to 2; on stage 3 the small weights that stay gathered
        _write(data, chosen, values)
    if hasattr(parameter, "ds_id"):
        start, part = access.partition(parameter)
        if part.numel():  # a rank that holds nothing but padding may begin behind the end
            _write(part, _cut(chosen, start, part.numel()), _cut(values, start, part.numel()))
