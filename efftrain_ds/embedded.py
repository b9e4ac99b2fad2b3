"""The plan of an embedded run: the user's own loop, the stages of the configured methods."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .config.deepspeed_keys import batch_sizes
from .config.loader import LoadedConfig
from .core.errors import ConfigError
from .core.method import Method
from .core.replay import replays
from .core.timeline import PlanSpec, Schedule, merge_timelines
from .models.adapters import model_stride
from .models.stacks import growable_depth


def embedded_schedule(
    loaded: LoadedConfig,
    methods: Sequence[Method],
    model: nn.Module,
    *,
    world: int,
    batch: tuple[int, int] | None = None,
) -> Schedule:
    """Stages for a loop that the user owns; its optimizer steps are counted, its batch is left alone.

    Args:
        loaded: the configuration.
        methods: active methods in run order.
        model: the user's module; only its stride is read.
        world: number of data-parallel ranks.
        batch: (global batch, micro-batch) of an engine that exists; None reads them from DeepSpeed's section.

    Raises:
        ConfigError: the length of the run is not given, or a method changes the batch or replays samples.
        PlanError: a method cannot run.
        ModelError: the model's stride is not known.
    """
    run, data = loaded.efftrain.run, loaded.efftrain.data
    if run.steps is None and (run.epochs is None or data.samples is None):
        raise ConfigError(
            "efftrain.run.steps: missing; methods with stages need the number of optimizer steps of your loop "
            "(or efftrain.run.epochs together with efftrain.data.samples)"
        )
    if batch is None:
        sizes = batch_sizes(loaded.deepspeed, world)
        batch = (sizes.batch, sizes.micro_batch)
    spec = PlanSpec(
        seed=loaded.efftrain.run.seed,
        epochs=run.epochs or 0.0,
        samples=data.samples or 0,
        batch=batch[0],
        micro_batch=batch[1],
        world=world,
        resolution=data.resolution,
        stride=data.stride or model_stride(model),
        steps=run.steps,
        model=type(model).__name__,
        depth=growable_depth(model) if any(m.changes_parameters for m in methods) else 0,
        drop_path=max((float(getattr(m, "drop_prob", None) or 0.0) for m in model.modules()), default=0.0),
        space=getattr(model, "space", None),
    )
    schedule = merge_timelines([method.plan(spec) for method in methods], spec)
    for method in methods:
        method.check(schedule)
    if replays(schedule):
        raise ConfigError("efftrain.methods: a replay buffer needs the loader of launch/train.py; leave it out here")
    if any(stage.batch != spec.batch for stage in schedule.stages):
        raise ConfigError(
            "efftrain.methods: a plan that changes the global batch needs the loop of launch/train.py; leave that out "
            "here, where the batch is yours"
        )
    return schedule
