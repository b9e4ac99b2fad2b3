"""The supernets of `named` in timm's registry, so that ``efftrain.model.name`` can name them."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import nn

from ...core.errors import ModelError
from .named import space_and_rest

__all__: list[str] = []

_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices")
"""What timm passes to every builder."""


def _build(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ModelError(f"efftrain.model.pretrained: there are no weights of {name}; use efftrain.model.init")
    space, rest = space_and_rest(name, {key: value for key, value in kwargs.items() if key not in _TIMM})
    return space.supernet(**rest)


@register_model
def elasticvit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Supernet of ElasticViT's space: convolution stages, then transformer stages."""
    return _build("elasticvit", pretrained, kwargs)


@register_model
def elastic_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Supernet of a plain vision transformer; its space is given by the arguments."""
    return _build("elastic_vit", pretrained, kwargs)


@register_model
def elastic_autoformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Supernet of AutoFormer's tiny space."""
    return _build("elastic_autoformer_tiny", pretrained, kwargs)


@register_model
def elastic_autoformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Supernet of AutoFormer's small space."""
    return _build("elastic_autoformer_small", pretrained, kwargs)


@register_model
def elastic_autoformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Supernet of AutoFormer's base space."""
    return _build("elastic_autoformer_base", pretrained, kwargs)
