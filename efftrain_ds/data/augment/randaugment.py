"""RandAugment on a batch of uint8 images on any device, one independent draw a sample.

Semantics of timm's ``rand-mM-nN-mstdS-inc1-pP`` (Cubuk et al., "RandAugment", arXiv:1909.13719, with timm's level
functions), except: resampling is always bilinear (timm takes the training interpolation, or draws one of bilinear and
bicubic), and Posterize keeps at least one bit (at zero bits Pillow 13 raises and older versions return black).

The operations are drawn on the host, from counters, so a sample's augmentation depends on (seed, position) only and
never on the batch it is in. Each layer sorts its samples by operation, so that every kind is a slice that is worked on
in place by a few kernels, and untouched samples cost nothing. One buffer of indices and parameters goes to the device;
nothing comes back.

Legend: N samples, L layers, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core.draws import uniforms
from . import color, geometry, tables
from .transfer import Transfer

# The order groups the kinds that share kernels: tables (five fixed, two from the image), blends, geometry.
OPS = (
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Invert",
    "Brightness",
    "AutoContrast",
    "Equalize",
    "Color",
    "Contrast",
    "Sharpness",
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
IDLE = len(OPS)
"""Code of a sample that a layer leaves alone."""
_AUTOCONTRAST, _EQUALIZE, _BLEND, _SHARPNESS, _GEOMETRY = (
    OPS.index(name) for name in ("AutoContrast", "Equalize", "Color", "Sharpness", "Rotate")
)
_EDGES = np.arange(IDLE + 1)
_ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")


def _per_op(default: float, **values: float) -> np.ndarray:
    """One value for each code, the idle one included."""
    return np.array([values.get(name, default) for name in (*OPS, "")])


_SLOPES = {
    "Posterize": 4,
    "Solarize": 256,
    "SolarizeAdd": 110,
    "Rotate": 30,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateXRel": 0.45,
    "TranslateYRel": 0.45,
}
_WHOLE = _per_op(0, Posterize=1, Solarize=1, SolarizeAdd=1).astype(bool)
_LOWEST = _per_op(-math.inf, Posterize=1, **dict.fromkeys(_ENHANCE, 0.1))
# increasing -> (value at level 0, change over the levels 0..10, has a random sign)
_LEVELS = {
    True: (
        _per_op(0, Posterize=4, Solarize=256, **dict.fromkeys(_ENHANCE, 1)),
        _per_op(0, **{**_SLOPES, "Posterize": -4, "Solarize": -256, **dict.fromkeys(_ENHANCE, 0.9)}),
        _per_op(0, **dict.fromkeys((*OPS[_GEOMETRY:], *_ENHANCE), 1)).astype(bool),
    ),
    False: (
        _per_op(0, **dict.fromkeys(_ENHANCE, 0.1)),
        _per_op(0, **_SLOPES, **dict.fromkeys(_ENHANCE, 1.8)),
        _per_op(0, **dict.fromkeys(OPS[_GEOMETRY:], 1)).astype(bool),
    ),
}


def level_arguments(ops: np.ndarray, levels: np.ndarray, negate: np.ndarray, increasing: bool = True) -> np.ndarray:
    """Argument of each operation at a level (timm's ``LEVEL_TO_ARG``).

    Args:
        ops: integer codes, places in `OPS` (or `IDLE`).
        levels: magnitudes in 0..10, same shape.
        negate: bool, same shape; used by the operations that have a random sign.
        increasing: severity grows with the level for every operation ("inc1").

    Returns:
        float64 of the same shape: bits, thresholds, amounts, factors, degrees, shears or shares of the side.
    """
    start, slope, signed = _LEVELS[increasing]
    change = levels / 10 * slope[ops]
    change = np.where(_WHOLE[ops], np.trunc(change), np.where(negate & signed[ops], -change, change))
    return np.maximum(start[ops] + change, _LOWEST[ops])


@dataclass(frozen=True)
class Drawn:
    """The operations of one batch.

    Attributes:
        ops: [L, N] integers, places in `OPS` or `IDLE`.
        arguments: [L, N] float64, see `level_arguments`.
    """

    ops: np.ndarray
    arguments: np.ndarray


class RandAugment:
    """Batched RandAugment; see the module for what it does.

    Args:
        num_ops: operations of each sample.
        magnitude: strength 0..10.
        magnitude_std: standard deviation of the normal noise on it (the sum is clipped to 0..10); infinity draws
            uniformly in 0..magnitude.
        prob: probability that a chosen operation is applied.
        increasing: timm's "inc1" level functions.
        fill: levels outside the image after a geometric operation (default: ImageNet's mean, as timm).
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 9.0,
        magnitude_std: float = 0.5,
        prob: float = 0.5,
        increasing: bool = True,
        fill: Sequence[int] = (124, 116, 104),
    ):
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.magnitude_std = magnitude_std
        self.prob = prob
        self.increasing = increasing
        self.fill = tuple(fill)

    def draw(self, positions: np.ndarray, seed: int, magnitude: float | None = None) -> Drawn:
        """The operations of the samples at `positions`; a pure function of (seed, position, magnitude).

        Args:
            positions: [N] integers.
            seed: seed of the run.
            magnitude: strength 0..10 instead of the one given at construction.

        Returns:
            Codes and arguments of every layer.
        """
        u = uniforms(seed, "randaugment", positions, 5 * self.num_ops).reshape(len(positions), self.num_ops, 5)
        choice, apply, sign, first, second = u.transpose(2, 1, 0)
        ops = np.where(apply < self.prob, (choice * len(OPS)).astype(np.int64), IDLE)
        strength = self.magnitude if magnitude is None else magnitude
        if math.isinf(self.magnitude_std):
            levels = strength * first
        else:  # Box-Muller
            noise = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
            levels = strength + self.magnitude_std * noise
        return Drawn(ops, level_arguments(ops, levels.clip(0, 10), sign >= 0.5, self.increasing))

    def __call__(
        self, images: Tensor, positions: np.ndarray | Tensor, seed: int, magnitude: float | None = None
    ) -> Tensor:
        """Augment a batch.

        Args:
            images: [N, 3, H, W] uint8 on any device; not changed.
            positions: [N] integers on the host, places in the training order.
            seed: seed of the run.
            magnitude: strength 0..10 instead of the one given at construction.

        Returns:
            [N, 3, H, W] uint8.
        """
        return apply_ops(images, self.draw(np.asarray(positions), seed, magnitude), self.fill)


@dataclass(frozen=True)
class _Layer:
    """One layer: samples of kind k stand at ``edge[k]..edge[k + 1]``; the rest are tickets of the transfer."""

    edge: list[int]
    order: int
    fixed: int
    factor: int
    theta: int


def _prepare(drawn: Drawn, transfer: Transfer, height: int, width: int) -> tuple[list[_Layer], int]:
    """Put what every layer needs into `transfer`; returns the layers and the ticket of the final order."""
    orders = np.argsort(drawn.ops, axis=1, kind="stable")
    place = np.arange(drawn.ops.shape[1])  # where each sample stands after the layers so far
    layers = []
    for ops, arguments, order in zip(drawn.ops, drawn.arguments, orders, strict=True):
        edge = np.searchsorted(ops[order], _EDGES).tolist()
        argument = arguments[order]
        theta = geometry.normalized_affine(argument[edge[_GEOMETRY] : edge[IDLE]], edge[_GEOMETRY:], height, width)
        layers.append(
            _Layer(
                edge,
                order=transfer.add(place[order]),
                fixed=transfer.add(tables.fixed_tables(argument[: edge[_AUTOCONTRAST]], edge[: _AUTOCONTRAST + 1])),
                factor=transfer.add(argument[edge[_BLEND] : edge[_GEOMETRY]].astype(np.float32)),
                theta=transfer.add(theta),
            )
        )
        place[order] = np.arange(len(order))
    return layers, transfer.add(place)


def apply_ops(images: Tensor, drawn: Drawn, fill: Sequence[int] = (124, 116, 104)) -> Tensor:
    """Apply drawn operations layer by layer.

    Args:
        images: [N, 3, H, W] uint8; not changed.
        drawn: operations and arguments.
        fill: levels outside the image after a geometric operation.

    Returns:
        [N, 3, H, W] uint8, contiguous new memory.
    """
    assert images.dtype == torch.uint8, f"RandAugment takes uint8 images, found {images.dtype}"
    assert images.shape[1:2] == (3,), f"RandAugment takes [N, 3, H, W], found {tuple(images.shape)}"
    transfer = Transfer()
    layers, restore = _prepare(drawn, transfer, *images.shape[2:])
    background = transfer.add(np.asarray(fill, dtype=np.float32))
    transfer.send(images.device)
    get = transfer.get
    out = images
    for layer in layers:
        edge = layer.edge
        out = out.index_select(0, get(layer.order))
        if edge[_BLEND]:
            tables.recode_(out[: edge[_BLEND]], get(layer.fixed), edge[_EQUALIZE] - edge[_AUTOCONTRAST])
        if edge[_GEOMETRY] > edge[_BLEND]:
            kinds = np.diff(edge[_BLEND : _SHARPNESS + 1]).tolist()
            color.enhance_(out[edge[_BLEND] : edge[_GEOMETRY]], get(layer.factor), *kinds)
        if edge[IDLE] > edge[_GEOMETRY]:
            geometry.affine_(out[edge[_GEOMETRY] : edge[IDLE]], get(layer.theta), get(background))
    return out.index_select(0, get(restore))
