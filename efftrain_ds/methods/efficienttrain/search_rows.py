"""From bandwidths of stages to what a configuration says: candidates, rows of a schedule, and the searches by name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ...core.errors import PlanError
from .config import KEY, SearchConfig
from .schedules import PACING, scaled_bandwidth
from .search import Costs, CurriculumSearch
from .search_greedy import GreedySearch
from .search_sequential import SequentialSearch

_PUBLISHED = (96, 128, 160, 192)  # candidates of the ET search at 224 pixels, as recalled; see the method's README
_MAGNITUDES = (1, 9)  # the ET release's 1, 3, 5, 7, 9 in five stages
_TENTHS = 10  # stages of constant magnitude in the ET++ release, min(9, floor(10 p))


def candidates_of(config: SearchConfig, resolution: int, stride: int) -> tuple[int, ...]:
    """Bandwidths to choose from in pixels, ascending, the full resolution last.

    Raises:
        PlanError: one that the model cannot take, or none below the full resolution.
    """
    if config.candidates is None:
        given = {scaled_bandwidth(b, resolution, stride) for b in _PUBLISHED}
    else:
        given = set(config.candidates)
    wrong = []
    for b in sorted(given):
        why = []
        if b > resolution:
            why.append(f"is above efftrain.data.resolution {resolution}")
        if b % stride:
            why.append(f"is not a multiple of the model's stride {stride}")
        if b % 2 and b != resolution:
            why.append("is odd")
        if why:
            wrong.append(f"{b} {' and '.join(why)}")
    if wrong:
        raise PlanError(f"{KEY}.search.candidates: {'; '.join(wrong)}")
    smaller = sorted(given - {resolution})
    if not smaller:
        raise PlanError(
            f"{KEY}.search.candidates: nothing to choose from below efftrain.data.resolution {resolution}; allowed are "
            f"multiples of the model's stride {stride} that are even"
        )
    return (*smaller, resolution)


def schedule_rows(config: SearchConfig, sizes: tuple[int, ...], *, magnitude: bool) -> list[dict[str, Any]]:
    """``efftrain.methods.efficienttrain.schedule`` of bandwidths that hold for equal stages.

    The RandAugment magnitudes are those of the release: with "et" from 1 to 9, one for each stage (linear where there
    are not five, ours); with "et++" min(9, floor(10 p)), so that a stage may have several rows.
    """
    n = len(sizes)
    if config.algorithm == "et":
        low, high = _MAGNITUDES
        starts = [Fraction(i, n) for i in range(n)]
        strengths = [float(low + Fraction((high - low) * i, n - 1)) for i in range(n)]
    else:
        starts = sorted({Fraction(i, n) for i in range(n)} | {Fraction(i, _TENTHS) for i in range(_TENTHS)})
        strengths = [float(min(9, int(_TENTHS * p))) for p in starts]
    rows: list[dict[str, Any]] = []
    for start, end, strength in zip(starts, [*starts[1:], Fraction(1)], strengths, strict=True):
        rows.append(
            {
                "until": progress(end),
                "bandwidth": sizes[int(start * n)],
                "magnitude": round(strength, 6) if magnitude else None,
                "pace": None,
            }
        )
    return rows


def progress(p: Fraction) -> float:
    """A place of the schedule as it is written in a file."""
    return round(float(p), 12)


def pacing_of(config: SearchConfig) -> str:
    """How progress is counted: "samples" (stages of equal epochs) or "compute"."""
    return PACING[config.algorithm]


def make_search(config: SearchConfig, costs: Costs, limit: float | None = None) -> CurriculumSearch:
    """The configured search; see `CurriculumSearch`.

    Raises:
        PlanError: the limit does not allow a single candidate.
    """
    kind = GreedySearch if config.algorithm == "et" else SequentialSearch
    return kind(config, costs, limit)
