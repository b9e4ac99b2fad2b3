"""ElasticViT (arXiv 2303.09730): the supernet of a `HybridSpace`, and the networks that are cut out of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ModelError
from ..stacks import ElasticSequential
from .choice import Choosable
from .hybrid_blocks import ConvNorm, HybridAttention, HybridHead, HybridLayer, InvertedResidual
from .layers import ElasticConv2d, ElasticPos, shell
from .norms import ElasticBatchNorm1d

if TYPE_CHECKING:
    from .hybrid_space import HybridConfig, HybridSpace, StageConfig


class ConvStage(nn.Module):
    """Inverted-residual blocks of one width.

    Args:
        blocks: the largest number of them.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = ElasticSequential(*blocks)

    def forward(self, x: Tensor, stage: StageConfig | None = None) -> Tensor:
        """Maps [B, C, H, W] to those of the next stage; None runs everything at full size."""
        if stage is None:
            return self.blocks(x)
        sizes = (stage.width, stage.expand, stage.kernel)
        return self.blocks(x, range(stage.depth), [sizes] * stage.depth)

    def extract(self, inputs: int, stage: StageConfig, side: int) -> ConvStage:
        """The same with plain layers."""
        new = shell(self)
        widths = [inputs, *[stage.width] * (stage.depth - 1)]
        blocks = list(self.blocks)[: stage.depth]
        new.blocks = ElasticSequential(
            *[b.extract(w, stage.width, stage.expand, stage.kernel) for b, w in zip(blocks, widths, strict=True)]
        )
        return new


class VitStage(nn.Module):
    """An inverted-residual block that changes the width, then transformer layers.

    Args:
        first: the block.
        layers: the largest number of them.
    """

    def __init__(self, first: InvertedResidual, layers: list[nn.Module]) -> None:
        super().__init__()
        self.first = first
        self.layers = ElasticSequential(*layers)

    def forward(self, x: Tensor, stage: StageConfig | None = None) -> Tensor:
        """Maps [B, C, H, W] to those of the next stage; None runs everything at full size."""
        x = self.first(x, None if stage is None else stage.width)
        batch, width, side, other = x.shape
        if side != other:
            raise ModelError(f"a map of {side} x {other}; this network takes square images")
        depth = len(self.layers) if stage is None else stage.depth
        sizes = (side,) if stage is None else (side, stage.mlp, stage.v_scale)
        x = self.layers(x.flatten(2).transpose(1, 2), range(depth), [sizes] * depth)
        return x.transpose(1, 2).reshape(batch, width, side, side)

    def extract(self, inputs: int, stage: StageConfig, side: int) -> VitStage:
        """The same with plain layers."""
        new = shell(self)
        new.first = self.first.extract(inputs, stage.width)
        layers = list(self.layers)[: stage.depth]
        new.layers = ElasticSequential(*[x.extract(stage.width, side, stage.mlp, stage.v_scale) for x in layers])
        return new


