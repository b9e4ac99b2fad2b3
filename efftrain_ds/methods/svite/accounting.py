"""MACs of a sparse vision transformer from its live masks.

What the masks keep is counted, not what was configured; norms, softmax, activations, biases and additions are left
out, as in `cost.macs`. These are operations that a perfect kernel would need: unstructured masks do not make a dense
product faster.

Shape legend: S tokens (class token included), S_k tokens kept in the blocks, H heads of width d_h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...core.errors import ModelError
from ...models.tokens import selector_of
from .densities import clean_name

_PATCH, _HEADS = "patch_embed.proj.weight", ("head.weight", "head_dist.weight")


@dataclass(frozen=True)
class LiveCounts:
    """Live weights of a vision transformer, by how often a forward pass uses them.

    Attributes:
        patch: entries of the patch embedding.
        blocks: entries of each block's matrices.
        attention: H x d_h of each block: width of the two products of the attention.
        head: entries of the classifiers.
    """

    patch: int
    blocks: tuple[int, ...]
    attention: tuple[int, ...]
    head: int

    def macs(self, patches: int, prefix: int = 1, kept: int | Sequence[int] | None = None) -> int:
        """Forward MACs of one image: ``patches x patch + sum_blocks (S_k x entries + 2 S_k^2 H d_h) + head``.

        Args:
            patches: patches of the image.
            prefix: tokens that are not patches.
            kept: tokens S_k in the blocks, prefix included: one number or one a block; None keeps all.
        """
        tokens = [patches + prefix] * len(self.blocks) if kept is None else kept
        tokens = [tokens] * len(self.blocks) if isinstance(tokens, int) else list(tokens)
        inside = sum(
            s * entries + 2 * s * s * width
            for s, entries, width in zip(tokens, self.blocks, self.attention, strict=True)
        )
        return patches * self.patch + inside + self.head


def live_counts(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, *, heads: Sequence[int] | None = None
) -> LiveCounts:
    """Count the live weights of a timm vision transformer.

    Compact layers count with the shape that they have, so heads and neurons that do not exist cost nothing.

    Args:
        model: with ``patch_embed.proj``, ``blocks[i].attn`` and ``blocks[i].mlp``; may lie on the meta device.
        masks: by clean weight name, in the shape of the weight; weights without one are dense.
        heads: live heads of each block; None takes ``attn.num_heads``.

    Raises:
        ModelError: another kind of model, a mask without a weight, or a mask of another shape than its weight.
    """
    masks = dict(masks or {})
    entries: dict[str, int] = {}
    for full, parameter in model.named_parameters():
        name, shape = clean_name(full), tuple(getattr(parameter, "ds_shape", parameter.shape))
        if name in masks:
            mask = masks.pop(name)
            if tuple(mask.shape) != shape:
                raise ModelError(f"{name} {list(shape)}: its mask has the shape {list(mask.shape)}")
            entries[name] = int(mask.sum())
        elif len(shape) in (2, 4) and "bias" not in name:
            entries[name] = math.prod(shape)
    if masks:
        raise ModelError(f"{next(iter(masks))}: a mask without a weight")
    modules = {clean_name(name): module for name, module in model.named_modules()}
    if _PATCH not in entries or "blocks.0.attn" not in modules:
        raise ModelError(f"{type(model).__name__}: MACs from masks need patch_embed.proj and blocks with attn and mlp")
    blocks, attention = [], []
    while f"blocks.{len(blocks)}.attn" in modules:
        i = len(blocks)
        blocks.append(sum(n for name, n in entries.items() if name.startswith(f"blocks.{i}.")))
        module = modules[f"blocks.{i}.attn"]
        attention.append((module.num_heads if heads is None else heads[i]) * module.head_dim)
    head = sum(entries.get(name, 0) for name in _HEADS)
    return LiveCounts(entries[_PATCH], tuple(blocks), tuple(attention), head)


def grid_of(model: nn.Module, side: int | None = None) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        model: a timm vision transformer.
        side: of the images in pixels, for models that take several sizes; others, and all where it is None or 0, have
            the grid that they were built for.

    Raises:
        ModelError: the model does not say.
    """
    embed: Any = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if side and getattr(model, "dynamic_img_size", False):
        grid = embed.dynamic_feat_size((side, side))
    if grid is None:
        raise ModelError(f"{type(model).__name__} does not say how many patches it has (patch_embed.grid_size)")
    return int(grid[0]), int(grid[1])


def _patches(model: nn.Module, size: int | tuple[int, int]) -> int:
    if isinstance(size, tuple):
        return size[0] * size[1]
    side = model.get_submodule("patch_embed.proj").kernel_size[0]  # type: ignore[index,union-attr]
    return (-(-size // side)) ** 2


def live_macs(
    model: nn.Module,
    size: int | tuple[int, int],
    masks: Mapping[str, Tensor] | None = None,
    *,
    kept: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> int:
    """Forward MACs of one image; see `live_counts` and `LiveCounts.macs`. Without masks `cost.macs.module_macs`.

    Args:
        model: as for `live_counts`.
        size: side of the image in pixels, or the grid of its patches (`grid_of`).
        masks: as for `live_counts`.
        kept: as for `LiveCounts.macs`.
        heads: as for `live_counts`.
    """
    counts = live_counts(model, masks, heads=heads)
    return counts.macs(_patches(model, size), getattr(model, "num_prefix_tokens", 1), kept)


def selected_tokens(model: nn.Module, size: int | tuple[int, int]) -> int | None:
    """Tokens S_k of an image in the blocks of a model that drops some; None where all go on.

    Tokens that are only set to zero go on. `size` as for `live_macs`.
    """
    selector = selector_of(model)
    if selector is None or selector.select != "gather":
        return None
    return selector.kept(_patches(model, size) + selector.prefix)


def live_density(masks: Mapping[str, Tensor]) -> float:
    """Live share of all masked units."""
    return sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))


def live_facts(
    model: nn.Module,
    resolution: int,
    shapes: Mapping[str, tuple[int, ...]],
    masks: Mapping[str, Tensor],
    union: Mapping[str, Tensor],
) -> dict[str, float]:
    """Live density, MACs where the model is of a known kind, and exploration R_s.

    Args:
        model: the model.
        resolution: side of the images in pixels; used where the model takes several sizes, see `grid_of`.
        shapes: of all weights that the density is counted over, by clean name.
        masks: bool in the weights' shapes, of those that are masked.
        union: running OR of the masks, in entries or in units of several.

    Returns:
        "density"; "macs" and "dense_macs" of the forward pass of an image; "explored".
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    dead = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    found: dict[str, float] = {"density": 1 - dead / max(1, total)}
    try:
        grid = grid_of(model, resolution)
        macs = [live_macs(model, grid, masks, kept=selected_tokens(model, grid)), live_macs(model, grid)]
    except (ModelError, AttributeError):  # no plain vision transformer
        macs = []
    found |= dict(zip(("macs", "dense_macs"), macs, strict=False))
    entries = sum(math.prod(shapes[name]) for name in union)
    seen = sum(math.prod(shapes[n]) // u.numel() * int(u.sum()) for n, u in union.items())
    found["explored"] = seen / max(1, entries)
    return found
