"""An elastic supernet of a timm ``VisionTransformer``.

Only the classes of the modules change, to ones whose forward pass takes sizes. Parameters keep their places and timm's
names, so timm's weights load, and checkpoints, optimizers and ZeRO partitions see the model they know.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm, LayerScale, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...core.errors import ModelError
from ..stacks import ElasticSequential
from .choice import Choosable
from .layers import Elastic, ElasticConv2d, ElasticLinear, ElasticQKV, become, cut, leading, plain_copy, shell
from .norms import ElasticLayerNorm

if TYPE_CHECKING:
    from .plain_space import PlainConfig, PlainSpace


class ElasticLayerScale(Elastic, LayerScale):
    """Scale of each channel: ``forward(x [..., C])``."""

    plain_class = LayerScale

    def forward(self, x: Tensor) -> Tensor:
        """Scale; the channels of `x` are the leading ones."""
        return x * leading(self.gamma, 0, x.shape[-1])

    def extract(self, channels: int) -> nn.Module:
        """The plain layer of the leading channels."""
        new = shell(self)
        new.gamma = cut(leading(self.gamma, 0, channels), self.gamma)
        return new


class ElasticPatchEmbed(PatchEmbed):
    """Patches to tokens of the leading channels."""

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        """Images [B, C, H, W] to tokens [B, N, width]."""
        return self.proj(x, width).flatten(2).transpose(1, 2)

    def extract(self, width: int, resolution: int) -> nn.Module:
        """The plain module, for images of one size."""
        new = shell(self)
        new.proj, new.norm = self.proj.extract(self.proj.in_channels, width), plain_copy(self.norm)
        new.img_size, new.grid_size, new.num_patches = new._init_img_size(resolution)
        return new


class ElasticAttention(Attention):
    """timm's attention with the leading heads."""

    def forward(self, x: Tensor, heads: int | None = None) -> Tensor:
        """Tokens [B, N, C] to the same."""
        batch, count, width = x.shape
        heads = heads or self.num_heads
        q, k, v = self.qkv(x, heads).reshape(batch, count, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            y = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, count, heads * self.head_dim), width))

    def extract(self, width: int, heads: int) -> nn.Module:
        """timm's own attention with these heads."""
        new = shell(self)
        new.num_heads, new.attn_dim = heads, heads * self.head_dim
        cut_ones = {"qkv": self.qkv.extract(width, heads), "proj": self.proj.extract(new.attn_dim, width)}
        return _with_children(new, self, width, cut_ones)


class ElasticMlp(Mlp):
    """timm's MLP with the leading hidden units."""

    def forward(self, x: Tensor, hidden: int | None = None) -> Tensor:
        """Tokens [B, N, C] to the same."""
        y = self.drop1(self.act(self.fc1(x, hidden)))
        return self.drop2(self.fc2(self.norm(y), x.shape[-1]))

    def extract(self, width: int, hidden: int) -> nn.Module:
        """timm's own MLP with these hidden units."""
        cut_ones = {"fc1": self.fc1.extract(width, hidden), "fc2": self.fc2.extract(hidden, width)}
        return _with_children(shell(self), self, width, cut_ones)


class ElasticBlock(Block):
    """timm's block with the leading channels, heads and hidden units."""

    def forward(self, x: Tensor, heads: int | None = None, hidden: int | None = None) -> Tensor:
        """Tokens [B, N, C] to the same; None for all there is."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), heads)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), hidden)))

    def extract(self, width: int, heads: int, hidden: int) -> nn.Module:
        """timm's own block of this size."""
        cut_ones = {"attn": self.attn.extract(width, heads), "mlp": self.mlp.extract(width, hidden)}
        return _with_children(shell(self), self, width, cut_ones)


