"""Units in the training state: their sizes, and the values of those that begin to live."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...models.unit_probes import Candidates
from ...models.units import BlockUnits, entry_mask, head_rows, unit_entries, units_of
from ...zero.access import full_shape
from ...zero.masks import ShardedMasks
from .s2vite_slots import HEADS, NEURONS, HeadDraws, head_draws, neuron_draws
from .s2vite_units import Exchanges, LiveUnits

Draws = dict[str, tuple[HeadDraws | None, Tensor | None]]
"""New weights of heads and of neurons by block; None where all of them live."""
Entries = dict[str, tuple[Tensor, Tensor]]
"""What `zero.masks.ShardedMasks.write_` takes."""


def neuron_sizes(sharded: ShardedMasks, block: str) -> Tensor:
    """L1 norm of each neuron's row of fc1 and column of fc2, from the fp32 masters. [slots]. Collective."""
    names = [f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.weight"]
    rows, columns = sharded.magnitudes(names).values()
    return rows.abs().sum(1) + columns.abs().sum(0)


def head_sizes(sharded: ShardedMasks, block: str, units: BlockUnits) -> Tensor:
    """L1 norm of each head's rows of q, k and v and columns of the projection. [slots]. Collective."""
    qkv, proj = sharded.magnitudes([f"{block}.attn.qkv.weight", f"{block}.attn.proj.weight"]).values()
    rows = qkv.abs().sum(1).view(3, units.heads, units.head_dim).sum((0, 2))
    return rows + proj.abs().sum(0).view(units.heads, units.head_dim).sum(1)


def draw_units(units: LiveUnits, seed: int, step: int, device: torch.device) -> tuple[Draws, dict[str, Candidates]]:
    """New weights of a step, and those of the dead units on the device, for the probe."""
    draws: Draws = {}
    candidates = {}
    for block, full in units.full.items():
        dead, heads, rows = units.dead(block), None, None
        if dead[HEADS]:
            heads = head_draws(full.heads, full.head_dim, full.width, seed, step, block)
        if dead[NEURONS]:
            rows = neuron_draws(full.neurons, full.width, seed, step, block)
        draws[block] = (heads, rows)
        candidates[block] = Candidates(
            heads.proj[dead[HEADS]].to(device) if heads is not None else None,
            rows[dead[NEURONS]].to(device) if rows is not None else None,
        )
    return draws, candidates


def write_units(sharded: ShardedMasks, done: Exchanges, draws: Draws) -> None:
    """Values of the units that begin to live into every copy of the weights, zeros into their optimizer state."""
    for block, of in done.items():
        heads, neurons = of[HEADS], of[NEURONS]
        if heads.written or neurons.written:
            drawn = draws[block]
            slots = (heads.written, drawn[0], heads.grown), (neurons.written, drawn[1], neurons.grown)
            sharded.write_(new_values(sharded.engine.module, block, *slots))


def new_values(
    model: nn.Module,
    block: str,
    heads: tuple[Sequence[int], HeadDraws | None, Sequence[int]],
    neurons: tuple[Sequence[int], Tensor | None, Sequence[int]],
) -> Entries:
    """Values of units that begin to live: no effect on the function, and a gradient for every weight.

    A head gets new queries, keys and projection, values and biases of zero; a neuron a new row of fc1, bias and column
    of fc2 of zero. (All zero, as in the published code, queries and keys would have no gradient ever.)

    Args:
        model: compact, as it is now.
        block: its module name.
        heads: (slots, draws, units), the units in the slots' order.
        neurons: likewise, the draws [units, width].
    """
    shapes = {name: full_shape(p) for name, p in model.named_parameters()}
    units = units_of(model)[block]
    entries: Entries = {}
    for name, take in unit_entries(model, block, heads[0], neurons[0]).items():
        entries[name] = (entry_mask(shapes[name], take), torch.zeros(shapes[name]))
    if heads[0] and heads[1] is not None:
        chosen = list(heads[2])
        rows = head_rows(units, heads[0], ("q", "k"))
        query_key = heads[1].query_key[chosen].transpose(0, 1).reshape(len(rows), -1)
        entries[f"{block}.attn.qkv.weight"][1][rows] = query_key
        (columns,) = unit_entries(model, block, heads[0], parts=("proj",)).values()
        proj = heads[1].proj[chosen].permute(1, 0, 2).reshape(-1, len(columns[1]))
        entries[f"{block}.attn.proj.weight"][1][:, columns[1]] = proj
    if neurons[0] and neurons[1] is not None:
        entries[f"{block}.mlp.fc1.weight"][1][list(neurons[0])] = neurons[1][list(neurons[2])]
    return entries
