"""From a loaded configuration to the schedule and its price: no device, no shard and no weight is touched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .config.deepspeed_keys import batch_sizes
from .config.loader import LoadedConfig, build_methods
from .config.sections import DataConfig
from .core.errors import ModelError, PlanError
from .core.method import Method
from .core.redact import redacted
from .core.registry import get_method
from .core.text import short_settings
from .core.timeline import PlanSpec, Schedule, Stage, Timeline, merge_timelines
from .cost.macs import VitShape, module_macs, parameter_count, vit_shape
from .cost.memory import PRECISION_BYTES, module_activation_values, vit_activation_bytes
from .cost.plan import PricedPlan, bandwidth_of, price
from .cost.throughput import Measured, Throughput, machine_name, profile_key
from .data import bundled
from .data.holdout import hold_out
from .data.labels import apply_labels, label_set
from .data.manifest import MANIFEST, Manifest, load_manifest
from .data.remote import open_data
from .data.transport import is_remote
from .observe.console import StageOutcome
from .observe.meters import StepMeter, seconds_left

if TYPE_CHECKING:
    from .models.elastic import Space


@dataclass(frozen=True)
class DataFacts:
    """Training samples of one epoch (0 = unknown) and number of classes (None = unknown)."""

    samples: int
    num_classes: int | None


def data_facts(config: LoadedConfig, samples: int | None = None) -> DataFacts:
    """Size of the training data: the argument, the shards' manifest, the bundled data, then ``efftrain.data.samples``.

    Raises:
        PlanError: none of them says, or the configuration contradicts the manifest.
        ShardError: a manifest is there but damaged.
    """
    data, model = config.efftrain.data, config.efftrain.model
    shown = redacted(data.train)
    found, names = bundled.samples(data.train), bundled.classes(data.train)
    if data.labels is not None:
        names = label_set(data.labels.target, "efftrain.data.labels.target").synsets
        if model.num_classes is not None and model.num_classes != len(names):
            raise PlanError(
                f"efftrain.model.num_classes is {model.num_classes}, but {data.labels.target} "
                f"(efftrain.data.labels.target) has {len(names)} classes"
            )
    mapped = data.labels is not None or data.hold_out is not None
    if (found is None or mapped) and (manifest := _manifest(config)) is not None:
        found, names = manifest.kept, manifest.classes
    if names and model.num_classes is not None and model.num_classes < len(names):
        raise PlanError(
            f"efftrain.model.num_classes is {model.num_classes}, but {shown} has {len(names)} classes; "
            "efftrain.data.labels maps them to others"
        )
    if found is not None and data.samples is not None and found != data.samples:
        raise PlanError(f"efftrain.data.samples is {data.samples}, but {shown} holds {found} samples")
    count = next((n for n in (samples, found, data.samples) if n is not None), None)
    if count is None and config.efftrain.run.steps is None:
        raise PlanError(
            f'efftrain.data.samples: not given, and "{shown}" (efftrain.data.train) has no {MANIFEST} to count from'
        )
    return DataFacts(count or 0, model.num_classes or (len(names) if names else None))


def with_labels(manifest: Manifest, data: DataConfig, *, held_out: bool = False) -> Manifest:
    """A split with the classes of ``efftrain.data.labels`` and its part of ``efftrain.data.hold_out``.

    Args:
        manifest: the shards: of the training split, or with `held_out` those of `held_out_data`.
        data: of the configuration.
        held_out: the images that are evaluated on, else those that are trained on.

    Raises:
        ConfigError: unknown label set, other counts of classes, or classes that the target does not have.
        ShardError: a class is too small to hold some of it out.
    """
    if data.labels is None:
        labelled = manifest
    elif held_out and data.hold_out is None:
        labels = data.labels
        return apply_labels(
            manifest,
            target=labels.target,
            source=labels.val_source,
            missing=labels.val_missing or labels.missing,
            source_key="val_source",
            missing_key="val_missing",
        )
    else:
        labels = data.labels
        labelled = apply_labels(manifest, target=labels.target, source=labels.source, missing=labels.missing)
    if data.hold_out is None:
        return labelled
    return hold_out(labelled, data.hold_out)[1 if held_out else 0]


def held_out_data(data: DataConfig) -> str | None:
    """Where the shards are that are evaluated on; None = nowhere."""
    return data.train if data.hold_out is not None else data.val


def _manifest(config: LoadedConfig) -> Manifest | None:
    """The manifest of the training data; of a remote one only where the configuration does not say what is needed."""
    data = config.efftrain.data
    if is_remote(data.train):
        if data.samples is not None and config.efftrain.model.num_classes is not None:
            return None
        # how many are dropped or held out stands in the index
        index = data.hold_out is not None or (data.labels is not None and data.labels.missing == "drop")
        found = open_data(data.train, cache_dir=data.cache_dir, allow_pipe=data.allow_pipe, index=index)
        return with_labels(found, data)
    mapped = data.labels is not None or data.hold_out is not None
    path = Path(bundled.resolve(data.train) if mapped else data.train)
    if data.train and (path.is_file() or (path / MANIFEST).is_file()):
        return with_labels(load_manifest(path), data)
    return None


def precision_of(deepspeed: Mapping[str, Any]) -> str:
    """ "bf16", "fp16" or "fp32" by DeepSpeed's own keys."""
    for key, name in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        section = deepspeed.get(key)
        if isinstance(section, Mapping) and section.get("enabled"):
            return name
    return "fp32"


