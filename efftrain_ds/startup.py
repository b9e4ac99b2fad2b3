"""`initialize` and `wrap`: from DeepSpeed's arguments to an `EfficientEngine`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from .config.loader import LoadedConfig, build_methods, load_config
from .core.batch import Batch
from .core.errors import ConfigError
from .core.method import Method
from .core.timeline import Schedule
from .embedded import embedded_schedule
from .engine import EfficientEngine
from .guards.guard import Guard
from .zero import access
from .zero.blueprint import make_blueprint
from .zero.ema import ShardedEma
from .zero.groups import GroupPlan
from .zero.rebuild import Rebuilder
from .zero.shared_buffers import release_own_buffer


def _resolve_config(args: Any, config: Any, config_params: Any) -> tuple[Any, Any]:
    """The configuration and the args object without it (DeepSpeed accepts only one of the two)."""
    found = config if config is not None else config_params
    from_args = getattr(args, "deepspeed_config", None)
    if from_args is not None:
        if found is not None:
            raise ConfigError("the configuration is given twice: in args.deepspeed_config and as config=")
        found, args = from_args, copy.copy(args)
        args.deepspeed_config = None
    if found is None:
        raise ConfigError("no configuration: pass config= (path or dict) or --deepspeed_config")
    return found, args


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _join(args: Any, distributed_port: int, dist_init_required: bool | None) -> None:
    """Join the process group as `deepspeed.initialize` would, but before methods prepare the model: what rank 0 makes
    for all, or one rank alone cannot do, they must be able to tell each other."""
    accelerator = get_accelerator()
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
        )
    place = getattr(args, "device_rank", os.environ.get("LOCAL_RANK"))
    if place is not None and int(place) >= 0 and accelerator.device_name() != "cpu":
        accelerator.set_device(int(place))  # as the engine will; collectives of objects use the current device


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    *,
    schedule: Schedule | None = None,
    methods: Sequence[Method] | None = None,
    owns_batch: bool = False,
    record: Callable[..., None] | None = None,
    rebuildable: bool = False,
    probe_batches: Callable[[int], list[Batch]] | None = None,
    guard: bool | None = None,
) -> tuple[EfficientEngine, Any, Any, Any]:
    """``deepspeed.initialize`` with the ``"efftrain"`` section of the configuration carried out.

    Takes DeepSpeed's arguments and returns its four values, the engine being an `EfficientEngine`. DeepSpeed never
    sees our section. The keyword-only arguments are for a trainer that plans by itself.

    Args:
        schedule: stages made beforehand; None plans from ``efftrain.run.steps`` (or epochs and samples).
        methods: instances made beforehand, in run order.
        owns_batch: let stages set DeepSpeed's micro-batch and accumulation.
        record: journal function.
        rebuildable: keep what `EfficientEngine.rebuild` needs, also where no method changes parameters.
        probe_batches: fixed labelled samples for methods that search, see `core.context.Context`.
        guard: watch the run as ``efftrain.guard`` says; None = where a method is configured or that key is given.

    Raises:
        ConfigError: the configuration is wrong.
        PlanError: the plan cannot run.
        ModelError: a method cannot take this model.
    """
    if model is None:
        raise ConfigError("initialize: a model is required")
    found, args = _resolve_config(args, config, config_params)
    loaded = found if isinstance(found, LoadedConfig) else load_config(found, world=_world_size())
    chosen = list(methods) if methods is not None else build_methods(loaded)
    if schedule is None and chosen:
        schedule = embedded_schedule(loaded, chosen, model, world=_world_size())
    changes = rebuildable or any(m.changes_parameters for m in chosen)
    if changes:
        _check_rebuildable(optimizer, lr_scheduler, mpu)
        original = make_blueprint(model)
        groups = GroupPlan.of(model, model_parameters)
    if chosen:
        _join(args, distributed_port, dist_init_required)
    for method in chosen:
        model = method.prepare_model(model)
    common = {
        "args": args,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    }
    rebuilder = None
    if changes:
        groups = groups.first(model)
        model_parameters = groups.for_optimizer(model)

        def create(module: nn.Module, parameters: list[dict[str, Any]]) -> Any:
            return deepspeed.initialize(
                model=module, model_parameters=parameters, config=copy.deepcopy(loaded.deepspeed), **common
            )[0]

        seed, keep_old = loaded.efftrain.run.seed, loaded.efftrain.run.keep_old_state
        rebuilder = Rebuilder(make_blueprint(model), groups, create, seed=seed, keep_old=keep_old)
    engine, ds_optimizer, loader, scheduler = deepspeed.initialize(
        model=model,
        model_parameters=model_parameters,
        training_data=training_data,
        config=copy.deepcopy(loaded.deepspeed) if changes else loaded.deepspeed,
        **common,
    )
    release_own_buffer(torch.device(engine.device))
    if changes:  # said now, not at the first growth after hours
        why = access.unsupported(engine) or access.unreadable(engine)
        if why is not None:
            raise ConfigError(why)
    watcher = _guard(loaded, chosen, guard)
    proxy = _attach(
        engine, loaded, chosen, schedule, owns_batch, record, watcher, rebuilder, original if changes else None
    )
    proxy.context.probe_batches = probe_batches
    if changes:  # these objects are replaced with the engine
        ds_optimizer = Current(proxy, "optimizer")
        scheduler = Current(proxy, "lr_scheduler") if scheduler is not None else None
    return proxy, ds_optimizer, loader, scheduler


class Current:
    """The optimizer or scheduler of the current DeepSpeedEngine; attributes are read from, and written to, it."""

    def __init__(self, proxy: EfficientEngine, name: str):
        self.__dict__.update(_proxy=proxy, _name=name)

    def _now(self) -> Any:
        return getattr(self.__dict__["_proxy"].deepspeed_engine, self.__dict__["_name"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._now(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._now(), name, value)


def _check_rebuildable(optimizer: Any, lr_scheduler: Any, mpu: Any) -> None:
    """Refuse objects that are bound to the first engine, where engines will be replaced.

    Raises:
        ConfigError: with what to pass instead.
    """
    for name, value in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        if value is not None and (isinstance(value, torch.optim.Optimizer) or not callable(value)):
            raise ConfigError(
                f"initialize: {name} is an object, but parameters change during this run and it must be made anew; "
                f"pass a function that makes it, or the {'optimizer' if name == 'optimizer' else 'scheduler'} section "
                "of the configuration"
            )
    if mpu is not None:
        raise ConfigError("initialize: mpu (tensor or pipeline parallelism) is not supported where parameters change")


def wrap(engine: Any, config: Any = None, *, guard: bool | None = None) -> EfficientEngine:
    """Give an existing DeepSpeedEngine the methods of `config` (those that do not change parameters).

    Args:
        engine: a DeepSpeedEngine before its first step.
        config: path or dictionary with an ``"efftrain"`` section; None means no method.
        guard: as in `initialize`.

    Raises:
        ConfigError: the configuration is wrong, or a method would change parameters.
        ModelError: a method cannot take this model, or would replace it.
    """
    document = copy.deepcopy(config) if isinstance(config, dict) else config
    loaded = load_config(document if document is not None else {})
    chosen = build_methods(loaded)
    refused = [m.name for m in chosen if m.changes_parameters]
    if refused:
        raise ConfigError(f"wrap: {', '.join(refused)} changes parameters; use efftrain_ds.initialize instead")
    batch = (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu())
    schedule = embedded_schedule(loaded, chosen, engine.module, world=_world_size(), batch=batch) if chosen else None
    for method in chosen:
        if method.prepare_model(engine.module) is not engine.module:
            raise ConfigError(f"wrap: {method.name} replaces the model; use efftrain_ds.initialize instead")
    return _attach(engine, loaded, chosen, schedule, False, None, _guard(loaded, chosen, guard))


def _guard(loaded: LoadedConfig, methods: Sequence[Method], wanted: bool | None) -> Guard | None:
    """The guard of a run, where one is wanted; replay files go to the output folder where that was chosen."""
    section = loaded.efftrain
    asked = wanted is True or "guard" in section.model_fields_set
    if section.guard is None and wanted:  # a trainer needs the exchange of stop requests in any case
        return Guard(nonfinite=False, decisions=False, stall_s=None)
    if section.guard is None or wanted is False or not (asked or methods):
        return None
    faults = Path(section.run.output) / "faults" if asked or "output" in section.run.model_fields_set else None
    return Guard(**section.guard.model_dump(), faults=faults)


def _attach(
    engine: Any,
    loaded: LoadedConfig,
    methods: list[Method],
    schedule: Schedule | None,
    owns_batch: bool,
    record: Callable[..., None] | None,
    guard: Guard | None,
    rebuilder: Rebuilder | None = None,
    original: nn.Module | None = None,
) -> EfficientEngine:
    average = loaded.efftrain.model.ema
    ema = None
    if methods or average is not None or guard is not None:
        access.check_version()
    if average is not None:
        ema = ShardedEma(access.layout_of(engine), average.decay, average.warmup)
    return EfficientEngine(
        engine,
        methods=methods,
        schedule=schedule,
        seed=loaded.efftrain.run.seed,
        ema=ema,
        owns_batch=owns_batch,
        record=record,
        rebuilder=rebuilder,
        original=original,
        guard=guard,
    )
