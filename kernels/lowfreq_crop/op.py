"""Public functions of the low-frequency crop, their checks and the choice of implementation.

Shape legend: N images, C channels, H x W input pixels, Bh x Bw output pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .matrices import ALIGNMENTS, FILTERS, check_sizes
from .reference import matmul_crop, matmul_resample


def lowfreq_crop(
    x: Tensor,
    size: int | tuple[int, int],
    *,
    align: str = "center",
    exact: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Keep the lowest `size` spatial frequencies of each channel and return them as a smaller image.

    The ideal low-pass of EfficientTrain (ICCV 2023, section 3.1) without a Fourier transform: two matrix products
    and, for even sizes, one number a plane. Linear, keeps the mean, does not clamp, differentiable in a float `x`.

    Args:
        x: [N, C, H, W] images, uint8 0..255 or floating point.
        size: side B of the square result, or (Bh, Bw); 1 to H and 1 to W. Odd sizes have no Nyquist term.
        align: "center" matches pixel centres (objects stay in place); "grid" matches the first samples, as in the
            authors' code.
        exact: add the Nyquist term: the result equals the real part of the Fourier definition. Without it both
            diagonals of the corner frequency are treated alike, and with "center" the crop commutes with flips.
        mean: per-channel mean in 0..1, for uint8 images only, together with `std`.
        std: per-channel standard deviation in 0..1; the result is (crop / 255 - mean) / std.
        out_dtype: floating dtype of the result; default float32 for uint8, else that of `x`.

    Returns:
        [N, C, Bh, Bw]; `x` itself where nothing is to be done.

    Raises:
        ValueError: wrong rank, dtype, size, `align`, or mean/std that do not fit.
        RuntimeError: EFFTRAIN_KERNELS asks for a kernel that does not exist.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align is one of {', '.join(ALIGNMENTS)}, found {align!r}")
    pair, scale, shift, dtype = _prepare("lowfreq_crop", x, size, mean, std, out_dtype)
    if pair == tuple(x.shape[-2:]) and scale is None:
        return x.to(dtype)
    return matmul_crop(
        x,
        pair,
        align=align,
        exact=exact,
        scale=scale,
        shift=shift,
        compute_dtype=_compute_dtype(x),
        out_dtype=dtype,
    )


def resample(
    x: Tensor,
    size: int | tuple[int, int],
    filter: str = "lanczos",
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Shrink images with an antialiased filter in PIL's convention, without rounding or clamping.

    The reduction of the EfficientTrain++ code release (PIL Lanczos on uint8) and its bicubic sibling; unlike
    `lowfreq_crop` not an ideal low-pass. Arguments and result as there; always pixel-centred.

    Args:
        x: [N, C, H, W] images, uint8 0..255 or floating point.
        size: side B of the square result, or (Bh, Bw); 1 to H and 1 to W.
        filter: "lanczos" (3 lobes) or "bicubic" (a = -1/2).
        mean: per-channel mean in 0..1, for uint8 images only, together with `std`.
        std: per-channel standard deviation in 0..1.
        out_dtype: floating dtype of the result; default float32 for uint8, else that of `x`.

    Raises:
        ValueError: wrong rank, dtype, size, `filter`, or mean/std that do not fit.
        RuntimeError: EFFTRAIN_KERNELS asks for a kernel that does not exist.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter is one of {', '.join(FILTERS)}, found {filter!r}")
    pair, scale, shift, dtype = _prepare("resample", x, size, mean, std, out_dtype)
    if pair == tuple(x.shape[-2:]) and scale is None:
        return x.to(dtype)
    return matmul_resample(
        x, pair, filter=filter, scale=scale, shift=shift, compute_dtype=_compute_dtype(x), out_dtype=dtype
    )


def _prepare(
    op: str,
    x: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    out_dtype: torch.dtype | None,
) -> tuple[tuple[int, int], Tensor | None, Tensor | None, torch.dtype]:
    """Check the arguments; returns (Bh, Bw), the affine map of the result ([C, 1, 1] each or None) and its dtype."""
    _check_implementation(op)
    if x.ndim != 4:
        raise ValueError(f"{op} takes images [N, C, H, W], found shape {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"{op} takes uint8 or floating-point images, found {x.dtype}")
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"size is an int or (height, width), found {size!r}")
    for size_in, size_out in zip(x.shape[-2:], pair, strict=True):
        check_sizes(size_in, size_out)
    dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"out_dtype must be floating point, found {dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std are given together or not at all")
    if mean is None or std is None:
        return pair, None, None, dtype
    if x.dtype != torch.uint8:
        raise ValueError(f"mean and std apply to uint8 images, found {x.dtype} (normalised already?)")
    if len(mean) not in (1, x.shape[1]) or len(std) != len(mean):
        raise ValueError(f"mean and std need 1 or {x.shape[1]} values each, found {len(mean)} and {len(std)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, found {list(std)}")
    scale, shift = _affine(tuple(mean), tuple(std), str(x.device))
    return pair, scale, shift, dtype


@lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: str) -> tuple[Tensor, Tensor]:
    """Scale and shift [C, 1, 1] fp32 that turn 0..255 into (x / 255 - mean) / std; kept, as a GPU copy would wait."""
    with torch.inference_mode(False):
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=device)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
        return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def _check_implementation(op: str) -> None:
    """Where a Triton kernel will take its place; today every device runs the two matrix products.

    Raises:
        RuntimeError: ``EFFTRAIN_KERNELS=triton``.
        ValueError: another value than "", "reference" or "triton".
    """
    wanted = os.environ.get("EFFTRAIN_KERNELS", "")
    if wanted == "triton":
        raise RuntimeError(
            f"EFFTRAIN_KERNELS=triton: no Triton kernel for {op} in this version; unset it or use "
            "EFFTRAIN_KERNELS=reference"
        )
    if wanted not in ("", "reference"):
        raise ValueError(f'EFFTRAIN_KERNELS is "reference" or "triton", found {wanted!r}')


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Operand dtype of the products: fp16 for 8-bit images on a GPU (bf16 would lose 2 grey levels), else >= fp32."""
    if x.dtype == torch.uint8 and x.is_cuda:
        return torch.float16
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
