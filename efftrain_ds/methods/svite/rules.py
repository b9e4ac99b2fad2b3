"""One topology update of one layer: which units are dropped, which are grown.

A *unit* is what a mask switches: one entry of a weight (`ElementRule`), a block of them, or an entry under an N:M
constraint. Every rule keeps its counts exactly, also where scores tie: ties go to the lower flat (row-major) index.
All inputs must be equal on all ranks; then the outcome is too, and no mask is ever sent.

Shape legend: N units of a layer, n of them live, k exchanged.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...core.errors import ConfigError
from .densities import Shapes, exact_counts, layer_densities, mask_rng, random_mask

GROWTH = ("gradient", "random", "mixed")


@dataclass(frozen=True)
class Update:
    """Outcome of an update, in units.

    Attributes:
        mask: units that live now, boolean.
        dropped: units that were live and were dropped, also where they were grown again at once.
        grown: units that were grown, among them the ones just dropped.
        regrown_share: share of the dropped units that were grown again (that part of the update did nothing).
        keeps_values: weights outside of the mask stay as they are (Top-KAST), instead of being zeroed.
        backward: units whose gradient is applied, where these are more than the live ones (Top-KAST).
    """

    mask: Tensor
    dropped: Tensor
    grown: Tensor
    regrown_share: float
    keeps_values: bool = False
    backward: Tensor | None = None

    @property
    def zero(self) -> Tensor:
        """Units that changed sides: their weight, moments and average become 0.

        What was dropped and grown again is not among them and keeps its value.
        """
        return torch.zeros_like(self.mask) if self.keeps_values else self.dropped ^ self.grown


@dataclass(frozen=True)
class Entries:
    """What a score may look at; all tensors in the shape of the mask.

    Attributes:
        weight: fp32.
        gradient: dense mean gradient of the step, or None.
        mask: live units.
        generator: equal on all ranks.
        factor: weight of the gradient in scores that mix both.
    """

    weight: Tensor
    gradient: Tensor | None
    mask: Tensor
    generator: torch.Generator | None = None
    factor: float = 0.0

    @property
    def slope(self) -> Tensor:
        """The gradient, where a score cannot do without."""
        if self.gradient is None:
            raise ValueError("this score needs the dense gradient, and none was given")
        return self.gradient


Score = Callable[[Entries], Tensor]
_S = TypeVar("_S", bound=Score)

DROP_SCORES: dict[str, Score] = {}
"""Importance of live units by name; the lowest are dropped."""
NEED_GRADIENT: set[str] = set()
"""Names of the drop scores that read the gradient (of live units)."""


def drop_score(name: str, *, gradient: bool = False) -> Callable[[_S], _S]:
    """Register a function as the importance `name`; `gradient` says that it reads the gradient."""

    def add(function: _S) -> _S:
        DROP_SCORES[name] = function
        if gradient:
            NEED_GRADIENT.add(name)
        return function

    return add


@drop_score("magnitude")
def _magnitude(entries: Entries) -> Tensor:
    return entries.weight.abs()


@drop_score("signed_magnitude")
def _signed_magnitude(entries: Entries) -> Tensor:
    # SET drops the smallest positive and the largest negative weights, the same share of each sign
    score = torch.zeros_like(entries.weight)
    for sign in (1, -1):
        places = (entries.mask & (entries.weight * sign > 0)).flatten().nonzero().squeeze(1)
        order = entries.weight.abs().flatten()[places].argsort(stable=True)
        ranks = torch.arange(1, len(places) + 1, dtype=score.dtype, device=score.device) / max(1, len(places))
        score.view(-1)[places[order]] = ranks
    return score


@drop_score("magnitude_gradient", gradient=True)
def _magnitude_gradient(entries: Entries) -> Tensor:
    size = entries.weight.abs()
    return size + entries.factor * entries.slope.abs() if entries.factor else size


@drop_score("sensitivity", gradient=True)
def _sensitivity(entries: Entries) -> Tensor:
    return (entries.weight * entries.slope).abs()


@drop_score("random")
def _random(entries: Entries) -> Tensor:
    return random_order(entries.mask, entries.generator)


def random_order(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random permutation of the flat positions, in the shape and on the device of `like`; drawn on the generator's.

    Raises:
        ValueError: no generator.
    """
    if generator is None:
        raise ValueError("a random choice needs a generator that is equal on all ranks")
    order = torch.randperm(like.numel(), generator=generator, device=generator.device)
    return order.view(like.shape).to(like.device)


