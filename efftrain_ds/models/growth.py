"""Growth of depth: which old block each new block comes from, and the change of parameters that carries it out.

Operators (AutoProg, arXiv 2203.14509): "random" appends freshly initialised blocks, "stacking" repeats the whole list,
"interpolation" puts copies right after their source, last blocks first, and "identity" does the same but silences the
new blocks. Momentum growth (MoGrow) is interpolation with ``values="ema"``.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.rng import torch_rng
from ..zero.request import ParameterMap, RebuildRequest, copy, fresh, zeros
from .stacks import Stack, arrange, blocks_of, depth_of, full_depth, split_depth, stacks_of

OPERATORS = ("random", "stacking", "interpolation", "identity")
NO_SOURCE = -1
"""In an index map: this block comes from no old block."""


def interpolation(old: int, new: int) -> tuple[int, ...]:
    """Index map of interpolation: old block of each new block. The copies of a block follow it, last blocks first.

    With ``q, rem = divmod(new, old)`` old block i appears q times if ``i < old - rem``, else q + 1 times.

    Raises:
        ModelError: not ``1 <= old <= new``.
    """
    _check_depths(old, new)
    times, rest = divmod(new, old)
    return tuple(i for i in range(old) for _ in range(times if i < old - rest else times + 1))


def stacking(old: int, new: int) -> tuple[int, ...]:
    """Index map of stacking: the list of old blocks repeated from its beginning.

    Raises:
        ModelError: not ``1 <= old <= new``.
    """
    _check_depths(old, new)
    return tuple(j % old for j in range(new))


def random_init(old: int, new: int) -> tuple[int, ...]:
    """Index map of random initialisation: the old blocks, then blocks of no source (`NO_SOURCE`).

    Raises:
        ModelError: not ``1 <= old <= new``.
    """
    _check_depths(old, new)
    return tuple(j if j < old else NO_SOURCE for j in range(new))


def new_blocks(index_map: Sequence[int]) -> tuple[int, ...]:
    """Positions in an index map that do not hold the first copy of an old block."""
    return tuple(j for j, i in enumerate(index_map) if i == NO_SOURCE or i in index_map[:j])


def grow_request(
    blueprint: nn.Module,
    total: int,
    operator: str,
    *,
    seed: int,
    values: Literal["online", "ema"] = "online",
    reset: bool = False,
) -> RebuildRequest:
    """The change of parameters that brings a model to a larger depth.

    Args:
        blueprint: the model now (prepared by `prepare_growth`); its values are not read and it is not changed.
        total: new depth over all stacks.
        operator: one of `OPERATORS`.
        seed: of new values ("random").
        values: "ema" takes all values from the average of the weights (MoGrow with "interpolation").
        reset: start the optimizer state anew.

    Raises:
        ModelError: unknown operator, a depth that is smaller than now or larger than full, or blocks that the operator
            cannot initialise.
    """
    if operator not in OPERATORS:
        raise ModelError(f'unknown growth operator "{operator}"; allowed: {", ".join(OPERATORS)}')
    stacks, now, full = stacks_of(blueprint), depth_of(blueprint), full_depth(blueprint)
    if not now <= total <= full:
        raise ModelError(
            f"{type(blueprint).__name__}: cannot grow from depth {now} to {total}; allowed: {now} to {full}"
        )
    depths = (*(s.depth for s in stacks),) if total == now else split_depth(blueprint, total)
    if any(depth < stack.depth for depth, stack in zip(depths, stacks, strict=True)):
        raise ModelError(
            f"{type(blueprint).__name__}: depth {total} needs stacks of {list(depths)} blocks, present are "
            f"{[stack.depth for stack in stacks]}, and no stack may shrink; choose a larger depth"
        )
    rule = {"random": random_init, "stacking": stacking}.get(operator, interpolation)
    index_maps = [rule(stack.depth, depth) for stack, depth in zip(stacks, depths, strict=True)]
    special: dict[str, ParameterMap] = {}
    for stack, blocks, index_map in zip(stacks, blocks_of(blueprint), index_maps, strict=True):
        for j in new_blocks(index_map):
            name = _name(stack, j)
            if operator == "identity":
                special |= {f"{name}.{part}": zeros() for part in _last_of_branches(blocks[index_map[j]], name)}
            elif operator == "random":
                special |= _fresh_block(blueprint, blocks[-1], name, seed)
    origin = " of the average" if values == "ema" else ""
    reason = f"depth {now} -> {total}" + (f", {operator}{origin}" if total > now else "")
    return _request(blueprint, index_maps, special, values=values, reset=reset, reason=reason)


def select_request(
    blueprint: nn.Module,
    kept: Sequence[Sequence[int]],
    *,
    values: Literal["online", "ema"] = "online",
    reset: bool = False,
) -> RebuildRequest:
    """The change of parameters that keeps only some blocks, renumbered without gaps.

    Args:
        blueprint: the model now; it is not changed.
        kept: for each stack the positions to keep, ascending.
        values: "ema" takes all values from the average of the weights.
        reset: start the optimizer state anew.

    Raises:
        ModelError: positions that are not ascending, not there, or none at all.
    """
    stacks = stacks_of(blueprint)
    check_positions(blueprint, kept)
    now = sum(stack.depth for stack in stacks)
    reason = f"depth {now} -> {sum(map(len, kept))}, selected"
    return _request(blueprint, [tuple(k) for k in kept], {}, values=values, reset=reset, reason=reason)


def check_positions(model: nn.Module, positions: Sequence[Sequence[int]]) -> None:
    """Refuse lists of block positions that do not fit the stacks of the model.

    Raises:
        ModelError: says which stack, what was given and what is allowed.
    """
    stacks = stacks_of(model)
    if len(positions) != len(stacks):
        raise ModelError(
            f"{type(model).__name__} has {len(stacks)} stacks, block positions are given for {len(positions)}"
        )
    for number, (given, stack) in enumerate(zip(positions, stacks, strict=True)):
        if not given or list(given) != sorted({*given}) or given[0] < 0 or given[-1] >= stack.depth:
            raise ModelError(
                f"{type(model).__name__}, stack {number}: block positions {list(given)}; allowed: ascending, at least "
                f"one, each from 0 to {stack.depth - 1}"
            )


def _check_depths(old: int, new: int) -> None:
    if not 1 <= old <= new:
        raise ModelError(f"blocks can grow from 1 or more to at least as many; found {old} -> {new}")


def _name(stack: Stack, position: int) -> str:
    container, index = stack.slots[position]
    return f"{container}.{index}"


def _request(
    blueprint: nn.Module,
    index_maps: Sequence[Sequence[int]],
    special: dict[str, ParameterMap],
    *,
    values: Literal["online", "ema"],
    reset: bool,
    reason: str,
) -> RebuildRequest:
    """Surgery and maps for new lists of blocks, given by the old position of each.

    Tensors that several places share are named once, as `named_parameters` does; `special` has maps that replace
    copies.
    """
    before = [stack.depth for stack in stacks_of(blueprint)]

    def surgery(model: nn.Module) -> nn.Module:
        found = [stack.depth for stack in stacks_of(model)]
        if found != before:
            raise ModelError(f"{type(model).__name__}: made for stacks of {before} blocks, found {found}")
        owners = _owners(model)
        arrange(model, [_new_list(b, m, owners) for b, m in zip(blocks_of(model), index_maps, strict=True)])
        return model

    canonical = _canonical_names(blueprint)
    origin: dict[str, str] = {}  # new block -> old block
    for stack, index_map in zip(stacks_of(blueprint), index_maps, strict=True):
        for j, i in enumerate(index_map):
            # a block of no source is built after the last one, and its buffers are that one's
            origin[_name(stack, j)] = _name(stack, i if i != NO_SOURCE else stack.depth - 1)
    maps: dict[str, ParameterMap] = {}
    sources: set[str] = set()
    for name in dict.fromkeys(_canonical_names(surgery(_skeleton(blueprint))).values()):
        block = next((b for b in origin if name.startswith(b + ".")), None)
        source = canonical[name if block is None else origin[block] + name[len(block) :]]
        if name in special:
            maps[name] = special[name]
            continue
        sources.add(source)
        if source != name:
            maps[name] = copy(source)
    shared = [name for name, target in special.items() if name not in maps and target.init is None]
    if shared:
        raise ModelError(f"{shared[0]} must become zero, but it is tied to a tensor of another name; allowed: untied")
    return RebuildRequest(
        surgery=surgery,
        maps=maps,
        drops=frozenset({*canonical.values()} - sources),
        values=values,
        reset=reset,
        reason=reason,
    )


def _new_list(blocks: Sequence[nn.Module], index_map: Sequence[int], owners: dict[int, set[int]]) -> list[nn.Module]:
    """Old blocks at their first place in the map, copies elsewhere."""
    result: list[nn.Module] = []
    for j, i in enumerate(index_map):
        block = blocks[i]  # NO_SOURCE is the last one
        result.append(_clone(block, owners) if i == NO_SOURCE or i in index_map[:j] else block)
    return result


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """For each tensor (by id) the blocks that use it (by id; 0 is the rest of the model)."""
    owners: dict[int, set[int]] = {}
    inside: set[int] = set()
    for block in (block for blocks in blocks_of(model) for block in blocks):
        inside |= {id(module) for module in block.modules()}
        for _, tensor in _tensors(block):
            owners.setdefault(id(tensor), set()).add(id(block))
    for module in model.modules():
        if id(module) not in inside:
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                owners.setdefault(id(tensor), set()).add(0)
    return owners


def _clone(block: nn.Module, owners: dict[int, set[int]]) -> nn.Module:
    """Deep copy in which tensors shared with the outside stay shared."""
    return copying.deepcopy(block, {id(t): t for _, t in _tensors(block) if len(owners[id(t)]) > 1})


def _skeleton(model: nn.Module) -> nn.Module:
    """Deep copy with parameters on the meta device."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copying.deepcopy(model, memo)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """The name under which `named_parameters` or `named_buffers` lists a tensor, by every name it has."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(model)}


