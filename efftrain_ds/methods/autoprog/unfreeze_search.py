"""Search of staged unfreezing: candidates are scored on a copy of the running model, and nothing is trained for it.

Per candidate the condition of the tangent kernel, ZiCo and the time of forward and backward; a vote by ranks decides
(AutoProg-Zero, arXiv 2410.00350). All ranks measure, one decides.

Shape legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, RebuildError
from ...core.ranks import agree, from_first, text_of
from ...core.text import align
from ...data.augment.chain import normalize
from ...zero import access
from ...zero.blueprint import materialise
from .candidates import Candidate
from .config import UnfreezeSearchConfig
from .scores import score_module, vote

_KEY = "efftrain.methods.autoprog_zero.search"
_WARM_UP = 2


def shrink(images: Tensor, side: int) -> Tensor:
    """Images [N, C, H, W] of any dtype as fp32 [N, C, side, side]: bilinear, pixel centres aligned, not normalised."""
    return F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False)


Trained = Callable[[nn.Module, int], frozenset[str]]
"""Names of the parameters that a module trains at a level."""


@dataclass(frozen=True)
class Measured:
    """What a candidate costs and how it scores, equal on all ranks.

    Attributes:
        seconds: of forward and backward of one batch, on the slowest rank.
        ntk: condition of the tangent kernel, higher is better; mean over ranks.
        zico: ZiCo, higher is better; mean over ranks.
    """

    seconds: float
    ntk: float
    zico: float


def search_candidates(
    ctx: Context, stage: int, candidates: Sequence[Candidate], trained: Trained, search: UnfreezeSearchConfig
) -> Candidate:
    """Measure, vote, and put the table in the journal and on the screen. Collective.

    Args:
        ctx: of the run.
        stage: number of the stage, for the table.
        candidates: (level, resolution), at least two.
        trained: what a module trains at a level.
        search: numbers of samples and batches.

    Returns:
        The chosen candidate, the same on all ranks.

    Raises:
        ConfigError: there are no samples to measure on.
        RebuildError: measuring failed on some rank; on all ranks.
    """
    start = time.perf_counter()
    measured = measure(ctx, candidates, trained, search)
    result = from_first(
        lambda: vote([m.seconds for m in measured], [m.ntk for m in measured], [m.zico for m in measured])
    )
    seconds = time.perf_counter() - start
    table, rows = [], [["level", "side", "ms", "NTK", "ZiCo", "votes", ""]]
    for i, ((level, side), m) in enumerate(zip(candidates, measured, strict=True)):
        values = {"seconds": m.seconds, "ntk": m.ntk, "zico": m.zico, "votes": result.votes[i]}
        table.append({"level": level, "resolution": side, **values, "chosen": i == result.index})
        cells = [str(level), str(side), f"{1e3 * m.seconds:.1f}", f"{m.ntk:.4g}", f"{m.zico:.1f}"]
        rows.append([*cells, f"{result.votes[i]:g}", "<- chosen" if i == result.index else ""])
    ctx.record("unfreeze_search", stage=stage, table=table, seconds=seconds)
    head = f"unfreezing search, stage {stage}: {len(candidates)} candidates, {seconds:.1f} s"
    ctx.say([head, *("  " + line for line in align(rows, left=(6,)))])
    return candidates[result.index]


def measure(
    ctx: Context, candidates: Sequence[Candidate], trained: Trained, search: UnfreezeSearchConfig
) -> list[Measured]:
    """Score candidates (level, resolution) on a copy of the running model. Collective; the run is not changed.

    The copy has the whole weights on every rank; the scores are computed in fp32, the time in the training dtype.
    Scores are averaged over ranks, of times the longest counts.

    Args:
        ctx: of the run.
        candidates: what to compare.
        trained: what a module trains at a level.
        search: numbers of samples and batches.

    Raises:
        ConfigError: there are no samples to measure on.
        RebuildError: measuring failed on some rank; on all ranks.
    """
    if ctx.probe_batches is None:
        raise ConfigError(
            f"{_KEY}: measures candidates on fixed samples, and this loop has none; use launch/train.py, pass "
            "probe_batches= to efftrain_ds.initialize, or set it to null"
        )
    device = ctx.device
    engine = ctx.engine
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float16 if engine.fp16_enabled() else torch.float32
    local: list[tuple[float, float, float]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with _Shared() as shared:
            batches = _probe(ctx, search)
            # not engine.blueprint, which has what other methods ask for at this boundary
            module = materialise(engine.rebuilder.blueprint, dtype=torch.float32, device=device)
        shared.check()
        _copy_weights(engine.module, module)
        with _Shared() as shared:
            scored = search.ntk_batches + search.zico_batches
            scores = [
                score_module(
                    module,
                    [(_sized(images, resolution), labels) for images, labels in batches[:scored]],
                    trained(module, level),
                    ntk_batches=search.ntk_batches,
                    zico_batches=search.zico_batches,
                )
                for level, resolution in candidates
            ]
            module.to(dtype)
            seconds = _seconds(module, candidates, trained, batches[scored:], dtype)
            local = [(t, *pair) for t, pair in zip(seconds, scores, strict=True)]
        shared.check()
    return _reduced(ctx, local)


class _Shared:
    """Keeps an exception of this rank until all ranks can hear of it (`check`)."""

    problem: str | None = None

    def __enter__(self) -> _Shared:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.problem = text_of(error)
        return isinstance(error, Exception)

    def check(self) -> None:
        """Raise on all ranks where any has a problem. Collective."""
        agree(self.problem, RebuildError, _KEY)


def _probe(ctx: Context, search: UnfreezeSearchConfig) -> list[tuple[Tensor, Tensor]]:
    """Normalised batches on the device: those for the scores first, then those for the time."""
    assert ctx.probe_batches is not None
    count = search.ntk_batches + search.zico_batches + search.time_batches
    size = max(2, -(-search.samples // ctx.world))  # one sample has no tangent kernel to speak of
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in ctx.probe_batches(size * ctx.world * count):
        if batch.labels is None:
            raise ConfigError("the probe batches have no labels")
        keep = batch.labels >= 0 if batch.valid is None else batch.valid & (batch.labels >= 0)
        rows += zip(_floating(batch)[keep], batch.labels[keep], strict=True)
    if not rows:
        raise ConfigError("none of the samples to measure on is valid")
    # taken in strides, so that a sorted data set gives mixed batches; few samples are used again
    chunks = [[rows[(k + i * count) % len(rows)] for i in range(size)] for k in range(count)]
    return [
        (torch.stack([x for x, _ in chunk]).to(ctx.device), torch.stack([y for _, y in chunk]).to(ctx.device))
        for chunk in chunks
    ]


def _floating(batch: Batch) -> Tensor:
    """Normalised fp32 images [N, C, H, W]."""
    if batch.normalized:
        return batch.images.float()
    if batch.mean is None or batch.std is None:
        raise ConfigError("the probe images are uint8 and come without mean and std (Batch.mean, Batch.std)")
    return normalize(batch.images, batch.mean, batch.std, torch.float32)


def _sized(images: Tensor, side: int) -> Tensor:
    return shrink(images, side) if images.shape[-1] > side else images


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Whole weights of a running module, one at a time. Collective."""
    parameters, buffers = dict(target.named_parameters()), dict(target.named_buffers())
    for name, parameter in source.named_parameters():
        with access.gather_full([parameter]):
            parameters[name].copy_(parameter)
    for name, buffer in source.named_buffers():
        buffers[name].copy_(buffer)