def zero_stage_of(deepspeed: Mapping[str, Any]) -> int:
    """ZeRO stage, 0 where the section is missing."""
    return int((deepspeed.get("zero_optimization") or {}).get("stage", 0))


class _ModelCost:
    """MACs, parameters and stride of the configured model at any depth, each number computed once.

    Built on the meta device only where no closed form holds. `depth` counts blocks, None is the full model; a depth
    that the model has not raises PlanError or ModelError.
    """

    def __init__(self, config: LoadedConfig, num_classes: int | None):
        self.config, self.num_classes = config, num_classes
        model, data = config.efftrain.model, config.efftrain.data
        self.shape: VitShape | None = vit_shape(model.name, {"img_size": data.resolution, **model.kwargs})
        self.channels = int(model.kwargs.get("in_chans", 3))
        self._modules: dict[int | None, nn.Module] = {}
        self._found: dict[Hashable, int] = {}

    @cached_property
    def space(self) -> Space[Any] | None:
        """Search space of a supernet; None for other models."""
        from .models.elastic.named import space_of

        model = self.config.efftrain.model
        return space_of(model.name, model.kwargs, self.num_classes or 1000)

    @property
    def stride(self) -> int:
        """Total stride of the model in pixels."""
        if self.shape is not None:
            return self.shape.patch
        from .models.adapters import model_stride

        model = self.config.efftrain.model
        return model_stride(model.name, model.kwargs)

    @property
    def depth(self) -> int:
        """Blocks of the full model; 0 where its depth cannot change."""
        if self.shape is not None:
            return self.shape.depth
        from .models.stacks import growable_depth

        return growable_depth(self.module())

    @property
    def classes(self) -> int:
        """Size of the head."""
        if self.num_classes is None:
            raise PlanError(
                f"efftrain.model.num_classes: not given, and {redacted(self.config.efftrain.data.train)!r} "
                "(efftrain.data.train) does not say how many classes it has"
            )
        return self.num_classes

    def module(self, depth: int | None = None) -> nn.Module:
        """The model on the meta device, able to change its input size as in training."""
        if depth not in self._modules:
            self._modules[depth] = self._build() if depth is None else self._truncated(depth)
        return self._modules[depth]

    def _build(self) -> nn.Module:
        from .cost.macs import build_meta
        from .models.adapters import create_model

        model, side = self.config.efftrain.model, self.config.efftrain.data.resolution
        return build_meta(
            model.name,
            num_classes=self.classes,
            kwargs=model.kwargs,
            build=lambda: create_model(
                model.name,
                resolution=side,
                num_classes=self.classes,
                drop_path=model.drop_path,
                dynamic=True,
                pretrained=False,
                **model.kwargs,
            ),
        )

    def _truncated(self, depth: int) -> nn.Module:
        from .models.stacks import prepare_growth, truncate

        return truncate(prepare_growth(copy.deepcopy(self.module())), depth)

    def _shape(self, depth: int | None) -> VitShape | None:
        if self.shape is None or depth is None:
            return self.shape
        if not 1 <= depth <= self.shape.depth:
            raise PlanError(
                f"a stage asks for {depth} blocks, {self.config.efftrain.model.name} has {self.shape.depth} "
                f"(allowed: 1 to {self.shape.depth})"
            )
        return replace(self.shape, depth=depth)

    def params(self, depth: int | None = None) -> int:
        """Number of parameters."""
        shape = self._shape(depth)
        if shape is not None:
            return shape.params(self.classes)
        return self._once(("params", depth), lambda: parameter_count(self.module(depth)))

    def macs(self, resolution: int, depth: int | None = None) -> int:
        """Forward MACs of one image.

        Raises:
            ModelError: the model takes no images of this side.
        """
        shape = self._shape(depth)
        if shape is not None:
            return shape.macs(resolution, self.classes)
        if self.space is not None:  # its sub-networks resize the images
            return self.space.macs(self.space.max())
        return self._once(("macs", depth, resolution), lambda: self._count_macs(resolution, depth))

    def _count_macs(self, resolution: int, depth: int | None) -> int:
        module = self.module(depth)
        try:
            return module_macs(module, resolution, channels=self.channels)
        except ModelError as error:
            from .models.adapters import accepts_sizes

            accepted, reason = accepts_sizes(module)
            raise ModelError(f"efftrain.model.name: {error if accepted else reason}") from error

    def activations(self, resolution: int, micro_batch: int, precision: str, depth: int | None = None) -> int:
        """Estimated activation bytes of one micro-batch."""
        shape = self._shape(depth)
        if shape is not None:
            return vit_activation_bytes(shape, resolution, micro_batch=micro_batch, precision=precision)
        values = self._once(
            ("activations", depth, resolution),
            lambda: module_activation_values(self.module(depth), resolution, channels=self.channels),
        )
        return values * micro_batch * PRECISION_BYTES[precision]

    def _once(self, key: Hashable, compute: Callable[[], int]) -> int:
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]


