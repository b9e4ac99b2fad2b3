"""The state of an engine that is about to be replaced: views of what is large, copies of what is small."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.ranks import gather
from . import access
from .ema import ShardedEma
from .exchange import Held, mapped_values
from .request import ParameterMap


@dataclass
class Bundle:
    """The state of an engine that is about to be destroyed: views and small values, no copies.

    Attributes:
        held: this rank's fragments by key ("fp32", state keys, "ema"); "fp32" includes the frozen weights.
        replicated: names of which every rank holds the whole tensor.
        shapes: full shapes of all parameters.
        trainable: names that have a master.
        scalars: step count and the like by parameter name, of all ranks.
        hypers: current hyper-parameters by group name.
        buffers: module buffers by name.
    """

    held: dict[str, list[Held]]
    replicated: frozenset[str]
    shapes: dict[str, torch.Size]
    trainable: frozenset[str]
    scalars: dict[str, dict[str, float]]
    hypers: dict[str, dict[str, Any]]
    buffers: dict[str, Tensor]
    carried: dict[str, Any]
    scheduler: dict[str, Any] | None
    training: bool
    modes: dict[str, bool]
    average: tuple[float, bool, int] | None
    rng: dict[str, Any] = field(default_factory=dict)

    @property
    def state_keys(self) -> list[str]:
        """Keys of the optimizer state."""
        return [key for key in self.held if key not in ("fp32", "ema")]


def capture(engine: Any, ema: ShardedEma | None) -> Bundle:
    """Views and small values of everything that must survive. Collective (tables of step counts)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # copies of an offloaded optimizer may still be on their way
    rng = rng_state()
    layout = access.layout_of(engine)
    frozen, replicated, frozen_shapes = access.frozen_fragments(engine)
    held = {"fp32": held_in(layout, layout.tensors("fp32"))}
    keys = gather(layout.state_keys())  # a rank that holds only padding has no state of its own
    for key in sorted({k for of_rank in keys for k in of_rank}):
        held[key] = held_in(layout, layout.tensors(key, create=False))
    if ema is not None:
        held["ema"] = held_in(layout, ema.shadow)
    held["fp32"] += [Held(name, start, values) for name, start, values in frozen]
    mine = {f.name: layout.scalars(f.flat) for f in layout.fragments}
    scalars = _per_group_maximum(mine, layout)
    carried = access.carried(engine)
    carried["batch"] = (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
    scheduler = engine.lr_scheduler
    return Bundle(
        held=held,
        replicated=frozenset(layout.shapes if layout.replicated else ()) | replicated,
        shapes={**layout.shapes, **frozen_shapes},
        trainable=frozenset(layout.shapes),
        scalars=scalars,
        hypers={g["name"]: {k: v for k, v in g.items() if k != "params"} for g in layout.base.param_groups},
        buffers={name: b for name, b in engine.module.named_buffers() if b is not None},
        carried=carried,
        scheduler=scheduler.state_dict() if scheduler is not None else None,
        training=engine.module.training,
        modes={name: module.training for name, module in engine.module.named_modules()},
        average=(ema.decay, ema.warmup, ema.updates) if ema is not None else None,
        rng=rng,
    )


def _per_group_maximum(mine: dict[str, dict[str, float]], layout: access.Layout) -> dict[str, dict[str, float]]:
    """Step counts by name, of all ranks.

    Every parameter of a group has stepped equally often; only some fused optimizers (and torch's, for parameters that
    never had a gradient) count fewer for some of them, so the group's maximum is carried where DeepSpeed steps whole
    groups.
    """
    parts = [mine] if layout.replicated else gather(mine)
    merged = {name: scalars for part in parts for name, scalars in part.items()}
    fused = type(layout.base).__name__ == "FusedAdam"
    if layout.replicated and not fused:
        return merged
    best: dict[int, dict[str, float]] = {}
    for name, scalars in merged.items():
        row = best.setdefault(layout.groups[name], {})
        for key, value in scalars.items():
            row[key] = max(row.get(key, 0.0), value)
    return {name: best.get(layout.groups[name], {}) for name in layout.shapes}


def held_in(layout: access.Layout, tensors: list[Tensor]) -> list[Held]:
    """This rank's stretches of all parameters in tensors that parallel the flats."""
    return [Held(f.name, f.start, layout.values(f, tensors)) for f in layout.fragments]


def restore_buffers(module: nn.Module, old: Mapping[str, Tensor], maps: Mapping[str, ParameterMap]) -> None:
    """Buffers are whole on every rank. One whose map has no pieces keeps what the surgery gave it."""
    for name, buffer in module.named_buffers():
        target = maps.get(name)
        if target is not None and target.pieces and not (len(target.pieces) == 1 and target.pieces[0].whole):
            sources = {p.source: old[p.source].float() for p in target.pieces if p.source in old}
            buffer.copy_(mapped_values("fp32", target, buffer.shape, sources, None, buffer.device))
            continue
        source = name if target is None else (target.pieces[0].source if target.pieces else None)
        if source is not None and source in old and old[source].shape == buffer.shape:
            buffer.copy_(old[source])


def regrouped(state: Any, fresh: Any, old_count: int, rows: Sequence[int | None]) -> Any:
    """A scheduler's state with one entry a group in every list that had one a group.

    Args:
        state: of the old scheduler.
        fresh: of the new scheduler, before anything is loaded; tells lists that go by group from others (milestones).
        old_count: parameter groups before.
        rows: for each new group the old group that it takes over; None keeps the new scheduler's own value.
    """
    if isinstance(state, dict) and isinstance(fresh, dict):
        return {key: regrouped(value, fresh.get(key), old_count, rows) for key, value in state.items()}
    if not isinstance(state, list) or not isinstance(fresh, list):
        return state
    if any(isinstance(value, dict) for value in state) and len(state) == len(fresh):  # schedulers in a scheduler
        return [regrouped(value, new, old_count, rows) for value, new in zip(state, fresh, strict=True)]
    by_group = len(state) == old_count and len(fresh) == len(rows) and state != fresh
    return [fresh[i] if row is None else state[row] for i, row in enumerate(rows)] if by_group else state


def rng_state() -> dict[str, Any]:
    """Random states of torch, the devices, numpy and python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
