"""Elastic normalisation: the leading channels of batch, layer and one-group normalisation.

Running statistics of batch normalisation are written in place into the leading part, so all sub-networks share them and
they describe none: they must be estimated anew (reset, cumulative average) before a sub-network is evaluated.
Training uses the statistics of the batch and is not affected.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ModelError
from .layers import Elastic, cut, leading, shell

NORMS = ("ln", "gn1")


class _ElasticBatchNorm(Elastic, nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of the leading channels: ``forward(x [B, C, ...])``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the channels of `x` are the leading ones."""
        channels = x.shape[1]
        if self.weight is not None and channels > self.num_features:
            raise ModelError(f"{channels} channels; this normalisation has {self.num_features}")
        average = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                average = 1.0 / float(self.num_batches_tracked)
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(
            x,
            None if mean is None else mean[:channels],
            None if variance is None else variance[:channels],
            None if self.weight is None else self.weight[:channels],
            None if self.bias is None else self.bias[:channels],
            self.training or mean is None,
            average,
            self.eps,
        )

    def extract(self, channels: int) -> nn.Module:
        """The plain layer of the leading channels, with their running statistics."""
        new = shell(self)
        new.num_features = channels
        for name, parameter in self._parameters.items():
            new.register_parameter(name, None if parameter is None else cut(leading(parameter, 0, channels), parameter))
        for name, buffer in self._buffers.items():
            new.register_buffer(
                name, buffer if buffer is None else (buffer[:channels] if buffer.ndim else buffer).clone()
            )
        return new


class ElasticBatchNorm1d(_ElasticBatchNorm):
    """Of rows [N, C]."""

    plain_class = nn.BatchNorm1d


class ElasticBatchNorm2d(_ElasticBatchNorm):
    """Of maps [B, C, H, W]."""

    plain_class = nn.BatchNorm2d


class ElasticLayerNorm(Elastic, nn.LayerNorm):
    """Layer normalisation of each token: ``forward(x [..., C])``."""

    plain_class = nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the channels of `x` are the leading ones."""
        channels = x.shape[-1]
        weight = None if self.weight is None else leading(self.weight, 0, channels)
        bias = None if self.bias is None else leading(self.bias, 0, channels)
        return F.layer_norm(x, (channels,), weight, bias, self.eps)

    def extract(self, channels: int) -> nn.Module:
        """The plain layer of the leading channels."""
        new = shell(self)
        new.normalized_shape = (channels,)
        for name, parameter in self._parameters.items():
            new.register_parameter(name, None if parameter is None else cut(leading(parameter, 0, channels), parameter))
        return new


class TokenGroupNorm(nn.GroupNorm):
    """Normalisation over tokens and channels of an image together, scaled by channel: ``forward(x [B, N, C])``."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(1, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return _over_tokens(x, self.weight, self.bias, self.eps)


class ElasticTokenGroupNorm(Elastic, TokenGroupNorm):
    """`TokenGroupNorm` of the leading channels."""

    plain_class = TokenGroupNorm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the channels of `x` are the leading ones."""
        channels = x.shape[-1]
        return _over_tokens(x, leading(self.weight, 0, channels), leading(self.bias, 0, channels), self.eps)

    def extract(self, channels: int) -> nn.Module:
        """The plain layer of the leading channels."""
        new = shell(self)
        new.num_channels = channels
        for name, parameter in self._parameters.items():
            new.register_parameter(name, cut(leading(parameter, 0, channels), parameter))
        return new


def _over_tokens(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=eps) * weight + bias


def token_norm(kind: str, channels: int) -> nn.Module:
    """Elastic normalisation of tokens [B, N, C].

    Args:
        kind: "ln", layer normalisation of each token, or "gn1", over tokens and channels together (the published
            ElasticViT's).
        channels: of the largest sub-network.

    Raises:
        ModelError: another kind.
    """
    if kind not in NORMS:
        raise ModelError(f'unknown normalisation "{kind}"; allowed: {", ".join(NORMS)}')
    return ElasticLayerNorm(channels) if kind == "ln" else ElasticTokenGroupNorm(channels)
