"""Everything a run needs, built from the configuration: devices, data, plan, model, engine."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from .config.loader import LoadedConfig, build_methods
from .core.batch import Batch
from .core.durations import parse_duration
from .core.errors import ConfigError, ModelError
from .core.ranks import local_world
from .core.rng import derive_seed
from .core.timeline import Schedule
from .cost.plan import PricedPlan, PricedStage
from .cost.throughput import Throughput, load_throughput, machine_name, profile_key
from .data.augment import DeviceAugment
from .data.evaluation import EvalLoader
from .data.loader import TrainLoader
from .data.manifest import Manifest
from .data.remote import open_data
from .data.replay import ReplayFeed, fresh_spec, make_training_feed
from .engine import EfficientEngine
from .lr_schedule import ProgressLR
from .models.adapters import accepts_sizes, create_model
from .models.weights import Loaded
from .planning import held_out_data, make_plan, precision_of, with_labels, zero_stage_of
from .startup import initialize
from .train_init import initial_weights, parameter_groups
from .train_saving import checkpoint_of
from .zero.shared_buffers import release_own_buffer

logger = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """The parts of a run.

    `probe_batches` makes the fixed training samples that methods measure candidates on, see `Context.probe_batches`.
    `checkpoint` is the one to go on from; the model then has no weights of ``model.init``.
    """

    config: LoadedConfig
    output: Path
    rank: int
    world: int
    device: torch.device
    plan: PricedPlan
    schedule: Schedule
    engine: EfficientEngine
    augment: DeviceAugment
    train_manifest: Manifest
    val_manifest: Manifest | None
    loader: TrainLoader | ReplayFeed
    val_loader: EvalLoader | None
    num_classes: int
    precision: str
    probe_batches: Callable[[int], list[Batch]]
    throughput: Throughput | None = None
    init: Loaded | None = None
    checkpoint: Path | None = None


def start_processes(config: LoadedConfig) -> tuple[int, int, torch.device]:
    """Join the process group; returns rank, world size and device. Without a launcher the run has one rank."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if not dist.is_initialized() else "29500")
        if os.environ["MASTER_PORT"] == "0":
            os.environ["MASTER_PORT"] = str(_free_port())
    # the ninja of this environment: another version on the machine takes DeepSpeed's compiled extension for outdated
    # and builds it anew, for minutes, in every process start that follows the other one
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    accelerator = get_accelerator()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if accelerator.device_name() == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world()))
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _telling_while_waiting():
        deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    device = torch.device(accelerator.current_device_name())
    release_own_buffer(device)
    return dist.get_rank(), dist.get_world_size(), device


