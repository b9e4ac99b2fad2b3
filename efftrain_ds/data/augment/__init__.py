"""Augmentation of whole batches on the device, drawn per sample from (seed, position)."""

from .chain import DeviceAugment, horizontal_flip, normalize
from .erasing import RandomErasing
from .mixing import BatchMixer, Mix, mixed_cross_entropy
from .randaugment import OPS, Drawn, RandAugment, apply_ops, level_arguments

__all__ = [
    "OPS",
    "BatchMixer",
    "DeviceAugment",
    "Drawn",
    "Mix",
    "RandAugment",
    "RandomErasing",
    "apply_ops",
    "horizontal_flip",
    "level_arguments",
    "mixed_cross_entropy",
    "normalize",
]
