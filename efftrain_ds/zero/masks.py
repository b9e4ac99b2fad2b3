"""Zeros in the training state: masters, optimizer state, working weights and average of chosen entries, on any stage.

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
    """Writes zeros into, and reads, sharded training state by parameter name.

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

    @torch.no_grad()
    def zero_(self, entries: Mapping[str, Tensor], moments: bool = True) -> None:
        """Write zeros where `entries` is True, between two optimizer steps. No communication.

        Args:
            entries: bool, in the full shape of the parameter, by name; the same on all ranks.
            moments: write the optimizer state of these entries too.

        Raises:
            EffTrainError: a name is not a parameter, a shape is not its, or the average is swapped in. Nothing was
                written.
        """
        parameters = self._parameters(entries)
        for name, chosen in entries.items():
            if chosen.shape != access.full_shape(parameters[name]) or chosen.dtype != torch.bool:
                raise EffTrainError(
                    f"{name} has shape {list(access.full_shape(parameters[name]))}; entries of shape "
                    f"{list(chosen.shape)}, {chosen.dtype} do not fit (allowed: that shape, torch.bool)"
                )
        average = self.average
        if average is not None and average.swapped:
            raise EffTrainError("masters cannot be written while the average is swapped in (evaluating)")
        layout = access.layout_of(self.engine)
        if any(flat.master.device.type == "cpu" for flat in layout.flats) and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies between an offloaded optimizer and the device may be on their way
        for fragment in layout.fragments:
            if fragment.name in entries:
                chosen = entries[fragment.name].reshape(-1).narrow(0, fragment.start, fragment.length)
                for view in _views(layout, fragment, average, moments):
                    view.masked_fill_(chosen.to(view.device), 0.0)
        for name, chosen in entries.items():
            _zero_working(parameters[name], chosen)

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
            views = _views(layout, fragment, None, moments)
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


def _views(layout: Layout, fragment: Fragment, average: ShardedEma | None, moments: bool) -> Iterator[Tensor]:
    """Master, optimizer state and average of one fragment, each [length]; only what exists."""
    master = layout.flats[fragment.flat].master
    tensors = [master.data]
    if moments:
        state = layout.base.state.get(master, {})
        tensors += [v for v in state.values() if torch.is_tensor(v) and v.shape == master.shape]
    if average is not None:
        tensors.append(average.shadow[fragment.flat])
    for tensor in tensors:
        yield tensor.view(-1).narrow(0, fragment.offset, fragment.length)


def _zero_working(parameter: nn.Parameter, chosen: Tensor) -> None:
    """Zeros in the weight that the forward pass reads, as far as this rank holds it."""
    data = parameter.data
    if data.shape == chosen.shape:  # stages 0 to 2; on stage 3 the small weights that stay gathered
        data.masked_fill_(chosen.to(data.device), 0.0)
    if hasattr(parameter, "ds_id"):
        start, part = access.partition(parameter)
        part.masked_fill_(chosen.reshape(-1).narrow(0, start, part.numel()).to(part.device), 0.0)