@contextmanager
def _telling_while_waiting(seconds: float = 60) -> Iterator[None]:
    """Say every so often that this rank waits for the others to join: a node that never starts says nothing itself."""
    joined = threading.Event()
    own, world, port = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{port}"

    def tell() -> None:
        while not joined.wait(seconds):
            logger.warning("rank %s waits for all %s ranks to join at %s; is every node running?", own, world, where)

    threading.Thread(target=tell, name="join-watch", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def schedule_digest(schedule: Schedule) -> str:
    """Identity of a plan as far as a resume must keep it: stages, settings, batch and seed, not the world size."""
    rows = [[s.start_step, s.end_step, s.batch, sorted(s.settings.items())] for s in schedule.stages]
    text = json.dumps([rows, schedule.spec.seed, schedule.pacing], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shortened(plan: PricedPlan, steps: int) -> PricedPlan:
    """`steps` steps of every different kind of stage, for measuring how long a step takes.

    A round of half as many goes before it: caches fill and code warms up there, and of two stretches of the same kind
    the longer one is taken for the profile. A model that grows, or gives up units, cannot go back for a second round,
    so there each kind is warmed up just before it is measured, the shallowest first. Nothing is searched while
    measuring: the "search" setting is left out.
    """
    kinds: dict[tuple, PricedStage] = {}
    for priced in plan.stages:
        kinds.setdefault(priced.work_key, priced)
    one_way = {tuple(priced.stage.settings.get(key) for key in ("depth", "unit_level")) for priced in kinds.values()}
    warm = max(1, steps // 2)
    if len(one_way) > 1:
        ordered = sorted(kinds.values(), key=lambda p: p.stage.settings.get("depth") or math.inf)
        parts = [part for priced in ordered for part in ((priced, warm), (priced, steps))]
    else:
        parts = [(priced, count) for count in (warm, steps) for priced in kinds.values()]
    stages: list[PricedStage] = []
    for index, (priced, count) in enumerate(parts):
        first = stages[-1].stage.end_step if stages else 0
        edges = {"p_start": index / len(parts), "p_end": (index + 1) / len(parts)}
        settings = {key: value for key, value in priced.stage.settings.items() if key != "search"}
        stage = replace(priced.stage, index=index, start_step=first, end_step=first + count, settings=settings, **edges)
        stages.append(replace(priced, stage=stage))
    schedule = Schedule(tuple(s.stage for s in stages), plan.schedule.spec, plan.schedule.pacing)
    return replace(plan, schedule=schedule, stages=tuple(stages))


def _profile(path: Path, config: LoadedConfig, world: int) -> Throughput | None:
    """The throughput profile of the output folder, where it was made for this model, world size and machine."""
    if not path.is_file():
        return None
    profile = load_throughput(path)
    key = profile_key(config.efftrain.model.name, precision_of(config.deepspeed), zero_stage_of(config.deepspeed))
    return profile if (profile.key, profile.world, profile.machine) == (key, world, machine_name()) else None


def check_scheduler(config: LoadedConfig, schedule: Schedule) -> None:
    """Raises ConfigError: DeepSpeed's own scheduler, and a plan that changes the learning rate."""
    if "scheduler" in config.deepspeed and any(stage.lr_scale != 1 for stage in schedule.stages):
        raise ConfigError(
            "scheduler: DeepSpeed's learning rate does not follow the plan, which changes it with the batch; leave it "
            "out, or leave the rate of efftrain.methods alone"
        )


def build(
    config: LoadedConfig,
    output: Path,
    record: Any,
    *,
    measure_steps: int | None = None,
    cut: Callable[[PricedPlan], PricedPlan] | None = None,
) -> Run:
    """Build all parts of a run. Collective.

    Args:
        config: the loaded file.
        output: folder of the run.
        record: writes an event to the journal.
        measure_steps: replace the plan by so many steps of every kind of stage, see `shortened`.
        cut: otherwise changes the plan.

    Raises:
        EffTrainError: whatever is wrong with the configuration, the data or the model; nothing was trained.
    """
    section, data = config.efftrain, config.efftrain.data
    rank, world, device = start_processes(config)
    remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "allow_pipe": data.allow_pipe}
    train_manifest = with_labels(open_data(data.train, **remote), data)
    held_out = held_out_data(data)
    val_manifest = with_labels(open_data(held_out, **remote), data, held_out=True) if held_out is not None else None
    num_classes = section.model.num_classes or len(train_manifest.classes)
    methods = build_methods(config)
    profile = _profile(output / "throughput.json", config, world)
    plan = make_plan(config, world=world, samples=train_manifest.kept, throughput=profile, methods=methods)
    whole = plan.schedule
    check_scheduler(config, whole)
    if measure_steps is not None:
        plan = shortened(plan, measure_steps)
    elif cut is not None:
        plan = cut(plan)
    schedule = plan.schedule
    other_size = (data.eval_resolution or data.resolution) != data.resolution
    torch.manual_seed(derive_seed(section.run.seed, "model"))
    model = create_model(
        section.model.name,
        resolution=section.data.resolution,
        num_classes=num_classes,
        drop_path=section.model.drop_path,
        dynamic=other_size or any(m.changes_inputs for m in methods),
        pretrained=section.model.pretrained,
        **section.model.kwargs,
    )
    if other_size and not (answer := accepts_sizes(model))[0]:
        raise ModelError(f"efftrain.data.eval_resolution: {answer[1]}")
    checkpoint = checkpoint_of(config) if measure_steps is None else None
    # what the run once started from may be gone, and a checkpoint replaces every value of it
    init = initial_weights(model, config, train_manifest.classes) if checkpoint is None else None
    engine, *_ = initialize(
        model=model,
        model_parameters=parameter_groups(model, config),
        lr_scheduler=None if "scheduler" in config.deepspeed else _scheduler_factory(config, schedule, whole),
        config=config,
        schedule=schedule,
        methods=methods,
        owns_batch=True,
        record=record,
        guard=True,
    )
    # every rank drops other paths; all of them are restored by a resume
    seed = derive_seed(section.run.seed, "rank", rank)
    torch.manual_seed(seed)
    random.seed(seed)  # nothing of ours draws from these two, but a method or a model may
    np.random.seed(seed % 2**32)
    precision = precision_of(config.deepspeed)
    augment, loader, val_loader = _data(
        config, output, train_manifest, val_manifest, schedule, rank, world, num_classes
    )
    augment.dtype = _DTYPES[precision]
    where = device if data.replay_memory == "device" else "cpu"
    feed = make_training_feed(loader, schedule, device=where, record=record)
    return Run(
        config,
        output,
        rank,
        world,
        device,
        plan,
        schedule,
        engine,
        augment,
        train_manifest,
        val_manifest,
        feed,
        val_loader,
        num_classes,
        precision,
        probe_source(config, train_manifest, rank, world, schedule.spec.micro_batch, num_classes),
        profile,
        init,
        checkpoint,
    )


def _scheduler_factory(config: LoadedConfig, schedule: Schedule, whole: Schedule) -> Any:
    """Makes the scheduler of `schedule`; the warm-up is a share of `whole`, of which `schedule` may be a part."""
    optim, duration = config.efftrain.optim, parse_duration(config.efftrain.optim.warmup)
    spec = whole.spec
    per_epoch = spec.samples / spec.batch if spec.samples else whole.total_steps
    steps: float = duration.steps(per_epoch, whole.total_steps) or 0
    if duration.unit == "ep" and spec.samples and any(stage.batch != spec.batch for stage in whole.stages):
        steps = whole.step_at(duration.value * spec.samples)
    warmup = duration.value / 100 if duration.unit == "%" else whole.progress(steps)

    def make(optimizer: Any) -> ProgressLR:
        return ProgressLR(optimizer, schedule, warmup=warmup, min_lr=optim.min_lr, shape=optim.schedule)

    return make


def _data(
    config: LoadedConfig,
    output: Path,
    train: Manifest,
    val: Manifest | None,
    schedule: Schedule,
    rank: int,
    world: int,
    num_classes: int,
) -> tuple[DeviceAugment, TrainLoader, EvalLoader | None]:
    data, seed = config.efftrain.data, config.efftrain.run.seed
    augment = DeviceAugment(
        seed=seed,
        flip=data.flip,
        randaugment=data.randaugment.model_dump() if data.randaugment is not None else None,
        erasing=data.erasing,
        mixup=data.mixup,
        cutmix=data.cutmix,
        mix_prob=data.mix_prob,
        mix_switch=data.mix_switch,
        mean=data.mean,
        std=data.std,
    )
    loader = TrainLoader(
        train,
        seed=seed,
        rank=rank,
        world=world,
        spec_at=lambda consumed: fresh_spec(schedule, consumed),
        resolution=data.resolution,
        workers=data.workers,
        prefetch=data.prefetch,
        streams=data.streams,
        shuffle_block=data.shuffle_block,
        scale=data.scale,
        ratio=data.ratio,
        interpolation=data.interpolation,
        decoded_cache_mb=data.decoded_cache_mb,
        max_bad_fraction=data.max_bad_fraction,
        quarantine=output / f"quarantine.rank{rank}.jsonl",
        num_classes=num_classes,
        pin_memory=torch.cuda.is_available(),
    )
    val_loader = None
    if val is not None:
        batch = data.eval_batch or 2 * schedule.spec.micro_batch
        val_loader = EvalLoader(
            val,
            rank=rank,
            world=world,
            batch=batch,
            resolution=data.eval_resolution or data.resolution,
            crop=data.eval_crop,
            interpolation=data.interpolation,
            workers=min(data.workers, 2),
            num_classes=num_classes,
            strict=data.hold_out is None,
        )
    return augment, loader, val_loader


def probe_source(
    config: LoadedConfig, manifest: Manifest, rank: int, world: int, batch: int, num_classes: int
) -> Callable[[int], list[Batch]]:
    """A function from a number of samples (all ranks together) to this rank's batches of fixed training samples.

    The samples are evenly spaced over the data set and resized and cropped as in an evaluation. They are read once for
    each number, in this process, and kept on the host as uint8; every call returns batches of its own, which
    `Batch.to` and `DeviceAugment.evaluate` may change. Every rank gets the same number of batches of `batch` rows.
    Unreadable samples and rows beyond the end have ``valid=False``.
    """
    data = config.efftrain.data
    kept: dict[int, list[Batch]] = {}

    def probe(total: int) -> list[Batch]:
        if total not in kept:
            loader = EvalLoader(
                manifest,
                rank=rank,
                world=world,
                batch=batch,
                resolution=data.resolution,
                crop=data.eval_crop,
                interpolation=data.interpolation,
                num_classes=num_classes,
                limit=total,
                strict=False,
            )
            kept[total] = list(loader)
            loader.close()
        return [replace(batch) for batch in kept[total]]

    return probe


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on an accelerator, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
