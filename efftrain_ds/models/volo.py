"""timm's VOLO at several image sizes: its position embedding is resampled in each forward, as a dynamic ViT's is."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..core.errors import ModelError


def accept_sizes(model: nn.Module) -> nn.Module:
    """Let a VOLO take images of any side that is a multiple of 16, in place; no parameter changes.

    ``pos_embed`` [1, H, W, C] stays a parameter on the grid of the full size. At another size it is resampled
    (bicubic, antialiased) inside the forward, so gradients reach all of it; at the full size it is added as it is.

    Raises:
        ModelError: not a VOLO of timm.
    """
    from timm.models.volo import VOLO

    if not isinstance(model, VOLO):
        raise ModelError(f"{type(model).__name__} is not timm's VOLO")
    if not getattr(model, "dynamic_img_size", False):
        model.__class__ = _dynamic(type(model))
    return model


@functools.cache
def _dynamic(base: Any) -> type[nn.Module]:
    """Subclass of `base` (timm's VOLO or a subclass) that resamples its position embedding."""
    from timm.layers import resample_abs_pos_embed_nhwc
    from timm.models import checkpoint

    def forward_tokens(self: Any, x: Tensor) -> Tensor:
        """Stages over tokens [B, H, W, C]; returns [B, N, C]."""
        for index, stage in enumerate(self.network):
            if index == 2 and self.pos_embed is not None:  # after the outlookers and the down-sampling
                grid = [x.shape[1], x.shape[2]]
                x = self.pos_drop(x + resample_abs_pos_embed_nhwc(self.pos_embed, grid))
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
        return x.flatten(1, 2)

    # the class attribute says the same as that of a ViT built with dynamic_img_size=True
    body = {"forward_tokens": forward_tokens, "dynamic_img_size": True, "__doc__": accept_sizes.__doc__}
    return type(f"Dynamic{base.__name__}", (base,), {**body, "__module__": __name__})