def plan_spec(
    config: LoadedConfig,
    *,
    world: int,
    samples: int,
    num_classes: int | None = None,
    stride: int | None = None,
) -> PlanSpec:
    """What the methods may know of the run when they plan.

    Args:
        config: the loaded file.
        world: number of data-parallel ranks.
        samples: training samples of one epoch; 0 where the user fixed the steps and the number is not known.
        num_classes: size of the head, for models that must be built to learn their stride.
        stride: total stride of the model in pixels; None asks the model.

    Raises:
        PlanError: no budget is given.
        ConfigError: the batch sizes do not multiply.
        ModelError: the model is unknown.
    """
    section = config.efftrain
    if section.run.epochs is None and section.run.steps is None:
        raise PlanError('efftrain.run: give "epochs" or "steps"')
    sizes = batch_sizes(config.deepspeed, world)
    data, depth, width, prefix, space = section.data, 0, 0, 1, None
    if section.model.name:
        cost = _ModelCost(config, num_classes)
        if cost.shape is not None:
            width, prefix = cost.shape.dim, cost.shape.prefix
        space = cost.space
        stride = cost.stride if stride is None else stride
        # a model without a closed form must be built to tell, so it is for methods that change the depth only
        changes = any(get_method(name).changes_parameters for name in config.methods)
        depth = cost.depth if changes or cost.shape is not None else 0
    return PlanSpec(
        seed=section.run.seed,
        epochs=section.run.epochs or 0.0,
        samples=samples,
        batch=sizes.batch,
        micro_batch=sizes.micro_batch,
        world=world,
        resolution=section.data.resolution,
        stride=stride or 1,
        steps=section.run.steps,
        model=section.model.name,
        depth=depth,
        drop_path=section.model.drop_path,
        magnitude=data.randaugment.magnitude if data.randaugment is not None else None,
        erasing=data.erasing,
        width=width,
        prefix=prefix,
        space=space,
        eval_resolution=data.eval_resolution or data.resolution,
        mixing=data.mix_prob if data.mixup or data.cutmix else 0.0,
    )


def make_plan(
    config: LoadedConfig,
    *,
    world: int,
    samples: int | None = None,
    throughput: Throughput | None = None,
    methods: Sequence[Method] | None = None,
) -> PricedPlan:
    """The priced plan of a configuration.

    Args:
        config: the loaded file.
        world: number of data-parallel ranks.
        samples: training samples of one epoch; None looks them up, see `data_facts`.
        throughput: measured profile for predicted seconds.
        methods: instances made beforehand, in run order, e.g. to price again after one of them has chosen a stage;
            None makes them.

    Raises:
        PlanError: what cannot run, with the key.
        ConfigError: the batch sizes do not multiply, or methods do not fit together.
        ModelError: the model is unknown or its arguments do not fit.
        ShardError: a manifest is there but damaged.
    """
    section = config.efftrain
    if not section.model.name:
        raise PlanError("efftrain.model.name: not given; a plan can only be priced for a timm model")
    if methods is None:
        methods = build_methods(config)
    facts = data_facts(config, samples)
    model = _ModelCost(config, facts.num_classes)
    spec = plan_spec(config, world=world, samples=facts.samples, num_classes=facts.num_classes)
    schedule = merge_timelines([m.plan(spec) for m in methods], spec)
    for method in methods:
        method.check(schedule)
    plan = _price(config, schedule, model, methods, throughput)
    others = [_price(config, s, model, methods, None).relative for s in _alternatives(methods, spec)]
    return replace(plan, range=(min(others), max(others))) if others else plan


def _alternatives(methods: Sequence[Method], spec: PlanSpec) -> list[Schedule]:
    """What may run instead: each alternative of one method together with the plans of the others.

    Raises:
        PlanError: more than one method leaves its stages open.
    """
    found: dict[str, dict[str, Timeline]] = {m.name: other for m in methods if (other := m.alternatives(spec))}
    if len(found) > 1:
        names = ", ".join(found)
        raise PlanError(f"efftrain.methods: only one method may choose its stages at run time, found {names}")
    return [
        merge_timelines([timeline if m.name == name else m.plan(spec) for m in methods], spec)
        for name, timelines in found.items()
        for timeline in timelines.values()
    ]


