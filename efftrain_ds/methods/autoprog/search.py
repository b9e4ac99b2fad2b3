"""One search: a supernet is trained on all candidates, measured on fixed samples, and one candidate goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...core import faults
from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError
from ...core.ranks import agree, from_first, gather, text_of
from ...core.text import align
from ...cost.macs import module_macs
from ...models.elastic import paths_for, set_paths
from ...models.stacks import depth_of, truncate
from ...zero.blueprint import copy_blueprint
from .candidates import Candidate
from .choice import Choice, choose

INSTANTS = 5
"""Losses are measured at the start, the quarters and the end of the last epoch of a search."""


class Search:
    """State of the search of one stage.

    Args:
        stage: growth stage (0-based).
        options: candidates (depth, resolution); 0 where a dimension does not grow.
        base: depth that the supernet was grown from.
        top: its depth.
    """

    def __init__(self, stage: int, options: Sequence[Candidate], base: int, top: int):
        self.stage = stage
        self.options = tuple((int(d), int(r)) for d, r in options)
        self.base, self.top = base, top
        self.losses: list[list[float]] = []
        self.seconds: list[list[float]] = [[] for _ in self.options]

    def depth(self, option: Candidate) -> int:
        """Depth of a candidate."""
        return option[0] or self.top

    def paths(self, module: Any, option: Candidate) -> list[list[int]] | None:
        """Blocks of each stack that a candidate runs; None is all of them."""
        return None if self.depth(option) == self.top else paths_for(module, self.base, self.depth(option))

    def instants(self, start: int, end: int, epoch_steps: float) -> list[int]:
        """Steps before which losses are measured: the first four instants (the last is the end of the search)."""
        first = max(start, round(end - epoch_steps))
        return [first + (end - first) * i // (INSTANTS - 1) for i in range(INSTANTS - 1)]

    def time(self, option: Candidate, seconds: float) -> None:
        """Note how long the forward and backward passes of one step took."""
        self.seconds[self.options.index(option)].append(seconds)

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "stage": self.stage,
            "options": [list(o) for o in self.options],
            "base": self.base,
            "top": self.top,
            "losses": self.losses,
            "seconds": self.seconds,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Search:
        """What `to_plain` returned."""
        found = cls(plain["stage"], [tuple(o) for o in plain["options"]], plain["base"], plain["top"])
        found.losses = [list(row) for row in plain["losses"]]
        found.seconds = [list(row) for row in plain["seconds"]]
        return found

    # -- measuring ---------------------------------------------------------------------------------------------

    def measure(self, ctx: Context, samples: int, resize: Any) -> None:
        """Loss of every candidate with the average of the weights, on the same fixed samples. Collective.

        Args:
            ctx: of the run.
            samples: samples over all ranks.
            resize: function (images, side) that brings images on the device to a candidate's resolution.

        Raises:
            ConfigError: nobody provides fixed samples.
        """
        if ctx.probe_batches is None:
            raise ConfigError(
                "efftrain.methods.autoprog.search needs fixed labelled samples: use launch/train.py, or pass "
                "probe_batches= to efftrain_ds.initialize"
            )
        batches = self._probes(ctx, samples)
        engine = ctx.engine
        sums = torch.zeros(len(self.options), 2, dtype=torch.float64)
        with torch.no_grad(), engine.evaluating(ema=engine.ema is not None):
            dtype = next(engine.module.parameters()).dtype
            for batch in batches:
                faults.point("search.measure")
                batch = batch.to(ctx.device)
                images = normalised(batch.images, batch.mean, batch.std)
                for i, option in enumerate(self.options):
                    if self.top:
                        set_paths(engine.module, self.paths(engine.module, option))
                    logits = engine(resize(images, option[1]).to(dtype)).float()
                    labels, valid = batch.labels, batch.valid
                    if valid is not None:
                        logits, labels = logits[valid], labels[valid]
                    if len(labels):
                        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                        sums[i] += torch.stack([loss.double().cpu(), torch.tensor(float(len(labels)))])
            if self.top:
                set_paths(engine.module, None)
        if ctx.world > 1:
            on_device = sums.to(ctx.device)
            dist.all_reduce(on_device)
            sums = on_device.cpu()
        self.losses.append((sums[:, 0] / sums[:, 1]).tolist())

    @staticmethod
    def _probes(ctx: Context, samples: int) -> list[Batch]:
        """The fixed samples; what one rank cannot read all ranks hear of. Collective."""
        problem, batches = None, []
        try:
            assert ctx.probe_batches is not None
            batches = list(ctx.probe_batches(samples))
            if any(batch.labels is None for batch in batches):
                problem = "the probe batches have no labels"
        except Exception as error:
            problem = text_of(error)
        agree(problem, ConfigError, "efftrain.methods.autoprog.search")
        counts = gather(len(batches))
        if len(set(counts)) > 1:
            raise ConfigError(
                f"efftrain.methods.autoprog.search: the ranks have different numbers of probe batches: {counts}"
            )
        return batches

    def macs(self, ctx: Context) -> list[int]:
        """Forward MACs of one image of each candidate, by count on the blueprint."""
        spec = ctx.schedule.spec if ctx.schedule is not None else None
        full = spec.resolution if spec is not None else 224
        found: dict[Candidate, int] = {}
        for depth, resolution in self.options:
            module = copy_blueprint(ctx.engine.blueprint)
            if depth and depth < depth_of(module):
                module = truncate(module, depth)
            channels = next((m.in_channels for m in module.modules() if isinstance(m, torch.nn.Conv2d)), 3)
            found[depth, resolution] = module_macs(module, resolution or full, channels=channels)
        return [found[o] for o in self.options]

    def costs(self, ctx: Context, kind: str) -> list[float]:
        """Cost of a step of each candidate: measured seconds (the slowest rank's median) or MACs. Collective.

        A candidate that was hardly ever drawn takes the seconds per MAC of the others.
        """
        macs = self.macs(ctx)
        if kind == "macs":
            return [float(m) for m in macs]
        medians = torch.tensor(
            [statistics.median(s) if len(s) > 1 else float("nan") for s in self.seconds], dtype=torch.float64
        )
        if ctx.world > 1:
            on_device = medians.to(ctx.device)
            dist.all_reduce(on_device, dist.ReduceOp.MAX)
            medians = on_device.cpu()
        times = medians.tolist()
        rates = [t / m for t, m in zip(times, macs, strict=True) if t == t]
        if not rates:
            return [float(m) for m in macs]
        typical = statistics.median(rates)
        return [t if t == t else typical * m for t, m in zip(times, macs, strict=True)]

    def finish(self, ctx: Context, kind: str, previous_alpha: float | None) -> tuple[Candidate, Choice]:
        """Choose on rank 0 and tell the others; the table goes to the journal and the screen. Collective."""
        losses = [statistics.fmean(column) for column in zip(*self.losses, strict=True)]
        costs = self.costs(ctx, kind)
        choice = from_first(lambda: choose(costs, losses, previous_alpha))
        chosen = self.options[choice.index]
        rows = [
            {
                "depth": d,
                "resolution": r,
                "losses": [row[i] for row in self.losses],
                "loss": losses[i],
                "cost": costs[i],
                "score": choice.scores[i],
                "chosen": i == choice.index,
            }
            for i, (d, r) in enumerate(self.options)
        ]
        ctx.record("growth_search", stage=self.stage, alpha=choice.alpha, cost=kind, table=rows)
        ctx.say(self._lines(rows, choice.alpha, kind))
        return chosen, choice

    def _lines(self, rows: list[dict[str, Any]], alpha: float, kind: str) -> list[str]:
        unit = "MACs" if kind == "macs" else "ms"
        table = [["depth", "side", "loss", unit, "score", ""]]
        for row in rows:
            cost = f"{row['cost']:.3g}" if kind == "macs" else f"{1e3 * row['cost']:.1f}"
            table.append(
                [
                    str(row["depth"] or "-"),
                    str(row["resolution"] or "-"),
                    f"{row['loss']:.4f}",
                    cost,
                    f"{row['score']:.4g}",
                    "<- chosen" if row["chosen"] else "",
                ]
            )
        head = f"growth search, stage {self.stage}: {len(rows)} candidates, alpha {alpha:.4f}"
        return [head, *("  " + line for line in align(table, left=(5,)))]


def normalised(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """fp32 images from uint8 ones; floating-point images are returned as they are. [N, C, H, W]

    Raises:
        ConfigError: uint8 images without mean and std.
    """
    if images.dtype != torch.uint8:
        return images
    if mean is None or std is None:
        raise ConfigError("efftrain.data: uint8 images arrived without mean and std (Batch.mean, Batch.std)")
    shape = (1, -1, 1, 1)
    m = torch.tensor(mean, device=images.device).view(shape)
    s = torch.tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - m) / s


def resized(images: Tensor, side: int) -> Tensor:
    """Square images brought to `side` pixels if they are larger: bilinear, pixel centres. [N, C, H, W]"""
    if not side or images.shape[-1] <= side:
        return images
    return torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


class StepTimer:
    """Seconds between the first batch of a step and its boundary, the device's work included."""

    def __init__(self) -> None:
        self._start: float | None = None

    def begin(self, device: torch.device) -> None:
        """The first micro-batch is here; later ones of the step change nothing."""
        if self._start is None:
            _wait(device)
            self._start = time.perf_counter()

    def end(self, device: torch.device) -> float | None:
        """Seconds since `begin`; None without one."""
        if self._start is None:
            return None
        _wait(device)
        seconds, self._start = time.perf_counter() - self._start, None
        return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["INSTANTS", "Search", "StepTimer", "normalised", "resized"]
