"""Growth schedules as pure functions: which depth, resolution and augmentation strength each stage has.

AutoProg (Li et al., CVPR 2022, arXiv 2203.14509): every dimension follows the same linear ramp from its own start
scale to 1, ``s_k = s_0 + (1 - s_0) k / (K - 1)``. The ramp is evaluated in float64 in exactly this order, so that the
half-way cases (9 x 5/6 = 7.4999...) fall as in the authors' code.
"""

from __future__ import annotations

import math
from fractions import Fraction

from ...core.errors import PlanError

DEFAULT_RESOLUTION_STEP = 32


def ramp(start: float, stages: int) -> tuple[float, ...]:
    """Linear scales from `start` to 1, one a stage; a single stage has scale 1. May be negative where `start` is."""
    if stages == 1:
        return (1.0,)
    return tuple(start + (1 - start) * k / (stages - 1) for k in range(stages - 1)) + (1.0,)


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value` (half up), at least one multiple and not below 0.9 `value`."""
    rounded = max(divisor, math.floor((value + divisor / 2) / divisor) * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def levels(start: float | None, full: int, round_to: int, stages: int) -> tuple[int, ...]:
    """Depths (blocks) or resolutions (pixels) of the stages.

    Args:
        start: scale of the first stage, in (0, 1]; None means that the dimension does not grow.
        full: value of the last stage, exactly.
        round_to: the values between are multiples of this.
        stages: number of stages K.

    Returns:
        [K] values that never fall and never exceed `full`; neighbours may be equal.
    """
    if start is None:
        return (full,) * stages
    return tuple(min(make_divisible(scale * full, round_to), full) for scale in ramp(start, stages)[:-1]) + (full,)


def magnitudes(start: float, full: float, stages: int) -> tuple[float, ...]:
    """RandAugment magnitudes of the stages: whole numbers, at least 0, and `full` itself in the last; 0 means none."""
    return tuple(min(max(0.0, float(round(scale * full))), full) for scale in ramp(start, stages)[:-1]) + (float(full),)


def rates(start: float, full: float, stages: int) -> tuple[float, ...]:
    """Drop-path rates or erasing probabilities of the stages: the ramp times `full`, clipped below at 0."""
    return tuple(max(0.0, scale) * full for scale in ramp(start, stages))


def resolution_step(
    resolution: int, stride: int, step: int | None = None, *, key: str = "efftrain.methods.autoprog.resolution_step"
) -> int:
    """What resolutions are rounded to, in pixels.

    Args:
        resolution: side of the images at full cost.
        stride: the model's total stride.
        step: the configured value; None takes 32 where the stride divides it and it divides the resolution, else the
            stride.
        key: where `step` stands in the configuration, for the error.

    Raises:
        PlanError: `step` is not a multiple of the stride or is larger than the resolution.
    """
    if step is None:
        fits = DEFAULT_RESOLUTION_STEP % stride == 0 and resolution % DEFAULT_RESOLUTION_STEP == 0
        return DEFAULT_RESOLUTION_STEP if fits else stride
    if step <= 0 or step % stride or step > resolution:
        raise PlanError(
            f"{key}: must be a multiple of the model's stride {stride} and at most the resolution {resolution}, "
            f"found {step}"
        )
    return step


def stage_epochs(epochs: float, stages: int) -> tuple[Fraction, ...]:
    """Epoch at which each stage starts: ``floor(k E / K)`` for a whole number of epochs E, ``k E / K`` otherwise.

    The fractions are exact (a decimal such as 2.6 counts as written); divided by E they are progress.

    Raises:
        PlanError: there are more stages than epochs.
    """
    if stages > epochs:
        raise PlanError(f"{stages} stages need at least {stages} epochs (efftrain.run.epochs), found {epochs:g}")
    total = Fraction(str(epochs))
    starts = [total * k / stages for k in range(stages)]
    return tuple(Fraction(math.floor(s)) for s in starts) if total.denominator == 1 else tuple(starts)
