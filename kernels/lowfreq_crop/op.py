"""Public functions of the low-frequency crop, their checks and the choice of implementation.

Shape legend: N images, C channels, H x W input pixels, Bh x Bw output pixels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import use_triton
from .fused import OUT_DTYPES, crop_op
from .matrices import ALIGNMENTS, FILTERS, check_sizes, constant_in_graphs, kept
from .reference import matmul_crop, matmul_resample
from .tiles import Operands, crop_operands, resample_operands, too_large


def lowfreq_crop(
    x: Tensor,
    size: int | tuple[int, int],
    *,
    align: str = "center",
    exact: bool = True,
    flip: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Keep the lowest `size` spatial frequencies of each channel and return them as a smaller image.

    The ideal low-pass of EfficientTrain (ICCV 2023, section 3.1) without a Fourier transform: two matrix products
    and, for even sizes, one number a plane. Linear, keeps the mean, does not clamp, differentiable in a float `x`.
    8-bit images of even sizes go through one Triton kernel where that runs, everything else through torch.

    Args:
        x: [N, C, H, W] images, uint8 0..255 or floating point.
        size: side B of the square result, or (Bh, Bw); 1 to H and 1 to W. Odd sizes have no Nyquist term.
        align: "center" matches pixel centres (objects stay in place); "grid" matches the first samples, as in the
            authors' code.
        exact: add the Nyquist term: the result equals the real part of the Fourier definition. Without it both
            diagonals of the corner frequency are treated alike, and with "center" the crop commutes with flips.
        flip: [N] bool: images that are mirrored left to right before they are cropped; None = none.
        mean: per-channel mean in 0..1, for uint8 images only, together with `std`.
        std: per-channel standard deviation in 0..1; the result is (crop / 255 - mean) / std.
        out_dtype: floating dtype of the result; default float32 for uint8, else that of `x`.

    Returns:
        [N, C, Bh, Bw]; `x` itself where nothing is to be done.

    Raises:
        ValueError: wrong rank, dtype, size or `align`; `flip`, `mean` or `std` that do not fit.
        RuntimeError: EFFTRAIN_KERNELS=triton, and the kernel cannot run here or cannot take these arguments.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align is one of {', '.join(ALIGNMENTS)}, found {align!r}")
    call = _prepare("lowfreq_crop", x, size, flip, mean, std, out_dtype)
    if call.idle:
        return _mirrored(x, flip).to(call.dtype)
    if call.fused:
        operands = crop_operands(call.size_in, call.size, align, exact, torch.float16, torch.float32, call.device)
        return _run(x, operands, flip, call)
    return matmul_crop(
        _mirrored(x, flip),
        call.size,
        align=align,
        exact=exact,
        scale=call.scale,
        shift=call.shift,
        compute_dtype=_compute_dtype(x),
        out_dtype=call.dtype,
    )


def resample(
    x: Tensor,
    size: int | tuple[int, int],
    filter: str = "lanczos",
    *,
    flip: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Shrink images with an antialiased filter in PIL's convention, without rounding or clamping.

    The reduction of the EfficientTrain++ code release (PIL Lanczos on uint8) and its bicubic sibling; unlike
    `lowfreq_crop` not an ideal low-pass. Arguments and result as there; always pixel-centred. The same kernel computes
    it where it runs, of odd sizes too.

    Args:
        x: [N, C, H, W] images, uint8 0..255 or floating point.
        size: side B of the square result, or (Bh, Bw); 1 to H and 1 to W.
        filter: "lanczos" (3 lobes) or "bicubic" (a = -1/2).
        flip: [N] bool: images that are mirrored left to right first.
        mean: per-channel mean in 0..1, for uint8 images only, together with `std`.
        std: per-channel standard deviation in 0..1.
        out_dtype: floating dtype of the result; default float32 for uint8, else that of `x`.

    Raises:
        ValueError: wrong rank, dtype, size or `filter`; `flip`, `mean` or `std` that do not fit.
        RuntimeError: EFFTRAIN_KERNELS=triton, and the kernel cannot run here or cannot take these arguments.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter is one of {', '.join(FILTERS)}, found {filter!r}")
    call = _prepare("resample", x, size, flip, mean, std, out_dtype)
    if call.idle:
        return _mirrored(x, flip).to(call.dtype)
    if call.fused:
        operands = resample_operands(call.size_in, call.size, filter, torch.float16, call.device)
        return _run(x, operands, flip, call)
    return matmul_resample(
        _mirrored(x, flip),
        call.size,
        filter=filter,
        scale=call.scale,
        shift=call.shift,
        compute_dtype=_compute_dtype(x),
        out_dtype=call.dtype,
    )


class _Call(NamedTuple):
    """Checked arguments.

    Attributes:
        size_in: (H, W).
        size: (Bh, Bw).
        scale: [C] fp32 that multiplies the result, or None.
        shift: [C] fp32 that is added then, or None.
        dtype: of the result.
        device: where the images are.
        fused: the kernel takes the call.
        idle: nothing is to be computed.
    """

    size_in: tuple[int, int]
    size: tuple[int, int]
    scale: Tensor | None
    shift: Tensor | None
    dtype: torch.dtype
    device: str
    fused: bool
    idle: bool


def _prepare(
    op: str,
    x: Tensor,
    size: int | tuple[int, int],
    flip: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    out_dtype: torch.dtype | None,
) -> _Call:
    """Check the arguments and choose the implementation."""
    if x.ndim != 4:
        raise ValueError(f"{op} takes images [N, C, H, W], found shape {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"{op} takes uint8 or floating-point images, found {x.dtype}")
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"size is an int or (height, width), found {size!r}")
    # the sizes select matrices: `index`, and not `int`, makes Dynamo compile a graph for each
    channels, height, width = (operator.index(side) for side in x.shape[1:])
    size_in, pair = (height, width), (operator.index(pair[0]), operator.index(pair[1]))
    for before, after in zip(size_in, pair, strict=True):
        check_sizes(before, after)
    dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"out_dtype must be floating point, found {dtype}")
    if flip is not None and (flip.dtype != torch.bool or flip.shape != x.shape[:1] or flip.device != x.device):
        raise ValueError(
            f"flip is bool [{x.shape[0]}] on {x.device}, found {flip.dtype} {list(flip.shape)} on {flip.device}"
        )
    if (mean is None) != (std is None):
        raise ValueError("mean and std are given together or not at all")
    device, scale, shift = str(x.device), None, None
    if mean is not None and std is not None:
        if x.dtype != torch.uint8:
            raise ValueError(f"mean and std apply to uint8 images, found {x.dtype} (normalised already?)")
        if len(mean) not in (1, channels) or len(std) != len(mean):
            raise ValueError(f"mean and std need 1 or {channels} values each, found {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std must be positive, found {list(std)}")
        values = tuple(map(_constant, mean)), tuple(map(_constant, std))
        scale, shift = (_affine(part, *values, channels, device) for part in ("scale", "shift"))
    fused = _chosen(op, x.device, _unable(op, x.dtype, size_in, pair, dtype))
    return _Call(size_in, pair, scale, shift, dtype, device, fused, pair == size_in and scale is None)


def _constant(value: float) -> float:
    """The same number: Dynamo may have made it symbolic, and takes the text of one as a constant, with a guard."""
    return float.fromhex(float(value).hex())


def _unable(
    op: str, dtype: torch.dtype, size_in: tuple[int, int], size: tuple[int, int], out_dtype: torch.dtype
) -> str | None:
    """Why the kernel does not take a call; None where it does."""
    if dtype != torch.uint8:
        return f"the images are {dtype}, the kernel takes uint8 (floating-point images keep their gradient in torch)"
    if op == "lowfreq_crop" and (size[0] % 2 or size[1] % 2):
        return f"the kernel takes even sizes, found {size[0]} x {size[1]}"
    if out_dtype not in OUT_DTYPES:
        return f"the kernel writes fp32, bf16 or fp16, not {out_dtype}"
    return too_large(*size_in, *size)


@constant_in_graphs
def _chosen(op: str, device: torch.device, unable: str | None) -> bool:
    return use_triton(op, device, unable)


def _run(x: Tensor, operands: Operands, flip: Tensor | None, call: _Call) -> Tensor:
    """Call the kernel's operation."""
    scale, shift = call.scale, call.shift
    if scale is None or shift is None:
        channels = operator.index(x.shape[1])
        scale, shift = (_affine(part, None, None, channels, call.device) for part in ("scale", "shift"))
    flip = None if flip is None else flip.contiguous()
    return crop_op(x, *operands, flip, scale, shift, *call.size, call.dtype)


@kept
def _affine(
    part: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int, device: str
) -> Tensor:
    """Scale or shift [C] fp32 that turn 0..255 into (x / 255 - mean) / std; kept, as a copy to a GPU would wait."""
    if mean is None or std is None:
        values = [1.0 if part == "scale" else 0.0]
    elif part == "scale":
        values = [1 / (255 * s) for s in std]
    else:
        values = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(values, dtype=torch.float32, device="cpu").expand(channels).contiguous().to(device)


def _mirrored(x: Tensor, flip: Tensor | None) -> Tensor:
    """The images with those of `flip` mirrored left to right."""
    return x if flip is None else torch.where(flip[:, None, None, None], x.flip(-1), x)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Operand dtype of the products: fp16 for 8-bit images on a GPU (bf16 would lose 2 grey levels), else >= fp32."""
    if x.dtype == torch.uint8 and x.is_cuda:
        return torch.float16
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
