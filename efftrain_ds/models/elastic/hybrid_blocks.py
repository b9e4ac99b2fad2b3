"""Blocks of ElasticViT. The same classes serve the supernet (elastic layers inside, sizes come with the call) and an
extracted network (plain layers inside, no sizes).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    ElasticConv2d,
    ElasticLinear,
    ElasticPos,
    ElasticQKV,
    call,
    plain_copy,
    shell,
)
from .norms import ElasticBatchNorm2d, token_norm

SE_DIVISOR = 4


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and, where `active`, hard-swish."""

    def __init__(self, conv: nn.Module, active: bool) -> None:
        super().__init__()
        self.conv = conv
        self.norm = ElasticBatchNorm2d(conv.out_channels)
        self.active = active

    def forward(self, x: Tensor, out: int | None = None, kernel: int | None = None) -> Tensor:
        """Maps [B, C, H, W] to `out` channels with the centre of the kernel; None for all there is."""
        x = self.norm(call(self.conv, x, out, kernel))
        return F.hardswish(x) if self.active else x

    def extract(self, inputs: int, out: int, kernel: int | None = None) -> ConvNorm:
        """The same with plain layers."""
        new = shell(self)
        new.conv = self.conv.extract(inputs, out, kernel)
        new.norm = self.norm.extract(out)
        return new


