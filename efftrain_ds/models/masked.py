"""Linear and convolution layers whose weight is masked, in place: same parameters, same names, another class.

The forward pass uses W * M. The backward pass uses W * M for the gradient of the input and hands autograd the masked
gradient of the weight, so what the optimizer, the gradient norm and the clipping see is zero outside the mask. The
dense gradient, which rules that grow entries need, leaves through a side channel: a zero-sized stand-in (an expanded
scalar) that autograd gives the dense gradient in fp32. It exists only while `capture` is on.

The mask is a boolean buffer beside the weight (``blocks.0.attn.qkv.weight_mask``): it is in the state dict, in
checkpoints, in deep copies and in the blueprint of a partition rebuild, and it is changed in place, so compiled code
is not compiled again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.ranks import world_size
from ..zero.access import full_shape

MASK = "weight_mask"
GRADIENTS = ("masked", "dense")


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _inside(values: Tensor, mask: Tensor) -> Tensor:
    """The values inside the mask, exact zeros outside; a product would make NaN of an inf outside."""
    if values.is_cpu:  # torch.where takes 5 to 20 times as long there
        kind = _BITS[values.element_size()]
        return (values.view(kind) & mask.to(kind).neg_()).view(values.dtype)
    return torch.where(mask, values, 0.0)


def _sparse(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return _inside(weight, mask).to(dtype)


class _LinearFunction(torch.autograd.Function):
    """Saves the parameter itself instead of W * M, so ZeRO-3 can release the gathered weight after the forward pass."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, probe: Tensor | None, masked: bool, kind: Any
    ) -> Tensor:
        return F.linear(x, _sparse(weight, mask, kind), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, mask, _, masked, kind = inputs
        ctx.save_for_backward(x, weight, mask)
        ctx.masked, ctx.kind = masked, kind

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, mask = ctx.saved_tensors
        for_x = for_weight = for_bias = for_probe = None
        if ctx.needs_input_grad[0]:
            for_x = grad @ _sparse(weight, mask, ctx.kind)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            dense = rows.t() @ x.reshape(-1, x.shape[-1])
            for_weight, for_probe = _split(dense, mask, weight.dtype, ctx.masked, ctx.needs_input_grad[4])
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias, None, for_probe, None, None


class _WeightFunction(torch.autograd.Function):
    """W * M for layers that compute with it themselves."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, probe: Tensor | None, masked: bool) -> Tensor:
        return _sparse(weight, mask, weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.masked = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (mask,) = ctx.saved_tensors
        for_weight, for_probe = _split(grad, mask, grad.dtype, ctx.masked, ctx.needs_input_grad[2])
        return for_weight, None, for_probe, None


def _split(dense: Tensor, mask: Tensor, dtype: torch.dtype, masked: bool, captured: bool) -> tuple[Tensor, Any]:
    """Gradient for the weight and, where it is captured, the dense one in fp32; they never share memory."""
    for_weight = (_inside(dense, mask) if masked else dense).to(dtype)
    return for_weight, dense.to(torch.float32, copy=not masked) if captured else None


class _Masked(nn.Module):
    """What masked layers share. Made by `mask_layers`, not by a constructor."""

    weight_mask: Tensor
    mask_gradient: str
    probe: Tensor | None

    def set_capture(self, on: bool) -> None:
        """Begin anew, or end, the collection of the dense gradient."""
        # an expanded scalar has the weight's shape and no memory of its own; its .grad is a full fp32 tensor
        zero = torch.zeros((), dtype=torch.float32, device=self.weight_mask.device)
        self.probe = zero.expand(self.weight_mask.shape).requires_grad_() if on else None


class MaskedLinear(_Masked, nn.Linear):
    """`nn.Linear` with W * M."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        bias, kind = self.bias, self.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x = x.to(kind)
            bias = None if bias is None else bias.to(kind)
        if not torch.is_grad_enabled():
            return F.linear(x, (self.weight * self.weight_mask).to(kind), bias)  # exporters know the product
        masked = self.mask_gradient == "masked"
        return _LinearFunction.apply(x, self.weight, bias, self.weight_mask, self.probe, masked, kind)


class MaskedConv2d(_Masked, nn.Conv2d):
    """`nn.Conv2d` with W * M (autograd keeps one copy of W * M from the forward to the backward pass)."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W']."""
        if not torch.is_grad_enabled():
            return self._conv_forward(x, self.weight * self.weight_mask, self.bias)
        masked = self.mask_gradient == "masked"
        weight = _WeightFunction.apply(self.weight, self.weight_mask, self.probe, masked)
        return self._conv_forward(x, weight, self.bias)


_FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}


