"""How many tokens a model has in each stage, whether the masks can be for so many, and what live blocks cost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...core.errors import ModelError, PlanError
from ...core.timeline import PlanSpec, Stage
from ...cost.plan import bandwidth_of
from ...kernels.attention import BlockMask
from ...kernels.attention.mask import num_blocks
from .accounting import grid_of, live_counts
from .attention_config import KEY, AttentionConfig
from .attention_masks import SHORT, Layer, first_keep, fixed_keep, live_count
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
    embed, prefix = getattr(model, "patch_embed", None), getattr(model, "num_prefix_tokens", None)
    if getattr(embed, "grid_size", None) is None or prefix is None:
        raise ModelError(
            f"{KEY}: {type(model).__name__} does not say how many tokens it has; needed are patch_embed.grid_size and "
            "num_prefix_tokens, as timm's vision transformers have them"
        )
    drop = getattr(model, "patch_drop", None)
    if getattr(drop, "prob", 0) and not isinstance(drop, nn.Identity):
        raise ModelError(
            f"{KEY}: patch_drop_rate {drop.prob:g} changes the number of tokens while training; set it to 0"
        )
    return grid_of(model, side), int(prefix)


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


def check_masks(config: AttentionConfig, tokens: int, prefix: int, where: str) -> None:
    """Refuse a pattern that cannot be for a number of tokens, before a model is there to make its masks.

    Args:
        config: of the method.
        tokens: of the sequences.
        prefix: those of them that are not patches.
        where: what has so many tokens, for the message.

    Raises:
        PlanError: the density is too low, or windows over patches that are no square.
    """
    if tokens <= SHORT and not config.allow_short:
        return  # these have no mask, or are refused elsewhere
    make = first_keep if config.pattern == "learned" else fixed_keep
    try:
        make(config, Layer("attention", 1, prefix, 0), tokens)
    except ModelError as error:
        raise PlanError(f"{KEY}: {where}: {error}") from error


def check_evaluation(config: AttentionConfig, spec: PlanSpec) -> None:
    """Refuse evaluations at a size that the masks cannot be for.

    Raises:
        PlanError: learned masks and another number of tokens, or as `check_masks`.
    """
    side = spec.eval_resolution
    if not side or side == spec.resolution:
        return
    full, tokens = plan_tokens(spec, spec.resolution), plan_tokens(spec, side)
    if config.pattern != "learned":
        if spec.width:
            check_masks(config, tokens, spec.prefix, f"efftrain.data.eval_resolution {side}")
    elif tokens != full:
        raise PlanError(
            f"efftrain.data.eval_resolution: images of {side} have {tokens} tokens, those of efftrain.data.resolution "
            f"{spec.resolution} have {full}; learned masks are for one number of tokens: evaluate at "
            f'{spec.resolution}, or set {KEY}.pattern to "window", "strided" or "random"'
        )


def live_share(config: AttentionConfig, tokens: int, prefix: int) -> float:
    """Live share of the blocks, before there is a model."""
    if config.pattern in ("learned", "random"):
        return live_count(config, tokens) / num_blocks(tokens, config.block) ** 2
    return float(fixed_keep(config, Layer("attention", 1, prefix, 0), tokens).float().mean())


def masked_share(config: AttentionConfig, depth: int) -> float:
    """Share of `depth` blocks whose attention is masked; 0 where some are excluded and `depth` is not known (0)."""
    if not config.exclude:
        return 1.0
    names = [f"blocks.{i}.attn" for i in range(depth)]
    return sum(not excluded(config, name) for name in names) / depth if depth else 0.0


def excluded(config: AttentionConfig, name: str) -> bool:
    """True for an attention layer of this clean name that sees everything."""
    return any(name == root or name.startswith(root + ".") for root in config.exclude)


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
