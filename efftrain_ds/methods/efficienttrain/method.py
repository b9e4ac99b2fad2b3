"""EfficientTrain as a method: plan, size check of the model, and the reduction of each batch.

Shape legend: N images, C channels, H x W pixels, B bandwidth.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, ModelError, NoEffectWarning, PlanError
from ...core.method import Method
from ...core.registry import register_method
from ...core.replay import mean_uses
from ...core.timeline import PlanSpec, Stage, Timeline
from ...kernels.lowfreq_crop import lowfreq_crop, resample
from ...models.adapters import accepts_sizes
from .config import EfficientTrainConfig
from .schedules import PACING, CurriculumStage, batch_scale, build_timeline, custom_stages, named_stages

logger = logging.getLogger(__name__)


@register_method
class EfficientTrain(Method):
    """Show only low spatial frequencies and weak augmentation early in training.

    EfficientTrain (ICCV 2023, arXiv 2211.09703) and EfficientTrain++ (TPAMI 2024, arXiv 2405.08768). Changes no
    parameter: a stage sets the bandwidth of the crop, the RandAugment magnitude and the batch split.
    """

    name: ClassVar[str] = "efficienttrain"
    Config: ClassVar[type[EfficientTrainConfig]] = EfficientTrainConfig
    phase: ClassVar[str] = "data"
    changes_inputs: ClassVar[bool] = True

    config: EfficientTrainConfig

    def __init__(self, config: EfficientTrainConfig):
        super().__init__(config)
        self._warned = False

    def plan(self, spec: PlanSpec) -> Timeline:
        """Stages of the configured schedule at this resolution and stride.

        Raises:
            PlanError: resolution, bandwidths or micro-batch limit do not fit the model and the batch.
        """
        config, found = self.config, []
        if spec.resolution % spec.stride:
            found.append(
                f"efftrain.data.resolution: {spec.resolution} is not a multiple of the model's stride {spec.stride}"
            )
        if config.max_micro_batch is not None and config.max_micro_batch < spec.micro_batch:
            found.append(
                f"efftrain.methods.efficienttrain.max_micro_batch: {config.max_micro_batch} is below "
                f"train_micro_batch_size_per_gpu {spec.micro_batch}"
            )
        if isinstance(config.schedule, str):
            pacing = PACING[config.schedule]
            stages = [] if found else named_stages(config.schedule, spec.resolution, spec.stride)
        else:
            pacing = config.pacing or "compute"
            stages = custom_stages(config.schedule, spec.resolution)
            found += _misfits(stages, spec)
        if stages:
            found += _replay_misfits(stages, config, spec)
        if found:
            raise PlanError("\n".join(found))
        if stages[-1].bandwidth < spec.resolution:
            logger.warning(
                "efftrain.methods.efficienttrain.schedule: the last stage has bandwidth %d, the model never trains at "
                "the full resolution %d",
                stages[-1].bandwidth,
                spec.resolution,
            )
        limit = None if config.max_micro_batch is None else config.max_micro_batch / spec.micro_batch
        return build_timeline(
            stages,
            pacing,
            magnitude=config.magnitude,
            grow_micro_batch=config.grow_micro_batch,
            max_micro_scale=limit,
            replay=config.replay,
            large_batch=config.large_batch,
        )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Check that the model accepts images of other sizes; returns it unchanged.

        Raises:
            ModelError: it does not; the text says why and what to do.
        """
        accepted, reason = accepts_sizes(model)
        if not accepted:
            raise ModelError(f"efftrain.methods.efficienttrain needs a model that takes several input sizes: {reason}")
        return model

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Reduce the images to the stage's bandwidth.

        uint8 images leave as normalised fp32, floating-point images keep their dtype. At full bandwidth nothing
        happens (the data pipeline normalises).

        Raises:
            PlanError: the images are not square or smaller than the bandwidth.
            ConfigError: uint8 images without mean and std.
        """
        bandwidth = ctx.settings.get("bandwidth")
        if bandwidth is None:
            if not self._warned:
                warnings.warn("efficienttrain: this run has no plan, so no bandwidth is set", NoEffectWarning, 2)
                self._warned = True
            return batch
        height, width = batch.images.shape[-2:]
        if height != width or height < bandwidth:
            raise PlanError(
                f"efftrain.methods.efficienttrain: images of {height} x {width} pixels arrived, this stage needs "
                f"square images of at least {bandwidth}; set efftrain.data.resolution to their side"
            )
        if height > bandwidth:
            batch.images = self.reduce(batch.images, bandwidth, batch.mean, batch.std)
        return batch

    def reduce(
        self, images: Tensor, bandwidth: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> Tensor:
        """Apply the configured low-pass: [N, C, H, W] -> [N, C, B, B].

        Raises:
            ConfigError: uint8 images without mean and std.
        """
        affine: dict[str, Any] = {}
        if images.dtype == torch.uint8:
            if mean is None or std is None:
                raise ConfigError("efftrain.data: uint8 images arrived without mean and std (Batch.mean, Batch.std)")
            affine = {"mean": mean, "std": std}
        if self.config.lowpass == "fourier":
            return lowfreq_crop(images, bandwidth, align=self.config.align, exact=self.config.nyquist, **affine)
        return resample(images, bandwidth, self.config.lowpass, **affine)

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Bandwidth in pixels and RandAugment magnitude of the current stage."""
        names = ("bandwidth", "ra_magnitude")
        return {f"stage/{name}": float(ctx.settings[name]) for name in names if name in ctx.settings}

    def describe(self, stage: Stage) -> str:
        """For example ``"B96 m3"``, with ``"x4"`` where a sample is used four times."""
        words = [f"B{stage.settings['bandwidth']}"] if "bandwidth" in stage.settings else []
        if "ra_magnitude" in stage.settings:
            words.append(f"m{stage.settings['ra_magnitude']:g}")
        if mean_uses(stage) > 1:
            words.append(f"x{mean_uses(stage)}")
        return " ".join(words)


def _misfits(stages: list[CurriculumStage], spec: PlanSpec) -> list[str]:
    """What is wrong with the bandwidths of a list of stages."""
    found = []
    for i, stage in enumerate(stages):
        b, why = stage.bandwidth, []
        if b > spec.resolution:
            why.append(f"is above efftrain.data.resolution {spec.resolution}")
        if b % spec.stride:
            why.append(f"is not a multiple of the model's stride {spec.stride}")
        if b % 2 and b != spec.resolution:
            why.append("is odd")
        if why:
            found.append(f"efftrain.methods.efficienttrain.schedule.{i}.bandwidth: {b} {' and '.join(why)}")
    return found


def _replay_misfits(stages: list[CurriculumStage], config: EfficientTrainConfig, spec: PlanSpec) -> list[str]:
    """What is wrong with the replay buffers."""
    found = []
    for i, buffer in enumerate(config.replay):
        key = f"efftrain.methods.efficienttrain.replay.{i}"
        own = [stage for stage in stages if stage.bandwidth == buffer.bandwidth]
        if not own:
            sides = ", ".join(str(side) for side in dict.fromkeys(stage.bandwidth for stage in stages))
            found.append(f"{key}.bandwidth: no stage has {buffer.bandwidth}; allowed here: {sides}")
            continue
        limit = config.large_batch.max_scale if config.large_batch is not None else 1
        batch = spec.batch * min(batch_scale(stage.pace, limit) for stage in own)
        if batch % (spec.world * buffer.uses):
            found.append(
                f"{key}.uses: {batch // spec.world} samples of a rank in a step do not divide by {buffer.uses}; "
                "allowed are divisors of that number"
            )
    return found
