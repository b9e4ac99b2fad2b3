"""Estimate of the peak bytes of one rank. An estimate for choosing a micro-batch, not a promise: it leaves out
communication buckets, ZeRO-3's gathered parameters, fragmentation and the framework itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .macs import VitShape, build_meta, vit_shape

PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_VIT_BYTES_16BIT = 34  # per token and unit of width, 16-bit, attention not stored (Korthikanti et al. 2022, eq. 2)
_VIT_FACTOR = _VIT_BYTES_16BIT / 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by use; `master` are the fp32 weights the optimizer updates, `moments` both Adam moments."""

    parameters: int
    gradients: int
    master: int
    moments: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all uses."""
        return sum(asdict(self).values())


def state_memory(
    params: int,
    *,
    precision: str,
    zero_stage: int,
    world: int,
    ema: bool = False,
    offload_optimizer: bool = False,
    activations: int = 0,
) -> Memory:
    """Bytes of one rank for weights, gradients and Adam's state under ZeRO 0-3.

    Stage 1 shards the optimizer (fp32 master weights, two moments) and the EMA, stage 2 the gradients too, stage 3 the
    weights too (Rajbhandari et al. 2020, fig. 1). ZeRO keeps its own fp32 copy also in fp32 training; stage 0 needs
    none there.

    Args:
        params: number of parameters.
        precision: "fp32", "bf16" or "fp16".
        zero_stage: 0 to 3.
        world: number of data-parallel ranks.
        ema: an average of the fp32 weights is kept.
        offload_optimizer: master weights and moments live in host memory.
        activations: bytes of the activations, see `activation_bytes`.

    Raises:
        ValueError: unknown precision or stage.
    """
    if precision not in PRECISION_BYTES:
        raise ValueError(f"precision is one of {', '.join(PRECISION_BYTES)}, found {precision!r}")
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO stage is 0 to 3, found {zero_stage!r}")
    width = PRECISION_BYTES[precision]
    shard = -(-params // world)
    held = shard if zero_stage >= 1 else params
    has_master = zero_stage >= 1 or precision != "fp32"
    on_device = 0 if offload_optimizer else 1
    return Memory(
        parameters=width * (shard if zero_stage >= 3 else params),
        gradients=width * (shard if zero_stage >= 2 else params),
        master=4 * held * on_device if has_master else 0,
        moments=8 * held * on_device,
        ema=4 * held if ema else 0,
        activations=activations,
    )


def vit_activation_bytes(shape: VitShape, resolution: int, *, micro_batch: int, precision: str) -> int:
    """Activations kept for the backward pass of a ViT with fused attention: about 17 values a token, width and block.

    Source: Korthikanti et al. 2022 ("Reducing activation recomputation"), eq. 2 without the stored attention matrix.
    """
    tokens = shape.tokens(resolution)
    scale = (9 + 2 * shape.mlp_ratio) / 17  # 9 values beside the MLP's two hidden ones of mlp_ratio each
    values = _VIT_FACTOR * scale * tokens * shape.dim * shape.depth + shape.channels * resolution**2
    return int(values * micro_batch * PRECISION_BYTES[precision])


@contextmanager
def _leaf_outputs(module: nn.Module, sizes: list[int]) -> Iterator[None]:
    def add(_: nn.Module, __: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel())

    kinds = (nn.Identity, nn.Dropout, nn.Flatten)
    leaves = [m for m in module.modules() if not any(True for _ in m.children()) and not isinstance(m, kinds)]
    handles = [m.register_forward_hook(add) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_activation_values(module: nn.Module, resolution: int, *, channels: int = 3) -> int:
    """Values that the leaf modules of a model on the meta device put out for one image: the estimate for non-ViTs."""
    sizes: list[int] = []
    was_training = module.training
    module.eval()
    try:
        with _leaf_outputs(module, sizes), torch.no_grad():
            module(torch.empty(1, channels, resolution, resolution, device="meta"))
    finally:
        module.train(was_training)
    return sum(sizes)


def activation_bytes(
    name: str,
    resolution: int,
    *,
    micro_batch: int,
    precision: str,
    num_classes: int = 1000,
    kwargs: dict | None = None,
    module: nn.Module | None = None,
) -> int:
    """Estimate of the activation bytes of one micro-batch.

    Args:
        name: timm model name; plain ViTs take the formula of `vit_activation_bytes`.
        resolution: input side in pixels.
        micro_batch: samples of one forward.
        precision: of the activations.
        num_classes: size of the head.
        kwargs: keyword arguments of ``timm.create_model``.
        module: the model on the meta device, if it is already built.
    """
    shape = vit_shape(name, kwargs)
    if shape is not None:
        return vit_activation_bytes(shape, resolution, micro_batch=micro_batch, precision=precision)
    module = module if module is not None else build_meta(name, num_classes=num_classes, kwargs=kwargs)
    values = module_activation_values(module, resolution, channels=(kwargs or {}).get("in_chans", 3))
    return values * micro_batch * PRECISION_BYTES[precision]
