"""Multiply-accumulate operations (MACs) of one forward pass, without weights and without a device.

MACs count the matrix products and convolutions; biases, norms, activations and the softmax are left out (below 1 % of
a ViT). FLOPs = 2 x MACs. One training sample costs 3 forward passes: forward, gradient of the inputs, gradient of the
weights.

Shape legend: n tokens, d width, L blocks, P patch side.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError

TRAINING_FACTOR = 3
"""Training MACs of a sample per forward MAC."""

_WIDTHS = {  # d, L of the plain ViT sizes (Dosovitskiy et al. 2021; Touvron et al. 2021 and 2022)
    "tiny": (192, 12),
    "small": (384, 12),
    "medium": (512, 12),
    "base": (768, 12),
    "large": (1024, 24),
    "huge": (1280, 32),
}
_PLAIN = {  # family, size -> allowed "patch_side" endings in timm's registry
    ("vit", "tiny"): {"16_224", "16_384"},
    ("vit", "small"): {"8_224", "16_224", "16_384", "32_224", "32_384"},
    ("vit", "base"): {"8_224", "16_224", "16_384", "32_224", "32_384"},
    ("vit", "large"): {"14_224", "16_224", "16_384", "32_224", "32_384"},
    ("vit", "huge"): {"14_224"},
    ("deit", "tiny"): {"16_224"},
    ("deit", "small"): {"16_224"},
    ("deit", "base"): {"16_224", "16_384"},
    ("deit3", "small"): {"16_224", "16_384"},
    ("deit3", "medium"): {"16_224"},
    ("deit3", "base"): {"16_224", "16_384"},
    ("deit3", "large"): {"16_224", "16_384"},
    ("deit3", "huge"): {"14_224"},
}
_NAME = re.compile(r"^(vit|deit|deit3)_(tiny|small|medium|base|large|huge)_patch(\d+)_(\d+)(?:\..+)?$")
_SHAPING = {
    "embed_dim": "dim",
    "depth": "depth",
    "mlp_ratio": "mlp_ratio",
    "patch_size": "patch",
    "in_chans": "channels",
}
_NEUTRAL = {
    "num_heads", "dynamic_img_size", "dynamic_img_pad", "drop_rate", "drop_path_rate", "proj_drop_rate",
    "attn_drop_rate", "pos_drop_rate", "patch_drop_rate",
}  # fmt: skip


@dataclass(frozen=True)
class VitShape:
    """What decides the cost of a plain vision transformer.

    Attributes:
        patch: side of a patch in pixels.
        dim: width d.
        depth: number of blocks L.
        image: side in pixels of the grid that the position embedding is made for.
        mlp_ratio: hidden width of the MLP divided by d.
        channels: image channels.
        prefix: tokens that are not patches (class token).
        layer_scale: has a learned scale after each branch (parameters only).
        embeds_prefix: the position embedding has a row for each prefix token.
    """

    patch: int
    dim: int
    depth: int
    image: int = 224
    mlp_ratio: float = 4.0
    channels: int = 3
    prefix: int = 1
    layer_scale: bool = False
    embeds_prefix: bool = True

    def tokens(self, resolution: int) -> int:
        """Tokens of an image of side `resolution`, prefix tokens included (a rest is padded to a full patch)."""
        return (-(-resolution // self.patch)) ** 2 + self.prefix

    def macs(self, resolution: int, num_classes: int) -> int:
        """Forward MACs of one image."""
        return vit_macs(
            resolution,
            patch=self.patch,
            dim=self.dim,
            depth=self.depth,
            mlp_ratio=self.mlp_ratio,
            num_classes=num_classes,
            channels=self.channels,
            prefix=self.prefix,
        )

    def params(self, num_classes: int) -> int:
        """Number of parameters."""
        d, hidden = self.dim, int(self.dim * self.mlp_ratio)
        block = 4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d + (2 * d if self.layer_scale else 0)
        rows = (-(-self.image // self.patch)) ** 2 + (self.prefix if self.embeds_prefix else 0)
        embedding = (self.channels * self.patch**2 + 1) * d + (self.prefix + rows) * d
        return embedding + self.depth * block + 2 * d + (d + 1) * num_classes


def vit_macs(
    resolution: int,
    *,
    patch: int = 16,
    dim: int,
    depth: int,
    mlp_ratio: float = 4.0,
    num_classes: int = 1000,
    channels: int = 3,
    prefix: int = 1,
) -> int:
    """Forward MACs of one image through a plain ViT: ``L (12 n d^2 + 2 n^2 d) + (n - 1) C P^2 d + classes d``.

    The 12 is 4 (query, key, value, projection) + 2 x `mlp_ratio`; ``2 n^2 d`` are the two products of the attention.
    """
    patches = (-(-resolution // patch)) ** 2
    n = patches + prefix
    block = n * (4 * dim * dim + 2 * dim * int(dim * mlp_ratio)) + 2 * n * n * dim
    return depth * block + patches * channels * patch * patch * dim + num_classes * dim


def vit_shape(name: str, kwargs: Mapping[str, Any] | None = None, *, image: int | None = None) -> VitShape | None:
    """The shape of a plain ViT or DeiT by its timm name, without importing timm (whose import takes seconds).

    Args:
        name: timm model name; a pretrained tag after the dot is ignored.
        kwargs: keyword arguments of ``timm.create_model``.
        image: side of the position embedding's grid; None takes `kwargs` and then the name.

    Returns:
        The shape, or None where the name or an argument is not one this closed form covers.
    """
    match = _NAME.match(name)
    if match is None:
        return None
    family, size, patch, side = match.groups()
    if f"{patch}_{side}" not in _PLAIN.get((family, size), ()):
        return None
    arguments = dict(kwargs or {})
    grid = arguments.pop("img_size", None)
    # without a class token the patches are averaged; timm then moves the last norm behind the pooling (same size)
    pool, token = arguments.pop("global_pool", "token"), arguments.pop("class_token", True)
    if pool not in ("token", "avg") or not isinstance(token, bool) or (pool == "token" and not token):
        return None
    dim, depth = _WIDTHS[size]
    deit3 = family == "deit3"
    shape = VitShape(int(patch), dim, depth, int(side), layer_scale=deit3, embeds_prefix=not deit3)
    shape = replace(shape, prefix=int(token))
    if set(arguments) - set(_SHAPING) - _NEUTRAL or not (grid is None or isinstance(grid, int)):
        return None
    changes = {_SHAPING[key]: value for key, value in arguments.items() if key in _SHAPING}
    return replace(shape, image=image or grid or shape.image, **changes)


@contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Switch fused attention off inside: counters see nothing of the fused CPU kernel."""
    fused = [m for m in module.modules() if getattr(m, "fused_attn", False) is True]
    for m in fused:
        m.fused_attn = False
    try:
        yield
    finally:
        for m in fused:
            m.fused_attn = True