def _seconds(
    module: nn.Module,
    candidates: Sequence[Candidate],
    trained: Trained,
    batches: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> list[float]:
    """Median time of forward and backward over the batches, for each candidate, after a warm-up.

    The candidates take turns batch by batch, so that a machine that is busy for a while slows all of them.
    """
    module.train()
    laps: list[list[float]] = [[] for _ in candidates]
    for images, labels in [*[batches[0]] * _WARM_UP, *batches]:
        for (level, resolution), times in zip(candidates, laps, strict=True):
            names = trained(module, level)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in names)
            sized = _sized(images, resolution).to(dtype)
            _synchronise(images.device)
            start = time.perf_counter()
            F.cross_entropy(module(sized).float(), labels).backward()
            _synchronise(images.device)
            times.append(time.perf_counter() - start)
            module.zero_grad(set_to_none=True)
    return [median(times[_WARM_UP:]) for times in laps]


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _reduced(ctx: Context, local: Sequence[tuple[float, float, float]]) -> list[Measured]:
    """The longest time and the mean scores of all ranks. Collective."""
    times = torch.tensor([row[0] for row in local], dtype=torch.float64, device=ctx.device)
    scores = torch.tensor([row[1:] for row in local], dtype=torch.float64, device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        dist.all_reduce(scores)
        scores /= ctx.world
    return [Measured(t, *row) for t, row in zip(times.tolist(), scores.tolist(), strict=True)]
