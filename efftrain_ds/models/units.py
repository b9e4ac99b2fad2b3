"""Heads and MLP neurons as units of a vision transformer, and layers that hold only some of them.

A *unit* is a head (its rows of q, k and v in the fused ``attn.qkv``, their biases, its columns of ``attn.proj``) or an
MLP neuron (a row of ``mlp.fc1``, its bias, a column of ``mlp.fc2``). A *slot* is the position of a unit in these
layers as they are now. A compact block is an ordinary timm block with fewer heads and neurons: the width of a head and
its softmax scale stay, so removing a unit leaves what the others compute as it was.

Shape legend: d width of the tokens, H heads of width d_h, m neurons; qkv [3 H d_h, d], proj [d, H d_h], fc1 [m, d],
fc2 [d, m].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..zero.access import full_shape
from ..zero.request import RebuildRequest, gather
from .masked import MaskedLinear

Keep = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""(heads, neurons) by block name, each a list of slots (or of units, where said so)."""

Take = dict[int, list[int]]
"""Indices by dimension, as in `zero.request.Piece.take`."""

QKV = ("q", "k", "v")
PARTS = (*QKV, "proj", "fc1", "fc2")


@dataclass(frozen=True)
class BlockUnits:
    """Size of one block in units.

    Attributes:
        heads: H.
        head_dim: d_h.
        neurons: m.
        width: d.
    """

    heads: int
    head_dim: int
    neurons: int
    width: int


def units_of(model: nn.Module) -> dict[str, BlockUnits]:
    """Units of every block by its module name ("blocks.0"), in the model's order.

    The model may be a blueprint (meta device), partitioned by ZeRO-3, masked, or compact already. Taken are timm's
    blocks with timm's ``Attention`` (also on our kernels) and ``Mlp``: ViT, DeiT (distilled too), registers, layer
    scale, drop path, normalised q and k. An attention pool before the classifier stays as it is.

    Raises:
        ModelError: naming the layer that cannot be split into units, or that the model has no attention blocks.
    """
    return {name: _units(*parts) for name, parts in parts_of(model).items()}


