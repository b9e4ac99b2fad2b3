"""One-dimensional operators of the low-frequency crop and of PIL-style resampling.

Shape legend: H input samples, B output samples (the bandwidth), m in 0..B-1, h in 0..H-1.

The 1-D crop keeps the frequencies -B/2 .. B/2-1 of a length-H discrete Fourier transform and evaluates them on B
points. As a complex matrix it is ``D = P + iQ``. All pairs +-u cancel in Q but u = -B/2, so Q = a q^T has rank one
(and is zero for odd B), and the real part of the 2-D crop is ``P_H X P_W^T - (q_H^T X q_W) a_H a_W^T``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

ALIGNMENTS = ("center", "grid")
FILTERS = ("lanczos", "bicubic")
_SUPPORT = {"lanczos": 3.0, "bicubic": 2.0}  # in output pixels
_KEPT = 256  # results of one function on the CPU
T = TypeVar("T")


class CropMatrix(NamedTuple):
    """The 1-D crop: `p` [B, H]; `q` [H] and `a` [B] of the Nyquist term (`q` is zero where there is none)."""

    p: Tensor
    q: Tensor
    a: Tensor


def kept(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call a function of constants that builds a tensor once for given arguments, and keep the result.

    Its last argument is the device, by name. Results on a GPU are kept for good: a captured graph reads them at their
    address without holding them.

    Unlike ``functools.lru_cache`` it keeps only what can be used anywhere: no inference tensors (autograd would refuse
    them later), nothing made under a fake-tensor mode; and `torch.compile` takes the result as a constant of the graph
    instead of tracing how it is made. Callers must not write into the result.
    """
    store: dict[tuple[object, ...], Tensor] = {}

    @functools.wraps(build)
    def get(*arguments: object) -> Tensor:
        device = torch.device(str(arguments[-1]))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # "cuda" is another one in another context
        key = (*arguments[:-1], str(device))
        real = type(torch.empty(0, device="cpu")) is Tensor
        if real and key in store:
            return store[key]
        with torch.inference_mode(False), torch.no_grad():
            result = build(*key)
        if real:
            on_cpu = [other for other in store if other[-1] == "cpu"] if len(store) >= _KEPT else []
            if len(on_cpu) >= _KEPT:
                for other in on_cpu:
                    del store[other]
            store[key] = result
        return result

    return constant_in_graphs(get)


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """`torch.compile` calls the function while it traces and takes the result as a constant.

    Its arguments have to be constants of the graph, sizes among them: ``operator.index`` of a symbolic size is one, and
    Dynamo guards on it; ``int`` would leave it symbolic.

    ``torch.compiler.assume_constant_result`` without the import of Dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_sizes(size_in: int, size_out: int) -> None:
    """Refuse sizes that no crop can have.

    Raises:
        ValueError: `size_out` is below 1 or above `size_in`.
    """
    if not 1 <= size_out <= size_in:
        raise ValueError(f"cannot crop {size_in} pixels to {size_out}: allowed are 1 to {size_in}")


def crop_matrix(
    size_in: int,
    size_out: int,
    align: str = "center",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CropMatrix:
    """Operator of the 1-D low-frequency crop, built in float64, cast to `dtype` and cached.

    With theta = (m+1/2)/B - (h+1/2)/H ("center": pixel centres coincide) or m/B - h/H ("grid": first samples
    coincide, as in the EfficientTrain code of 2023)::

        even B:  P[m,h] = sin(pi B theta) cot(pi theta) / H     (B/H where theta is an integer)
        odd B:   P[m,h] = sin(pi B theta) / (H sin(pi theta)),  Q = 0
        a[m] = (-1)^m;   q[h] = cos(pi B (h+1/2)/H)/H  ("center")  or  sin(pi B h/H)/H  ("grid")

    Callers must not write into the returned tensors.

    Raises:
        ValueError: unknown `align`, or `size_out` outside 1..`size_in`.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align is one of {', '.join(ALIGNMENTS)}, found {align!r}")
    size_in, size_out = operator.index(size_in), operator.index(size_out)  # see `constant_in_graphs`
    check_sizes(size_in, size_out)
    p, q, a = (_crop_part(part, size_in, size_out, align, dtype, str(device)) for part in CropMatrix._fields)
    return CropMatrix(p, q, a)


