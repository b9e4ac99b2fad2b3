"""Tiles of the crop kernel and its operands, padded to them. Needs torch only.

Shape legend: H x W input pixels, Bh x Bw output pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .matrices import crop_matrix, kept, resample_matrix

ROWS = 64
"""Output rows of a program: with fewer the products leave Hopper's wgmma for the older mma."""
CHUNK = 32
"""Input columns of a step."""
_PIECE = 128
_RESIDENT = 3 * _PIECE  # input rows up to which a program keeps its rows of the left operand
_STEP = 32  # input rows that are read at once if not all are kept
_COLUMNS = 192  # output columns that a program keeps in registers
OFFSETS = 2**31
"""Offsets inside of a plane and of an operand are below this: the kernel computes them in 32 bits."""


class Tiles(NamedTuple):
    """How a plane is divided; sides in pixels.

    Attributes:
        k: pieces of the input rows, 0 = absent; one piece, taken again and again, if `loop`.
        n: pieces of the output columns of a program, the second may be 0.
        loop: a program reads its rows of the left operand anew for each chunk instead of keeping them.
        row_tiles: programs along the output rows.
        column_tiles: programs along the output columns.
        masked: some tile reaches over the image.
    """

    k: tuple[int, int, int]
    n: tuple[int, int]
    loop: bool
    row_tiles: int
    column_tiles: int
    masked: bool


class Operands(NamedTuple):
    """What the kernel multiplies by, all contiguous.

    Attributes:
        left: [rows padded to ROWS, H padded].
        right: [W padded, columns padded]: the transposed operator.
        nyquist_h: [H padded] or None.
        nyquist_w: [W padded] or None.
    """

    left: Tensor
    right: Tensor
    nyquist_h: Tensor | None
    nyquist_w: Tensor | None


def tiles(height: int, width: int, rows: int, columns: int, resident: bool = True, narrow: bool = False) -> Tiles:
    """Division of the crop of height x width to rows x columns pixels.

    Args:
        height: H.
        width: W.
        rows: Bh.
        columns: Bw.
        resident: keep the left operand where it fits; needs registers and shared memory.
        narrow: two programs for 161 to 192 columns; needs fewer registers. The padding is the same.
    """
    loop = not resident or height > _RESIDENT
    k = (_STEP, 0, 0) if loop else _inner(height)
    n = _outer(columns) if columns <= _COLUMNS else (_PIECE, 0)
    if narrow and sum(n) == _COLUMNS:
        n = _outer(_COLUMNS // 2)
    covered = _up(height, _STEP) if loop else sum(k)
    return Tiles(k, n, loop, -(-rows // ROWS), -(-columns // sum(n)), covered != height or width % CHUNK != 0)


def _inner(size: int) -> tuple[int, int, int]:
    """At most three powers of two from 32 to 128 that cover `size` <= 384."""
    rest, pieces = _up(size, _STEP), []
    for last in (False, False, True):
        piece = 0 if rest <= 0 else _power(rest) if last else min(_PIECE, 1 << (rest.bit_length() - 1))
        pieces.append(piece)
        rest -= piece
    return pieces[0], pieces[1], pieces[2]


def _outer(size: int) -> tuple[int, int]:
    """One or two powers of two from 16 to 128 that cover `size` <= 192."""
    size = _up(size, 16)
    first = min(_PIECE, 1 << (size.bit_length() - 1))
    return first, _power(size - first) if size > first else 0


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def padded_sizes(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shapes that the operands are padded to: of `left` (two numbers), then of `right`."""
    plan = tiles(height, width, rows, columns)
    inner = _up(height, _STEP) if plan.loop else sum(plan.k)
    return plan.row_tiles * ROWS, inner, _up(width, CHUNK), plan.column_tiles * sum(plan.n)


def too_large(height: int, width: int, rows: int, columns: int) -> str | None:
    """Why the kernel cannot take planes of this size; None where it can."""
    left_rows, inner, outer, right_columns = padded_sizes(height, width, rows, columns)
    if max(height * width, left_rows * inner, outer * right_columns) < OFFSETS:
        return None
    return f"the kernel's planes and matrices have less than 2^31 elements, found {height} x {width} pixels"


def crop_operands(
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    align: str,
    exact: bool,
    dtype: torch.dtype,
    accumulator: torch.dtype,
    device: torch.device | str,
) -> Operands:
    """Operands of the low-frequency crop from (H, W) to (Bh, Bw); kept for later calls.

    Args:
        size_in: (H, W).
        size_out: (Bh, Bw).
        align: "center" or "grid", see `matrices.crop_matrix`.
        exact: with the Nyquist term.
        dtype: type of the operands of the products.
        accumulator: type of the sum of the Nyquist term.
        device: where they are needed.
    """
    shape, place = padded_sizes(*size_in, *size_out), str(device)
    left = _crop_operand("left", size_in[0], size_out[0], align, shape[0], shape[1], dtype, place)
    right = _crop_operand("right", size_in[1], size_out[1], align, shape[3], shape[2], dtype, place)
    # Both sides need a Nyquist bin of their own for the corner bin that the term corrects.
    if not exact or any(b % 2 or b == s for b, s in zip(size_out, size_in, strict=True)):
        return Operands(left, right, None, None)
    q = [
        _crop_operand("nyquist", s, b, align, 1, pad, accumulator, place)
        for s, b, pad in zip(size_in, size_out, shape[1:3], strict=True)
    ]
    return Operands(left, right, q[0], q[1])


def resample_operands(
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    filter: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Operands:
    """Operands of antialiased resampling, arguments as in `crop_operands` and `matrices.resample_matrix`."""
    shape, place = padded_sizes(*size_in, *size_out), str(device)
    left = _resample_operand("left", size_in[0], size_out[0], filter, shape[0], shape[1], dtype, place)
    right = _resample_operand("right", size_in[1], size_out[1], filter, shape[3], shape[2], dtype, place)
    return Operands(left, right, None, None)


@kept
def _crop_operand(
    part: str, size_in: int, size_out: int, align: str, rows: int, inner: int, dtype: torch.dtype, device: str
) -> Tensor:
    matrix = crop_matrix(size_in, size_out, align, torch.float64)
    if part == "nyquist":
        return _padded(matrix.q[None, :], 1, inner)[0].to(dtype).to(device)
    return _side(part, matrix.p, rows, inner, dtype, device)


@kept
def _resample_operand(
    part: str, size_in: int, size_out: int, filter: str, rows: int, inner: int, dtype: torch.dtype, device: str
) -> Tensor:
    return _side(part, resample_matrix(size_in, size_out, filter, torch.float64), rows, inner, dtype, device)


def _side(part: str, matrix: Tensor, rows: int, inner: int, dtype: torch.dtype, device: str) -> Tensor:
    padded = _padded(matrix, rows, inner)
    return (padded if part == "left" else padded.t()).to(dtype).contiguous().to(device)


def _padded(matrix: Tensor, rows: int, inner: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, inner - matrix.shape[1], 0, rows - matrix.shape[0]))
