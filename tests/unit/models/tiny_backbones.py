"""Small versions of every family of backbones, made by the same `create_model` as a run makes its model."""

from __future__ import annotations

from typing import Any

from torch import nn

from efftrain_ds.models.adapters import accept_sizes, create_model

_WIDTHS = (8, 16, 24, 32)
_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": _WIDTHS}),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": _WIDTHS}),
    "deit": ("deit_tiny_patch16_224", _VIT),
    "vit": ("vit_tiny_patch16_224", {**_VIT, "class_token": False, "global_pool": "avg"}),
    "deit3": ("deit3_small_patch16_224", _VIT),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": _WIDTHS, "num_heads": (1, 2, 2, 2)}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}),
    "cswin": ("cswin_tiny_224", {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)}),
}
FAMILIES = (*TINY, "caformer", "volo")
STRIDES = {"deit": 16, "vit": 16, "deit3": 16, "volo": 16}
"""Total stride in pixels where it is not 32."""


def tiny(family: str, resolution: int, num_classes: int = 5, **more: Any) -> nn.Module:
    """A model of one family that takes several image sizes."""
    if family == "caformer":  # timm's entry points fix the sizes of this one and of the next
        from timm.models import metaformer

        mixers = [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention]
        return metaformer.MetaFormer(
            depths=[1, 1, 1, 1],
            dims=[16, 32, 32, 64],
            token_mixers=mixers,
            norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
            num_classes=num_classes,
            **more,
        )
    if family == "volo":
        from timm.models.volo import VOLO

        sizes = {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)}
        return accept_sizes(VOLO(**sizes, stem_hidden_dim=16, img_size=resolution, num_classes=num_classes, **more))
    name, kwargs = TINY[family]
    if family == "swin":
        kwargs = {**kwargs, "window_size": resolution // 32}
    return create_model(name, resolution=resolution, num_classes=num_classes, dynamic=True, **{**kwargs, **more})