def _last_of_branches(block: nn.Module, name: str) -> list[str]:
    """The tensors that silence both residual branches of a block when they are zero.

    Raises:
        ModelError: a block that is not ``x + scale * layer(norm(x))`` twice.
    """
    from timm.models.vision_transformer import Block
    from timm.models.volo import Outlooker, Transformer

    names: list[str] = []
    for scale, last in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        if isinstance(getattr(getattr(block, scale, None), "gamma", None), nn.Parameter):
            names.append(f"{scale}.gamma")
            continue
        owner, _, attribute = last.partition(".")
        layer = getattr(getattr(block, owner, None), attribute, None)
        if not isinstance(block, (Block, Outlooker, Transformer)) or not isinstance(layer, nn.Linear):
            raise ModelError(
                f"{name} ({type(block).__name__}): the operator identity needs timm's pre-norm blocks, with attn.proj "
                f"and mlp.fc2; allowed for others: {', '.join(o for o in OPERATORS if o != 'identity')}"
            )
        names += [f"{last}.{part}" for part, value in layer.named_parameters() if value is not None]
    return names


def _fresh_block(model: nn.Module, template: nn.Module, name: str, seed: int) -> dict[str, ParameterMap]:
    """Maps that give a block the values of the model's own initialisation."""
    found: dict[str, ParameterMap] = {}
    mode = getattr(model, "weight_init_mode", "")
    if getattr(model, "fix_init", False) or mode not in ("", "jax", "jax_nlhb"):
        raise ModelError(
            f'{type(model).__name__}: the operator random does not know weight_init "{mode}" with fix_init '
            f'{getattr(model, "fix_init", False)}; allowed: "", "jax", "jax_nlhb" without fix_init'
        )
    for path, module in template.named_modules():
        for part, _ in module.named_parameters(recurse=False):
            full = ".".join(filter(None, (name, path, part)))
            found[full] = fresh(_seeded(_rule(module, path, part, full, bool(mode)), seed, full))
    return found


