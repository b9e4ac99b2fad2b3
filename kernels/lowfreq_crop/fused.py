"""The crop kernel as an operation of torch, ``efftrain::lowfreq_crop``, with its checks and its fake form.

Shape legend: N images, C channels, H x W input pixels, Bh x Bw output pixels.

The operands are arguments of the operation, not built inside: so they live outside the memory pools of captured graphs,
and tracing with fake tensors never meets the cache of real ones. There is no backward; 8-bit images have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import Operands, padded_sizes, too_large

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op(
    "efftrain::lowfreq_crop",
    mutates_args=(),
    schema="(Tensor x, Tensor left, Tensor right, Tensor? nyquist_h, Tensor? nyquist_w, Tensor? flip, Tensor scale, "
    "Tensor shift, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
)
def crop_op(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    nyquist_h: Tensor | None,
    nyquist_w: Tensor | None,
    flip: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """``(L_h (x - 128) L_w^T - nyquist term + 128) scale + shift`` of every plane, by one Triton kernel.

    Args:
        x: [N, C, H, W] uint8, any strides; rows of contiguous pixels are fast.
        left: L_h, fp16, as `tiles.Operands` has it; the operands are those of exactly these sizes.
        right: L_w^T, likewise.
        nyquist_h: fp32 or None = without the Nyquist term.
        nyquist_w: fp32 or None.
        flip: [N] bool, images to mirror from left to right first; None = none.
        scale: [C] fp32.
        shift: [C] fp32.
        rows: Bh.
        columns: Bw.
        dtype: of the result: fp32, bf16 or fp16.

    Returns:
        [N, C, Bh, Bw] contiguous.

    Raises:
        ValueError: a wrong shape, dtype or device, or an odd size with a Nyquist term.
    """
    from .triton_fwd import launch

    operands = Operands(left, right, nyquist_h, nyquist_w)
    _check(x, operands, flip, scale, shift, rows, columns, dtype)
    out = x.new_empty((*x.shape[:2], rows, columns), dtype=dtype)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            launch(x, operands, flip, scale, shift, out)
    else:
        launch(x, operands, flip, scale, shift, out)
    return out


@crop_op.register_fake
def _(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    nyquist_h: Tensor | None,
    nyquist_w: Tensor | None,
    flip: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(x, Operands(left, right, nyquist_h, nyquist_w), flip, scale, shift, rows, columns, dtype)
    return x.new_empty((*x.shape[:2], rows, columns), dtype=dtype)


def _check(
    x: Tensor,
    operands: Operands,
    flip: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> None:
    """Refuse what the kernel would misread.

    Raises:
        ValueError: see `crop_op`.
    """
    name = "efftrain::lowfreq_crop"
    if x.ndim != 4 or x.dtype != torch.uint8:
        raise ValueError(f"{name} takes uint8 images [N, C, H, W], found {x.dtype} {list(x.shape)}")
    if dtype not in OUT_DTYPES:
        raise ValueError(f"{name}: the result is {', '.join(map(str, OUT_DTYPES))}, found {dtype}")
    images, channels, height, width = x.shape
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"{name}: cannot crop {height} x {width} pixels to {rows} x {columns}")
    term = operands.nyquist_h is not None
    if term != (operands.nyquist_w is not None):
        raise ValueError(f"{name}: nyquist_h and nyquist_w are given together or not at all")
    if term and (rows % 2 or columns % 2):
        raise ValueError(f"{name}: the Nyquist term belongs to even sizes, found {rows} x {columns}")
    if (reason := too_large(height, width, rows, columns)) is not None:
        raise ValueError(f"{name}: {reason}")
    shape = padded_sizes(height, width, rows, columns)
    wanted: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "left": (operands.left, torch.float16, shape[:2]),
        "right": (operands.right, torch.float16, shape[2:]),
        "nyquist_h": (operands.nyquist_h, torch.float32, shape[1:2]),
        "nyquist_w": (operands.nyquist_w, torch.float32, shape[2:3]),
        "flip": (flip, torch.bool, (images,)),
        "scale": (scale, torch.float32, (channels,)),
        "shift": (shift, torch.float32, (channels,)),
    }
    for argument, (tensor, kind, sides) in wanted.items():
        if tensor is None:
            continue
        if tensor.dtype != kind or tuple(tensor.shape) != tuple(sides) or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {argument} is contiguous {kind} {list(sides)}, found {tensor.dtype} "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: {argument} is on {tensor.device}, the images are on {x.device}")
