"""Frozen teachers: any timm model with the classes of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ModelError
from ...core.ranks import agree, text_of
from ...models.weights import read_file
from .config import KEY, TeacherConfig


class Teacher:
    """One teacher; no part of the trained module, so neither the optimizer nor checkpoints know it.

    It gets the images of the step, brought to its own size and normalisation.

    Args:
        net: returns logits [B, classes].
        resolution: side of its images; None takes them as they are.
        mean: channel means of its training, None = those of the run.
        std: channel standard deviations.
    """

    def __init__(
        self,
        net: nn.Module,
        resolution: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.resolution = resolution
        self.mean, self.std = mean, std

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        self.net.to(device, dtype)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W].

        Args:
            images: as the student gets them.
            mean: with which they were normalised; None where that is not known or the teacher's.
            std: likewise.
        """
        kind = next(self.net.parameters()).dtype
        if mean is not None and self.mean is not None and (tuple(mean), tuple(std or ())) != (self.mean, self.std):
            images = images.float() * _column(std, images) + _column(mean, images)
            images = (images - _column(self.mean, images)) / _column(self.std, images)
        if self.resolution is not None and images.shape[-1] != self.resolution:
            size = (self.resolution, self.resolution)
            images = F.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
        return self.net(images.to(kind))


def _column(values: Any, images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)


def make_teachers(configs: Sequence[TeacherConfig], num_classes: int) -> list[Teacher]:
    """Build all teachers. Collective where a process group is there: all ranks hear of what one cannot read.

    Raises:
        ModelError: unknown model, weights that cannot be had or do not fit, or another number of classes.
    """
    teachers: list[Teacher] = []
    problem = None
    try:
        teachers = [_make(config, f"{KEY}.teachers.{j}", num_classes) for j, config in enumerate(configs)]
    except Exception as error:  # a registry, a hub or a network says no in many ways
        problem = text_of(error)
    agree(problem, ModelError)
    return teachers


def _make(config: TeacherConfig, where: str, num_classes: int) -> Teacher:
    import timm

    name = config.model
    if ":" not in name and not timm.is_model(name):
        raise ModelError(f'{where}.model: timm has no model "{name}"')
    weights = None
    if config.weights is not None:
        try:
            weights = read_file(Path(config.weights))
        except ModelError as error:
            raise ModelError(f"{where}.weights: {str(error).partition('weights: ')[2]}") from error
    kwargs = dict(config.kwargs)
    if weights is not None and "num_classes" not in kwargs:
        kwargs["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers do not depend on its teachers
        net = timm.create_model(name, pretrained=weights is None, **kwargs)
    if weights is not None:
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(f"{where}.weights: {config.weights}: {error}") from error
    found = getattr(net, "num_classes", None)
    if found != num_classes:
        raise ModelError(
            f"{where}: {name} tells {found} classes apart, this run has {num_classes}; a teacher needs the same "
            "classes in the same order"
        )
    settings = getattr(net, "pretrained_cfg", None) or {}
    side = config.resolution
    if side is None and weights is None:
        side = int(settings.get("input_size", (3, 0, 0))[-1]) or None
    mean, std = settings.get("mean"), settings.get("std")
    if weights is not None:  # of unknown training: the run's own images
        mean = std = None
    return Teacher(net, side, tuple(mean) if mean else None, tuple(std) if std else None)