Draw = Callable[[Tensor, torch.Generator], Tensor]


def _seeded(draw: Draw, seed: int, name: str) -> Callable[[torch.Size, torch.Generator], Tensor]:
    """An initialiser whose values depend on the generator's seed, `seed` and `name` only."""

    def init(shape: torch.Size, generator: torch.Generator) -> Tensor:
        own = torch_rng("cpu", generator.initial_seed(), "growth", seed, name)
        return draw(torch.empty(shape, dtype=torch.float32, device="cpu"), own)

    return init


def _rule(module: nn.Module, path: str, part: str, name: str, jax: bool) -> Draw:
    """How timm's ViT (also its "jax" scheme) and VOLO initialise one parameter of a block.

    Raises:
        ModelError: a layer that is not known here.
    """
    if isinstance(module, nn.Linear):
        if part == "weight":
            if jax:
                return lambda t, g: nn.init.xavier_uniform_(t, generator=g)
            return lambda t, g: nn.init.trunc_normal_(t, std=0.02, generator=g)
        if jax and "mlp" in path:
            return lambda t, g: t.normal_(std=1e-6, generator=g)
        return lambda t, g: t.zero_()
    if "Norm" in type(module).__name__ and part in ("weight", "bias"):
        start = float(part == "weight")
        return lambda t, g: t.fill_(start)
    if part == "gamma" and hasattr(module, "init_values"):
        scale = float(module.init_values)
        return lambda t, g: t.fill_(scale)
    raise ModelError(
        f"{name}: the operator random does not know how {type(module).__name__} initialises {part}; allowed for this "
        "model: stacking, interpolation"
    )