def image_macs(config: LoadedConfig, sides: Sequence[int]) -> dict[int, int]:
    """Forward MACs of one image of each side.

    Raises:
        ModelError: the model is unknown, or takes no images of some side.
        PlanError: the number of classes is not known.
    """
    model = _ModelCost(config, data_facts(config).num_classes)
    return {side: model.macs(side) for side in sides}


def _price(
    config: LoadedConfig,
    schedule: Schedule,
    model: _ModelCost,
    methods: Sequence[Method],
    throughput: Throughput | None,
) -> PricedPlan:
    precision, full = precision_of(config.deepspeed), config.efftrain.data.resolution
    kinds = [(bandwidth_of(s.settings, full), _depth_of(s)) for s in schedule.stages]
    zero = config.deepspeed.get("zero_optimization") or {}
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return price(
        schedule,
        macs=[model.macs(side, depth) for side, depth in kinds],
        full_macs=model.macs(full),
        activations=[
            model.activations(side, stage.micro_batch, precision, depth)
            for (side, depth), stage in zip(kinds, schedule.stages, strict=True)
        ],
        model=config.efftrain.model.name,
        params=model.params(),
        stage_params=[model.params(depth) for _, depth in kinds],
        factors=[math.prod(m.cost_factor(schedule.spec, stage) for m in methods) for stage in schedule.stages],
        precision=precision,
        zero_stage=zero_stage_of(config.deepspeed),
        ema=config.efftrain.model.ema is not None,
        offload_optimizer=offload,
        methods=[(m.name, _line(m, schedule)) for m in methods],
        throughput=throughput,
    )


def _depth_of(stage: Stage) -> int | None:
    """Blocks of the model in this stage; None = all."""
    depth = stage.settings.get("depth")
    return None if depth is None else int(depth)


def _line(method: Method, schedule: Schedule) -> str:
    """First and last words of a method on the schedule, e.g. ``"B96 m0 -> B224 m9 in 10 stages"``."""
    words = [method.describe(stage) for stage in schedule.stages]
    first, last = words[0], words[-1]
    return first if first == last else f"{first} -> {last} in {len(words)} stages"


def time_left(plan: PricedPlan, step: int, meter: StepMeter) -> float | None:
    """Seconds until the last step by the rates measured so far; None before a step was timed."""
    stage = plan.schedule.stage_at(step).index
    rates = meter.rates() if meter.stage == stage else None  # just after a switch the window is still the old stage's
    return seconds_left(
        plan.costs_left(step),
        [s.share for s in plan.stages],
        [s.stage.steps for s in plan.stages],
        [s.work_key for s in plan.stages],
        stage=stage,
        step_seconds=rates.step_seconds if rates else None,
        timed_seconds=meter.stage_seconds,
        timed_steps=meter.stage_steps,
    )


def outcomes(plan: PricedPlan, meter: StepMeter) -> list[StageOutcome]:
    """Plan against truth for the final table; a stage that was not timed (resumed without meters) shows 0 seconds."""
    return [
        StageOutcome(
            label=short_settings(s.stage.settings),
            steps=meter.stage_steps.get(s.stage.index, 0),
            predicted_share=s.share,
            predicted_seconds=s.seconds,
            seconds=meter.stage_seconds.get(s.stage.index, 0.0),
        )
        for s in plan.stages
    ]


def measured_throughput(plan: PricedPlan, meter: StepMeter) -> Throughput:
    """A profile of this machine from the step times of a run, for ``efftrain plan --throughput``.

    Stages that do the same work are told apart by their setting only; the longest one of each setting is kept. A stage
    that searches among sub-networks is left out: its steps are of many sizes.
    """
    import torch

    spec = plan.schedule.spec
    best: dict[Hashable, Measured] = {}
    for s in plan.stages:
        median = meter.stage_median(s.stage.index)
        settings = s.stage.settings
        if median is None or (settings.get("search") and "unfrozen" not in settings):
            continue
        seconds, n = median
        side = bandwidth_of(s.stage.settings, spec.resolution)
        entry = Measured(side, s.stage.micro_batch, s.stage.accumulation, macs=s.work, seconds=seconds, n=n)
        if entry.setting not in best or n > best[entry.setting].n:
            best[entry.setting] = entry
    return Throughput(
        machine=machine_name(),
        torch=torch.__version__,
        world=spec.world,
        key=profile_key(plan.model, plan.precision, plan.zero_stage),
        date=date.today().isoformat(),
        entries=tuple(best.values()),
    )
