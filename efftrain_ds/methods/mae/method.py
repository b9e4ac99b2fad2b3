"""Masked autoencoder pre-training as a method: masks, loss, evaluation and pictures.

Source: MAE (He et al., CVPR 2022, arXiv 2111.06377) and its released code; EfficientTrain (arXiv 2211.09703) trains it
with a frequency curriculum. Neither says what is predicted under the curriculum: here the image as the network sees it.

Shape legend: N images, C channels, H x W pixels, L patches.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, ModelError, PlanError
from ...core.method import Method
from ...core.registry import register_method
from ...core.timeline import PlanSpec, Schedule, Segment, Stage, Timeline
from ...data.augment import normalize
from ...models.mae import MaskedAutoencoder, masked_patches, visible_patches
from .config import KEY, MaeConfig
from .pictures import reconstruction_picture
from .target import Target, drawn_order, make_target, sample_losses

_SHOWN = 6
"""Samples in a picture."""
_FAR = 1 << 40
"""Distance between the names that ranks give to samples without a position."""


@register_method
class MaskedAutoencoding(Method):
    """Hide most patches of every image and learn to predict their pixels. Labels are not used."""

    name: ClassVar[str] = "mae"
    Config: ClassVar[type[MaeConfig]] = MaeConfig
    phase: ClassVar[str] = "loss"
    owns_loss: ClassVar[bool] = True
    conflicts_with: ClassVar[tuple[str, ...]] = (
        *("autoprog", "autoprog_zero", "svite", "s2vite", "svite_tokens", "svite_attention", "elasticvit"),
    )

    config: MaeConfig

    def __init__(self, config: MaeConfig):
        super().__init__(config)
        self._micro = 0
        self._images: Tensor | None = None
        self._scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
        self._sample: tuple[Tensor, Tensor, Tensor, tuple[tuple[float, ...], tuple[float, ...]] | None] | None = None
        """Of the last micro-batch: images, predicted pixels, hidden patches, mean and standard deviation."""

    # -- before the run ----------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """One stage; images are to be cropped and flipped only.

        Raises:
            PlanError: the data section changes images otherwise, or mixes them.
        """
        found = [
            (
                f"randaugment (magnitude {spec.magnitude:g})" if spec.magnitude is not None else "",
                '"randaugment": null',
            ),
            (f"erasing {spec.erasing:g}" if spec.erasing else "", '"erasing": 0'),
            (f"mixup or cutmix (mix_prob {spec.mixing:g})" if spec.mixing else "", '"mixup": 0, "cutmix": 0'),
        ]
        words = [what for what, _ in found if what]
        if words:
            raise PlanError(
                f"{KEY} trains on images that are only cropped and flipped; efftrain.data asks for "
                f"{', '.join(words)}: set {', '.join(how for what, how in found if what)}"
            )
        return Timeline((Segment(0.0, 1.0),))

    def check(self, schedule: Schedule) -> None:
        """Refuse a curriculum over the augmentation, and sizes that leave nothing to see or to predict.

        Raises:
            PlanError: with the stage, or the key of the evaluation's size.
        """
        spec = schedule.spec
        for stage in schedule.stages:
            other = [key for key in ("ra_magnitude", "erasing") if stage.settings.get(key) is not None]
            if other:
                raise PlanError(
                    f"{KEY} trains on images that are only cropped and flipped, but stage {stage.index + 1} sets "
                    f'{" and ".join(other)}; set "magnitude": false in efftrain.methods.efficienttrain'
                )
            side = int(stage.settings.get("bandwidth", spec.resolution))
            if side % spec.stride:
                raise PlanError(f"{KEY}: {side} pixels of stage {stage.index + 1} do not divide into patches")
            self._check_ratio(side, spec.stride, "")
        side, key = spec.eval_resolution, "efftrain.data.eval_resolution"
        if side % spec.stride:
            raise PlanError(f"{key}: {side} pixels do not divide into the patches of {spec.stride} that {KEY} masks")
        if side:
            self._check_ratio(side, spec.stride, f" of {key}")

    def _check_ratio(self, side: int, stride: int, where: str) -> None:
        try:
            visible_patches((side // stride) ** 2, self.config.mask_ratio)
        except ModelError as error:
            raise PlanError(f"{KEY}.mask_ratio: {error} at {side} pixels{where}") from error

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Check the model and give it the mask ratio.

        Raises:
            ModelError: it is no masked autoencoder.
        """
        if not isinstance(model, MaskedAutoencoder):
            raise ModelError(
                f"{KEY}: {type(model).__name__} is no masked autoencoder; allowed for efftrain.model.name: "
                '"mae_vit_tiny_patch16", "mae_vit_small_patch16", "mae_vit_base_patch16", "mae_vit_large_patch16"'
            )
        model.mask_ratio = self.config.mask_ratio
        return model

    # -- a step ------------------------------------------------------------------------------------------------

    def on_step_start(self, ctx: Context) -> None:
        """Count micro-batches from 0."""
        self._micro = 0

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Draw the masks and keep the images at full precision; returns the batch as it is.

        A mask depends on the seed, the step and the sample's position in the training order, so it is the same on any
        number of ranks and after a resume. Samples without a position are named by rank and place in the step.
        """
        count = len(batch)
        if batch.positions is not None:
            names = batch.positions.cpu().numpy()
        else:
            names = ctx.rank * _FAR + self._micro * count + np.arange(count)
        self._micro += 1
        self._set_order(ctx, batch.images, f"mae/{ctx.step}", names)
        self._images = batch.images
        self._scale = (batch.mean, batch.std) if batch.mean is not None and batch.std is not None else None
        return batch

    def _set_order(self, ctx: Context, images: Tensor, stream: str, names: np.ndarray) -> Tensor:
        """Masks for the next forward pass; returns which patches are hidden, [N, L]."""
        module = ctx.engine.module
        patches = (images.shape[2] // module.patch) * (images.shape[3] // module.patch)
        seed = ctx.seed if self.config.seed is None else self.config.seed
        module.order = drawn_order(seed, stream, names, patches).to(images.device, non_blocking=True)
        return masked_patches(module.order, visible_patches(patches, self.config.mask_ratio))

    def loss(self, ctx: Context, outputs: Any, batch: Any) -> Tensor:
        """Mean over the valid images of the squared error on their hidden patches, in float32.

        With `Batch.denominator` it is the micro-batch's share of the mean over all ranks and micro-batches of the step.

        Raises:
            ConfigError: no batch was prepared before.
        """
        module = ctx.engine.module
        images = self._images
        if images is None or module.order is None:
            raise ConfigError(f"{KEY}: engine.loss belongs to a forward pass of training, engine(images), before it")
        if images.dtype == torch.uint8:  # at full bandwidth nobody has normalised them
            if self._scale is None:
                raise ConfigError("efftrain.data: uint8 images arrived without mean and std (Batch.mean, Batch.std)")
            images = normalize(images, *self._scale, torch.float32)
        target = make_target(images, module.patch, self.config.norm_pixels)
        hidden = masked_patches(module.order, visible_patches(module.order.shape[1], self.config.mask_ratio))
        each = sample_losses(outputs, target.values, hidden)
        if ctx.rank == 0:
            self._remember(images, outputs, target, hidden)
        valid, count = (batch.valid, batch.denominator) if isinstance(batch, Batch) else (None, None)
        if valid is not None:
            each = torch.where(valid, each, 0.0)
            count = valid.sum().clamp(min=1) if count is None else count
        return each.mean() if count is None else each.sum() / count

    def _remember(self, images: Tensor, outputs: Tensor, target: Target, hidden: Tensor) -> None:
        """Copy a few samples for a picture: the whole output is not to be kept alive for them."""
        few = Target(*(part[:_SHOWN] for part in (target.values, target.mean, target.scale)))
        predicted = few.pixels(outputs[:_SHOWN].detach().float())
        self._sample = (images[:_SHOWN].detach().clone(), predicted, hidden[:_SHOWN].clone(), self._scale)

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Let go of the batch."""
        ctx.engine.module.order = self._images = None

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Loss of held-out images; every image has the same mask in every evaluation."""
        module = ctx.engine.module
        names = batch.ids.cpu().numpy() if batch.ids is not None else np.arange(len(batch))
        hidden = self._set_order(ctx, batch.images, "mae/held out", names)
        try:
            outputs = ctx.engine(batch.images)
        finally:
            module.order = None
        target = make_target(batch.images, module.patch, self.config.norm_pixels)
        return {"loss": sample_losses(outputs, target.values, hidden)}

    # -- words and pictures ------------------------------------------------------------------------------------

    def pictures(self, ctx: Context) -> dict[str, Tensor]:
        """Images of the last step: as seen, their visible patches, and the hidden ones as predicted.

        With `norm_pixels` mean and contrast of a predicted patch are the true ones, as only the rest is predicted.
        """
        if self._sample is None:
            return {}
        images, predicted, hidden, scale = self._sample
        channels = images.shape[1]
        mean, std = scale if scale is not None else ((0.5,) * channels, (0.25,) * channels)
        return {
            "mae/seen_visible_predicted": reconstruction_picture(
                images, predicted, hidden, ctx.engine.module.patch, mean, std
            )
        }

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Visible patches of an image in the current stage."""
        if ctx.schedule is None:
            return {}
        side = int(ctx.settings.get("bandwidth", ctx.schedule.spec.resolution))
        return {"stage/visible_patches": float(visible_patches(self._patches(ctx, side), self.config.mask_ratio))}

    def _patches(self, ctx: Context, side: int) -> int:
        return (side // ctx.engine.module.patch) ** 2

    def describe(self, stage: Stage) -> str:
        """For example ``"mask 0.75"``."""
        return f"mask {self.config.mask_ratio:g}"
