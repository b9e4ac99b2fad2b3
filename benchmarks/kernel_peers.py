"""What `kernels.py` times: our operations and their peers, each in its best form, with inputs and exact references.

Shape legend: B images, N tokens, H heads, D head dim, C = H * D; crop: S input side, R result side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from efftrain_ds.kernels.attention import BlockMask, attention, attention_reference
from efftrain_ds.kernels.lowfreq_crop import lowfreq_crop
from efftrain_ds.kernels.lowfreq_crop.reference import fourier_crop, matmul_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKED_IMAGES = 2


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A seeded generator on the device."""
    return torch.Generator(device).manual_seed(seed)


class Inputs:
    """Rotating sets of attention inputs in both layouts, and the float64 result for the first images of set 0."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        mask: BlockMask | None = None,
        sets: int = 3,
    ):
        """Draw the inputs; `shape` is (B, N, H, D)."""
        self.shape, self.dtype, self.device, self.mask, self.sets = shape, dtype, device, mask, sets
        b, n, h, d = shape
        draw = [generator(index, device) for index in range(sets)]
        self.qkv = [torch.randn(b, n, 3, h, d, dtype=dtype, device=device, generator=g) for g in draw]
        self.dout = [torch.randn(b, n, h, d, dtype=dtype, device=device, generator=g) for g in draw]

    @cached_property
    def packed(self) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """For each set ((qkv [B, N, 3, H, D],), dout [B, N, H, D])."""
        return [((qkv.detach().requires_grad_(),), dout) for qkv, dout in zip(self.qkv, self.dout, strict=True)]

    @cached_property
    def separate(self) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """For each set ((q, k, v) [B, H, N, D], dout likewise), stored as [B, N, H, D]: nothing is copied for SDPA."""
        return [
            (tuple(x.contiguous().transpose(1, 2).requires_grad_() for x in qkv.unbind(2)), dout.transpose(1, 2))
            for qkv, dout in zip(self.qkv, self.dout, strict=True)
        ]

    def reference(self, masked: bool) -> tuple[Tensor, Tensor]:
        """Output [b, N, H, D] and dqkv [b, N, 3, H, D] in float64 for the first images of set 0."""
        qkv = self.qkv[0][:CHECKED_IMAGES].double().requires_grad_()
        keep = self.mask.to_dense() if masked and self.mask is not None else None
        out, _ = attention_reference(*qkv.unbind(2), keep, self.shape[3] ** -0.5)
        (grad,) = torch.autograd.grad(out, qkv, self.dout[0][:CHECKED_IMAGES].double())
        return out.detach(), grad

    def kept(self) -> float:
        """Share of the scores that the mask keeps."""
        return 1.0 if self.mask is None else float(self.mask.to_dense().double().mean())


@dataclass
class Alternative:
    """One way to compute attention.

    Attributes:
        name: in the table.
        inputs: its inputs.
        function: from the leaves of one set to the output.
        packed: takes qkv [B, N, 3, H, D] and gives [B, N, H, D] (or [B, N, C]); else q, k, v and result [B, H, N, D].
        masked: it applies the inputs' mask.
        held: outputs with their graphs, by set; see `backward`.
    """

    name: str
    inputs: Inputs
    function: Callable[..., Tensor]
    packed: bool = False
    masked: bool = False
    held: dict[int, Tensor] = field(default_factory=dict)

    def set(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Leaves and gradient of the output of one set."""
        return (self.inputs.packed if self.packed else self.inputs.separate)[index]

    def forward(self, index: int) -> Tensor:
        """Forward without a graph."""
        with torch.no_grad():
            return self.function(*self.set(index)[0])

    def both(self, index: int) -> tuple[Tensor, ...]:
        """Forward and backward."""
        leaves, dout = self.set(index)
        out = self.function(*leaves)
        return torch.autograd.grad(out, leaves, dout.reshape(out.shape))

    def backward(self, index: int) -> tuple[Tensor, ...]:
        """Backward of a forward that is kept from the first call on; `drop` frees it."""
        leaves, dout = self.set(index)
        if index not in self.held:
            self.held[index] = self.function(*leaves)
        out = self.held[index]
        return torch.autograd.grad(out, leaves, dout.reshape(out.shape), retain_graph=True)

    def drop(self) -> None:
        """Free what `backward` keeps."""
        self.held.clear()

    def errors(self) -> dict[str, float]:
        """Relative error of the output and of dq, dk, dv on the first images; inf where something is not finite."""
        b, n, h, d = self.inputs.shape
        out_reference, grad_reference = self.inputs.reference(self.masked)
        leaves, dout = self.set(0)
        out = self.function(*leaves)
        grads = torch.autograd.grad(out, leaves, dout.reshape(out.shape))
        if self.packed:
            out, grad = out.reshape(b, n, h, d), grads[0]
        else:
            out, grad = out.transpose(1, 2), torch.stack([g.transpose(1, 2) for g in grads], 2)
        pairs = {"out": (out[:CHECKED_IMAGES], out_reference)}
        for index, name in enumerate(("dq", "dk", "dv")):
            pairs[name] = (grad[:CHECKED_IMAGES, :, index], grad_reference[:, :, index])
        return {name: relative_error(*pair) for name, pair in pairs.items()}


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||; inf where `found` has a NaN."""
    error = float((found.detach().double() - reference).norm() / reference.norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


# ---- attention


def ours(inputs: Inputs, route: str = "auto", name: str = "ours") -> Alternative:
    """Our operation on packed qkv."""
    return Alternative(
        name, inputs, lambda qkv: attention(qkv, inputs.mask, route=route), True, inputs.mask is not None
    )


SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_peers(inputs: Inputs, dry: bool = False) -> list[Alternative]:
    """Every backend of scaled_dot_product_attention, without a mask."""

    def make(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH if dry else backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return [Alternative(name, inputs, make(backend)) for name, backend in SDPA.items()]


def packed_peers(inputs: Inputs, dry: bool = False) -> list[Alternative]:
    """Every backend of scaled_dot_product_attention, fed from packed qkv as timm's models feed it."""
    backends = {name: SDPBackend.MATH if dry else backend for name, backend in SDPA.items()}
    return [Alternative(f"{name}, packed", inputs, as_timm(inputs, b), True) for name, b in backends.items()]