class ElasticVisionTransformer(Choosable, VisionTransformer):
    """The supernet: ``net(images, config)``; without a configuration that of `set_config`, or else the largest.

    Made by `make_elastic`. Images are resized (bicubic) to the resolution of the sub-network, and the position
    embedding is resampled to it.
    """

    space: PlainSpace

    def forward(self, images: Tensor, config: PlainConfig | None = None) -> Tensor:
        """Logits of a sub-network.

        Args:
            images: [B, C, H, W].
            config: of the space; None for that of `set_config`.

        Raises:
            ModelError: the sub-network does not fit into this supernet.
        """
        config = self.chosen(config)
        resolution, width = config.resolution, config.width
        if images.shape[-2:] != (resolution, resolution):
            images = F.interpolate(images, (resolution, resolution), mode="bicubic", align_corners=False)
        x = self.patch_drop(self._add_position(self.patch_embed(images, width), resolution))
        sizes = [(heads, int(width * mlp)) for heads, mlp in zip(config.heads, config.mlp, strict=True)]
        x = self.norm(self.blocks(x, config.layers, sizes))
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return self.head(x)

    def _add_position(self, x: Tensor, resolution: int) -> Tensor:
        """Class token and position embedding; tokens [B, N, C] to [B, prefix + N, C]."""
        width = x.shape[-1]
        if self.cls_token is not None:
            x = torch.cat([leading(self.cls_token, 2, width).expand(x.shape[0], -1, -1), x], 1)
        return self.pos_drop(x + self._position(width, resolution))

    def _position(self, width: int, resolution: int) -> Tensor:
        """Position embedding [1, N, width] for images of one size."""
        grid = [resolution // patch for patch in self.patch_embed.patch_size]
        values = leading(self.pos_embed, 2, width)
        return resample_abs_pos_embed(values, grid, self.patch_embed.grid_size, self.num_prefix_tokens)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, with the sub-network of its own call."""
        self.blocks.checkpointing = enable

    def extract(self, config: PlainConfig) -> VisionTransformer:
        """A sub-network as timm's own class with copies of the weights; `PlainSpace.extract` checks first."""
        width = config.width
        new: Any = shell(self)
        for key in ("space", "config", "growth_slots"):
            new.__dict__.pop(key, None)
        for name, parameter in self._parameters.items():
            values = None if parameter is None else leading(parameter, 2, width)
            if name == "pos_embed" and parameter is not None:
                values = self._position(width, config.resolution)
            new.register_parameter(name, None if values is None else cut(values, parameter))
        blocks = list(self.blocks)
        chosen = zip(config.layers, config.heads, config.mlp, strict=True)
        cut_ones = {
            "patch_embed": self.patch_embed.extract(width, config.resolution),
            "blocks": nn.Sequential(*[blocks[i].extract(width, heads, int(width * mlp)) for i, heads, mlp in chosen]),
            "head": self.head.extract(width, self.num_classes),
        }
        _with_children(new, self, width, cut_ones)
        new.num_features = new.head_hidden_size = new.embed_dim = width
        row = self.feature_info[0]
        new.feature_info = [{**row, "module": f"blocks.{i}", "num_chs": width} for i in range(config.depth)]
        if isinstance(getattr(self, "pretrained_cfg", None), dict):
            size = (self.in_chans, config.resolution, config.resolution)
            new.pretrained_cfg = new.default_cfg = {**self.pretrained_cfg, "input_size": size}
        return new


def _with_children(new: Any, module: nn.Module, width: int, children: dict[str, nn.Module]) -> Any:
    """Give `new` these children and, in their places, the others of `module` at a width. Returns it."""
    for name, child in module.named_children():
        if name not in children:
            children[name] = child.extract(width) if isinstance(child, Elastic) else plain_copy(child)
        new.add_module(name, children[name])
    return new


def plain_options(net: nn.Module) -> dict[str, Any]:
    """Arguments of `build_plain` that a supernet or an extracted network cannot be built again without."""
    last = isinstance(net.fc_norm, nn.LayerNorm)
    eps = (net.fc_norm if last else net.norm).eps
    return {"global_pool": net.global_pool, "fc_norm": last, "norm_eps": eps}


def build_plain(space: PlainSpace, norm_eps: float = 1e-6, **kwargs: Any) -> nn.Module:
    """A supernet with fresh weights.

    Args:
        space: what it contains.
        norm_eps: of layer normalisation.
        **kwargs: further arguments of timm's ``VisionTransformer``.

    Raises:
        ModelError: arguments that make it another kind of model.
    """
    width, heads = max(space.widths), max(space.heads)
    arguments = {
        "img_size": max(space.resolutions),
        "patch_size": space.patch,
        "in_chans": space.in_chans,
        "num_classes": space.num_classes,
        "class_token": space.class_token,
        "global_pool": "token" if space.class_token else "avg",
        "qkv_bias": space.qkv_bias,
        "init_values": 1e-5 if space.layer_scale else None,
        "qk_norm": space.qk_norm,
        "norm_layer": partial(LayerNorm, eps=norm_eps),
    }
    # with one head the width of attention is the embedding's whatever it is; the real attention follows
    fixed = {"embed_dim": width, "depth": space.top, "num_heads": 1, "mlp_ratio": max(space.mlp)}
    try:
        model = VisionTransformer(**{**arguments, **kwargs}, **fixed)
    except (TypeError, AssertionError) as error:
        raise ModelError(f"timm's VisionTransformer takes other arguments than {kwargs}: {error}") from error
    for block in model.blocks:
        block.attn = Attention(
            width,
            heads,
            attn_head_dim=space.head_dim,
            qkv_bias=space.qkv_bias,
            qk_norm=space.qk_norm,
            attn_drop=block.attn.attn_drop.p,
            proj_drop=block.attn.proj_drop.p,
            norm_layer=arguments["norm_layer"],
        )
    model.init_weights(needs_reset=False)
    return make_elastic(model, space)


def make_elastic(model: nn.Module, space: PlainSpace) -> ElasticVisionTransformer:
    """Turn a timm ``VisionTransformer`` of the largest size (or larger) into a supernet, in place.

    Args:
        model: e.g. of ``timm.create_model``, with its weights.
        space: sub-networks that it shall contain.

    Raises:
        ModelError: another class, parts that cannot be cut, or sizes that are too small for the space.
    """
    _refuse(model, space)
    for block in model.blocks:
        for name in ("norm1", "norm2"):
            become(getattr(block, name), ElasticLayerNorm)
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), LayerScale):
                become(getattr(block, name), ElasticLayerScale)
        attention = block.attn
        become(attention.qkv, ElasticQKV)
        attention.qkv.heads, attention.qkv.head_dim = attention.num_heads, attention.head_dim
        attention.qkv.v_dim = attention.head_dim
        for layer in (attention.proj, block.mlp.fc1, block.mlp.fc2):
            become(layer, ElasticLinear)
        become(attention, ElasticAttention)
        become(block.mlp, ElasticMlp)
        become(block, ElasticBlock)
    become(model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm, ElasticLayerNorm)
    become(model.head, ElasticLinear)
    become(model.patch_embed.proj, ElasticConv2d)
    become(model.patch_embed, ElasticPatchEmbed)
    model.blocks.__class__ = ElasticSequential
    become(model, ElasticVisionTransformer)
    model.space = space
    return model