class SqueezeExcite(nn.Module):
    """Channels scaled by a hard-sigmoid of the map's mean; the inner width is a quarter of the one in use, floored."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // SE_DIVISOR
        self.reduce = ElasticConv2d(channels, inner, 1, bias=True)
        self.expand = ElasticConv2d(inner, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of maps [B, C, H, W]."""
        channels = x.shape[1]
        gate = F.relu(call(self.reduce, x.mean((2, 3), keepdim=True), channels // SE_DIVISOR))
        return x * F.hardsigmoid(call(self.expand, gate, channels))

    def extract(self, channels: int) -> SqueezeExcite:
        """The same with plain layers."""
        new = shell(self)
        new.reduce = self.reduce.extract(channels, channels // SE_DIVISOR)
        new.expand = self.expand.extract(channels // SE_DIVISOR, channels)
        return new


class InvertedResidual(nn.Module):
    """Expanding 1 x 1, depthwise and projecting 1 x 1 convolution, with a shortcut (MobileNet v2 and v3).

    The inner width is the input's times the expansion in use. The shortcut averages 2 x 2 pixels with stride 2 (an odd
    side is padded with zeros that count) and changes the width with a 1 x 1 convolution where it must.

    Args:
        inputs: most channels of the input.
        outputs: most channels of the result.
        expand: largest expansion.
        kernel: largest kernel.
        stride: 1 or 2.
        se: squeeze-and-excitation.
        expands: False leaves the expanding convolution out.
        same: input and output always have the same width, so there is no convolution on the shortcut.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expand: int,
        kernel: int,
        stride: int,
        *,
        se: bool,
        expands: bool = True,
        same: bool = False,
    ) -> None:
        super().__init__()
        inner = inputs * expand
        self.factor, self.stride = expand, stride
        self.expand = ConvNorm(ElasticConv2d(inputs, inner, 1), True) if expands else None
        self.depthwise = ConvNorm(ElasticConv2d(inner, inner, kernel, stride, depthwise=True), True)
        self.se = SqueezeExcite(inner) if se else None
        self.project = ConvNorm(ElasticConv2d(inner, outputs, 1), False)
        self.shortcut = None if same else ElasticConv2d(inputs, outputs, 1, bias=True)
        if stride == 1:
            nn.init.zeros_(self.project.norm.weight)

    def forward(
        self, x: Tensor, out: int | None = None, expand: int | None = None, kernel: int | None = None
    ) -> Tensor:
        """Maps [B, C, H, W] to [B, out, ceil(H / stride), ceil(W / stride)]; None for all there is."""
        y = x if self.expand is None else self.expand(x, x.shape[1] * (expand or self.factor))
        y = self.depthwise(y, None, kernel)
        y = y if self.se is None else self.se(y)
        y = self.project(y, out)
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, 2, (x.shape[2] % 2, x.shape[3] % 2))
        if self.shortcut is not None and x.shape[1] != y.shape[1]:
            x = call(self.shortcut, x, out)
        return x + y

    def extract(self, inputs: int, out: int, expand: int | None = None, kernel: int | None = None) -> InvertedResidual:
        """The same with plain layers."""
        new = shell(self)
        new.factor = expand or self.factor
        inner = inputs * new.factor
        new.expand = None if self.expand is None else self.expand.extract(inputs, inner)
        new.depthwise = self.depthwise.extract(inner, inner, kernel)
        new.se = None if self.se is None else self.se.extract(inner)
        new.project = self.project.extract(inner, out)
        new.shortcut = None if inputs == out else self.shortcut.extract(inputs, out)
        return new


class HybridAttention(nn.Module):
    """Attention whose values pass a depthwise 3 x 3 convolution, with a bias by relative position.

    The values are `v_scale` times as wide as the queries. The result passes hard-swish before the projection.

    Args:
        width: most channels.
        head_dim: size of queries and keys of a head.
        v_scale: largest width of the values by that of the queries.
        side: of the largest map, in tokens.
        compat: the published code's layout of the weights (see `layers.ElasticQKV`).
        fused_attn: use torch's fused attention.
    """

    def __init__(self, width: int, head_dim: int, v_scale: int, side: int, *, compat: bool, fused_attn: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.v_dim = width // head_dim, head_dim, v_scale * head_dim
        self.compat, self.fused_attn = compat, fused_attn
        values = self.heads * self.v_dim
        axes = None if compat else (self.heads, self.v_dim)
        self.qkv = ElasticQKV(width, self.heads, head_dim, self.v_dim, bias=False, mixed=compat)
        self.local = ElasticConv2d(values, values, 3, depthwise=True, axes=axes)
        self.position = ElasticPos(side, self.heads)
        self.proj = ElasticLinear(values, width, in_axes=axes)

    def forward(self, x: Tensor, side: int, v_scale: int | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens [B, N, C] of a square map; C says how many heads are in use.
            side: of the map, in tokens.
            v_scale: width of the values by that of the queries; None for the largest.
        """
        batch, count, width = x.shape
        heads, v_dim = width // self.head_dim, v_scale * self.head_dim if v_scale else self.v_dim
        axes = None if self.compat else (heads, v_dim)
        qkv = call(self.qkv, x, heads, v_dim)
        q, k, v = qkv.split([width, width, heads * v_dim], -1)
        v = call(self.local, v.transpose(1, 2).reshape(batch, heads * v_dim, side, side), axes)
        v = v.reshape(batch, heads, v_dim, count).transpose(2, 3)
        q, k = (part.view(batch, count, heads, self.head_dim).transpose(1, 2) for part in (q, k))
        bias = self.position(side, heads).to(q.dtype)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.head_dim**-0.5)
        else:
            y = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        y = F.hardswish(y.transpose(1, 2).reshape(batch, count, heads * v_dim))
        return call(self.proj, y, width, axes)

    def extract(self, width: int, side: int, v_scale: int) -> HybridAttention:
        """The same with plain layers; rows are ordered by role also where this one is `compat`."""
        new = shell(self)
        new.heads, new.v_dim, new.compat = width // self.head_dim, v_scale * self.head_dim, False
        axes = None if self.compat else (new.heads, new.v_dim)
        values = new.heads * new.v_dim
        new.qkv = self.qkv.extract(width, new.heads, new.v_dim)
        new.local = self.local.extract(values, axes)
        new.position = self.position.extract(side, new.heads)
        new.proj = self.proj.extract(values, width, axes)
        return new


class HybridLayer(nn.Module):
    """Transformer layer: attention, then MLP with hard-swish, each behind a normalisation and with a shortcut.

    Args:
        width: most channels.
        mlp: largest hidden width of the MLP by the channels.
        norm: kind of normalisation (`norms.token_norm`).
        attention: of this width.
    """

    def __init__(self, width: int, mlp: int, norm: str, attention: HybridAttention) -> None:
        super().__init__()
        self.norm1 = token_norm(norm, width)
        self.attn = attention
        self.norm2 = token_norm(norm, width)
        self.ratio = mlp
        self.fc1 = ElasticLinear(width, mlp * width)
        self.fc2 = ElasticLinear(mlp * width, width)

    def forward(self, x: Tensor, side: int, mlp: int | None = None, v_scale: int | None = None) -> Tensor:
        """Tokens [B, N, C] of a square map to the same; None for the largest ratios."""
        width = x.shape[-1]
        x = x + self.attn(self.norm1(x), side, v_scale)
        y = F.hardswish(call(self.fc1, self.norm2(x), width * (mlp or self.ratio)))
        return x + call(self.fc2, y, width)

    def extract(self, width: int, side: int, mlp: int, v_scale: int) -> HybridLayer:
        """The same with plain layers."""
        new = shell(self)
        new.ratio = mlp
        new.norm1, new.norm2 = self.norm1.extract(width), self.norm2.extract(width)
        new.attn = self.attn.extract(width, side, v_scale)
        new.fc1 = self.fc1.extract(width, mlp * width)
        new.fc2 = self.fc2.extract(mlp * width, width)
        return new


class HybridHead(nn.Module):
    """Widening linear layer with batch normalisation on tokens, mean, second linear layer, classifier.

    Args:
        width: most channels.
        expand: widening of the first layer.
        features: inputs of the classifier.
        num_classes: outputs.
        norm: elastic batch normalisation of rows.
    """

    def __init__(self, width: int, expand: int, features: int, num_classes: int, norm: nn.Module) -> None:
        super().__init__()
        self.factor = expand
        self.widen = ElasticLinear(width, expand * width, bias=False)
        self.norm = norm
        self.features = ElasticLinear(expand * width, features)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] to logits [B, classes]."""
        batch, count, width = x.shape
        y = self.norm(call(self.widen, x, self.factor * width).flatten(0, 1))
        y = F.hardswish(y).view(batch, count, -1).mean(1)
        return self.classifier(F.hardswish(call(self.features, y)))

    def extract(self, width: int) -> HybridHead:
        """The same with plain layers."""
        new = shell(self)
        inner = self.factor * width
        new.widen, new.norm = self.widen.extract(width, inner), self.norm.extract(inner)
        new.features = self.features.extract(inner, self.features.out_features)
        new.classifier = plain_copy(self.classifier)
        return new
