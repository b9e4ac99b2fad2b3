"""Plain torch forms of the low-frequency crop: the Fourier definition and the two matrix products.

Shape legend: N images, C channels, H x W input pixels, Bh x Bw output pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matrices import check_sizes, crop_matrix, resample_matrix


def fourier_crop(x: Tensor, size: tuple[int, int], align: str = "center") -> Tensor:
    """The definition, in float64 through `torch.fft`: slow, an oracle for tests and documents.

    Keeps the Bh x Bw frequencies around zero of the transform of `x` [..., H, W], evaluates them on the output points
    and takes the real part; scaled so that the mean is kept. ``align="grid"`` is EfficientTrain (ICCV 2023) section
    3.1; ``"center"`` multiplies frequency u by exp(i pi u (1/B - 1/H)), which moves the points to the pixel centres.

    Returns:
        [..., Bh, Bw] float64, not clamped.
    """
    spectrum = torch.fft.fft2(x.double())
    for dim, size_out in zip((-2, -1), size, strict=True):
        size_in = x.shape[dim]
        check_sizes(size_in, size_out)
        # frequencies in transform order: 0 .. ceil(B/2)-1, then -floor(B/2) .. -1
        u = torch.cat([torch.arange((size_out + 1) // 2), torch.arange(-(size_out // 2), 0)]).to(x.device)
        spectrum = spectrum.index_select(dim, u % size_in) * (size_out / size_in)
        if align == "center":
            phase = torch.exp(1j * math.pi * u.double() * (1 / size_out - 1 / size_in))
            spectrum = spectrum * (phase[:, None] if dim == -2 else phase)
    return torch.fft.ifft2(spectrum).real


def matmul_crop(
    x: Tensor,
    size: tuple[int, int],
    *,
    align: str = "center",
    exact: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Low-frequency crop by two matrix products.

    Args:
        x: [N, C, H, W], any real dtype.
        size: (Bh, Bw).
        align: "center" or "grid", see `matrices.crop_matrix`.
        exact: add the rank-one Nyquist term of even sizes.
        scale: [C], multiplies the result; None = 1.
        shift: [C], added to the scaled result; None = 0.
        compute_dtype: dtype of the operands of both products (the intermediate is rounded to it).
        out_dtype: dtype of the result.

    Returns:
        [N, C, Bh, Bw] in `out_dtype`, not clamped.
    """
    h = crop_matrix(x.shape[-2], size[0], align, compute_dtype, x.device)
    w = crop_matrix(x.shape[-1], size[1], align, compute_dtype, x.device)
    # Both sides need a Nyquist bin of their own for the corner bin that the term corrects.
    corner = exact and all(b % 2 == 0 and b < s for b, s in zip(size, x.shape[-2:], strict=True))
    # 8-bit values are centred for 16-bit products: P keeps constants, and half the magnitude is half the rounding.
    centre = 128.0 if x.dtype == torch.uint8 and compute_dtype in (torch.float16, torch.bfloat16) else 0.0
    planes = _planes(x, compute_dtype, centre)
    z = _product(planes, h.p, w.p, size)
    if corner:
        weight = (planes.view(-1, x.shape[-1]) @ w.q).view(-1, x.shape[-2]) @ h.q  # q_H^T X q_W, one number a plane
        z = torch.addcmul(z, weight[:, None, None], torch.outer(h.a, w.a), value=-1)
    return _finish(z, x, centre, scale, shift, out_dtype)


def matmul_resample(
    x: Tensor,
    size: tuple[int, int],
    *,
    filter: str = "lanczos",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Antialiased resampling by two matrix products; arguments and result as in `matmul_crop`."""
    h = resample_matrix(x.shape[-2], size[0], filter, compute_dtype, x.device)
    w = resample_matrix(x.shape[-1], size[1], filter, compute_dtype, x.device)
    centre = 128.0 if x.dtype == torch.uint8 and compute_dtype in (torch.float16, torch.bfloat16) else 0.0
    return _finish(_product(_planes(x, compute_dtype, centre), h, w, size), x, centre, scale, shift, out_dtype)


def _planes(x: Tensor, dtype: torch.dtype, centre: float) -> Tensor:
    """Planes [N*C, H, W] of `x` minus `centre`, contiguous, in `dtype`."""
    planes = x.to(dtype, memory_format=torch.contiguous_format).reshape(-1, *x.shape[-2:])
    return planes - centre if centre else planes


def _product(planes: Tensor, left: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
    """left @ plane @ right^T of every plane: [N*C, H, W] -> [N*C, Bh, Bw]; identities are skipped."""
    n, height, width = planes.shape
    if size[1] != width:
        planes = (planes.view(n * height, width) @ right.t()).view(n, height, size[1])
    if size[0] != height:
        planes = torch.bmm(left.expand(n, -1, -1), planes)
    return planes


def _finish(
    z: Tensor, x: Tensor, centre: float, scale: Tensor | None, shift: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Undo the centring, apply the affine map in at least fp32 and cast: [N*C, Bh, Bw] -> [N, C, Bh, Bw]."""
    z = z.view(*x.shape[:-2], *z.shape[-2:])
    if centre or scale is not None or shift is not None:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if centre:
            z = z + centre
        if scale is not None:
            z = z * scale.to(z.dtype).view(-1, 1, 1)
        if shift is not None:
            z = z + shift.to(z.dtype).view(-1, 1, 1)
    return z.to(out_dtype)
