"""Known sparse-training methods as settings of one interface: a rule, an update schedule, a density schedule.

Settings that their papers do not fix for vision transformers are ours; the text of each preset says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigError
from .densities import mask_rng
from .rules import ElementRule, Rule, Update, top_k
from .schedule import DensitySchedule, UpdateSchedule, end_step


@dataclass(frozen=True)
class Preset:
    """Settings of one method.

    Attributes:
        rule: what an update does.
        every: interval of the updates in optimizer steps, or None.
        every_epochs: interval in epochs, where `every` is None.
        initial: update fraction at step 0.
        alpha: its course (see `schedule.ALPHAS`).
        end_share: share of the run in which updates take place.
        moments: "reset" keeps the moments of dead entries at 0, "dense" lets them follow the dense gradient.
        start_density: density at step 0 relative to nothing: None starts at the target.
        extra_density: share above the target at step 0, where `start_density` is None.
        power: of the density's course.
        change_share: share of the run in which the density changes.
    """

    rule: Rule
    every: int | None = None
    every_epochs: float | None = None
    initial: float = 0.5
    alpha: str = "paper"
    end_share: float = 0.8
    moments: str = "reset"
    start_density: float | None = None
    extra_density: float = 0.0
    power: float = 3.0
    change_share: float = 0.8

    def schedule(self, total: int, steps_per_epoch: float) -> UpdateSchedule:
        """Update schedule of a run of `total` steps."""
        every = self.every or max(1, math.floor((self.every_epochs or 1.0) * steps_per_epoch + 0.5))
        return UpdateSchedule(total, every, end_step(total, self.end_share), self.alpha, self.initial)

    def density(self, target: float, total: int) -> DensitySchedule:
        """Density schedule of a run of `total` steps that ends at `target`."""
        start = self.start_density
        if start is None:
            start = min(1.0, target * (1 + self.extra_density))
        elif start < target:
            raise ConfigError(f"density {target} is above the density {start} that the run starts from")
        return DensitySchedule(start, target, 0, max(1, end_step(total, self.change_share)), self.power)


def svite(**rule: object) -> Preset:
    """SViTE with exact counts and masked moments; the interval (15 000 steps of 1.5 M) is DeiT-S's at 600 epochs."""
    return Preset(ElementRule(**rule), every=15_000)  # type: ignore[arg-type]


def svite_reference(**rule: object) -> Preset:
    """SViTE as its code runs it: update fraction annealed over the whole run, moments of the dense gradient."""
    return Preset(ElementRule(**rule), every=15_000, alpha="reference", moments="dense")  # type: ignore[arg-type]


def rigl(every: int = 100, initial: float = 0.3) -> Preset:
    """RigL (Evci et al. 2020): growth by gradient. Its authors leave the updating step out; here it is taken."""
    rule = ElementRule(noise=1e-5)
    return Preset(rule, every=every, initial=initial, end_share=0.75)


def set_() -> Preset:
    """SET (Mocanu et al. 2018): once an epoch, the smallest 30 % of each sign go and random entries come."""
    rule = ElementRule(drop="signed_magnitude", grow="random")
    return Preset(rule, every_epochs=1.0, initial=0.3, alpha="constant", end_share=1.0)


def itop(grow: str = "gradient", every: int = 4_000) -> Preset:
    """ITOP (Liu et al. 2021): RigL's or SET's rule with rare, large updates nearly to the end (interval, end: ours).

    `densities.exploration` is what to watch: the share of entries that were ever live should come near 1.
    """
    return Preset(ElementRule(grow=grow), every=every, end_share=0.95)


def granet(start_density: float = 0.5, every: int = 1_000) -> Preset:
    """GraNet (Liu et al. 2021): the density falls as a cubic, and every prune is followed by prune-and-grow.

    Counts follow the density rule layer by layer; update fraction, interval and ends are ours.
    """
    return Preset(ElementRule(), every=every, start_density=start_density)


def srigl(ablation: float = 0.0, every: int = 100) -> Preset:
    """SRigL (Lasby et al. 2024): RigL with equally many live entries in every row; `ablation` is its gamma."""
    return Preset(FanInRule(ablation), every=every, initial=0.3, end_share=0.75)


def topkast(extra: float = 0.1, every: int = 100) -> Preset:
    """Top-KAST (Jayakumar et al. 2020): the largest weights run, a wider set of `extra` density learns (ours: 0.1)."""
    return Preset(TopKastRule(extra), every=every, initial=0.0, alpha="constant", end_share=1.0)


def mest(factor: float = 0.01, extra_density: float = 0.0) -> Preset:
    """MEST (Yuan et al. 2021): drop by |W| + factor |G| of live entries, grow at random, every 5 epochs.

    No dense gradient is needed. `extra_density` is the elastic variant: more entries early, falling linearly to the
    target. Factor, update fraction and ends are ours.
    """
    rule = ElementRule(drop="magnitude_gradient", grow="random", factor=factor)
    return Preset(rule, every_epochs=5.0, initial=0.3, extra_density=extra_density, power=1.0)