def as_timm(inputs: Inputs, backend: SDPBackend) -> Callable[..., Tensor]:
    """Attention as timm writes it: from the output of the qkv linear [B, N, 3C] to the input of proj [B, N, C]."""
    b, n, h, d = inputs.shape

    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.reshape(b, n, 3 * h * d).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(backend):  # inside, so that compiled code is guarded by the backend
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h * d)

    return run


def flex_peers(inputs: Inputs, dry: bool = False) -> list[Alternative]:
    """FlexAttention, compiled, with blocks of 64 and 128, under the mask of the inputs.

    All compiled forms of one function share a limit of recompilations, past which torch runs it uncompiled. As one
    graph (``fullgraph``) that is an error instead; call ``torch._dynamo.reset()`` between cases.
    """
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

    config.donated_buffer = False  # else a backward cannot be timed without its forward
    mask = inputs.mask
    assert mask is not None
    run = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    keep, block, (_, n, h, _) = mask.keep, mask.block, inputs.shape

    def seen(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keep[head if keep.shape[0] > 1 else 0, q // block, k // block]

    def make(size: int, flex_mask: Any) -> Callable[..., Tensor]:
        if dry:  # it has no backward on a CPU: its mask function through SDPA instead
            dense = create_mask(flex_mask.mask_mod, 1, h, n, n, device=inputs.device)
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dense)
        # tiles may not be larger than the mask's blocks; the defaults suit 128
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options = dict.fromkeys(names, size) if size < 128 else None
        return lambda q, k, v: run(q, k, v, block_mask=flex_mask, kernel_options=options)

    masks = {
        64: mask.to_flex(),
        128: create_block_mask(seen, 1, h, n, n, device=inputs.device, BLOCK_SIZE=2 * block),
    }
    return [
        Alternative(f"FlexAttention {size}", inputs, make(size, flex_mask), masked=True)
        for size, flex_mask in masks.items()
    ]


def layer_alternatives(inputs: Inputs, compiled: bool, dry: bool = False) -> list[Alternative]:
    """From the output of the qkv linear [B, N, 3C] to the input of proj [B, N, C], as timm writes it; ours first."""
    b, n, h, d = inputs.shape

    def own(qkv: Tensor) -> Tensor:
        return attention(qkv.reshape(b, n, 3 * h * d).view(b, n, 3, h, d), inputs.mask).reshape(b, n, h * d)

    def prepared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if not compiled:
            return function
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager" if dry else "inductor")

    alternatives = [Alternative("ours", inputs, prepared(own), True, inputs.mask is not None)]
    for name in ("SDPA flash", "SDPA cuDNN"):
        backend = SDPBackend.MATH if dry else SDPA[name]
        alternatives.append(Alternative(name, inputs, prepared(as_timm(inputs, backend)), True))
    return alternatives


# ---- low-frequency crop


def photographs(count: int, side: int, device: torch.device, seed: int) -> Tensor:
    """uint8 [count, 3, side, side] with the 1/f spectrum of photographs."""
    frequency = torch.fft.fftfreq(side, device=device)
    radius = (frequency[:, None] ** 2 + frequency[None, :] ** 2).sqrt().clamp_min(1 / side)
    white = torch.randn(count, 3, side, side, device=device, generator=generator(seed, device))
    image = torch.fft.ifft2(torch.fft.fft2(white) / radius).real
    image = 128 + 50 * image / image.std((-2, -1), keepdim=True)
    return image.clamp(0, 255).to(torch.uint8)


def crop_alternatives(size: int, device: torch.device, dry: bool = False) -> dict[str, Callable[[Tensor], Tensor]]:
    """From uint8 [B, 3, S, S] to bf16 [B, 3, R, R], normalised; ours first, "interpolate" has another filter."""
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=device).view(-1, 1, 1)
    prepared = (lambda f: f) if dry else (lambda f: torch.compile(f, dynamic=False, fullgraph=True))

    @prepared
    def normalised(x: Tensor) -> Tensor:
        return x.float() * scale + shift

    def own(x: Tensor) -> Tensor:
        return lowfreq_crop(x, size, align="grid", mean=MEAN, std=STD, out_dtype=torch.bfloat16)

    def literal(x: Tensor) -> Tensor:
        y, side = (x.float() / 255 - mean) / std, x.shape[-1]
        low = (side - size) // 2
        spectrum = torch.fft.fftshift(torch.fft.fft2(y), (-2, -1))[..., low : low + size, low : low + size]
        y = torch.fft.ifft2(torch.fft.ifftshift(spectrum, (-2, -1))).real * (size**2 / side**2)
        return y.to(torch.bfloat16)

    def half_spectrum(x: Tensor) -> Tensor:
        y, side = normalised(x), x.shape[-1]
        columns = torch.fft.rfft2(y)[..., : size // 2 + 1]
        middle = (
            columns[..., size // 2, None, :] + columns[..., side - size // 2, None, :]
        ) / 2  # Nyquist row, of both
        spectrum = torch.cat([columns[..., : size // 2, :], middle, columns[..., side - size // 2 + 1 :, :]], -2)
        return (torch.fft.irfft2(spectrum, s=(size, size)) * (size**2 / side**2)).to(torch.bfloat16)

    def products(x: Tensor) -> Tensor:
        return matmul_crop(
            x,
            (size, size),
            align="grid",
            exact=False,
            scale=scale,
            shift=shift,
            compute_dtype=torch.float32 if dry else torch.float16,
            out_dtype=torch.bfloat16,
        )

    def interpolate(x: Tensor) -> Tensor:
        y = F.interpolate(normalised(x), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        return y.to(torch.bfloat16)

    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (MEAN, STD))
    return {
        "ours": own,
        "literal FFT": literal,
        "rfft2": half_spectrum,
        "two matmuls": products,
        "interpolate": interpolate,
    }


def crop_reference(x: Tensor, size: int) -> Tensor:
    """The definition in float64 for the first images."""
    y = fourier_crop(x[:CHECKED_IMAGES], (size, size), "grid") / 255
    mean, std = (torch.tensor(values, dtype=torch.float64, device=x.device).view(-1, 1, 1) for values in (MEAN, STD))
    return (y - mean) / std
