"""Stacks: the runs of equal blocks of a vision transformer, whose depth can change during training.

A plain ViT has one stack, VOLO two (outlookers; transformer blocks over all later stages). A model of less than full
depth fills the first slots of each stack, so that the names at full depth are timm's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import ModelError
from ..zero.blueprint import make_blueprint

Slot = tuple[str, int]
"""(name of the container, index in it)."""

_OUTLOOKER_SHARE = 0.23  # AutoProg's reference code: share of VOLO's depth that goes to the outlookers


class ElasticSequential(nn.Sequential):
    """A Sequential that can run only some of its blocks; parameter names are those of `nn.Sequential`.

    Which ones can come with the call, or stand in `active` for callers that pass only the input.

    Attributes:
        active: indices of the blocks that run, ascending; None runs all.
        checkpointing: recompute each block in the backward pass, with the arguments of its own call.
    """

    active: tuple[int, ...] | None = None
    checkpointing: bool = False

    def forward(
        self, x: Tensor, layers: Sequence[int] | None = None, args: Sequence[tuple[Any, ...]] | None = None
    ) -> Tensor:
        """Run the chosen blocks in order; with none of them the input is returned.

        Args:
            x: input of the first block.
            layers: indices of the blocks that run; None takes `active`.
            args: further arguments of each of them, in the same order.
        """
        layers = self.active if layers is None else layers
        if layers is None and args is None and not self.checkpointing:
            return super().forward(x)
        blocks = list(self._modules.values())
        for position, index in enumerate(range(len(blocks)) if layers is None else layers):
            given = () if args is None else args[position]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(blocks[index], x, *given, use_reentrant=False)
            else:
                x = blocks[index](x, *given)
        return x


@dataclass(frozen=True)
class Stack:
    """A run of equal blocks.

    Attributes:
        slots: places of the blocks at full depth, in running order.
        depth: blocks present now; they fill the first slots.
    """

    slots: tuple[Slot, ...]
    depth: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks present, e.g. "blocks.3", in running order."""
        return tuple(f"{container}.{index}" for container, index in self.slots[: self.depth])


def prepare_growth(model: nn.Module) -> nn.Module:
    """Make the depth of a timm ViT, DeiT or VOLO changeable, in place.

    Records the slots of full depth in ``model.growth_slots`` (so call it at full depth) and turns the block containers
    into `ElasticSequential`. No parameter or name changes; a second call changes nothing.

    Raises:
        ModelError: another kind of model, or blocks that differ in shape.
    """
    if getattr(model, "growth_slots", None) is not None:
        return model
    containers = _containers(model)
    slots = tuple(tuple((n, i) for n in names for i in range(len(_container(model, n)))) for names in containers)
    for stack in slots:
        _check_equal(model, stack)
    for name in (n for names in containers for n in names):
        # in place of a new object: hooks and the training flag stay
        _container(model, name).__class__ = ElasticSequential
    model.growth_slots = slots
    return model


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model that `prepare_growth` has seen.

    Raises:
        ModelError: it has not.
    """
    slots = getattr(model, "growth_slots", None)
    if slots is None:
        raise ModelError(f"{type(model).__name__}: its depth cannot change before prepare_growth(model) is called")
    names = [dict.fromkeys(name for name, _ in stack) for stack in slots]
    return tuple(
        Stack(stack, sum(len(_container(model, n)) for n in unique)) for stack, unique in zip(slots, names, strict=True)
    )


def depth_of(model: nn.Module) -> int:
    """Blocks present now, over all stacks."""
    return sum(stack.depth for stack in stacks_of(model))


def full_depth(model: nn.Module) -> int:
    """Blocks at full depth, over all stacks."""
    return sum(len(stack.slots) for stack in stacks_of(model))


def growable_depth(model: nn.Module) -> int:
    """Blocks at full depth of a model as it was built; 0 where its depth cannot change. The model is left alone."""
    try:
        return full_depth(prepare_growth(make_blueprint(model)))
    except ModelError:
        return 0


def split_depth(model: nn.Module, total: int) -> tuple[int, ...]:
    """Depth of each stack at a total depth.

    A ViT has one stack. VOLO's outlookers get a share of 0.23, rounded to an even number (AutoProg's reference code);
    at full depth the model's own division holds.

    Raises:
        ModelError: `total` is not between the smallest and the full depth.
    """
    full = tuple(len(stack.slots) for stack in stacks_of(model))
    if total == sum(full):
        return full
    least = 1 if len(full) == 1 else 3
    if not least <= total < sum(full):
        raise ModelError(f"{type(model).__name__}: depth {total} is not possible; allowed: {least} to {sum(full)}")
    if len(full) == 1:
        return (total,)
    from timm.layers import make_divisible

    first = min(make_divisible(_OUTLOOKER_SHARE * total, 2), full[0])
    first = max(first, total - full[1])
    return first, total - first


def truncate(model: nn.Module, total: int) -> nn.Module:
    """Keep only the first blocks of each stack, in place; for a model that is not being trained yet.

    Raises:
        ModelError: `total` is not possible, or more blocks than the model has now.
    """
    depths, stacks = split_depth(model, total), stacks_of(model)
    if any(depth > stack.depth for depth, stack in zip(depths, stacks, strict=True)):
        raise ModelError(
            f"{type(model).__name__}: depth {total} needs stacks of {list(depths)} blocks, present are "
            f"{[stack.depth for stack in stacks]}; truncating can only take blocks away"
        )
    arrange(model, [blocks[:depth] for blocks, depth in zip(blocks_of(model), depths, strict=True)])
    return model


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The block modules present, by stack, in running order."""
    return [[model.get_submodule(name) for name in stack.names] for stack in stacks_of(model)]


