"""Triton kernel of the low-frequency crop: 8-bit pixels in, two tensor-core products, normalised image out.

Shape legend: N images, C channels, H x W input pixels, Bh x Bw output pixels; L_h [Bh, H] and L_w [Bw, W] are the
one-dimensional operators.

A program computes 64 rows of one plane. It walks over chunks of 32 input columns; for each of them
T = L_h[rows] (X[:, chunk] - 128) is accumulated in fp32, rounded to the operands' type (fp16) and multiplied by
L_w[:, chunk]^T into the result, which stays in registers. Tiles have powers of two as sides, so the inner dimension and
the output columns are split into pieces (224 = 128+64+32, 192 = 128+64) instead of being padded. The weight of the
Nyquist term, q_h^T X q_w, is summed in fp32 beside the products: along each row while the chunk is in registers, then
over the rows. A flipped image reads the rows of L_w^T and of q_w in reverse order, which costs nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import product
from ..runtime import FUSED, architecture, interpreted
from .tiles import CHUNK, OFFSETS, ROWS, Operands, Tiles, tiles

if TYPE_CHECKING:
    from ..gate import GateCase

WIDE = ("sm_90", "sm_100")
"""Architectures whose tensor cores read their operands from shared memory, and that have much of it."""


@triton.jit
def _pixels(
    pointer, stride_h, stride_w, k, columns, H, W, CENTRE: tl.constexpr, OP: tl.constexpr, MASKED: tl.constexpr
):
    """Tile [k, columns] of a plane minus CENTRE, in the operands' type; anything finite outside the image."""
    at = pointer + k[:, None] * stride_h + columns[None, :] * stride_w
    if MASKED:
        raw = tl.load(at, mask=(k < H)[:, None] & (columns < W)[None, :], other=0)
    else:
        raw = tl.load(at)
    if raw.dtype == tl.uint8 and OP == tl.float16:
        # 0x6400 | x is the fp16 number 1024 + x: no conversion instruction, and the subtraction is exact
        return (raw.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + CENTRE)
    else:
        return raw.to(OP) - CENTRE


@triton.jit
def _store(out, y, s, m, n, Bh, Bw, gain, offset, NYQUIST: tl.constexpr):
    """Write y [m, n] minus s (-1)^(m+n), times `gain` plus `offset`."""
    if NYQUIST:
        along = tl.where((m & 1) == 0, s, -s)[:, None]
        y -= tl.where((n & 1)[None, :] == 0, along, -along)
    y = y * gain + offset
    at = out + m[:, None] * Bw + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(m < Bh)[:, None] & (n < Bw)[None, :])


