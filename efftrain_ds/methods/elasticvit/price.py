"""What a training step of several sub-networks costs, before anything is built."""

from __future__ import annotations

import json
from functools import lru_cache
from statistics import fmean
from typing import Any

from ...core.durations import parse_duration
from ...core.errors import ModelError
from ...core.timeline import PlanSpec
from ...cost.macs import model_macs
from ...models.elastic import Space
from .bank import MemoryBank
from .config import KEY, ElasticViTConfig, TeacherConfig, exploit_of
from .levels import Levels, SmallestSubnets

_FORWARD = 1 / 3
"""MACs of a forward pass over those of a forward and backward pass."""


def step_cost(
    config: ElasticViTConfig,
    space: Space[Any],
    levels: Levels,
    smallest: SmallestSubnets,
    bank: MemoryBank | None,
    spec: PlanSpec,
) -> float:
    """Mean MACs of a step over those of a step that trains the largest sub-network alone.

    Counts the passes, the scores of the memory bank (as if it were always full) and the teachers.

    Raises:
        ModelError: timm does not have a teacher.
    """
    most = space.macs(space.max(), levels.formula)
    random = fmean(levels.macs) + levels.window / 2
    least = fmean(space.macs(smallest.of(i), levels.formula) for i in range(len(levels)))
    costs = {"random": random, "smallest": least, "largest": most}
    total = sum(costs[mode] for mode in config.modes)
    if bank is not None:
        total += _FORWARD * _scores(config, levels, bank, spec, random)
    for place, teacher in enumerate(config.teachers):
        total += _FORWARD * _teacher(teacher, f"{KEY}.teachers.{place}", spec.resolution, space.num_classes)
    return total / most


def _scores(config: ElasticViTConfig, levels: Levels, bank: MemoryBank, spec: PlanSpec, random: float) -> float:
    """MACs of the memory bank's scores for one image of a step, mean over the run."""
    given = config.bank
    assert given is not None
    exploit = exploit_of(config)
    ends = [0.0, *(share for share in exploit.at if 0 < share < 1), 1.0]
    again = sum((b - a) * exploit.value(a) for a, b in zip(ends, ends[1:], strict=False))
    total = (1 - again) * config.modes.count("random") * random
    full = [count * (macs + levels.window / 2) for count, macs in zip(bank.capacity, levels.macs, strict=True)]
    steps = max(1, round(spec.baseline_steps))
    for interval, macs in ((given.refresh, sum(full)), (given.refresh_level, fmean(full))):
        if interval is not None:
            total += macs * given.images / (spec.batch * every_steps(interval, spec, steps))
    return total


def every_steps(interval: str, spec: PlanSpec, total: int) -> int:
    """Steps of an interval of steps, epochs or percent of a run of `total` steps."""
    per_epoch = spec.samples / spec.batch if spec.samples else float(total)
    return max(1, parse_duration(interval).steps(per_epoch, total) or 0)


def _teacher(teacher: TeacherConfig, where: str, resolution: int, num_classes: int) -> int:
    """MACs of one image of the run through a teacher; 0 where they are not known without asking a hub.

    Raises:
        ModelError: timm does not have it.
    """
    import timm

    name = teacher.model
    if ":" in name:
        return 0
    if not timm.is_model(name):
        raise ModelError(f'{where}.model: timm has no model "{name}"')
    settings = timm.get_pretrained_cfg(name) if teacher.weights is None else None
    side = teacher.resolution or (settings.input_size[-1] if settings is not None else resolution)
    kwargs = {key: value for key, value in teacher.kwargs.items() if key != "num_classes"}
    try:
        return _macs(name, side, num_classes, json.dumps(kwargs, sort_keys=True))
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


@lru_cache(maxsize=8)
def _macs(name: str, resolution: int, num_classes: int, kwargs: str) -> int:
    """Counted once for all stages of a plan."""
    return model_macs(name, resolution, num_classes=num_classes, kwargs=json.loads(kwargs))
