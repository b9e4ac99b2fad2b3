"""S2ViTE as its published code does it: masks on full weights, and the gradients that those leave.

A dead head is its rows of q, k and v; its biases and its columns of ``attn.proj`` live on, so it still emits a
constant. A dead neuron is its row of ``mlp.fc1`` and its column of ``mlp.fc2``; with both at zero, neither has a
gradient, so the only dead neurons with a score above zero are those that lived a moment ago, and they come back: the
neurons of this mode never change. Optimizer state follows the dense gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...models import masked
from ...models.unit_probes import UnitScores
from ...models.units import BlockUnits, entry_mask, unit_entries
from ...zero.access import full_shape
from .s2vite_slots import HEADS, NEURONS, Slots
from .s2vite_units import LiveUnits

MASKED_PARTS = ("q", "k", "v", "fc1", "fc2")


def unit_masks(model: nn.Module, full: Mapping[str, BlockUnits], slots: Slots) -> dict[str, Tensor]:
    """Masks of the weights of all blocks that have dead units, by parameter name."""
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for block, units in full.items():
        dead_heads = dead_units(units.heads, slots[block][HEADS])
        dead_neurons = dead_units(units.neurons, slots[block][NEURONS])
        for name, take in unit_entries(model, block, dead_heads, dead_neurons, MASKED_PARTS).items():
            if name.endswith("weight"):
                masks[name] = ~entry_mask(full_shape(parameters[name]), take)
    return masks


def mask_model(model: nn.Module, full: Mapping[str, BlockUnits], slots: Slots) -> nn.Module:
    """Put the masks on a full model, in place; weights outside of them become zero, where they are at hand.

    Raises:
        ModelError: a layer that cannot be masked.
    """
    masks, parameters = unit_masks(model, full, slots), dict(model.named_parameters())
    masked.mask_layers(model, masks, "dense")
    with torch.no_grad():
        for name, mask in masks.items():
            weight = parameters[name]
            if not hasattr(weight, "ds_id") and not weight.is_meta:  # else the first step writes the zeros
                weight.mul_(mask.to(weight.device))
    return model


def dead_units(units: int, live: tuple[int, ...]) -> list[int]:
    """Units without a slot, ascending."""
    alive = set(live)
    return [unit for unit in range(units) if unit not in alive]


def scores_of(
    units: LiveUnits, scores: Mapping[str, UnitScores], sizes: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Prune scores by live unit and grow scores by unit, of a model in which all units are stored.

    Args:
        units: which live.
        scores: of the probe; every head of the model has its slot.
        sizes: [neurons] by block, L1 norm of each neuron's weights.
        gradients: dense gradients by clean weight name.
    """
    prune, grow = {}, {}
    for block, of in units.slots.items():
        found = scores[block]
        prune[block] = {HEADS: found.head_prune[list(of[HEADS])], NEURONS: sizes[block][list(of[NEURONS])]}
        grow[block] = {HEADS: found.head_grow_live, NEURONS: torch.zeros_like(sizes[block])}
        if f"{block}.mlp.fc1.weight" in gradients:  # not masked where all neurons live
            rows, columns = gradients[f"{block}.mlp.fc1.weight"], gradients[f"{block}.mlp.fc2.weight"]
            grow[block][NEURONS] = rows.abs().sum(1) + columns.abs().sum(0)
    return prune, grow
