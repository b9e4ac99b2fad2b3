"""Which heads and neurons live, and in which slot: pure decisions, equal on every rank.

A *unit* is an attention head or an MLP neuron of the full model; a *slot* is a position in the smaller layers that are
trained. The number of slots is constant between two stages, so an update only changes which unit a slot holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.rng import torch_rng

HEADS, NEURONS = "heads", "neurons"
KINDS = (HEADS, NEURONS)
INIT_STD = 0.02
"""Spread of newly drawn weights: that of the first weights of a vision transformer."""

Slots = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Unit in every slot, by block and kind."""


def live_count(units: int, density: float) -> int:
    """Live units: ``floor(units * density)``, at least one (the density taken as the decimal it is written as).

    Raises:
        ConfigError: density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}, allowed: above 0, at most 1")
    return max(1, math.floor(units * Fraction(str(density))))


def swap_count(alpha: float, live: int) -> int:
    """Units to exchange: ``ceil(alpha * live)``, so at least one until the share is 0."""
    return min(live, math.ceil(alpha * live - 1e-9))


def first_units(units: int, count: int, seed: int, block: str, kind: str) -> tuple[int, ...]:
    """`count` of `units`, drawn uniformly from (seed, block, kind), in ascending order."""
    generator = torch_rng("cpu", seed, "s2vite", block, kind)
    return tuple(sorted(torch.randperm(units, generator=generator)[:count].tolist()))


@dataclass(frozen=True)
class Exchange:
    """What one update does to the units of one kind in one block.

    Attributes:
        slots: unit in every slot afterwards.
        dropped: units that had to go, lowest score first; some of them may have come back.
        regrown: those of them that came back, into their own slots, with all values.
        written: slots that hold a unit which did not live before, ascending.
    """

    slots: tuple[int, ...]
    dropped: tuple[int, ...]
    regrown: tuple[int, ...]
    written: tuple[int, ...]

    @property
    def grown(self) -> tuple[int, ...]:
        """Units that did not live before, in the order of `written`."""
        return tuple(self.slots[i] for i in self.written)


def exchange(
    slots: Sequence[int], prune: Tensor, grow: Tensor, count: int, *, exclude_dropped: bool = False
) -> Exchange:
    """Drop the `count` live units with the lowest score and grow as many of those that are then dead.

    A unit dropped a moment ago may be grown again; it then stays where it is. Equal scores go by the number of the
    unit, lower first, so that the outcome depends neither on the order of the slots nor on the device.

    Args:
        slots: unit in every slot.
        prune: [len(slots)], by slot.
        grow: [units], by unit; values of units that stay alive are not read.
        count: at most ``len(slots)``.
        exclude_dropped: grow only units that were dead before; then at most as many are exchanged as there are.
    """
    if exclude_dropped:
        count = min(count, grow.numel() - len(slots))
    assert prune.shape == (len(slots),), (prune.shape, len(slots))
    assert 0 <= count <= len(slots), (count, len(slots))
    by_unit = torch.full((grow.numel(),), torch.inf, dtype=torch.float64)
    by_unit[list(slots)] = prune.detach().cpu().double()
    # a prune score of +inf would look like a unit that does not live, so units that do are asked for by name
    live = torch.tensor(sorted(slots), dtype=torch.long)
    dropped = live[by_unit[live].argsort(stable=True)[:count]].tolist()
    alive = torch.zeros(grow.numel(), dtype=torch.bool)
    alive[list(slots)] = True
    if not exclude_dropped:
        alive[dropped] = False
    candidates = (~alive).nonzero().flatten()
    best = grow.detach().cpu().double()[candidates].argsort(descending=True, stable=True)[:count]
    chosen = set(candidates[best].tolist())
    regrown = tuple(unit for unit in dropped if unit in chosen)
    gone = set(dropped) - chosen
    written = tuple(i for i, unit in enumerate(slots) if unit in gone)
    after = list(slots)
    for slot, unit in zip(written, sorted(chosen - set(dropped)), strict=True):
        after[slot] = unit
    return Exchange(tuple(after), tuple(dropped), regrown, written)


def keep_best(slots: Sequence[int], prune: Tensor, count: int) -> list[int]:
    """The `count` slots with the highest score, in ascending order; of equal scores the lower units go first."""
    by_unit = sorted(range(len(slots)), key=lambda i: slots[i])
    order = prune.detach().cpu().double()[by_unit].argsort(stable=True).tolist()
    return sorted(by_unit[i] for i in order[len(slots) - count :])


@dataclass(frozen=True)
class HeadDraws:
    """New weights of all heads of a block, drawn whether they are needed or not.

    Attributes:
        query_key: [units, 2, head_dim, width].
        proj: [units, width, head_dim].
    """

    query_key: Tensor
    proj: Tensor


def head_draws(units: int, head_dim: int, width: int, seed: int, step: int, block: str) -> HeadDraws:
    """New weights of a block's heads from (seed, step, block, head), fp32 on the host."""
    query_key = _drawn((units, 2, head_dim, width), seed, step, block, "query_key")
    return HeadDraws(query_key, _drawn((units, width, head_dim), seed, step, block, "proj"))


def neuron_draws(units: int, width: int, seed: int, step: int, block: str) -> Tensor:
    """New rows of the first MLP layer from (seed, step, block, neuron). [units, width], fp32 on the host."""
    return _drawn((units, width), seed, step, block, "neurons")


def _drawn(shape: tuple[int, ...], seed: int, step: int, block: str, what: str) -> Tensor:
    # one stream for the block: the values of a unit depend on its number alone, not on which others are dead
    generator = torch_rng("cpu", seed, "s2vite", step, block, what)
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=INIT_STD, generator=generator)


def slots_digest(slots: Slots) -> str:
    """Digest of the units in all slots; equal on two ranks only if these are."""
    digest = hashlib.blake2b(digest_size=8)
    for block in sorted(slots):
        for kind in KINDS:
            digest.update(f"{block} {kind} {list(slots[block][kind])}\n".encode())
    return digest.hexdigest()


def unit_mask(units: int, live: Iterable[int]) -> Tensor:
    """[units], True where a unit lives."""
    mask = torch.zeros(units, dtype=torch.bool)
    mask[list(live)] = True
    return mask
