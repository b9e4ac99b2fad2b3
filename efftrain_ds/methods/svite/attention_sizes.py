"""How many tokens a model has in each stage, and what attention with live blocks costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...core.errors import ModelError
from ...core.timeline import PlanSpec, Stage
from ...cost.plan import bandwidth_of
from ...kernels.attention import BlockMask
from .accounting import live_counts
from .attention_config import KEY
from .attention_masks import SHORT
from .densities import clean_name

WHY_SHORT = (
    f"up to {SHORT} tokens attention is bound by memory traffic: the kernels compute masked blocks too, so a mask "
    "saves nothing. Use larger images or smaller patches, remove whole heads or tokens instead, or set allow_short to "
    "experiment"
)


def plan_tokens(spec: PlanSpec, side: int) -> int:
    """Tokens of square images before there is a model."""
    return (side // spec.stride) ** 2 + spec.prefix


def patch_grid(model: nn.Module, side: int | None) -> tuple[tuple[int, int], int]:
    """Rows and columns of patches for images of the given side where the model takes several, and prefix tokens.

    Raises:
        ModelError: the model does not say.
    """
    embed = getattr(model, "patch_embed", None)
    grid, prefix = getattr(embed, "grid_size", None), getattr(model, "num_prefix_tokens", None)
    if grid is None or prefix is None:
        raise ModelError(
            f"{KEY}: {type(model).__name__} does not say how many tokens it has; needed are patch_embed.grid_size and "
            "num_prefix_tokens, as timm's vision transformers have them"
        )
    drop = getattr(model, "patch_drop", None)
    if getattr(drop, "prob", 0) and not isinstance(drop, nn.Identity):
        raise ModelError(
            f"{KEY}: patch_drop_rate {drop.prob:g} changes the number of tokens while training; set it to 0"
        )
    if side is not None and getattr(model, "dynamic_img_size", False):
        grid = embed.dynamic_feat_size((side, side))  # type: ignore[union-attr]
    return (int(grid[0]), int(grid[1])), int(prefix)


def stage_tokens(model: nn.Module, stage: Stage, full: int, spec: PlanSpec) -> int:
    """Tokens of the sequences in a stage; `full` where no setting changes the size of the images."""
    side = bandwidth_of(stage.settings, 0)
    if side == 0 or side == spec.resolution:
        return full
    grid, prefix = patch_grid(model, side)
    return grid[0] * grid[1] + prefix


def other_length(stage: Stage, tokens: int, full: int) -> str:
    """What is wrong with a stage for learned masks."""
    return (
        f"{KEY}: stage {stage.index} ({dict(stage.settings)}) has {tokens} tokens, the full model {full}; learned "
        'masks are for one number of tokens: use a fixed pattern ("window", "strided", "random"), or no method that '
        "changes the size of the images"
    )


def attention_macs(model: nn.Module, current: Mapping[str, tuple[BlockMask | None, int]]) -> dict[str, float]:
    """Forward MACs of an image with live blocks only, and with all; pairs of tokens in partial blocks count exactly."""
    counts, modules = live_counts(model), {clean_name(name): module for name, module in model.named_modules()}
    tokens = next(iter(current.values()))[1]
    prefix = getattr(model, "num_prefix_tokens", 1)
    dense = counts.macs(tokens - prefix, prefix)
    saved = 0
    for name, (mask, _) in current.items():
        if mask is None:
            continue
        module = modules[name]
        sizes = torch.full((mask.keep.shape[1],), mask.block)
        sizes[-1] = tokens - mask.block * (len(sizes) - 1)
        dead = int(((~mask.keep.cpu()) * torch.outer(sizes, sizes)).sum()) * (module.num_heads // mask.num_heads)
        saved += 2 * dead * module.head_dim
    return {"macs": dense - saved, "dense_macs": dense}
