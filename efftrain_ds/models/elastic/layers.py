"""Elastic layers: parameters with named axes, of which a sub-network uses the leading part.

Every layer has the shape of the largest sub-network and is told, with the call, how much of each axis to use; what the
input already says (its channels) is not repeated. The slice is taken inside the layer's own forward pass with autograd
on: under ZeRO-3 a weight is only there then, and nothing is kept between calls, so several sub-networks may run before
one backward pass, and a recomputed forward pass sees the sub-network of its own call.

An axis can be nested, e.g. (head, head_dim): then each part is cut by itself, so that a row keeps its head when the
number of heads or their size changes. `extract` gives the plain layer of a sub-network with copied values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ModelError

Axes = tuple[int, ...]
"""Sizes of the parts of a nested axis, from the outside in, e.g. (heads, head_dim)."""

_OWN = frozenset({"plain_class", "in_axes", "axes", "heads", "head_dim", "v_dim", "mixed"})
_INTERNAL = frozenset(nn.Module().__dict__)


class Elastic:
    """Marks the layers that take sizes with the call.

    Attributes:
        plain_class: what `extract` gives.
    """

    plain_class: type[nn.Module]


def call(layer: nn.Module, x: Tensor, *sizes: Any) -> Tensor:
    """Run a layer with sizes if it is elastic; the plain layer of an extracted network has no choice."""
    return layer(x, *sizes) if isinstance(layer, Elastic) else layer(x)


def leading(value: Tensor, dim: int, part: int | Axes, whole: Axes | None = None) -> Tensor:
    """The leading part of one axis; the tensor itself where all of it is asked.

    Args:
        value: any tensor.
        dim: the axis, counted from the front.
        part: entries to keep; of a nested axis the entries of each of its parts.
        whole: sizes of the parts of a nested axis.

    Raises:
        ModelError: more is asked than there is.
    """
    wanted = part if isinstance(part, tuple) else (part,)
    have = whole if isinstance(part, tuple) and whole is not None else (value.shape[dim],)
    if len(wanted) != len(have) or any(not 0 < w <= h for w, h in zip(wanted, have, strict=False)):
        raise ModelError(f"an axis of {list(have)} has no leading part {list(wanted)}")
    if wanted == tuple(have):
        return value
    if len(have) == 1:
        return value.narrow(dim, 0, wanted[0])
    value = value.unflatten(dim, have)
    for offset, size in enumerate(wanted):
        value = value.narrow(dim + offset, 0, size)
    return value.flatten(dim, dim + len(have) - 1)


def shell(module: nn.Module, cls: type[nn.Module] | None = None) -> Any:
    """A module with the settings of another one, but without its parameters, buffers, children and hooks.

    Args:
        module: where the settings come from.
        cls: class of the new module; None takes the plain class of an elastic layer, otherwise the same class.
    """
    cls = cls or getattr(module, "plain_class", None) or type(module)
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    own = _OWN if isinstance(module, Elastic) else {"plain_class"}
    for key, value in module.__dict__.items():
        if key not in _INTERNAL and key not in own and not key.startswith(("ds_", "_ds")):
            new.__dict__[key] = value
    new.training = module.training
    return new


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters no sub-network cuts (activation, dropout, classifier, ...)."""
    new = shell(module)
    for name, parameter in module._parameters.items():
        new.register_parameter(name, None if parameter is None else cut(parameter, parameter))
    for name, buffer in module._buffers.items():
        new.register_buffer(name, None if buffer is None else buffer.clone(), name not in _volatile(module))
    for name, child in module.named_children():
        new.add_module(name, plain_copy(child))
    return new


def cut(value: Tensor, parameter: Tensor) -> nn.Parameter:
    """A parameter of its own with the values of a slice, trainable if `parameter` is."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), parameter.requires_grad)


def become(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Make a plain layer elastic in place: parameters, their names and hooks stay. Returns it."""
    module.plain_class = type(module)
    module.__class__ = cls
    return module