def finite(*tensors: Tensor | None) -> bool:
    """True where no entry of any tensor is inf or NaN; an update on other scores must be postponed."""
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


def top_k(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Exactly `k` of the candidates: those with the highest scores, ties by the lower flat index, NaN last.

    Args:
        scores: any real type, shape of `candidates`.
        candidates: boolean.
        k: how many.

    Returns:
        Boolean, shape of `candidates`.

    Raises:
        ValueError: there are fewer than `k` candidates.
    """
    places = candidates.flatten().nonzero().squeeze(1)
    if not 0 <= k <= len(places):
        raise ValueError(f"cannot choose {k} of {len(places)} candidates")
    chosen = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    if k:
        values = scores.flatten()[places]
        if values.is_floating_point():
            values = values.masked_fill(values.isnan(), -math.inf)
        # no order among equal values is promised by topk, so it only finds the threshold
        threshold = values.topk(k, sorted=False).values.min()
        above = values > threshold
        ties = (values == threshold).nonzero().squeeze(1)[: k - int(above.sum())]
        chosen[places[above]] = True
        chosen[places[ties]] = True
    return chosen.view(candidates.shape)


def grow_after_drop(
    mask: Tensor,
    dropped: Tensor,
    count: int,
    scores: Tensor | None,
    generator: torch.Generator | None,
    *,
    random_share: float = 0.0,
    exclude_just_dropped: bool = False,
) -> Update:
    """Grow until `count` units live.

    Args:
        mask: units that lived before the update.
        dropped: part of them.
        count: live units afterwards (not fewer than remain after the drop).
        scores: highest first; None grows uniformly at random.
        generator: for the random part.
        random_share: share of the grown units that are drawn at random, after the others were chosen by score.
        exclude_just_dropped: what was just dropped is no candidate.
    """
    kept = mask & ~dropped
    candidates = ~(mask if exclude_just_dropped else kept)
    number = max(0, count - int(kept.sum()))
    random = number if scores is None else math.floor(random_share * number + 0.5)
    grown = torch.zeros_like(mask)
    if scores is not None and number > random:
        grown = top_k(scores, candidates, number - random)
    if random:
        grown = grown | top_k(random_order(mask, generator), candidates & ~grown, random)
    share = int((dropped & grown).sum()) / max(1, int(dropped.sum()))
    return Update(kept | grown, dropped, grown, share)


class Rule(ABC):
    """How a layer's mask is made, stored and changed; the same for every form of sparsity.

    Masks are stored in units (`unit_shape`), `expand` turns them into the shape of the weight.
    """

    @property
    def needs_gradient(self) -> bool:
        """True where an update reads the gradient."""
        return self.needs_dense_gradient

    @property
    def needs_dense_gradient(self) -> bool:
        """True where it reads the gradient of dead units too."""
        return False

    def unit_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the mask of the weight `name`.

        Raises:
            ModelError: the weight's shape does not fit the form.
        """
        return tuple(shape)

    def expand(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Boolean mask in the shape of the weight."""
        return mask

    def dense_layers(self, shapes: Shapes) -> list[str]:
        """Names of the weights that this form leaves dense (no mask)."""
        return []

    def fit_count(self, name: str, shape: tuple[int, ...], count: int) -> int:
        """The live count nearest to `count` that this form can hold in a weight of this shape.

        Raises:
            ModelError: the weight's shape does not fit the form.
        """
        return min(count, math.prod(self.unit_shape(name, shape)))

    def initial(self, name: str, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
        """First mask, with exactly `count` live units; equal on all ranks."""
        return random_mask(self.unit_shape(name, shape), count, mask_rng(seed, name, "initial"))

    def swaps(self, alpha: float, mask: Tensor, count: int | None = None) -> int:
        """Units k to exchange: floor(alpha n), at most what is not live.

        Args:
            alpha: update fraction.
            mask: live units.
            count: live units after the update; None keeps their number.
        """
        live = int(mask.sum())
        count = live if count is None else count
        return max(0, min(math.floor(alpha * count), mask.numel() - max(live, count), live))

    @abstractmethod
    def update(
        self,
        weight: Tensor,
        gradient: Tensor | None,
        mask: Tensor,
        k: int,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Update:
        """Drop and grow.

        Args:
            weight: [out, in, ...] fp32 masters, after the optimizer step.
            gradient: dense mean gradient of the same shape, taken before that step; None where the rule needs none.
            mask: live units before.
            k: units to exchange, from `swaps`.
            generator: for random choices; see `densities.mask_rng`.
            count: live units afterwards where the density changes; None keeps their number.
        """


def layer_counts(
    rule: Rule, shapes: Shapes, density: float, distribution: str = "erk", power: float = 1.0
) -> dict[str, int]:
    """Live units of every masked weight at a density of the model.

    Args:
        rule: decides the units and which weights stay dense (those are not in the result).
        shapes: of the weights, from `densities.maskable`.
        density: kept share; an N:M form keeps its own.
        distribution: density rule, see `densities.layer_densities`.
        power: of ERK.

    Raises:
        ConfigError: density or distribution not allowed.
        ModelError: a weight that the form cannot take, or that would have no live unit.
    """
    units = {name: rule.unit_shape(name, tuple(shape)) for name, shape in shapes.items()}
    dense = rule.dense_layers(shapes)
    counts = exact_counts(units, layer_densities(units, density, distribution, power, dense=dense))
    return {n: rule.fit_count(n, tuple(shapes[n]), count) for n, count in counts.items() if n not in dense}


def initial_masks(rule: Rule, shapes: Shapes, counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """First masks, in units, of the weights that `counts` names; equal on all ranks without any message."""
    return {name: rule.initial(name, tuple(shapes[name]), count, seed) for name, count in counts.items()}


@dataclass(frozen=True)
class ElementRule(Rule):
    """Prune-and-grow of single entries (RigL, Evci et al. 2020; SViTE, Chen et al. 2021).

    Attributes:
        drop: importance, a name in `DROP_SCORES`.
        grow: "gradient", "random" or "mixed".
        random_share: part of a "mixed" growth that is random.
        exclude_just_dropped: never grow what this update dropped.
        noise: standard deviation of normal noise on the importance (breaks ties at random).
        factor: of the gradient in the importance "magnitude_gradient".
    """

    drop: str = "magnitude"
    grow: str = "gradient"
    random_share: float = 0.5
    exclude_just_dropped: bool = False
    noise: float = 0.0
    factor: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self.drop, DROP_SCORES, self.grow, self.random_share)

    @property
    def needs_gradient(self) -> bool:
        """True for growth by gradient and for importances that read it."""
        by_factor = self.drop == "magnitude_gradient"
        return self.needs_dense_gradient or (self.factor != 0 if by_factor else self.drop in NEED_GRADIENT)

    @property
    def needs_dense_gradient(self) -> bool:
        """True for growth by gradient."""
        return self.grow != "random"

    def update(
        self,
        weight: Tensor,
        gradient: Tensor | None,
        mask: Tensor,
        k: int,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Update:
        """Drop the least important live entries, grow the best dead ones; see `Rule.update`."""
        live = int(mask.sum())
        count = live if count is None else count
        importance = DROP_SCORES[self.drop](Entries(weight, gradient, mask, generator, self.factor))
        if self.noise:
            if generator is None:
                raise ValueError("noise on the importance needs a generator that is equal on all ranks")
            noise = torch.randn(mask.shape, generator=generator, device=generator.device)
            importance = importance + self.noise * noise.to(importance.device)
        dropped = top_k(-importance, mask, k + max(0, live - count))
        scores = None if self.grow == "random" else Entries(weight, gradient, mask).slope.abs()
        share = self.random_share if self.grow == "mixed" else 0.0
        exclude = self.exclude_just_dropped
        return grow_after_drop(
            mask, dropped, count, scores, generator, random_share=share, exclude_just_dropped=exclude
        )


def check_choices(drop: str, drops: object, grow: str, random_share: float) -> None:
    """Check the names of a rule.

    Raises:
        ConfigError: unknown importance or growth, or a share outside [0, 1].
    """
    if drop not in drops:  # type: ignore[operator]
        raise ConfigError(f'drop score "{drop}" is unknown, allowed: {", ".join(drops)}')  # type: ignore[arg-type]
    if grow not in GROWTH:
        raise ConfigError(f'growth "{grow}" is unknown, allowed: {", ".join(GROWTH)}')
    if not 0 <= random_share <= 1:
        raise ConfigError(f"random share of the growth is {random_share}, allowed: 0 to 1")