def counted_macs(module: nn.Module, resolution: int, *, channels: int = 3) -> int:
    """Forward MACs of one [1, C, R, R] image by torch's counter on meta tensors.

    Raises:
        ModelError: the module cannot run at this resolution.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if any(p.device.type != "meta" for p in module.parameters()):
        module = copy.deepcopy(module).to("meta")
    was_training = module.training
    module.eval()
    image = torch.empty(1, channels, resolution, resolution, device="meta")
    try:
        with _plain_attention(module), FlopCounterMode(display=False) as counter:
            module(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{type(module).__name__} cannot run at {resolution} x {resolution} pixels: {str(error).splitlines()[0]}"
        ) from error
    finally:
        module.train(was_training)
    return counter.get_total_flops() // 2


def vit_module_shape(module: nn.Module) -> VitShape | None:
    """The shape of a built timm ``VisionTransformer`` from its attributes; None where a part is not the plain one."""
    if type(module).__name__ != "VisionTransformer" or not hasattr(module, "patch_embed"):
        return None
    weight = getattr(getattr(module.patch_embed, "proj", None), "weight", None)
    ratios = set()
    for block in module.blocks:
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if type(block).__name__ != "Block" or type(attention).__name__ != "Attention" or type(mlp).__name__ != "Mlp":
            return None
        d = module.embed_dim
        if attention.qkv.weight.shape != (3 * d, d) or mlp.fc1.in_features != d:
            return None
        ratios.add(mlp.fc1.out_features / d)
    if weight is None or weight.shape[-1] != weight.shape[-2] or len(ratios) != 1 or module.attn_pool is not None:
        return None
    return VitShape(
        patch=weight.shape[-1],
        dim=module.embed_dim,
        depth=len(module.blocks),
        image=module.patch_embed.img_size[0] if module.patch_embed.img_size else 224,
        mlp_ratio=ratios.pop(),
        channels=weight.shape[1],
        prefix=module.num_prefix_tokens,
        layer_scale=not isinstance(module.blocks[0].ls1, nn.Identity),
        embeds_prefix=not module.no_embed_class,
    )


def module_macs(module: nn.Module, resolution: int, *, channels: int = 3) -> int:
    """Forward MACs of one image: closed form for a plain timm ViT, torch's counter for everything else.

    Raises:
        ModelError: the module cannot run at this resolution.
    """
    shape = vit_module_shape(module)
    if shape is None:
        return counted_macs(module, resolution, channels=channels)
    head = getattr(module, "head", None)
    return shape.macs(resolution, head.out_features if isinstance(head, nn.Linear) else 0)


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


@lru_cache(maxsize=16)
def _timm_module(name: str, num_classes: int, kwargs: str) -> nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **json.loads(kwargs))


def build_meta(
    name: str,
    *,
    num_classes: int,
    kwargs: Mapping[str, Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """A model on the meta device (no memory, no weights); `build` replaces ``timm.create_model``.

    Raises:
        ModelError: the model is unknown or an argument does not fit it.
    """
    try:
        if build is not None:
            with torch.device("meta"):
                return build()
        return _timm_module(name, num_classes, json.dumps(dict(kwargs or {}), sort_keys=True))
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f'efftrain.model: cannot build "{name}" with {dict(kwargs or {})}: {error}') from error


def model_macs(name: str, resolution: int, *, num_classes: int = 1000, kwargs: Mapping[str, Any] | None = None) -> int:
    """Forward MACs of one image through a timm model at an input side of `resolution` pixels.

    Plain ViTs take the closed form and do not import timm. Models whose windows follow the input (Swin) are set to
    `resolution` first.

    Raises:
        ModelError: the model is unknown or cannot run at this resolution.
    """
    shape = vit_shape(name, kwargs)
    if shape is not None:
        return shape.macs(resolution, num_classes)
    module = build_meta(name, num_classes=num_classes, kwargs=kwargs)
    if vit_module_shape(module) is None and hasattr(module, "set_input_size"):
        module = copy.deepcopy(module)
        with torch.device("meta"):
            module.set_input_size((resolution, resolution))
    return module_macs(module, resolution, channels=(kwargs or {}).get("in_chans", 3))


def model_params(name: str, *, num_classes: int = 1000, kwargs: Mapping[str, Any] | None = None) -> int:
    """Number of parameters of a timm model.

    Raises:
        ModelError: the model is unknown.
    """
    shape = vit_shape(name, kwargs)
    return (
        shape.params(num_classes)
        if shape is not None
        else parameter_count(build_meta(name, num_classes=num_classes, kwargs=kwargs))
    )