def _refuse(model: nn.Module, space: PlainSpace) -> None:
    """Raise for what cannot be made elastic, or what the prices of the space would not count.

    Raises:
        ModelError: says what.
    """
    kind = type(model).__name__
    if type(model) is not VisionTransformer:
        raise ModelError(f"{kind} cannot be made elastic; allowed: timm's VisionTransformer itself")
    embed, norms = model.patch_embed, (model.norm, model.fc_norm)
    plain = {
        "attention pooling": model.attn_pool is None,
        "another patch embedding than timm's PatchEmbed, or one with a norm": type(embed) is PatchEmbed
        and isinstance(embed.norm, nn.Identity),
        "dynamic_img_size (the supernet resizes images itself)": not model.dynamic_img_size
        and not embed.dynamic_img_pad,
        "register tokens": model.reg_token is None,
        "no position embedding for the class token": model.pos_embed is not None
        and (not model.no_embed_class or model.cls_token is None),
        "a norm before the blocks": isinstance(model.norm_pre, nn.Identity),
        "no final LayerNorm": sorted(isinstance(norm, nn.LayerNorm) for norm in norms) == [False, True],
        "no classifier": isinstance(model.head, nn.Linear),
        "blocks that are not in an nn.Sequential": type(model.blocks) in (nn.Sequential, ElasticSequential),
    }
    for what, ok in plain.items():
        if not ok:
            raise ModelError(f"{kind} has {what}, which cannot be made elastic")
    found = {
        "patch": (embed.patch_size[0], space.patch),
        "num_classes": (model.num_classes, space.num_classes),
        "in_chans": (model.in_chans, space.in_chans),
        "class_token": (model.has_class_token, space.class_token),
        "blocks": (len(model.blocks), space.top),
    }
    for name, block in model.blocks.named_children():
        if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
            raise ModelError(f"{kind}: blocks.{name} is not timm's plain block with its Attention and Mlp")
        attention, mlp = block.attn, block.mlp
        whole = isinstance(attention.norm, nn.Identity) and attention.gate is None and isinstance(mlp.norm, nn.Identity)
        biases = [layer.bias is not None for layer in (attention.proj, mlp.fc1, mlp.fc2)]
        layer_norms = [isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)]
        if not whole or not all(biases) or not all(layer_norms) or type(mlp.act) is not nn.GELU:
            raise ModelError(
                f"{kind}: blocks.{name} has a gate, a norm inside attention or MLP, no bias, or another norm than "
                "LayerNorm or activation than GELU, which cannot be made elastic"
            )
        found |= {
            f"blocks.{name}: head_dim": (attention.head_dim, space.head_dim),
            f"blocks.{name}: qkv_bias": (attention.qkv.bias is not None, space.qkv_bias),
            f"blocks.{name}: qk_norm": (not isinstance(attention.q_norm, nn.Identity), space.qk_norm),
            f"blocks.{name}: layer_scale": (isinstance(block.ls1, LayerScale), space.layer_scale),
        }
        hidden = max(int(width * ratio) for width in space.widths for ratio in space.mlp)
        if attention.num_heads < max(space.heads) or mlp.fc1.out_features < hidden:
            raise ModelError(
                f"{kind}: blocks.{name} has {attention.num_heads} heads and {mlp.fc1.out_features} hidden units; the "
                f"space needs {max(space.heads)} and {hidden}"
            )
    for what, (own, wanted) in found.items():
        if own != wanted:
            raise ModelError(f"{kind}: {what} is {own}; the space has {wanted}")
    if model.embed_dim < max(space.widths):
        raise ModelError(f"{kind}: width {model.embed_dim}; the space needs {max(space.widths)}")
