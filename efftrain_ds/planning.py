"""From a loaded configuration to the schedule and its price: no device, no shard and no weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from torch import nn

from .config.deepspeed_keys import batch_sizes
from .config.loader import LoadedConfig
from .core.compose import compose
from .core.errors import ModelError, PlanError
from .core.method import Method
from .core.registry import get_method
from .core.text import short_settings
from .core.timeline import PlanSpec, Schedule, merge_timelines
from .cost.macs import VitShape, module_macs, parameter_count, vit_shape
from .cost.memory import PRECISION_BYTES, module_activation_values, vit_activation_bytes
from .cost.plan import PricedPlan, bandwidth_of, price
from .cost.throughput import Measured, Throughput, machine_name, profile_key
from .data import bundled
from .data.manifest import MANIFEST, Manifest, load_manifest
from .observe.console import StageOutcome
from .observe.meters import StepMeter, seconds_left


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
    data = config.efftrain.data
    found, names = bundled.samples(data.train), bundled.classes(data.train)
    if found is None and (manifest := _manifest(data.train)) is not None:
        found, names = manifest.samples, manifest.classes
    if found is not None and data.samples is not None and found != data.samples:
        raise PlanError(f"efftrain.data.samples is {data.samples}, but {data.train} holds {found} samples")
    count = next((n for n in (samples, found, data.samples) if n is not None), None)
    if count is None and config.efftrain.run.steps is None:
        raise PlanError(
            f'efftrain.data.samples: not given, and "{data.train}" (efftrain.data.train) has no {MANIFEST} '
            "to count from"
        )
    classes = config.efftrain.model.num_classes or (len(names) if names else None)
    return DataFacts(count or 0, classes)


def _manifest(where: str) -> Manifest | None:
    path = Path(where)
    if where and (path.is_file() or (path / MANIFEST).is_file()):
        return load_manifest(path)
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
    """MACs, parameters and stride of the configured model; built on the meta device only where no closed form holds."""

    def __init__(self, config: LoadedConfig, num_classes: int | None):
        self.config, self.num_classes = config, num_classes
        model, data = config.efftrain.model, config.efftrain.data
        self.shape: VitShape | None = vit_shape(model.name, {"img_size": data.resolution, **model.kwargs})
        self.channels = int(model.kwargs.get("in_chans", 3))
        self._module: nn.Module | None = None

    @property
    def stride(self) -> int:
        """Total stride of the model in pixels."""
        if self.shape is not None:
            return self.shape.patch
        from .models.adapters import model_stride

        model = self.config.efftrain.model
        return model_stride(model.name, model.kwargs)

    @property
    def classes(self) -> int:
        """Size of the head."""
        if self.num_classes is None:
            raise PlanError(
                f"efftrain.model.num_classes: not given, and {self.config.efftrain.data.train!r} (efftrain.data.train) "
                "does not say how many classes it has"
            )
        return self.num_classes

    @property
    def module(self) -> nn.Module:
        """The model on the meta device, able to change its input size as in training."""
        if self._module is None:
            from .cost.macs import build_meta
            from .models.adapters import create_model

            model, side = self.config.efftrain.model, self.config.efftrain.data.resolution
            self._module = build_meta(
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
        return self._module

    def params(self) -> int:
        """Number of parameters."""
        return parameter_count(self.module) if self.shape is None else self.shape.params(self.classes)

    def macs(self, resolution: int) -> int:
        """Forward MACs of one image.

        Raises:
            ModelError: the model takes no images of this side.
        """
        if self.shape is not None:
            return self.shape.macs(resolution, self.classes)
        try:
            return module_macs(self.module, resolution, channels=self.channels)
        except ModelError as error:
            from .models.adapters import accepts_sizes

            accepted, reason = accepts_sizes(self.module)
            raise ModelError(f"efftrain.model.name: {error if accepted else reason}") from error

    def activations(self, resolution: int, micro_batch: int, precision: str) -> int:
        """Estimated activation bytes of one micro-batch."""
        if self.shape is not None:
            return vit_activation_bytes(self.shape, resolution, micro_batch=micro_batch, precision=precision)
        values = module_activation_values(self.module, resolution, channels=self.channels)
        return values * micro_batch * PRECISION_BYTES[precision]


def make_schedule(
    config: LoadedConfig,
    *,
    world: int,
    samples: int,
    num_classes: int | None = None,
    stride: int | None = None,
) -> tuple[Schedule, list[Method]]:
    """Construct the methods in run order and merge their timelines.

    Args:
        config: the loaded file.
        world: number of data-parallel ranks.
        samples: training samples of one epoch; 0 where the user fixed the steps and the number is not known.
        num_classes: size of the head, for models that must be built to learn their stride.
        stride: total stride of the user's own model, where ``efftrain.model.name`` is not given.

    Raises:
        PlanError: the methods, the model and the budget do not fit together; the text names the key.
        ConfigError: the batch sizes do not multiply, or two methods exclude each other.
    """
    section = config.efftrain
    if section.run.epochs is None and section.run.steps is None:
        raise PlanError('efftrain.run: give "epochs" or "steps"')
    sizes = batch_sizes(config.deepspeed, world)
    if stride is None:
        stride = _ModelCost(config, num_classes).stride if section.model.name else 1
    spec = PlanSpec(
        seed=section.run.seed,
        epochs=section.run.epochs or 0.0,
        samples=samples,
        batch=sizes.batch,
        micro_batch=sizes.micro_batch,
        world=world,
        resolution=section.data.resolution,
        stride=stride,
        steps=section.run.steps,
        model=section.model.name,
    )
    methods = compose([get_method(name)(value) for name, value in config.methods.items()])
    return merge_timelines([m.plan(spec) for m in methods], spec), methods


def make_plan(
    config: LoadedConfig, *, world: int, samples: int | None = None, throughput: Throughput | None = None
) -> PricedPlan:
    """The priced plan of a configuration.

    Args:
        config: the loaded file.
        world: number of data-parallel ranks.
        samples: training samples of one epoch; None looks them up, see `data_facts`.
        throughput: measured profile for predicted seconds.

    Raises:
        PlanError: what cannot run, with the key.
        ConfigError: the batch sizes do not multiply.
        ModelError: the model is unknown or its arguments do not fit.
        ShardError: a manifest is there but damaged.
    """
    section = config.efftrain
    if not section.model.name:
        raise PlanError("efftrain.model.name: not given; a plan can only be priced for a timm model")
    facts = data_facts(config, samples)
    schedule, methods = make_schedule(config, world=world, samples=facts.samples, num_classes=facts.num_classes)
    model, precision = _ModelCost(config, facts.num_classes), precision_of(config.deepspeed)
    full = section.data.resolution
    sides = [bandwidth_of(stage.settings, full) for stage in schedule.stages]
    macs = {side: model.macs(side) for side in {*sides, full}}
    activations = {
        key: model.activations(*key, precision)
        for key in {(side, s.micro_batch) for side, s in zip(sides, schedule.stages, strict=True)}
    }
    zero = config.deepspeed.get("zero_optimization") or {}
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return price(
        schedule,
        macs=[macs[side] for side in sides],
        full_macs=macs[full],
        activations=[activations[side, stage.micro_batch] for side, stage in zip(sides, schedule.stages, strict=True)],
        model=section.model.name,
        params=model.params(),
        precision=precision,
        zero_stage=zero_stage_of(config.deepspeed),
        ema=section.model.ema is not None,
        offload_optimizer=offload,
        methods=[(m.name, _line(m, schedule)) for m in methods],
        throughput=throughput,
    )


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

    Stages that do the same work are told apart by their setting only; the longest one of each setting is kept.
    """
    import torch

    spec = plan.schedule.spec
    best: dict[tuple[int, int, int], Measured] = {}
    for s in plan.stages:
        median = meter.stage_median(s.stage.index)
        if median is None:
            continue
        seconds, n = median
        side = bandwidth_of(s.stage.settings, spec.resolution)
        key = (side, s.stage.micro_batch, s.stage.accumulation)
        if key not in best or n > best[key].n:
            best[key] = Measured(*key, macs=s.macs, seconds=seconds, n=n)
    return Throughput(
        machine=machine_name(),
        torch=torch.__version__,
        world=spec.world,
        key=profile_key(plan.model, plan.precision, plan.zero_stage),
        date=date.today().isoformat(),
        entries=tuple(best.values()),
    )
