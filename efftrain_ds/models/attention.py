"""Our attention in timm's Vision Transformers: packed qkv, and block masks that may change while training.

The module keeps its parameters, their names and its place; only its class changes, to one with another `forward`. So
optimizers, ZeRO partitions, compiled checkpoint formats and deep copies see the same model. What is new is a submodule
``block_mask`` where a mask is given: its `keep` (bool, one number a block) is saved and loaded with the model as
``blocks.0.attn.block_mask.keep``; the lists that kernels walk are rebuilt from it.

A rebuild of the engine makes new modules. They hold the masks' present values, but they are other objects, and their
routes are those of the model that was given to ``initialize``: after a rebuild fetch the masks from ``engine.module``
again and call `update_routes`, as after every larger change of what they keep.

A mask is for one number of tokens. Where sequences of several lengths pass (`serve_lengths`), the others get masks that
are made when the first of them arrives; these follow from a pattern, so they are not in the state dict.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, NoEffectWarning
from ..kernels.attention import BlockMask, attention, attention_qkv, route_for
from ..zero.access import full_shape
from .attention_scores import observed

Masks = Mapping[str, BlockMask | None] | Callable[[str, nn.Module], BlockMask | None] | None
MaskOfLength = Callable[[int], BlockMask | None]
"""From a number of tokens to the mask for it, on the host; None where such a sequence attends to everything."""


def use_block_attention(model: nn.Module, masks: Masks = None) -> list[str]:
    """Let every timm ``Attention`` of a model run `kernels.attention`, in place.

    Subclasses that keep timm's `forward` are taken too. Others (rotary, relative-position, differential or windowed
    attention) stay as they are: their products are not the ones of our kernels. May be called again, to change masks
    (another mask object makes compiled code compile again; `BlockMask.update_` does not) or after blocks were added.
    A layer whose mask prunes too little for the kernels to be faster starts on SDPA (see `update_routes`; the masks are
    read, so the host waits for the device here).

    Args:
        model: any module with timm blocks inside.
        masks: masks by module name ("blocks.0.attn"), or a function of name and module; layers without one attend to
            everything. A mask is moved to its layer's device, that of the accelerator where ZeRO-3 has partitioned
            the weights. Give each layer its own, or one object to several: then it is one mask, saved under each name.

    Returns:
        Names of the modules that run our attention.

    Raises:
        ModelError: a name in `masks` that is not such a module, a mask for another number of heads, or a module in
            training mode with attention dropout, which our kernels do not have.

    Warns:
        NoEffectWarning: nothing matched.
    """
    found = {name: module for name, module in model.named_modules() if _fits(module)}
    if isinstance(masks, Mapping) and (unknown := sorted(set(masks) - set(found))):
        here = dict(model.named_modules()).get(unknown[0])
        what = "no module of this model" if here is None else f"a {type(here).__name__}, not timm's Attention"
        raise ModelError(f'masks: "{unknown[0]}" is {what}; modules that can take a mask: {", ".join(found) or "none"}')
    if not found:
        others = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        warnings.warn(
            f"block attention: {type(model).__name__} has no timm Attention"
            + (f"; its {', '.join(others)} cannot be replaced" if others else ""),
            NoEffectWarning,
            stacklevel=2,
        )
    chosen = {
        name: masks(name, module) if callable(masks) else (masks or {}).get(name) for name, module in found.items()
    }
    for name, module in found.items():  # all checks before the first change
        mask = chosen[name]
        if mask is not None and mask.num_heads not in (1, module.num_heads):
            raise ModelError(f"{name}: the mask is for {mask.num_heads} heads, the layer has {module.num_heads}")
        if module.training:
            _no_dropout(module, name)
    for name, module in found.items():
        if not isinstance(module, _BlockCore):
            module.__class__ = _adapted(type(module))
        mask = chosen[name]
        device = _device_of(module)
        if mask is not None and device.type != "meta":
            mask.to(device)
        module.register_module("block_mask", mask)
        module.attention_route = _first_route(module)
    return list(found)


def _first_route(module: nn.Module) -> str:
    """SDPA for a mask that prunes too little for the kernels; fp32 weights may become 16-bit ones before training."""
    mask, dtype = module.block_mask, module.qkv.weight.dtype
    if mask is None or mask.keep.device.type == "meta":
        return "auto"  # nothing to read
    return route_for(mask, torch.bfloat16 if dtype == torch.float32 else dtype, module.head_dim)


def update_routes(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Choose between SDPA and the block-sparse kernels for each masked layer by the mask's sparsity now.

    Reads the masks from their device, so call it where masks are changed and after a rebuild of the engine, on every
    rank alike. A layer whose route changes is compiled again.

    Args:
        model: after `use_block_attention`.
        dtype: of q, k and v; default that of the layer's weights (give bf16 or fp16 under autocast).

    Returns:
        The route by module name.
    """
    routes = {}
    for name, module in model.named_modules():
        if isinstance(module, _BlockCore):
            route = route_for(module.block_mask, dtype or module.qkv.weight.dtype, module.head_dim)
            if route != module.attention_route:
                module.attention_route = route
            routes[name] = route
    return routes