@triton.jit
def crop_kernel(
    x,
    left,
    right,
    nyquist_h,
    nyquist_w,
    flip,
    scale,
    shift,
    out,
    H,
    W,
    Bh,
    Bw,
    C,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    stride_left,
    stride_right,
    row_tiles,
    column_tiles,
    BM: tl.constexpr,
    CK: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    LOOP: tl.constexpr,
    MASKED: tl.constexpr,
    FLIP: tl.constexpr,
    NYQUIST: tl.constexpr,
    CENTRE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows x columns tile of one plane of ``(L_h (x - CENTRE) L_w^T - s a a^T) scale + CENTRE scale + shift``.

    Args:
        x: [N, C, H, W] with the strides `stride_n` .. `stride_w`.
        left: L_h padded with zeros, [row_tiles * BM, stride_left].
        right: L_w^T padded with zeros, [W padded to CK, stride_right].
        nyquist_h: q_h [stride_left] of type ACC, padded with zeros; read where NYQUIST.
        nyquist_w: q_w [W padded to CK], likewise.
        flip: [N] bytes, nonzero = mirror the image; read where FLIP.
        scale: [C] of type ACC.
        shift: [C] of type ACC.
        out: [N, C, Bh, Bw] contiguous.
        LOOP: walk over H in steps of K1 instead of keeping pieces K1 + K2 + K3 of L_h.
        MASKED: H or W is not a multiple of its tiles.
    """
    OP: tl.constexpr = left.dtype.element_ty
    pid = tl.program_id(0)
    # the row tiles of a plane are neighbours, so that all but one read it from the L2 cache
    row = pid % row_tiles
    column = (pid // row_tiles) % column_tiles
    plane = pid // (row_tiles * column_tiles)
    image = plane // C
    channel = plane % C
    x += image.to(tl.int64) * stride_n + channel.to(tl.int64) * stride_c
    out += plane.to(tl.int64) * Bh * Bw
    m = row * BM + tl.arange(0, BM)
    columns = tl.arange(0, CK)
    k1 = tl.arange(0, K1)
    n1 = column * (N1 + N2) + tl.arange(0, N1)
    y1 = tl.zeros([BM, N1], dtype=ACC)
    rows1 = tl.zeros([K1], dtype=ACC)
    if not LOOP:
        left1 = tl.load(left + m[:, None] * stride_left + k1[None, :])
    if K2 > 0:
        k2 = K1 + tl.arange(0, K2)
        left2 = tl.load(left + m[:, None] * stride_left + k2[None, :])
        rows2 = tl.zeros([K2], dtype=ACC)
    if K3 > 0:
        k3 = K1 + K2 + tl.arange(0, K3)
        left3 = tl.load(left + m[:, None] * stride_left + k3[None, :])
        rows3 = tl.zeros([K3], dtype=ACC)
    if N2 > 0:
        n2 = column * (N1 + N2) + N1 + tl.arange(0, N2)
        y2 = tl.zeros([BM, N2], dtype=ACC)
    if FLIP:
        mirror = tl.load(flip + image) != 0
    s = 0.0

    for start in range(0, W, CK):
        w = start + columns
        if FLIP:
            at = tl.where(mirror & (w < W), W - 1 - w, w)
        else:
            at = w
        if NYQUIST:
            weight = tl.load(nyquist_w + at)
        t = tl.zeros([BM, CK], dtype=ACC)
        if LOOP:
            for k in range(0, H, K1):
                tile = _pixels(x, stride_h, stride_w, k + k1, w, H, W, CENTRE, OP, MASKED)
                piece = tl.load(left + m[:, None] * stride_left + (k + k1)[None, :])
                t = product(piece, tile, t, UPCAST, "ieee")
                if NYQUIST:
                    rows1 += tl.sum(tile.to(ACC) * weight[None, :], 1) * tl.load(nyquist_h + k + k1)
        else:
            tile = _pixels(x, stride_h, stride_w, k1, w, H, W, CENTRE, OP, MASKED)
            t = product(left1, tile, t, UPCAST, "ieee")
            if NYQUIST:
                rows1 += tl.sum(tile.to(ACC) * weight[None, :], 1)
            if K2 > 0:
                tile = _pixels(x, stride_h, stride_w, k2, w, H, W, CENTRE, OP, MASKED)
                t = product(left2, tile, t, UPCAST, "ieee")
                if NYQUIST:
                    rows2 += tl.sum(tile.to(ACC) * weight[None, :], 1)
            if K3 > 0:
                tile = _pixels(x, stride_h, stride_w, k3, w, H, W, CENTRE, OP, MASKED)
                t = product(left3, tile, t, UPCAST, "ieee")
                if NYQUIST:
                    rows3 += tl.sum(tile.to(ACC) * weight[None, :], 1)
        rounded = t.to(OP)
        right1 = tl.load(right + at[:, None] * stride_right + n1[None, :])
        y1 = product(rounded, right1, y1, UPCAST, "ieee")
        if N2 > 0:
            right2 = tl.load(right + at[:, None] * stride_right + n2[None, :])
            y2 = product(rounded, right2, y2, UPCAST, "ieee")

    if NYQUIST:
        if LOOP:
            s = tl.sum(rows1, 0)
        else:
            s = tl.sum(rows1 * tl.load(nyquist_h + k1), 0)
        if K2 > 0:
            s += tl.sum(rows2 * tl.load(nyquist_h + k2), 0)
        if K3 > 0:
            s += tl.sum(rows3 * tl.load(nyquist_h + k3), 0)
    gain = tl.load(scale + channel)
    offset = tl.load(shift + channel) + CENTRE * gain
    _store(out, y1, s, m, n1, Bh, Bw, gain, offset, NYQUIST)
    if N2 > 0:
        _store(out, y2, s, m, n2, Bh, Bw, gain, offset, NYQUIST)


def launch(
    x: Tensor,
    operands: Operands,
    flip: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    resident: bool | None = None,
    **tuned: int,
) -> None:
    """Run the kernel: fill every element of `out` [N, C, Bh, Bw].

    Args:
        x: [N, C, H, W] with any strides: uint8 with fp16 operands; float64 with float64 ones, for tests of the logic.
            A plane that stretches over 2^31 elements or more is copied first.
        operands: from `tiles.crop_operands` or `tiles.resample_operands` for these sizes.
        flip: [N] bool, images to mirror, or None.
        scale: [C] of the accumulator's type (fp32; float64 for float64 operands).
        shift: [C], likewise.
        out: contiguous, floating point.
        resident: keep the left operand, see `tiles.tiles`; None = where that is known to be good.
        tuned: num_warps and num_stages in place of those of `options`.
    """
    planes, height, width = x.shape[0] * x.shape[1], x.shape[2], x.shape[3]
    rows, columns = out.shape[2:]
    if (height - 1) * x.stride(2) + (width - 1) * x.stride(3) >= OFFSETS:
        x = x.contiguous()
    arch = _architecture(x.device.index)
    keep = keeps(x, arch) if resident is None else resident
    plan = tiles(height, width, rows, columns, keep, arch not in WIDE)
    double = operands.left.dtype == torch.float64
    grid = (planes * plan.row_tiles * plan.column_tiles,)
    if not grid[0]:
        return
    crop_kernel[grid](
        x,
        operands.left,
        operands.right,
        operands.left if operands.nyquist_h is None else operands.nyquist_h,
        operands.left if operands.nyquist_w is None else operands.nyquist_w,
        operands.left if flip is None else flip.view(torch.uint8),
        scale,
        shift,
        out,
        height,
        width,
        rows,
        columns,
        x.shape[1],
        *x.stride(),
        operands.left.stride(0),
        operands.right.stride(0),
        plan.row_tiles,
        plan.column_tiles,
        **_constants(plan, flip is not None, operands.nyquist_h is not None, x.dtype == torch.uint8),
        ACC=tl.float64 if double else tl.float32,
        UPCAST=interpreted(),
        **{**options(arch), **FUSED, **tuned},
    )


def options(arch: str) -> dict[str, int]:
    """Launch options by architecture (see `runtime.architecture`); with mma 4 warps would spill at 160 columns."""
    return {"num_warps": 4 if arch in WIDE else 8, "num_stages": 2}


def keeps(x: Tensor, arch: str) -> bool:
    """Whether programs keep their rows of the left operand.

    Where products are mma instructions that operand is in registers, beside the result. And pixels that cannot be read
    16 at a time (an odd width, channels last) need an address each: then too many registers are in use as well.
    """
    aligned = x.stride(3) == 1 and all(stride % 16 == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return arch in WIDE and aligned and x.shape[3] % CHUNK == 0


@lru_cache(maxsize=16)
def _architecture(index: int | None) -> str:
    """Of a CUDA device, or of Hopper where there is none (the interpreter ignores the options)."""
    return "sm_90" if index is None else architecture(torch.cuda.get_device_capability(index))


def _constants(plan: Tiles, flip: bool, nyquist: bool, centred: bool) -> dict[str, Any]:
    """Constants of the kernel, but the accumulator's type and UPCAST."""
    return {
        "BM": ROWS,
        "CK": CHUNK,
        **dict(zip(("K1", "K2", "K3", "N1", "N2"), (*plan.k, *plan.n), strict=True)),
        "LOOP": plan.loop,
        "MASKED": plan.masked,
        "FLIP": flip,
        "NYQUIST": nyquist,
        "CENTRE": 128.0 if centred else 0.0,
    }


def gate_cases() -> list[GateCase]:
    """The shipped variants: 224 to the sizes of the schedules on all architectures, and unusual forms on Hopper.

    With flips and the Nyquist term, which need most registers.
    """
    from ..gate import GateCase

    def case(name: str, height: int, width: int, size: int, capability: int, form: str, out: str = "*bf16") -> GateCase:
        arch = architecture(divmod(capability, 10))
        plan = tiles(height, width, size, size, arch in WIDE and form == "chw", arch not in WIDE)
        signature = {"x": "*u8", "left": "*fp16", "right": "*fp16", "flip": "*u8", "out": out}
        signature |= dict.fromkeys(("nyquist_h", "nyquist_w", "scale", "shift"), "*fp32")
        integers = ("H", "W", "Bh", "Bw", "stride_n", "stride_c", "stride_h", "stride_left", "stride_right")
        hint = "" if form == "odd" else ":16"
        signature |= dict.fromkeys(integers, f"i32{hint}") | {"stride_left": "i32:16", "stride_right": "i32:16"}
        signature |= {"C": "i32", "row_tiles": "i32", "column_tiles": "i32", "stride_w": "i32:1"}
        if form == "hwc":
            signature |= {"stride_c": "i32:1", "stride_w": "i32"}
        return GateCase(
            name=f"crop_{name}",
            kernel=crop_kernel,
            signature=signature,
            constants={**_constants(plan, True, True, True), "ACC": tl.float32, "UPCAST": False},
            **options(arch),
            capability=capability,
            wgmma=arch == "sm_90",
            quick=capability == 90 and name == "224_192",
        )

    cases = [case(f"224_{b}", 224, 224, b, sm, "chw") for sm in (90, 89, 80, 100, 120) for b in (96, 128, 160, 192)]
    cases += [case(f"hwc_224_{b}", 224, 224, b, 90, "hwc") for b in (128, 192)]
    cases += [
        case("fp32_224_192", 224, 224, 192, 90, "chw", "*fp32"),
        case("224_224", 224, 224, 224, 90, "chw"),
        case("256_128", 256, 256, 128, 90, "chw"),
        case("240x256_192", 240, 256, 192, 90, "chw"),
        case("384_192", 384, 384, 192, 90, "chw"),
        case("512_192", 512, 512, 192, 90, "chw"),
        case("odd_225_192", 225, 225, 192, 90, "odd"),
    ]
    return cases