@cache
def _adapted(kind: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """The masked class for `plain` or one derived from it that keeps its forward (that one cannot be pickled)."""
    form = _FORMS[plain]
    if kind is plain:
        return form
    return type(f"Masked{kind.__name__}", (form, kind), {"__module__": kind.__module__, "plain_class": kind})


def mask_layers(model: nn.Module, masks: Mapping[str, Tensor], gradient: str = "masked") -> list[str]:
    """Mask weights of linear and 2-D convolution layers, in place; every layer is checked before the first changes.

    The weights themselves are not touched: write zeros outside the mask before the optimizer copies them
    (``weight.mul_(mask)``), or with `zero.masks.ShardedMasks.apply` afterwards. May be called again, for other layers
    or to give masked ones another mask or mode.

    Args:
        model: may be a blueprint (parameters on the meta device) and may be partitioned by ZeRO-3.
        masks: bool, in the full shape of the weight, by parameter name; copied. The same on all ranks.
        gradient: "masked" hides the gradient outside the mask from the optimizer; "dense" does not, so that moments
            outside the mask follow the dense gradient (then write the zeros again after every step).

    Returns:
        Names of all masked weights, in the order of the model's parameters.

    Raises:
        ModelError: naming the parameter, where it is not there, has another shape, is shared, or is not the weight of a
            layer that can be masked.
        ValueError: unknown `gradient`.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f'gradient = "{gradient}"; allowed: {", ".join(GRADIENTS)}')
    modules = dict(model.named_modules())
    uses: dict[int, list[str]] = {}
    for owner, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append(f"{owner}.{key}" if owner else key)
    plain = {name: _check(model, modules, uses, name, mask) for name, mask in masks.items()}
    for name, mask in masks.items():
        module = modules[name.rpartition(".")[0]]
        if isinstance(module, _Masked):
            module.weight_mask.copy_(mask)
        else:
            module.__class__ = _adapted(type(module), plain[name])
            device = mask.device if module.weight.device.type == "meta" else module.weight.device
            module.register_buffer(MASK, mask.detach().to(device=device, dtype=torch.bool, copy=True).contiguous())
            module.probe = None
        module.mask_gradient = gradient
    return list(masked_layers(model))


def _check(
    model: nn.Module, modules: Mapping[str, nn.Module], uses: Mapping[int, list[str]], name: str, mask: Tensor
) -> type[nn.Module]:
    """The plain class of the layer.

    Raises:
        ModelError: it cannot be masked.
    """
    owner, _, key = name.rpartition(".")
    module = modules.get(owner)
    parameter = module._parameters.get(key) if module is not None else None
    if module is None or parameter is None:
        raise ModelError(f'masks: {type(model).__name__} has no parameter "{name}"')
    if isinstance(module, _Masked):
        kind = next(p for p, form in _FORMS.items() if isinstance(module, form))
    else:
        kind = next((p for p in _FORMS if isinstance(module, p) and type(module).forward is p.forward), None)
    if kind is None or key != "weight" or isinstance(modules.get(owner.rpartition(".")[0]), nn.MultiheadAttention):
        # MultiheadAttention reads the weights of its layers without calling them
        raise ModelError(
            f"masks: {name} belongs to {type(module).__name__}, which cannot be masked; allowed: weights of nn.Linear "
            "and nn.Conv2d (and of classes derived from them that keep their forward) outside nn.MultiheadAttention"
        )
    if len(uses[id(parameter)]) > 1:
        raise ModelError(f"masks: {name} is shared by {', '.join(uses[id(parameter)])}; shared weights stay dense")
    if mask.shape != full_shape(parameter):
        raise ModelError(f"masks: {name} has shape {list(full_shape(parameter))}, its mask {list(mask.shape)}")
    return kind


def unmask_layers(model: nn.Module) -> list[str]:
    """Turn masked layers back into plain ones; the weights are not touched. Returns the names of their weights."""
    found = masked_layers(model)
    for module in found.values():
        form = next(p for p, form in _FORMS.items() if isinstance(module, form))
        module.__class__ = getattr(type(module), "plain_class", form)
        del module._buffers[MASK], module.probe, module.mask_gradient
    return list(found)


def masked_layers(model: nn.Module) -> dict[str, Any]:
    """Masked layers by the name of their weight, in the order of the model's modules (equal on all ranks)."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, _Masked))
    return {f"{name}.weight" if name else "weight": module for name, module in found}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks themselves (not copies) by parameter name."""
    return {name: module.weight_mask for name, module in masked_layers(model).items()}


@torch.no_grad()
def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Change masks in place; compiled code goes on. Layers that are not named keep theirs.

    Raises:
        ModelError: a name that is not a masked weight, or another shape.
    """
    layers = masked_layers(model)
    for name, mask in masks.items():
        if name not in layers or layers[name].weight_mask.shape != mask.shape:
            raise ModelError(f"set_masks: {name} {list(mask.shape)} is not a masked weight of {type(model).__name__}")
    for name, mask in masks.items():
        layers[name].weight_mask.copy_(mask)


def capture(model: nn.Module, on: bool) -> None:
    """Begin (with empty sums) or end the collection of dense gradients in all masked layers.

    Turn it on before the first micro-batch of a step and off when the gradients were read; compiled code is compiled
    once for each of the two.
    """
    for module in masked_layers(model).values():
        module.set_capture(on)


@torch.no_grad()
def dense_gradients(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Mean over the ranks of what was captured since `capture`, in fp32. Collective: one all-reduce a layer.

    Call after the last backward pass of a step and before ``engine.step()``. The engine has divided the loss by the
    accumulation count already, so the result is the gradient of the mean loss of the global batch. It may hold inf or
    NaN where the loss scale was too high.

    Args:
        model: the module, with `capture` on.
        scale: factor on the loss in the backward pass (`zero.skip.loss_scale`).

    Returns:
        By parameter name; zeros for a layer that took no part. The tensors are the collected sums themselves: a second
        call without `capture` between returns nonsense.

    Raises:
        ModelError: `capture` is off.
    """
    found: dict[str, Tensor] = {}
    for name, module in masked_layers(model).items():
        if module.probe is None:
            raise ModelError(f"dense_gradients: {name} is not captured; call capture(model, True) before the step")
        gradient = module.probe.grad
        if gradient is None:
            gradient = torch.zeros(module.weight_mask.shape, dtype=torch.float32, device=module.weight_mask.device)
        if world_size() > 1:
            dist.all_reduce(gradient)
        found[name] = gradient.mul_(1.0 / (scale * world_size()))
    return found