def resample_matrix(
    size_in: int,
    size_out: int,
    filter: str = "lanczos",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Operator [B, H] of antialiased resampling in PIL's convention, built in float64, cast to `dtype` and cached.

    Pixel-centred; the kernel is stretched by H/B, cut at the border and each row is normalised to sum 1.

    Raises:
        ValueError: unknown `filter`, or `size_out` outside 1..`size_in`.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter is one of {', '.join(FILTERS)}, found {filter!r}")
    size_in, size_out = operator.index(size_in), operator.index(size_out)  # see `constant_in_graphs`
    check_sizes(size_in, size_out)
    return _resample_matrix(size_in, size_out, filter, dtype, str(device))


@kept
def _crop_part(part: str, size_in: int, size_out: int, align: str, dtype: torch.dtype, device: str) -> Tensor:
    m = torch.arange(size_out, dtype=torch.int64, device="cpu")
    h = torch.arange(size_in, dtype=torch.int64, device="cpu")
    # theta = numerator / denominator in integers, so that the periods of sin and cot are removed exactly.
    if align == "center":
        denominator = 2 * size_in * size_out
        numerator = (2 * m[:, None] + 1) * size_in - (2 * h[None, :] + 1) * size_out
    else:
        denominator = size_in * size_out
        numerator = m[:, None] * size_in - h[None, :] * size_out
    numerator = _fold(numerator, denominator)  # P has period 1 in theta for even and odd B
    angle = numerator.double() * (math.pi / denominator)
    # sin(pi B theta) has period 2 in B theta
    wave = torch.sin(_fold(numerator * size_out, 2 * denominator).double() * (math.pi / denominator))
    whole = numerator == 0
    slope = torch.tan(angle) if size_out % 2 == 0 else torch.sin(angle)
    slope = torch.where(whole, torch.ones_like(slope), slope)
    p = torch.where(whole, torch.full_like(wave, float(size_out)), wave / slope) / size_in
    if size_out == size_in:
        p = torch.eye(size_in, dtype=torch.float64, device="cpu")
    a = 1.0 - 2.0 * (m % 2).double()
    if size_out % 2 or size_out == size_in:
        q = torch.zeros(size_in, dtype=torch.float64, device="cpu")
    elif align == "center":
        q = torch.cos(((2 * h + 1) * size_out % (4 * size_in)).double() * (math.pi / (2 * size_in))) / size_in
    else:
        q = torch.sin((h * size_out % (2 * size_in)).double() * (math.pi / size_in)) / size_in
    return {"p": p, "q": q, "a": a}[part].to(dtype).to(device)


@kept
def _resample_matrix(size_in: int, size_out: int, filter: str, dtype: torch.dtype, device: str) -> Tensor:
    if size_out == size_in:
        return torch.eye(size_in, dtype=torch.float64, device="cpu").to(dtype).to(device)
    scale = size_in / size_out
    support = _SUPPORT[filter] * scale
    centre = (torch.arange(size_out, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = torch.floor(centre - support + 0.5).clamp(min=0)
    last = torch.floor(centre + support + 0.5).clamp(max=size_in)
    h = torch.arange(size_in, dtype=torch.float64, device="cpu")
    weight = _kernel(filter, (h[None, :] + 0.5 - centre[:, None]) / scale)
    weight = weight * ((h >= first[:, None]) & (h < last[:, None]))
    return (weight / weight.sum(1, keepdim=True)).to(dtype).to(device)


def _fold(n: Tensor, period: int) -> Tensor:
    """Integers `n` modulo `period`, in -period/2 .. period/2, where sin and tan of small angles lose nothing."""
    return (n + period // 2) % period - period // 2


def _kernel(filter: str, x: Tensor) -> Tensor:
    """PIL's filter kernels at distance `x` (in output pixels): Lanczos with 3 lobes, cubic convolution a = -1/2."""
    x = x.abs()
    if filter == "lanczos":
        return torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
