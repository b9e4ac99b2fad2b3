"""The memory bank in the run: new sub-networks are offered to it, and its scores are renewed from time to time."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.batch import Batch
from ...core.context import Context
from .bank import MemoryBank
from .config import BankConfig
from .preference import Drawn
from .price import every_steps
from .scoring import Images, Probes, score


class Memory:
    """What happens to a bank after each step. Equal on all ranks, as the scores are those of all of them.

    Args:
        bank: of the run.
        config: of it.
        probes: fixed images for scoring again.
    """

    def __init__(self, bank: MemoryBank, config: BankConfig, probes: Probes) -> None:
        self.bank, self.config, self.probes = bank, config, probes
        self._raw: Images | None = None

    def begin(self) -> None:
        """A new step."""
        self._raw = None

    def keep(self, batch: Batch) -> None:
        """Remember the images before they are mixed."""
        if batch.labels is not None:
            images = batch.images.clone() if batch.normalized else batch.images  # mixing changes those in place
            self._raw = Images(images, batch.labels, batch.valid, batch.mean, batch.std)

    def offer(self, ctx: Context, drawn: Sequence[Drawn], levels: Sequence[int]) -> None:
        """Score the new ones among the sub-networks of a step and offer them. Collective.

        Args:
            ctx: of the run.
            drawn: of the step.
            levels: of each of them.
        """
        new = [
            (level, one.config)
            for level, one in zip(levels, drawn, strict=True)
            if one.explored and one.config not in self.bank.configs(level)
        ]
        if not new or self._raw is None:
            return
        for (level, config), value in zip(new, score(ctx, [c for _, c in new], [self._raw]), strict=True):
            self.bank.offer(level, config, value)

    def refresh(self, ctx: Context, level: int) -> None:
        """Score the banks again where it is time, all of them or that of the step's level. Collective."""
        bank = self.bank
        if self._due(ctx, self.config.refresh):
            levels: Sequence[int] = range(len(bank.capacity))
        elif self._due(ctx, self.config.refresh_level):
            levels = [level]
        else:
            return
        images = self.probes.of(ctx, self.config.images) or ([self._raw] if self._raw is not None else [])
        pairs = [(place, one) for place in levels for one in bank.configs(place)]
        if not pairs or not images:
            return
        scores = score(ctx, [one for _, one in pairs], images)
        for place in levels:
            bank.rescore(place, [s for (found, _), s in zip(pairs, scores, strict=True) if found == place])
        best = [bank.best(place) for place in range(len(bank.capacity))]
        ctx.record(
            "bank",
            sizes=[bank.size(place) for place in range(len(bank.capacity))],
            best=[None if one is None else one.score for one in best],
            rescored=len(pairs),
            checksum=bank.checksum(),
        )

    def _due(self, ctx: Context, text: str | None) -> bool:
        if text is None or ctx.schedule is None:
            return False
        return (ctx.step + 1) % every_steps(text, ctx.schedule.spec, ctx.schedule.total_steps) == 0