def arrange(model: nn.Module, blocks: Sequence[Sequence[nn.Module]]) -> None:
    """Put new lists of blocks in the first slots of each stack, in place; all blocks are active afterwards."""
    for stack, new in zip(stacks_of(model), blocks, strict=True):
        assert 0 < len(new) <= len(stack.slots)
        for name in dict.fromkeys(container for container, _ in stack.slots):
            container = _container(model, name)
            container._modules.clear()
            container.active = None
        for (name, index), block in zip(stack.slots, new, strict=False):
            _container(model, name).add_module(str(index), block)


def _container(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _containers(model: nn.Module) -> list[list[str]]:
    """Names of the block containers of each stack.

    Raises:
        ModelError: another kind of model, or an arrangement that cannot grow.
    """
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.volo import VOLO, Outlooker, Transformer

    kind = type(model).__name__
    if isinstance(model, VisionTransformer) and type(model.blocks) in (nn.Sequential, ElasticSequential):
        return [["blocks"]]
    if isinstance(model, VOLO):
        stages = [(i, m) for i, m in enumerate(model.network) if isinstance(m, nn.Sequential) and len(m)]
        first = [f"network.{i}" for i, m in stages if isinstance(m[0], Outlooker)]
        later = [i for i, m in stages if isinstance(m[0], Transformer)]
        if first == ["network.0"] and later == list(range(2, len(model.network))):
            return [first, [f"network.{i}" for i in later]]
        raise ModelError(
            f"{kind}: the depth of this arrangement of stages cannot change; allowed: one stage of outlookers, the "
            "down-sampling, then stages of transformer blocks without further down-sampling"
        )
    raise ModelError(
        f"the depth of {kind} cannot change; allowed: timm's VisionTransformer (ViT, DeiT) with its blocks in an "
        "nn.Sequential, and timm's VOLO"
    )


def _check_equal(model: nn.Module, slots: Sequence[Slot]) -> None:
    """Refuse a stack whose blocks could not take each other's weights.

    Raises:
        ModelError: names the first block that differs.
    """
    if not slots:
        raise ModelError(f"{type(model).__name__} has no blocks")
    names = [f"{container}.{index}" for container, index in slots]
    wanted = _signature(model.get_submodule(names[0]))
    for name in names[1:]:
        found = _signature(model.get_submodule(name))
        if found != wanted:
            raise ModelError(
                f"{type(model).__name__}: {name} is not like {names[0]} (type, heads, or shape of a parameter); "
                "only a stack of equal blocks can change its depth"
            )


def _signature(block: nn.Module) -> tuple[Any, ...]:
    heads = [getattr(module, "num_heads", None) for module in block.modules()]
    named = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
    # the shape of the whole parameter, also where the model was built partitioned
    shapes = [(name, tuple(getattr(value, "ds_shape", value.shape))) for name, value in named]
    return type(block), [h for h in heads if h is not None], shapes