def masked_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers that have a mask, by module name, in the model's order (equal on all ranks)."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, _BlockCore))
    return {name: module for name, module in found if module.block_mask is not None}


def serve_lengths(model: nn.Module, makers: Mapping[str, MaskOfLength]) -> None:
    """Let masked layers take sequences of other lengths than that of their mask.

    Args:
        model: after `use_block_attention`.
        makers: by module name. Give functions that can be pickled where the model shall be.

    Raises:
        ModelError: a name that is no layer with a mask.
    """
    layers = masked_attention(model)
    for name, make in makers.items():
        if name not in layers:
            raise ModelError(f'serve_lengths: "{name}" is no attention layer with a mask; there are: {list(layers)}')
        layers[name].length_masks = _LengthMasks(make)


class _LengthMasks:
    """Masks for other lengths, made once for each length and device. No module: buffers would come into checkpoints."""

    def __init__(self, make: MaskOfLength):
        self.make = make
        self.made: dict[tuple[int, torch.device], BlockMask | None] = {}

    @torch.compiler.disable
    def at(self, tokens: int, device: torch.device) -> BlockMask | None:
        """The mask for `tokens` tokens, with its lists on `device`."""
        key = (int(tokens), device)
        if key not in self.made:
            mask = self.make(key[0])
            self.made[key] = None if mask is None else mask.to(device)
        return self.made[key]


class _BlockCore(nn.Module):
    """timm's ``Attention`` with another core; everything else as there."""

    block_mask: BlockMask | None
    attention_route: str
    length_masks: _LengthMasks | None = None
    score_probe: Tensor | None = None
    """While scores are collected: see `attention_scores`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Self-attention of tokens [B, N, C].

        Raises:
            ModelError: attention dropout in training, a mask that is not the module's own, or a number of tokens that
                the module's mask is not for.
        """
        if attn_mask is not None or is_causal:
            raise ModelError("block attention takes no attn_mask and is not causal; give a BlockMask to the module")
        if self.training:
            _no_dropout(self, type(self).__name__)
        batch, tokens, _ = x.shape
        gate = getattr(self, "gate", None)
        share = gate(x).sigmoid() if gate is not None else None
        mask = self.block_mask
        if mask is not None and self.length_masks is not None and mask.q_len != tokens:
            mask = self.length_masks.at(tokens, x.device)
        elif mask is not None and mask.q_len != tokens:
            raise ModelError(
                f"block attention: the mask is made for {mask.q_len} tokens, the input has {tokens}; learned masks are "
                "for one number of tokens, those of the other patterns of efftrain.methods.svite_attention for any"
            )
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = attention(qkv, mask, self.scale, route=self.attention_route)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
            out = attention_qkv(q, k, v, mask, self.scale, route=self.attention_route)
        if self.score_probe is not None and mask is not None and torch.is_grad_enabled():
            out = observed(out, q, k, v, mask.keep, self.score_probe, mask.block, self.scale)
        out = self.norm(out.reshape(batch, tokens, self.num_heads * self.head_dim))
        if share is not None:
            out = out * share
        return self.proj_drop(self.proj(out))


def __getattr__(name: str) -> Any:
    """``BlockAttention``: timm's ``Attention`` on our kernels; made by `use_block_attention`, not its constructor."""
    if name == "BlockAttention":
        return _adapted(_plain())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _plain() -> type[nn.Module]:
    """timm's ``Attention``, imported here: methods are looked up by commands that need no model; timm takes seconds."""
    from timm.models.vision_transformer import Attention

    return Attention


def _fits(module: nn.Module) -> bool:
    plain = _plain()
    return isinstance(module, _BlockCore) or (isinstance(module, plain) and type(module).forward is plain.forward)


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with our forward for timm's class or one derived from it (that one cannot be pickled)."""
    if kind is _plain():  # found by its name here, so that models can be pickled
        return type("BlockAttention", (_BlockCore, kind), {"__module__": __name__})
    return type(f"Block{kind.__name__}", (_BlockCore, kind), {"__module__": kind.__module__})


def _device_of(module: nn.Module) -> torch.device:
    """Where the layer computes. A partitioned weight may rest elsewhere: in host memory, with offloaded parameters."""
    weight = module.qkv.weight
    if full_shape(weight) == weight.shape or not torch.accelerator.is_available():
        return weight.device
    return torch.accelerator.current_accelerator() or weight.device


def _no_dropout(module: nn.Module, name: str) -> None:
    if module.attn_drop.p > 0:
        raise ModelError(
            f"{name}: attention dropout is {module.attn_drop.p}, which the kernels do not have; build the model with "
            "attn_drop_rate=0 (drop path and proj_drop are fine)"
        )
