"""Masks in the attention layers of a model: put in before the run, compared with the configuration, and updated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from ...core.errors import ConfigError, ModelError, NoEffectWarning
from ...kernels.attention import BlockMask
from ...models.attention import masked_attention, serve_lengths, use_block_attention
from ...models.attention_scores import BlockScores
from .attention_config import KEY, AttentionConfig
from .attention_masks import SHORT, FixedMask, Layer, exchange, first_keep, fixed_keep, live_count, protected
from .attention_sizes import WHY_SHORT, excluded, patch_grid
from .densities import clean_name


class Masked(NamedTuple):
    """What the masks of a model are for.

    Attributes:
        tokens: of the sequences.
        prefix: those of them that are not patches.
        grid: rows and columns of patches.
        layers: clean names of the attention layers that have a mask.
    """

    tokens: int
    prefix: int
    grid: tuple[int, int]
    layers: list[str]


def check_length(config: AttentionConfig, tokens: int, kind: type[Exception]) -> None:
    """Refuse sequences that are too short, by an exception of a kind."""
    if tokens <= SHORT and not config.allow_short:
        raise kind(f"{KEY}: the sequences have {tokens} tokens; {WHY_SHORT}")


def mask_attention(model: nn.Module, config: AttentionConfig, side: int | None, seed: int) -> Masked:
    """Give the attention layers their first or fixed masks, in place.

    Args:
        model: to be masked.
        config: of the method.
        side: of the images in pixels, where the model takes several.
        seed: of random blocks.

    Raises:
        ModelError: naming what cannot take a mask.
    """
    grid, prefix = patch_grid(model, side)
    tokens = grid[0] * grid[1] + prefix
    check_length(config, tokens, ModelError)
    names = {clean_name(name) for name, _ in model.named_modules()}
    for name in config.exclude:
        if name not in names:
            raise ModelError(f'{KEY}.exclude: {type(model).__name__} has no module "{name}"')
    makers: dict[str, FixedMask] = {}

    def make(name: str, module: nn.Module) -> BlockMask | None:
        if excluded(config, clean_name(name)):
            return None
        layer = Layer(clean_name(name), module.num_heads, prefix, seed)
        if config.pattern == "learned":
            return BlockMask(first_keep(config, layer, tokens), tokens, tokens, config.block)
        makers[name] = FixedMask(config, layer)
        return BlockMask(fixed_keep(config, layer, tokens, grid), tokens, tokens, config.block)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            use_block_attention(model, make)
        serve_lengths(model, makers)
    except ModelError as error:
        raise ModelError(f"{KEY}: {error}") from error
    layers = masked_attention(model)
    if not layers:
        raise ModelError(
            f"{KEY}: {type(model).__name__} has no attention layer that can take a mask; needed is timm's "
            "Attention (vit_*, deit_*)" + (f" outside of exclude {config.exclude}" if config.exclude else "")
        )
    if all(bool(module.block_mask.keep.all()) for module in layers.values()):
        warnings.warn(f"{KEY}: every block of the attention lives, so nothing is saved", NoEffectWarning, 2)
    return Masked(tokens, prefix, grid, [clean_name(name) for name in layers])


def check_resumed(config: AttentionConfig, layers: Mapping[str, nn.Module], of: Masked) -> None:
    """Refuse to go on with a checkpoint's masks under a configuration that they do not follow.

    Args:
        config: of this run.
        layers: with the checkpoint's masks, by clean name.
        of: what `mask_attention` has returned in this run.

    Raises:
        ConfigError: names the key.
    """
    own = f"set {KEY} as it was, or begin a new run"
    for name, module in layers.items():
        mask = module.block_mask
        keep = mask.keep.cpu()
        if config.pattern in ("window", "strided"):
            layer = Layer(name, module.num_heads, of.prefix, 0)
            if not torch.equal(keep, fixed_keep(config, layer, mask.q_len, of.grid)):
                raise ConfigError(
                    f"{KEY}.pattern: the checkpoint's mask of {name} is not that of "
                    f'"{config.pattern}" with {_sizes(config)}; {own}'
                )
            continue
        live, want = set(keep.sum((1, 2)).tolist()), live_count(config, mask.q_len)
        if live != {want}:
            raise ConfigError(
                f"{KEY}.density, {KEY}.pattern: {config.target:g} is {want} live blocks a head, but the checkpoint's "
                f"{name} has {', '.join(map(str, sorted(live)))}; {own}"
            )
        if not keep[:, protected(config, mask.q_len, of.prefix)[0]].all():
            raise ConfigError(
                f"{KEY}.protect: blocks that {config.protect} protects do not live in the checkpoint's {name}; {own}"
            )


def update_layer(
    mask: BlockMask, scores: BlockScores, config: AttentionConfig, prefix: int, alpha: float, generator: torch.Generator
) -> dict[str, list[int]]:
    """Update the mask of a layer from what is equal on all ranks.

    Args:
        mask: of the layer; changed in place.
        scores: of all its blocks.
        config: of the method.
        prefix: tokens that are not patches.
        alpha: share of the live blocks to exchange.
        generator: for random growth, equal on all ranks.

    Returns:
        Blocks that live, were dropped, and came back at once, of each head; none for a layer that took no part.
    """
    keep, mass, slope = mask.keep.cpu(), scores.mass.cpu(), scores.slope.cpu()
    certain, new = protected(config, mask.q_len, prefix)[0], keep.clone()
    counts: dict[str, list[int]] = {"live": [], "dropped": [], "regrown": []}
    for head in range(keep.shape[0] if bool(mass.any()) else 0):
        grow = slope[head] if config.growth == "gradient" else None
        done = exchange(keep[head], mass[head], grow, certain, alpha, generator, config.exclude_just_dropped)
        new[head] = done.mask
        for key, units in (("live", new[head]), ("dropped", done.dropped), ("regrown", done.dropped & done.grown)):
            counts[key].append(int(units.sum()))
    mask.update_(new.to(mask.keep.device))
    return counts


def _sizes(config: AttentionConfig) -> str:
    if config.pattern == "window":
        return f"window {config.window}"
    return f"stride {config.stride} and local {config.local}"
