"""MACs and parameters of ElasticViT sub-networks, for whole tables at a time.

"exact" is what the network computes: convolutions, linear layers and the two products of attention. "reference" is
the count of the published code, by which its levels are defined. It differs in six points: the depthwise convolution of
the values counts 1 instead of 9 for each entry; N^2 is added for each softmax; the first blocks of transformer stages
have no squeeze-and-excitation and no shortcut; with stride 2 the side of their expanding convolution is twice the
output's, also where that is odd; a shortcut of a convolution block with stride 2 counts also where the width stays;
and all stem blocks count the first one's kernel (one kernel for the stage makes this no difference here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import ModelError
from .space import FORMULAS

if TYPE_CHECKING:
    from .hybrid_space import HybridSpace, StageSpec

Rows = np.ndarray
"""[n] int64, one entry a sub-network."""


@dataclass
class _Stage:
    """Values of one stage; sides of the maps before and behind its first block."""

    spec: StageSpec
    inputs: Rows
    width: Rows
    depth: Rows
    before: Rows
    side: Rows
    expand: Rows
    kernel: Rows
    mlp: Rows
    v_scale: Rows


def _stages(space: HybridSpace, numbers: np.ndarray) -> tuple[Rows, list[_Stage]]:
    """(side behind the opening convolution, stages)."""
    values = {d.name: row for d, row in zip(space.dimensions, numbers.astype(np.int64), strict=True)}
    first = -(-values["resolution"] // 2)
    side, inputs = first, values[f"{space.stages[0].name}.width"]
    none = np.zeros_like(side)
    found = []
    for spec in space.stages:
        before, side = side, -(-side // spec.stride)
        width = values[f"{spec.name}.width"]
        rest = [values.get(f"{spec.name}.{kind}", none) for kind in ("expand", "kernel", "mlp", "v_scale")]
        found.append(_Stage(spec, inputs, width, values[f"{spec.name}.depth"], before, side, *rest))
        inputs = width
    return first, found


def _block_macs(i: Rows, o: Rows, n: Rows, k: Rows, before: Rows, side: Rows, se: bool, expands: bool) -> Rows:
    """An inverted-residual block from i to o channels over n, with kernel k."""
    area = side * side
    total = n * k * k * area + n * o * area + np.where(i != o, i * o * area, 0)
    if expands:
        total += i * n * before * before
    return total + 2 * n * (n // 4) if se else total


def macs(space: HybridSpace, numbers: np.ndarray, formula: str = "exact") -> Rows:
    """MACs of one image.

    Args:
        space: of the sub-networks.
        numbers: [D, n] values by dimension.
        formula: "exact" or "reference".

    Returns:
        [n] int64.

    Raises:
        ModelError: another formula.
    """
    if formula not in FORMULAS:
        raise ModelError(f'no MAC formula "{formula}"; allowed: {", ".join(FORMULAS)}')
    reference = formula == "reference"
    first, stages = _stages(space, numbers)
    total = 9 * space.in_chans * stages[0].width * first * first
    for s in stages:
        i, c, area = s.inputs, s.width, s.side * s.side
        if not s.spec.is_vit:
            se, expands = s.spec.se, s.spec.expand != (1,)
            total += _block_macs(i, c, i * s.expand, s.kernel, s.before, s.side, se, expands)
            total += (s.depth - 1) * _block_macs(c, c, c * s.expand, s.kernel, s.side, s.side, se, expands)
            if reference and s.spec.stride == 2:
                total += np.where(i == c, i * c * area, 0)
            continue
        n = i * space.first_expand
        if reference:
            before = s.spec.stride * s.side
            total += i * n * before * before + n * 9 * area + n * c * area
        else:
            total += _block_macs(i, c, n, np.full_like(n, 3), s.before, s.side, True, True)
        v, m, square = s.v_scale, s.mlp, area * area
        layer = area * c * c * (2 + 2 * v + 2 * m) + square * c * (1 + v)
        layer += area * v * c + square * (c // space.head_dim) if reference else 9 * area * v * c
        total += s.depth * layer
    last, width = stages[-1].side, stages[-1].width
    hidden = space.head_expand * width
    return total + last * last * hidden * width + hidden * space.head_width + space.head_width * space.num_classes


def _block_params(i: Rows, o: Rows, n: Rows, k: Rows, se: bool, expands: bool) -> Rows:
    total = n * k * k + 2 * n + n * o + 2 * o + np.where(i != o, i * o + o, 0)
    if expands:
        total += i * n + 2 * n
    return total + 2 * n * (n // 4) + n + n // 4 if se else total


def params(space: HybridSpace, numbers: np.ndarray, position: bool = True) -> Rows:
    """Parameters of the extracted sub-network.

    Args:
        space: of the sub-networks.
        numbers: [D, n] values by dimension.
        position: count the tables of relative positions, too.

    Returns:
        [n] int64.
    """
    _, stages = _stages(space, numbers)
    total = (9 * space.in_chans + 2) * stages[0].width
    for s in stages:
        i, c = s.inputs, s.width
        if not s.spec.is_vit:
            se, expands = s.spec.se, s.spec.expand != (1,)
            total += _block_params(i, c, i * s.expand, s.kernel, se, expands)
            total += (s.depth - 1) * _block_params(c, c, c * s.expand, s.kernel, se, expands)
            continue
        n, v, m = i * space.first_expand, s.v_scale, s.mlp
        total += _block_params(i, c, n, np.full_like(n, 3), True, True)
        layer = c * c * (2 + 2 * v + 2 * m) + c * (9 * v + m + 6)
        if position:
            layer += (2 * s.side - 1) ** 2 * (c // space.head_dim)
        total += s.depth * layer
    width, out = stages[-1].width, space.head_width
    hidden = space.head_expand * width
    return total + hidden * width + 2 * hidden + hidden * out + out + (out + 1) * space.num_classes
