"""Elastic depth: one deep model (a supernet) whose shallower sub-networks run by skipping blocks.

A supernet of depth M is grown from depth b by interpolation. The sub-network of depth b runs the blocks that are not
new; deeper ones add new blocks in a fixed order, so each contains the shallower ones, and depth l is exactly what
growing from b to l would have given (AutoProg, arXiv 2203.14509).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...core.errors import ModelError
from ..growth import check_positions, interpolation, new_blocks
from ..stacks import ElasticSequential, blocks_of, split_depth, stacks_of

__all__ = ["ElasticSequential", "path_of", "paths_for", "set_paths", "skipped_names", "supernet_order"]


def supernet_order(base: int, top: int) -> tuple[list[int], list[int]]:
    """(blocks of the smallest sub-network, the other blocks in the order in which they join).

    New blocks join by copy number, then from the last position to the first.

    Args:
        base: depth the supernet was grown from.
        top: depth of the supernet.

    Raises:
        ModelError: not ``1 <= base <= top``.
    """
    index_map = interpolation(base, top)
    new = new_blocks(index_map)
    number = {j: j - index_map.index(index_map[j]) for j in new}
    return [j for j in range(top) if j not in number], sorted(new, key=lambda j: (number[j], -j))


def path_of(base: int, top: int, depth: int) -> list[int]:
    """Blocks of the sub-network of one depth in a supernet of depth `top` grown from `base`, ascending.

    Raises:
        ModelError: not ``1 <= base <= depth <= top``.
    """
    if not base <= depth <= top:
        raise ModelError(f"a supernet grown from {base} to {top} has no sub-network of depth {depth}")
    path, order = supernet_order(base, top)
    return sorted(path + order[: depth - base])


def paths_for(model: nn.Module, base_total: int, total: int) -> list[list[int]]:
    """Active blocks, by stack, of the sub-network of one total depth.

    Args:
        model: the supernet, at its present depth.
        base_total: total depth that it was grown from.
        total: total depth of the sub-network.

    Raises:
        ModelError: the supernet has no such sub-network.
    """
    base, wanted = split_depth(model, base_total), split_depth(model, total)
    tops = [stack.depth for stack in stacks_of(model)]
    return [path_of(b, top, depth) for b, top, depth in zip(base, tops, wanted, strict=True)]


def set_paths(model: nn.Module, paths: Sequence[Sequence[int]] | None) -> None:
    """Run only the given blocks of each stack from now on; None runs all. No parameter changes.

    Raises:
        ModelError: positions that do not fit, or gradient checkpointing (timm then calls the blocks one by one, past
            their container).
    """
    stacks = stacks_of(model)
    if paths is None:
        paths = [range(stack.depth) for stack in stacks]
    elif getattr(model, "grad_checkpointing", False):
        raise ModelError(
            f"{type(model).__name__}: blocks cannot be skipped with gradient checkpointing; switch it off for the "
            "search (model.set_grad_checkpointing(False))"
        )
    check_positions(model, paths)
    for stack, path in zip(stacks, paths, strict=True):
        chosen = {*path}
        active: dict[str, list[int]] = {name: [] for name, _ in stack.slots}
        for position, (name, index) in enumerate(stack.slots):
            if position in chosen:
                active[name].append(index)
        for name, indices in active.items():
            container = model.get_submodule(name)
            container.active = None if len(indices) == len(container) else tuple(indices)


def skipped_names(model: nn.Module) -> list[str]:
    """Names of the parameters that only inactive blocks use, as in `named_parameters`."""
    inside: set[int] = set()
    used: set[int] = set()
    for stack, blocks in zip(stacks_of(model), blocks_of(model), strict=True):
        for (container, index), block in zip(stack.slots, blocks, strict=False):
            inside |= {id(module) for module in block.modules()}
            active = model.get_submodule(container).active
            if active is None or index in active:
                used |= {id(parameter) for parameter in block.parameters()}
    rest = [module for module in model.modules() if id(module) not in inside]
    used |= {id(parameter) for module in rest for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in used]