PRESETS: dict[str, Callable[..., Preset]] = {
    "svite": svite,
    "svite_reference": svite_reference,
    "rigl": rigl,
    "set": set_,
    "itop": itop,
    "granet": granet,
    "srigl": srigl,
    "topkast": topkast,
    "mest": mest,
}
"""Presets by name."""


@dataclass(frozen=True)
class FanInRule(Rule):
    """Constant fan-in: every row (output) that lives keeps the same number of entries.

    Attributes:
        ablation: gamma; a row dies for good where fewer than gamma x fan-in of its entries are salient, that is survive
            the cut by magnitude or are among the k largest gradients. Its entries go to the other rows; then the layer
            holds the largest multiple of its live rows that is at most the count (pass the layer's budget as `count`).
    """

    ablation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ablation <= 1:
            raise ConfigError(f"ablation is {self.ablation}, allowed: 0 to 1")

    @property
    def needs_dense_gradient(self) -> bool:
        """Always: rows grow by gradient."""
        return True

    def fit_count(self, name: str, shape: tuple[int, ...], count: int) -> int:
        """Nearest multiple of the rows, at least one entry a row."""
        return shape[0] * min(math.prod(shape[1:]), max(1, math.floor(count / shape[0] + 0.5)))

    def initial(self, name: str, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
        """First mask: ``count / rows`` random entries in every row.

        Raises:
            ValueError: `count` is no multiple of the rows; see `fit_count`.
        """
        if count % shape[0]:
            raise ValueError(f"{name}: {count} live entries do not spread evenly over {shape[0]} rows")
        keys = torch.rand(shape[0], math.prod(shape[1:]), generator=mask_rng(seed, name, "initial"))
        need = torch.full((shape[0],), count // shape[0])
        return row_top(keys, torch.ones_like(keys, dtype=torch.bool), need).view(shape)

    def update(
        self,
        weight: Tensor,
        gradient: Tensor | None,
        mask: Tensor,
        k: int,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Update:
        """Drop the `k` smallest of the layer, ablate rows, then fill every row to the fan-in by gradient."""
        if gradient is None:
            raise ValueError("constant fan-in grows by gradient, and none was given")
        size, slope, old = weight.abs().flatten(1), gradient.abs().flatten(1), mask.flatten(1)
        live = int(old.sum())
        count = live if count is None else count
        kept = old & ~top_k(-size, old, min(live, k + max(0, live - count)))
        rows = old.any(1)
        if self.ablation:
            dead = ~old & rows[:, None]
            salient = (kept | top_k(slope, dead, min(k, int(dead.sum())))).sum(1)
            stay = rows & (salient >= self.ablation * (count // int(rows.sum())))
            least = max(1, math.ceil(count / old.shape[1]))  # rows that can hold the budget
            rows = stay if int(stay.sum()) >= least else top_k(salient, rows, min(least, int(rows.sum())))
        need = (count // int(rows.sum())) * rows
        kept = row_top(size, kept & rows[:, None], need)
        grown = row_top(slope, ~kept & rows[:, None], need - kept.sum(1))
        dropped = old & ~kept
        share = int((dropped & grown).sum()) / max(1, int(dropped.sum()))
        new, dropped, grown = (x.view(mask.shape) for x in (kept | grown, dropped, grown))
        return Update(new, dropped, grown, share)


def row_top(scores: Tensor, candidates: Tensor, need: Tensor) -> Tensor:
    """In each row of [R, C] the up to ``need[r]`` candidates of highest score; ties by column, NaN last."""
    values = scores.masked_fill(scores.isnan(), -math.inf)
    order = values.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, candidates.gather(1, order).to(torch.int8).argsort(dim=1, descending=True, stable=True))
    first = torch.arange(scores.shape[1], device=scores.device) < need[:, None]
    return torch.zeros_like(candidates).scatter_(1, order, first.expand_as(order)) & candidates


@dataclass(frozen=True)
class TopKastRule(Rule):
    """The largest weights of a dense layer run; a superset of `extra` more density gets gradients.

    Nothing is zeroed: dead weights keep their value and can come back. Ask for an update before the first step too, as
    the initial mask is random. The exchange k is not used.
    """

    extra: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.extra < 1:
            raise ConfigError(f"extra density is {self.extra}, allowed: 0 to below 1")

    def update(
        self,
        weight: Tensor,
        gradient: Tensor | None,
        mask: Tensor,
        k: int,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Update:
        """Masks from the magnitudes alone; `Update.backward` contains `Update.mask`."""
        count = int(mask.sum()) if count is None else count
        every = torch.ones_like(mask)
        wide = min(mask.numel(), count + math.floor(self.extra * mask.numel() + 0.5))
        new = top_k(weight.abs(), every, count)
        backward = top_k(weight.abs(), every, wide)
        return Update(new, mask & ~new, new & ~mask, 0.0, keeps_values=True, backward=backward)
