"""Models of full width from compact ones, and models whose pruned heads have live biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError
from .masked import masked_layers
from .units import BlockUnits, Keep, head_rows, parts_of, proj_columns, units_of


def dense_twin(model: nn.Module, full: Mapping[str, BlockUnits], slots: Keep) -> nn.Module:
    """A copy of full width with zeros at the dead units: a plain timm model with equal logits.

    Args:
        model: compact; it is not changed. Real or on the meta device.
        full: size of each block of the model that is wanted (`units_of` of it).
        slots: for each block the unit that each slot holds.

    Raises:
        ModelError: blocks, counts or units that do not fit, block masks by head, masked or partitioned layers.
    """
    now = units_of(model)
    _check_blocks(now, full, slots)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(f"{name} is partitioned by ZeRO-3; allowed: whole parameters")
    if masked_layers(model):
        raise ModelError(f"{next(iter(masked_layers(model)))} is masked; write its zeros and unmask the model before")
    twin = copy.deepcopy(model)
    for name, (attn, mlp) in parts_of(twin).items():
        heads, neurons = slots[name]
        wide = full[name]
        if (wide.heads, list(heads)) != (now[name].heads, list(range(wide.heads))):
            mask = getattr(attn, "block_mask", None)
            if mask is not None and mask.num_heads > 1:
                raise ModelError(f"{name}.attn has a block mask by head; allowed: none, or one for all heads")
            _spread(attn.qkv, 0, head_rows(wide, heads), 3 * wide.heads * wide.head_dim)
            _spread(attn.proj, 1, proj_columns(wide, heads), wide.heads * wide.head_dim)
            attn.num_heads, attn.attn_dim = wide.heads, wide.heads * wide.head_dim
        if (wide.neurons, list(neurons)) != (now[name].neurons, list(range(wide.neurons))):
            _spread(mlp.fc1, 0, neurons, wide.neurons)
            _spread(mlp.fc2, 1, neurons, wide.neurons)
    return twin


@torch.no_grad()
def fold_dead_biases(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> nn.Module:
    """Move what heads without weights still emit into the bias of the projection, in place; logits are equal.

    A head whose W_v rows are zero emits its b_v at every token. ``b_proj += W_proj[:, dead] b_v[dead]``, then b_v is
    zero; now the heads can be removed.

    Args:
        model: plain, with real parameters.
        heads: dead heads (slots) by block.

    Raises:
        ModelError: a block or head that is not there, a head whose W_v rows are not zero, a projection without bias,
            or a masked layer. Nothing was changed.
    """
    parts, units = parts_of(model), units_of(model)
    masked = masked_layers(model)
    chosen: list[tuple[Any, list[int], list[int]]] = []
    for name, dead in heads.items():
        if name not in units:
            raise ModelError(f'"{name}" is no block of the model; its blocks: {", ".join(units)}')
        attn = parts[name][0]
        odd = [head for head in dead if not 0 <= head < units[name].heads]
        if odd or len({*dead}) < len(dead):
            raise ModelError(
                f"{name}: dead heads {list(dead)}; allowed: different ones from 0 to {units[name].heads - 1}"
            )
        for key, layer in (("qkv", attn.qkv), ("proj", attn.proj)):
            if any(layer is module for module in masked.values()):
                raise ModelError(f"{name}.attn.{key} is masked; write its zeros and unmask the model before")
        for head in dead:
            if attn.qkv.weight[head_rows(units[name], [head], "v")].count_nonzero():
                raise ModelError(f"{name}: head {head} is not dead: its rows of W_v are not zero")
        if dead and attn.qkv.bias is not None:
            if attn.proj.bias is None:
                raise ModelError(f"{name}.attn.proj has no bias to take what the heads {list(dead)} emit")
            chosen.append((attn, head_rows(units[name], dead, "v"), proj_columns(units[name], dead)))
    for attn, rows, columns in chosen:
        attn.proj.bias += attn.proj.weight[:, columns] @ attn.qkv.bias[rows]
        attn.qkv.bias[rows] = 0
    return model


def _check_blocks(now: Mapping[str, BlockUnits], full: Mapping[str, BlockUnits], slots: Keep) -> None:
    """Refuse slots that do not say which unit of the wide model each slot of the model holds.

    Raises:
        ModelError: naming the block.
    """
    for name, units in now.items():
        if name not in full or name not in slots:
            raise ModelError(f"{name}: a block of the model that full or slots do not name")
        wide = full[name]
        if (wide.head_dim, wide.width) != (units.head_dim, units.width):
            raise ModelError(
                f"{name}: heads of width {units.head_dim} and tokens of width {units.width}; wanted are "
                f"{wide.head_dim} and {wide.width}"
            )
        counts = ((units.heads, wide.heads), (units.neurons, wide.neurons))
        for what, held, (have, want) in zip(("heads", "neurons"), slots[name], counts, strict=True):
            if len(held) != have or len({*held}) < have or not all(0 <= unit < want for unit in held):
                raise ModelError(
                    f"{name}: {have} slots of {what} hold {len({*held})} units; allowed: as many different ones from "
                    f"0 to {want - 1}"
                )


def _spread(layer: nn.Linear, dim: int, indices: Sequence[int], size: int) -> None:
    """Give a linear layer `size` rows (dim 0, with biases) or columns (dim 1): old ones at `indices`, else zeros."""
    for key in ("weight", "bias") if dim == 0 else ("weight",):
        old = getattr(layer, key)
        if old is not None:
            shape = list(old.shape)
            shape[dim] = size
            chosen = torch.tensor(list(indices), dtype=torch.long, device=old.device)
            wide = old.detach().new_zeros(shape).index_copy_(dim, chosen, old.detach())
            setattr(layer, key, nn.Parameter(wide, requires_grad=old.requires_grad))
    layer.out_features, layer.in_features = layer.weight.shape
