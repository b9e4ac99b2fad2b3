"""The live units of a model: which unit is in which slot, which units ever lived, and one update of all blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...models.unit_probes import UnitScores
from ...models.units import BlockUnits, Keep
from .packing import packed, unpacked
from .pictures import unit_map, unit_states
from .rules import finite
from .s2vite_slots import (
    HEADS,
    KINDS,
    NEURONS,
    Exchange,
    exchange,
    first_units,
    keep_best,
    live_count,
    slots_digest,
    swap_count,
    unit_mask,
)

Counts = dict[str, dict[str, int]]
"""Number of units by block and kind."""
Units = dict[str, dict[str, tuple[int, ...]]]
"""Unit in every slot, by block and kind."""
Exchanges = dict[str, dict[str, Exchange]]


def sizes_of(units: BlockUnits) -> dict[str, int]:
    """Heads and neurons of a block of the full model."""
    return {HEADS: units.heads, NEURONS: units.neurons}


@dataclass
class LiveUnits:
    """Which units live.

    Attributes:
        full: size of the full model's blocks.
        slots: unit in every slot.
        before: the same before the latest update; empty until there was one.
        union: bool [units] by block and kind: what ever lived; empty before the first step.
    """

    full: dict[str, BlockUnits] = field(default_factory=dict)
    slots: Units = field(default_factory=dict)
    before: Units = field(default_factory=dict)
    union: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def size(self, block: str, kind: str) -> int:
        """Units of the full model."""
        return sizes_of(self.full[block])[kind]

    def counts_at(self, densities: tuple[float, float], exclude: list[str]) -> Counts:
        """Live units at densities of heads and neurons; the excluded blocks keep all."""
        share = dict(zip(KINDS, densities, strict=True))
        return {
            block: {kind: n if block in exclude else live_count(n, share[kind]) for kind, n in sizes_of(units).items()}
            for block, units in self.full.items()
        }

    def counts(self) -> Counts:
        """Slots of now."""
        return {block: {kind: len(of[kind]) for kind in KINDS} for block, of in self.slots.items()}

    def draw(self, counts: Counts, seed: int) -> None:
        """The seeded first units."""
        self.slots = {
            block: {kind: first_units(self.size(block, kind), n, seed, block, kind) for kind, n in of.items()}
            for block, of in counts.items()
        }

    def live(self, block: str) -> dict[str, Tensor]:
        """bool [units] by kind."""
        return {kind: unit_mask(self.size(block, kind), units) for kind, units in self.slots[block].items()}

    def dead(self, block: str) -> dict[str, list[int]]:
        """Units without a slot by kind, ascending."""
        return {kind: (~live).nonzero().flatten().tolist() for kind, live in self.live(block).items()}

    def explore(self) -> None:
        """Remember what lives now."""
        for block in self.slots:
            known = self.union.get(block)
            self.union[block] = {k: m | known[k] if known else m for k, m in self.live(block).items()}

    def by_unit(self, block: str, kind: str, of_live: Tensor, of_dead: Tensor) -> Tensor:
        """Scores by slot and by dead unit as one by unit. float64 [units], on the host."""
        scores = torch.zeros(self.size(block, kind), dtype=torch.float64)
        scores[list(self.slots[block][kind])] = of_live.detach().cpu().double()
        dead = self.dead(block)[kind]
        if dead:
            scores[dead] = of_dead.detach().cpu().double()
        return scores

    def scored(self, scores: Mapping[str, UnitScores]) -> dict[str, dict[str, Tensor]]:
        """Grow scores of all units by block and kind, of a compact model."""
        return {
            block: {
                HEADS: self.by_unit(block, HEADS, scores[block].head_grow_live, scores[block].head_grow_dead),
                NEURONS: self.by_unit(block, NEURONS, scores[block].neuron_grow_live, scores[block].neuron_grow_dead),
            }
            for block in self.slots
        }

    def decide(
        self,
        prune: Mapping[str, Mapping[str, Tensor]],
        grow: Mapping[str, Mapping[str, Tensor]],
        alpha: float,
        exclude_dropped: bool = False,
    ) -> Exchanges | None:
        """One update of all blocks; nothing is changed.

        Args:
            prune: scores by slot.
            grow: scores by unit.
            alpha: share of the live units to exchange.
            exclude_dropped: see `s2vite_slots.exchange`.

        Returns:
            None where a score is not finite.
        """
        if not all(finite(*of.values()) for side in (prune, grow) for of in side.values()):
            return None
        done: Exchanges = {}
        for block, of in self.slots.items():
            done[block] = {}
            for kind, slots in of.items():
                k = swap_count(alpha, len(slots)) if len(slots) < self.size(block, kind) else 0
                scores = prune[block][kind], grow[block][kind]
                done[block][kind] = exchange(slots, *scores, k, exclude_dropped=exclude_dropped)
        return done

    def removal(self, counts: Counts, scores: Mapping[str, Mapping[str, Tensor]]) -> tuple[Keep, Units]:
        """Fewer units: those with the lowest score go; nothing is changed.

        Args:
            counts: to be left.
            scores: by slot, of the blocks that lose units.

        Returns:
            Slots to keep in these blocks, and the unit in every slot afterwards.
        """
        keep, after = {}, dict(self.slots)
        for block, of in scores.items():
            slots = self.slots[block]
            kept = {kind: keep_best(slots[kind], of[kind], counts[block][kind]) for kind in KINDS}
            keep[block] = (kept[HEADS], kept[NEURONS])
            after[block] = {kind: tuple(slots[kind][i] for i in kept[kind]) for kind in KINDS}
        return keep, after

    def adopt(self, done: Exchanges) -> None:
        """Carry an update out."""
        self.before = self.slots
        self.slots = {block: {kind: e.slots for kind, e in of.items()} for block, of in done.items()}
        self.explore()

    def digest(self) -> str:
        """Digest of the units in all slots."""
        return slots_digest(self.slots)

    def facts(self) -> dict[str, float]:
        """Live share, and share of those that ever lived, of all heads and of all neurons."""
        found: dict[str, float] = {}
        for kind in KINDS:
            total = sum(self.size(block, kind) for block in self.full)
            found[kind] = sum(len(of[kind]) for of in self.slots.values()) / total
            found[f"explored_{kind}"] = sum(int(of[kind].sum()) for of in self.union.values()) / total
        return found

    def maps(self) -> dict[str, Tensor]:
        """Pictures uint8 [3, H, W] of all blocks' units by kind."""
        found = {}
        for kind in KINDS:
            rows = {}
            for block, of in self.slots.items():
                before, ever = (side.get(block, {}).get(kind) for side in (self.before, self.union))
                rows[block] = unit_states(of[kind], self.size(block, kind), ever=ever, before=before)
            found[kind] = unit_map(rows)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything but the sizes, as tensors and plain types."""
        union = {b: {kind: [m.numel(), packed(m)] for kind, m in of.items()} for b, of in self.union.items()}
        return {"slots": _as_tensors(self.slots), "before": _as_tensors(self.before), "union": union}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.slots, self.before = _from_tensors(state["slots"]), _from_tensors(state["before"])
        self.union = {b: {k: unpacked(bits, [n]) for k, (n, bits) in of.items()} for b, of in state["union"].items()}


def _as_tensors(slots: Units) -> dict[str, dict[str, Tensor]]:
    return {b: {kind: torch.tensor(units, dtype=torch.int32) for kind, units in of.items()} for b, of in slots.items()}


def _from_tensors(slots: Mapping[str, Mapping[str, Tensor]]) -> Units:
    return {block: {kind: tuple(units.tolist()) for kind, units in of.items()} for block, of in slots.items()}