def _linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain linear layer with copies of these parts of `layer`."""
    new = shell(layer)
    new.out_features, new.in_features = weight.shape
    new.weight = cut(weight, layer.weight)
    new.register_parameter("bias", None if bias is None else cut(bias, layer.bias))
    return new


def _volatile(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


class ElasticLinear(Elastic, nn.Linear):
    """Linear layer; axes of the weight: out, in. ``forward(x [..., in], out, axes) -> [..., out]``.

    Attributes:
        in_axes: parts of a nested input axis, e.g. (heads, head_dim); None for a simple one.
    """

    plain_class = nn.Linear
    in_axes: Axes | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, in_axes: Axes | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        self.in_axes = in_axes

    def _parts(self, inputs: int, out: int | None, axes: Axes | None) -> tuple[Tensor, Tensor | None]:
        out = out or self.out_features
        weight = leading(leading(self.weight, 0, out), 1, axes or inputs, self.in_axes)
        return weight, None if self.bias is None else leading(self.bias, 0, out)

    def forward(self, x: Tensor, out: int | None = None, axes: Axes | None = None) -> Tensor:
        """Apply the leading part.

        Args:
            x: [..., in]; its size says how much of the input axis is used.
            out: outputs; None for all.
            axes: parts of the input axis in use, where it is nested; their product is ``x.shape[-1]``.
        """
        return F.linear(x, *self._parts(x.shape[-1], out, axes))

    def extract(self, inputs: int, out: int, axes: Axes | None = None) -> nn.Module:
        """The plain layer of the leading part."""
        return _linear(self, *self._parts(inputs, out, axes))


class ElasticQKV(Elastic, nn.Linear):
    """Projection to queries, keys and values of all heads; axes of the weight: role, head, head_dim, in.

    The rows are stored as [Q | K | V], each by heads. The output has the same order with the heads in use. A row feeds
    the same entry of the same head of the same role in every sub-network.

    Attributes:
        heads: most heads.
        head_dim: size of queries and keys of a head.
        v_dim: most values of a head.
        mixed: the published code's way instead: the leading rows of each role are joined and then dealt out to the
            heads anew, so what a row feeds depends on the sizes. Only for weights trained that way.
    """

    plain_class = nn.Linear
    mixed: bool = False

    def __init__(
        self,
        in_features: int,
        heads: int,
        head_dim: int,
        v_dim: int | None = None,
        bias: bool = True,
        mixed: bool = False,
    ) -> None:
        v_dim = v_dim or head_dim
        super().__init__(in_features, heads * (2 * head_dim + v_dim), bias)
        self.heads, self.head_dim, self.v_dim, self.mixed = heads, head_dim, v_dim, mixed

    def _rows(self, value: Tensor, heads: int, v_dim: int) -> Tensor:
        """Rows [Q | K | V] in use of the weight or the bias."""
        if not self.mixed and (heads, v_dim) == (self.heads, self.v_dim):
            return value
        most, size = self.heads * self.head_dim, heads * self.head_dim
        values = value[2 * most :]
        if not self.mixed:
            values = leading(values, 0, (heads, v_dim), (self.heads, self.v_dim))
            return torch.cat([value[:size], value[most : most + size], values])
        rows = torch.cat([value[:size], value[most : most + size], values[: heads * v_dim]])
        rows = rows.unflatten(0, (heads, 2 * self.head_dim + v_dim))
        return torch.cat([part.flatten(0, 1) for part in rows.split([self.head_dim, self.head_dim, v_dim], 1)])

    def _parts(self, inputs: int, heads: int | None, v_dim: int | None) -> tuple[Tensor, Tensor | None]:
        heads, v_dim = heads or self.heads, v_dim or self.v_dim
        if heads > self.heads or v_dim > self.v_dim:
            raise ModelError(f"{heads} heads of {v_dim} values; this layer has {self.heads} of {self.v_dim}")
        weight = self._rows(leading(self.weight, 1, inputs), heads, v_dim)
        return weight, None if self.bias is None else self._rows(self.bias, heads, v_dim)

    def forward(self, x: Tensor, heads: int | None = None, v_dim: int | None = None) -> Tensor:
        """Project.

        Args:
            x: [..., in].
            heads: heads in use; None for all.
            v_dim: values of a head in use; None for all.

        Returns:
            [..., heads * (2 * head_dim + v_dim)], in the order [Q | K | V].

        Raises:
            ModelError: more heads, values or inputs than there are.
        """
        return F.linear(x, *self._parts(x.shape[-1], heads, v_dim))

    def extract(self, inputs: int, heads: int, v_dim: int | None = None) -> nn.Module:
        """The plain layer of the leading part; its rows are ordered by role also where `mixed`."""
        return _linear(self, *self._parts(inputs, heads, v_dim))


class ElasticConv2d(Elastic, nn.Conv2d):
    """Convolution, dense or depthwise; axes of the weight: out, in / group, and a kernel whose centre is used.

    Padding follows the kernel in use, ``(kernel - 1) / 2``, and the number of groups of a depthwise one its channels;
    a layer made of another convolution with one fixed kernel (`become`) keeps that one's padding.

    Attributes:
        axes: parts of the nested channel axis of a depthwise convolution, e.g. (heads, values of a head).
    """

    plain_class = nn.Conv2d
    axes: Axes | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
        axes: Axes | None = None,
    ) -> None:
        groups = in_channels if depthwise else 1
        super().__init__(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=bias)
        self.axes = axes

    def _parts(
        self, inputs: int, out: int | Axes | None, kernel: int | None
    ) -> tuple[Tensor, Tensor | None, tuple[int, int], int]:
        """(weight, bias, padding, groups) in use.

        Raises:
            ModelError: more is asked than there is, or a kernel whose centre is not that of the stored one.
        """
        if self.groups == 1:
            out, groups = out or self.out_channels, 1
            weight = leading(leading(self.weight, 0, out), 1, inputs)
        elif self.groups == self.in_channels == self.out_channels:
            out, groups = (out if isinstance(out, tuple) else inputs), inputs
            weight = leading(self.weight, 0, out, self.axes)
        else:
            raise ModelError(f"a convolution with {self.groups} groups cannot be cut; allowed: dense or depthwise")
        bias = None if self.bias is None else leading(self.bias, 0, out, self.axes)
        padding = self.padding
        stored = self.kernel_size[0]
        if kernel is not None and kernel != stored:
            rest = stored - kernel
            if rest < 0 or rest % 2:
                raise ModelError(f"no {kernel} x {kernel} kernel at the centre of a {stored} x {stored} one")
            weight = weight[:, :, rest // 2 : rest // 2 + kernel, rest // 2 : rest // 2 + kernel]
            padding = (padding[0] - rest // 2, padding[1] - rest // 2)
        return weight, bias, padding, groups

    def forward(self, x: Tensor, out: int | Axes | None = None, kernel: int | None = None) -> Tensor:
        """Convolve.

        Args:
            x: [B, in, H, W].
            out: channels of the result, None for all. A depthwise one has those of `x`; where its axis is nested, give
                the parts in use.
            kernel: side of the kernel; None for the stored one.
        """
        weight, bias, padding, groups = self._parts(x.shape[1], out, kernel)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def extract(self, inputs: int, out: int | Axes | None = None, kernel: int | None = None) -> nn.Module:
        """The plain layer of the leading part."""
        new = shell(self)
        weight, bias, new.padding, new.groups = self._parts(inputs, out, kernel)
        new.out_channels, new.in_channels, new.kernel_size = weight.shape[0], inputs, tuple(weight.shape[2:])
        new._reversed_padding_repeated_twice = [p for p in reversed(new.padding) for _ in range(2)]
        new.weight = cut(weight, self.weight)
        new.register_parameter("bias", None if bias is None else cut(bias, self.bias))
        return new


class ElasticPos(nn.Module):
    """Relative position bias of an attention layer; axes of the table: offset (centre), head (leading).

    A smaller map uses the same entries for the same offsets. ``forward(side, heads) -> [1, heads, N, N]``, N = side^2.
    The same class, of the right size, serves an extracted network.

    Attributes:
        weight: table [(2 * side - 1)^2, heads].
        side: of the largest map, in tokens.
    """

    index: Tensor

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        self.register_buffer("index", _offsets(side), persistent=False)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, side: int | None = None, heads: int | None = None) -> Tensor:
        """Bias of every pair of positions.

        Args:
            side: of the map, in tokens; None for the largest.
            heads: heads in use; None for all.

        Raises:
            ModelError: a larger map, or more heads.
        """
        side, heads = side or self.side, heads or self.weight.shape[1]
        index = self.index
        if side != self.side:
            if side > self.side:
                raise ModelError(
                    f"a map of {side} x {side} tokens; the position table is for {self.side} x {self.side}"
                )
            index = index.view(self.side, self.side, self.side, self.side)[:side, :side, :side, :side]
        table = leading(self.weight, 1, heads)
        return table[index.reshape(-1)].view(side * side, side * side, heads).permute(2, 0, 1).unsqueeze(0)

    def extract(self, side: int, heads: int) -> ElasticPos:
        """The table of a smaller map and fewer heads."""
        new = shell(self)
        new.side = side
        whole, edge = 2 * self.side - 1, self.side - side
        table = self.weight.unflatten(0, (whole, whole))[edge : whole - edge, edge : whole - edge, :heads]
        new.weight = cut(table.flatten(0, 1), self.weight)
        new.register_buffer("index", _offsets(side).to(self.index.device), persistent=False)
        return new


def _offsets(side: int) -> Tensor:
    """Row of the table for each pair of positions [N, N]; always real, also in a model built without weights."""
    with torch.device("cpu"):
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        y, x = y.flatten(), x.flatten()
        return (y[:, None] - y + side - 1) * (2 * side - 1) + (x[:, None] - x + side - 1)