def parts_of(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """(attention, MLP) of every block by its module name; errors as in `units_of`."""
    found: dict[str, tuple[Any, Any]] = {}
    done: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in done:
            continue
        attn, mlp = (module._modules.get(key) for key in ("attn", "mlp"))
        if isinstance(module, _known().pools):
            done |= {*module.modules()}
        elif attn is not None and mlp is not None:
            _check_attention(_join(name, "attn"), attn)
            _check_mlp(_join(name, "mlp"), mlp, attn.qkv.in_features)
            found[name] = attn, mlp
            done |= {*attn.modules(), *mlp.modules()}
        elif isinstance(getattr(module, "num_heads", None), int) or "attention" in type(module).__name__.lower():
            raise ModelError(
                f"{name or 'the model'} is {type(module).__name__}, which cannot be split into heads; allowed: blocks "
                "with timm's Attention as attn and timm's Mlp as mlp"
            )
    if not found:
        raise ModelError(f"{type(model).__name__} has no attention blocks with attn and mlp")
    return found


def head_rows(units: BlockUnits, heads: Sequence[int], parts: Collection[str] = QKV) -> list[int]:
    """Rows of qkv (weight and bias) of some heads: all of "q" first, then "k", then "v", each in the heads' order."""
    every = units.heads * units.head_dim
    return [QKV.index(part) * every + i for part in QKV if part in parts for i in proj_columns(units, heads)]


def proj_columns(units: BlockUnits, heads: Sequence[int]) -> list[int]:
    """Columns of proj of some heads, in the given order."""
    return [h * units.head_dim + i for h in heads for i in range(units.head_dim)]


def unit_entries(
    model: nn.Module,
    block: str,
    heads: Sequence[int] = (),
    neurons: Sequence[int] = (),
    parts: Collection[str] = PARTS,
) -> dict[str, Take]:
    """Which entries of which parameters belong to some slots of a block.

    Args:
        model: as for `units_of`.
        block: its module name.
        heads: slots.
        neurons: slots.
        parts: leave some out, e.g. ``("q", "k")`` for the rows of queries and keys alone. Biases go with their rows.

    Returns:
        By parameter name (biases only where the layer has them; names without entries are left out): the indices of
        one dimension, ``{0: rows}`` or ``{1: columns}``; the other dimension is whole. `entry_mask` makes a mask of it.

    Raises:
        ModelError: a block or slot that is not there.
    """
    blocks = parts_of(model)
    _check_slots(blocks, {block: (heads, neurons)}, empty=True)
    return _entries(block, *blocks[block], heads, neurons, parts)


def entry_mask(shape: Sequence[int], take: Mapping[int, Sequence[int]], device: Any = None) -> Tensor:
    """Bool tensor of a parameter's full shape, True at the entries."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    ((dim, indices),) = take.items()
    return mask.index_fill_(dim, torch.tensor(list(indices), dtype=torch.long, device=device), True)


def compact_(model: nn.Module, keep: Keep) -> nn.Module:
    """Leave only some slots of each block, in place and in the given order; blocks that are not named stay.

    Parameters that change are new objects, so call it before an optimizer or DeepSpeed takes them. The block mask of
    an attention follows its heads.

    Args:
        model: real, or on the meta device (a blueprint).
        keep: slots to keep.

    Returns:
        The model.

    Raises:
        ModelError: a block or slot that is not there, none left, or a layer that is masked, shared or already
            partitioned. Nothing was changed.
    """
    blocks = _checked(model, keep)
    for name, (heads, neurons) in keep.items():
        attn, mlp = blocks[name]
        units = _units(attn, mlp)
        if list(heads) != list(range(units.heads)):
            select(attn.qkv, 0, head_rows(units, heads))
            select(attn.proj, 1, proj_columns(units, heads))
            attn.num_heads, attn.attn_dim = len(heads), len(heads) * attn.head_dim
            mask = getattr(attn, "block_mask", None)
            if mask is not None and mask.num_heads > 1:
                attn.block_mask = type(mask)(mask.keep[list(heads)], mask.q_len, mask.kv_len, mask.block)
        if list(neurons) != list(range(units.neurons)):
            select(mlp.fc1, 0, neurons)
            select(mlp.fc2, 1, neurons)
    return model


def compact_request(blueprint: nn.Module, keep: Keep, reason: str = "") -> RebuildRequest:
    """The change of parameters that leaves only some slots of each block; values and optimizer state are carried.

    Args:
        blueprint: the model now; it is not changed.
        keep: slots to keep, by block; blocks that are not named stay.
        reason: a few words for screen and journal; "" says the numbers of units.

    Raises:
        ModelError: as for `compact_`.
    """
    blocks = _checked(blueprint, keep)
    plain = {name: (list(heads), list(neurons)) for name, (heads, neurons) in keep.items()}
    before = {name: _units(*parts) for name, parts in blocks.items()}
    maps = {}
    for name, (heads, neurons) in plain.items():
        units, (attn, mlp) = before[name], blocks[name]
        moved = heads if heads != list(range(units.heads)) else []
        kept = neurons if neurons != list(range(units.neurons)) else []
        for target, take in _entries(name, attn, mlp, moved, kept, PARTS).items():
            maps[target] = gather(target, take)
        mask = getattr(attn, "block_mask", None)
        if moved and mask is not None and mask.num_heads > 1:
            for buffer, _ in mask.named_buffers():
                target = _join(name, f"attn.block_mask.{buffer}")
                maps[target] = gather(target, {0: moved})

    def surgery(model: nn.Module) -> nn.Module:
        found = units_of(model)
        if found != before:
            odd = next(name for name in {**before, **found} if found.get(name) != before.get(name))
            raise ModelError(f"{odd}: made for {before.get(odd)}, found {found.get(odd)}")
        return compact_(model, plain)

    return RebuildRequest(surgery=surgery, maps=maps, reason=reason or _reason(before, plain))


def select(layer: nn.Linear, dim: int, indices: Sequence[int]) -> None:
    """Give a linear layer some of its rows (dim 0, with their biases) or columns (dim 1), in the given order."""
    for key in ("weight", "bias") if dim == 0 else ("weight",):
        old = getattr(layer, key)
        if old is not None:
            chosen = torch.tensor(list(indices), dtype=torch.long, device=old.device)
            setattr(layer, key, nn.Parameter(old.detach().index_select(dim, chosen), requires_grad=old.requires_grad))
    layer.out_features, layer.in_features = layer.weight.shape


# -- inside ----------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """timm's classes."""

    attention: type[Any]
    forwards: tuple[Any, ...]
    mlp: type[Any]
    pools: tuple[type[Any], ...]


@cache
def _known() -> _Known:
    """Imported here: methods are looked up by commands that need no model, and timm takes seconds."""
    from timm.layers import AttentionPoolLatent, AttentionPoolPrr, Mlp
    from timm.models.vision_transformer import Attention

    from .attention import BlockAttention

    forwards = (Attention.forward, BlockAttention.forward)
    return _Known(Attention, forwards, Mlp, (AttentionPoolLatent, AttentionPoolPrr))


def _units(attn: Any, mlp: Any) -> BlockUnits:
    return BlockUnits(attn.num_heads, attn.head_dim, mlp.fc1.out_features, attn.qkv.in_features)


def _join(block: str, rest: str) -> str:
    return f"{block}.{rest}" if block else rest


def _entries(
    block: str, attn: Any, mlp: Any, heads: Sequence[int], neurons: Sequence[int], parts: Collection[str]
) -> dict[str, Take]:
    units = _units(attn, mlp)
    rows = {
        "attn.qkv": (attn.qkv, 0, head_rows(units, heads, parts)),
        "attn.proj": (attn.proj, 1, proj_columns(units, heads) if "proj" in parts else []),
        "mlp.fc1": (mlp.fc1, 0, list(neurons) if "fc1" in parts else []),
        "mlp.fc2": (mlp.fc2, 1, list(neurons) if "fc2" in parts else []),
    }
    found: dict[str, Take] = {}
    for name, (layer, dim, indices) in rows.items():
        if indices:
            found[_join(block, f"{name}.weight")] = {dim: indices}
            if dim == 0 and layer.bias is not None:
                found[_join(block, f"{name}.bias")] = {0: list(indices)}
    return found


def _check_attention(name: str, attn: nn.Module) -> None:
    """Refuse an attention that is not made of equal, independent heads.

    Raises:
        ModelError: naming what does not fit.
    """
    if not isinstance(attn, _known().attention) or type(attn).forward not in _known().forwards:
        raise ModelError(
            f"{name} is {type(attn).__name__}, which cannot be split into heads; allowed: timm's Attention"
        )
    if not isinstance(attn.norm, nn.Identity):
        raise ModelError(
            f"{name}.norm ({type(attn.norm).__name__}) normalises over all heads; allowed: scale_attn_norm=False"
        )
    if getattr(attn, "gate", None) is not None:
        raise ModelError(f"{name}.gate: gated attention cannot be split into heads; allowed: gated=False")
    inner = attn.num_heads * attn.head_dim
    _check_linear(f"{name}.qkv", attn.qkv, out_features=3 * inner)
    _check_linear(f"{name}.proj", attn.proj, in_features=inner, out_features=attn.qkv.in_features)
    for key in ("q_norm", "k_norm"):
        for part, value in getattr(attn, key).named_parameters():
            if full_shape(value) != (attn.head_dim,):
                raise ModelError(
                    f"{name}.{key}.{part} has shape {list(full_shape(value))}; allowed: [{attn.head_dim}], the same "
                    "for all heads"
                )


def _check_mlp(name: str, mlp: nn.Module, width: int) -> None:
    """Refuse an MLP whose neurons are not independent.

    Raises:
        ModelError: naming what does not fit.
    """
    if not isinstance(mlp, _known().mlp) or type(mlp).forward is not _known().mlp.forward:
        raise ModelError(f"{name} is {type(mlp).__name__}, which cannot be split into neurons; allowed: timm's Mlp")
    if not isinstance(mlp.norm, nn.Identity):
        raise ModelError(
            f"{name}.norm ({type(mlp.norm).__name__}) normalises over all neurons; allowed: scale_mlp_norm=False"
        )
    _check_linear(f"{name}.fc1", mlp.fc1, in_features=width)
    _check_linear(f"{name}.fc2", mlp.fc2, in_features=mlp.fc1.out_features, out_features=width)
    weight = next((key for key, _ in mlp.act.named_parameters()), None)
    if weight is not None:
        raise ModelError(f"{name}.act ({type(mlp.act).__name__}) has a parameter {weight}; allowed: none")


def _check_linear(name: str, layer: nn.Module, **sizes: int) -> None:
    known = isinstance(layer, MaskedLinear) or type(layer).forward is nn.Linear.forward
    if not isinstance(layer, nn.Linear) or not known:
        raise ModelError(f"{name} is {type(layer).__name__}, which is not known here; allowed: nn.Linear")
    for key, want in sizes.items():
        if getattr(layer, key) != want:
            raise ModelError(f"{name}.{key} is {getattr(layer, key)}; allowed: {want}")


def _check_slots(blocks: Mapping[str, tuple[Any, Any]], keep: Keep, empty: bool) -> None:
    """Refuse slots that are not there.

    Raises:
        ModelError: naming the block.
    """
    for name, lists in keep.items():
        if name not in blocks:
            raise ModelError(f'"{name}" is no block of the model; its blocks: {", ".join(blocks)}')
        units = _units(*blocks[name])
        for what, slots, count in zip(("heads", "neurons"), lists, (units.heads, units.neurons), strict=True):
            odd = [slot for slot in slots if not 0 <= slot < count]
            if odd or len({*slots}) < len(slots) or not (slots or empty):
                shown = f"{odd[0]} of" if odd else f"{len(slots)}, {len({*slots})} different, of"
                least = "" if empty else ", at least one"
                raise ModelError(
                    f"{name}: {what} {shown} {count}; allowed: different ones from 0 to {count - 1}{least}"
                )


def _checked(model: nn.Module, keep: Keep) -> dict[str, tuple[Any, Any]]:
    """The blocks, after every check that `compact_` makes.

    Raises:
        ModelError: they cannot be compacted like this.
    """
    blocks = parts_of(model)
    _check_slots(blocks, keep, empty=False)
    owners: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        owners.setdefault(id(tensor), []).append(name)
    for name in keep:
        attn, mlp = blocks[name]
        for key, layer in (
            ("attn.qkv", attn.qkv),
            ("attn.proj", attn.proj),
            ("mlp.fc1", mlp.fc1),
            ("mlp.fc2", mlp.fc2),
        ):
            full = _join(name, key)
            if isinstance(layer, MaskedLinear):
                raise ModelError(f"{full} is masked; write its zeros and unmask the model before it is made compact")
            for tensor in layer.parameters():
                if len(owners[id(tensor)]) > 1:
                    raise ModelError(f"{full} is shared: {', '.join(owners[id(tensor)])}; allowed: layers of their own")
                if hasattr(tensor, "ds_id"):
                    raise ModelError(f"{full} is partitioned by ZeRO-3; compact the model before, or by a rebuild")
        mask = getattr(attn, "block_mask", None)
        if mask is not None and mask.num_heads > 1 and len(owners[id(mask.keep)]) > 1:
            names = ", ".join(owners[id(mask.keep)])
            raise ModelError(f"{name}: one block mask for several layers ({names}); allowed: one a layer, or one head")
    return blocks


def _reason(before: Mapping[str, BlockUnits], keep: Keep) -> str:
    """For example ``"heads 12 -> 8, neurons 256 -> 128"``, summed over the blocks."""
    words = []
    for i, what in enumerate(("heads", "neurons")):
        old = sum(getattr(units, what) for units in before.values())
        new = old - sum(getattr(before[name], what) - len(lists[i]) for name, lists in keep.items())
        words.append(f"{what} {old} -> {new}")
    return ", ".join(words)
