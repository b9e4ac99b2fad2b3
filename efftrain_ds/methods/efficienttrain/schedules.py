"""Curriculum schedules as pure functions: which bandwidth and magnitude hold at which progress.

Sizes and costs are exact fractions, so no table entry depends on floating-point truncation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ...core.replay import REPLAY, REPLAY_STEPS
from ...core.timeline import Segment, Timeline
from .config import LargeBatchConfig, ReplayConfig, StageConfig

REFERENCE_RESOLUTION = 224  # the published bandwidths are for this side
_ET_BANDWIDTHS = (160, 160, 160, 192, 224)
_ETPP_BANDWIDTHS = {
    "et++": (96, 96, 160, 160, 160, 160, 224, 224, 224, 224),
    "et++deit": (96, 96, 160, 160, 160, 160, 192, 192, 224, 224),
}
PACING = {"et": "samples", "et++": "compute", "et++deit": "compute"}


@dataclass(frozen=True)
class CurriculumStage:
    """A stretch [start, end) of progress with one bandwidth (pixels) and one RandAugment magnitude (None: not set).

    `pace` is the cost of a sample relative to full resolution.
    """

    start: Fraction
    end: Fraction
    bandwidth: int
    magnitude: float | None
    pace: Fraction


def area_pace(bandwidth: int, resolution: int) -> Fraction:
    """Relative cost c(B) = (B / R)^2 of a sample, as EfficientTrain++ schedules every model."""
    return Fraction(bandwidth * bandwidth, resolution * resolution)


def scaled_bandwidth(bandwidth: int, resolution: int, stride: int) -> int:
    """A published bandwidth (for 224 pixels) at another resolution.

    Scaled by ``resolution / 224`` and rounded (half up) to a multiple of `stride` that is even, at least one such
    multiple and at most `resolution`; 224 becomes exactly `resolution`.
    """
    if bandwidth == REFERENCE_RESOLUTION:
        return resolution
    unit = stride if stride % 2 == 0 else 2 * stride
    steps = math.floor(Fraction(bandwidth * resolution, REFERENCE_RESOLUTION * unit) + Fraction(1, 2))
    return min(max(steps, 1) * unit, resolution)


def named_stages(name: str, resolution: int, stride: int) -> list[CurriculumStage]:
    """Stages of "et" (5, equal epochs; ICCV 2023), "et++" or "et++deit" (10, equal compute; TPAMI 2024)."""
    if name == "et":
        bandwidths, magnitudes = _ET_BANDWIDTHS, (1, 3, 5, 7, 9)
    else:
        bandwidths = _ETPP_BANDWIDTHS[name]
        magnitudes = tuple(min(9, i) for i in range(10))  # min(9, floor(10 p))
    n = len(bandwidths)
    stages = []
    for i, (published, magnitude) in enumerate(zip(bandwidths, magnitudes, strict=True)):
        b = scaled_bandwidth(published, resolution, stride)
        start, end = Fraction(i, n), Fraction(i + 1, n)
        stages.append(CurriculumStage(start, end, b, float(magnitude), area_pace(b, resolution)))
    return stages


def custom_stages(stages: Sequence[StageConfig], resolution: int) -> list[CurriculumStage]:
    """Stages of a list in the configuration, bandwidths taken as they are."""
    built, start = [], Fraction(0)
    for stage in stages:
        end = Fraction(str(stage.until))  # the decimal that was written, not its binary neighbour
        pace = area_pace(stage.bandwidth, resolution) if stage.pace is None else Fraction(str(stage.pace))
        built.append(CurriculumStage(start, end, stage.bandwidth, stage.magnitude, pace))
        start = end
    return built


def batch_scale(pace: Fraction, limit: int) -> int:
    """Factor on the global batch where a sample costs `pace` of a full one: the power of two at or below 1 / pace.

    Never above the largest power of two within `limit` and never below 1. A reconstruction: the EfficientTrain++ paper
    reports larger early batches, but neither their sizes nor code for them could be found.
    """
    whole = max(1, min(math.floor(1 / pace), limit))
    return 1 << (whole.bit_length() - 1)


def lr_scale(factor: int, rule: str) -> float:
    """Factor on the peak learning rate for a batch that is `factor` times larger: "sqrt", "linear" or "none"."""
    return {"sqrt": math.sqrt(factor), "linear": float(factor), "none": 1.0}[rule]


def build_timeline(
    stages: Sequence[CurriculumStage],
    pacing: str,
    *,
    magnitude: bool = True,
    grow_micro_batch: bool = True,
    max_micro_scale: float | None = None,
    replay: Sequence[ReplayConfig] = (),
    large_batch: LargeBatchConfig | None = None,
) -> Timeline:
    """Turn stages into a timeline; neighbours that ask for the same become one segment.

    Args:
        stages: tile [0, 1] in order.
        pacing: "samples" or "compute".
        magnitude: put the RandAugment magnitude into the settings.
        grow_micro_batch: allow micro-batches larger by 1 / pace.
        max_micro_scale: upper limit of that growth.
        replay: buffers by bandwidth.
        large_batch: larger global batches at small bandwidths; None = off.
    """
    buffers = {buffer.bandwidth: buffer for buffer in replay}
    segments: list[Segment] = []
    for stage in stages:
        settings: dict[str, int | float] = {"bandwidth": stage.bandwidth}
        if magnitude and stage.magnitude is not None:
            settings["ra_magnitude"] = stage.magnitude
        scale = float(max(1 / stage.pace, Fraction(1))) if grow_micro_batch else 1.0
        if max_micro_scale is not None:
            scale = min(scale, max_micro_scale)
        if (buffer := buffers.get(stage.bandwidth)) is not None:
            settings |= {REPLAY: buffer.uses, REPLAY_STEPS: buffer.capacity}
        new = Segment(float(stage.start), float(stage.end), settings, float(stage.pace), scale)
        if large_batch is not None:
            factor = batch_scale(stage.pace, large_batch.max_scale)
            new = replace(new, batch_scale=factor, lr_scale=lr_scale(factor, large_batch.lr), lr_ramp=large_batch.ramp)
        last = segments[-1] if segments else None
        if last and replace(last, start=new.start, end=new.end) == new:
            segments[-1] = replace(last, end=new.end)
        else:
            segments.append(new)
    return Timeline(tuple(segments), pacing)


def data_epochs(stages: Sequence[CurriculumStage], epochs: float) -> float:
    """Passes over the data set of a compute-paced schedule with a budget of `epochs` full-cost epochs."""
    return float(sum(((s.end - s.start) / s.pace for s in stages), Fraction(0)) * Fraction(epochs))


@dataclass(frozen=True)
class ReferenceRow:
    """One size of the reference's bookkeeping, in loader epochs of that size.

    The driver's cosine runs over `total` epochs; training at this size begins at `start` and its stages stop at `ends`.
    """

    bandwidth: int
    start: int
    ends: tuple[int, ...]
    total: int


def reference_rounding_table(epochs: int, schedule: str = "et++") -> list[ReferenceRow]:
    """Whole loader epochs as the drivers of the EfficientTrain++ code release count them at 224 pixels.

    ``total = floor(E / c)``, an end at progress p is ``floor(p * total)``, and a new size starts at the nearest epoch
    to the old size's last end at the ratio of their costs. The rounding repeats or skips up to 0.5 % of the compute at
    a switch; the timeline of this package does not (it is here for comparison with the authors' runs).
    """
    rows: list[ReferenceRow] = []
    last_end, last_cost = 0, Fraction(1)
    stages = named_stages(schedule, REFERENCE_RESOLUTION, 32)
    for bandwidth in dict.fromkeys(s.bandwidth for s in stages):
        own = [s for s in stages if s.bandwidth == bandwidth]
        total = math.floor(epochs / own[0].pace)
        start = math.floor(last_end * last_cost / own[0].pace + Fraction(1, 2))
        ends = tuple(math.floor(s.end * total) for s in own)
        rows.append(ReferenceRow(bandwidth, start, ends, total))
        last_end, last_cost = ends[-1], own[0].pace
    return rows