class HybridNet(nn.Module):
    """The network behind a sub-network and a supernet: opening convolution, stages, head.

    An extracted one is called as ``net(images)`` and resizes them to its own resolution.

    Attributes:
        resolution: side to which images are resized, in pixels.
        num_classes: outputs of the classifier.
    """

    resolution: int
    num_classes: int
    total_stride = 1
    first: nn.Module
    stages: nn.ModuleList
    head: nn.Module

    def _run(
        self, images: Tensor, resolution: int, stages: tuple[StageConfig | None, ...], width: int | None
    ) -> Tensor:
        if images.shape[-2:] != (resolution, resolution):
            images = F.interpolate(images, (resolution, resolution), mode="bicubic", align_corners=False)
        x = self.first(images, width)
        for module, stage in zip(self.stages, stages, strict=True):
            x = module(x, stage)
        return self.head(x.flatten(2).transpose(1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes]."""
        return self._run(images, self.resolution, (None,) * len(self.stages), None)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass. Running statistics are then updated twice in a step."""
        for module in self.modules():
            if isinstance(module, ElasticSequential):
                module.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names without weight decay in the published training: all convolution parts, and the position tables."""
        convolutions = (ConvNorm, InvertedResidual)
        found = {"first." + name for name, _ in self.first.named_parameters()}
        for name, module in self.named_modules():
            if isinstance(module, convolutions):
                found |= {f"{name}.{inner}" for inner, _ in module.named_parameters()}
            elif isinstance(module, ElasticPos):
                found.add(f"{name}.weight")
        return found

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head.classifier


class ElasticViT(Choosable, HybridNet):
    """The supernet: ``net(images, config)``; without a configuration that of `set_config`, or else the largest.

    Args:
        space: what it contains.
        compat: the published code's mapping of the weights of attention, for weights that were trained with it.
        norm: "ln", or "gn1" as in the published code (see `norms.token_norm`).
        fused_attn: use torch's fused attention.
    """

    def __init__(self, space: HybridSpace, *, compat: bool = False, norm: str = "ln", fused_attn: bool = True) -> None:
        super().__init__()
        self.space, self.compat = space, compat
        self.resolution, self.num_classes = max(space.resolutions), space.num_classes
        inputs = max(space.stages[0].widths)
        self.first = ConvNorm(ElasticConv2d(space.in_chans, inputs, 3, 2), True)
        self.stages = nn.ModuleList()
        for place, spec in enumerate(space.stages):
            width, depth = max(spec.widths), max(spec.depths)
            if spec.is_vit:
                first = InvertedResidual(inputs, width, space.first_expand, 3, spec.stride, se=True)
                side = space.side(self.resolution, place)
                layers = []
                for _ in range(depth):
                    attention = HybridAttention(
                        *(width, space.head_dim, max(spec.v_scale), side), compat=compat, fused_attn=fused_attn
                    )
                    layers.append(HybridLayer(width, max(spec.mlp), norm, attention))
                self.stages.append(VitStage(first, layers))
            else:
                blocks = [
                    InvertedResidual(
                        *(inputs if j == 0 else width, width, max(spec.expand), max(spec.kernels)),
                        spec.stride if j == 0 else 1,
                        se=spec.se,
                        expands=spec.expand != (1,),
                        same=j > 0 or place == 0,
                    )
                    for j in range(depth)
                ]
                self.stages.append(ConvStage(blocks))
            inputs = width
        norm1d = ElasticBatchNorm1d(space.head_expand * inputs)
        self.head = HybridHead(inputs, space.head_expand, space.head_width, space.num_classes, norm1d)
        self.apply(_init)

    def forward(self, images: Tensor, config: HybridConfig | None = None) -> Tensor:
        """Logits of a sub-network.

        Args:
            images: [B, C, H, W]; resized to the resolution of the sub-network.
            config: of the space; None for that of `set_config`.

        Raises:
            ModelError: the sub-network does not fit into this supernet.
        """
        config = self.chosen(config)
        return self._run(images, config.resolution, config.stages, config.stages[0].width)

    def extract(self, config: HybridConfig) -> HybridNet:
        """A sub-network with plain layers and copies of the weights; `HybridSpace.extract` checks first."""
        new: Any = shell(self, HybridNet)
        for key in ("space", "compat", "config"):
            new.__dict__.pop(key, None)
        new.resolution, width = config.resolution, config.stages[0].width
        new.first = self.first.extract(self.space.in_chans, width)
        new.stages = nn.ModuleList()
        for place, (module, stage) in enumerate(zip(self.stages, config.stages, strict=True)):
            new.stages.append(module.extract(width, stage, self.space.side(config.resolution, place)))
            width = stage.width
        new.head = self.head.extract(width)
        return new


def _init(module: nn.Module) -> None:
    """Convolutions as in MobileNet (normal by outputs), linear layers truncated normal of 0.02, biases zero."""
    if isinstance(module, nn.Conv2d):
        outputs = module.kernel_size[0] ** 2 * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
