"""CSWin Transformer (Dong et al., CVPR 2022, arXiv 2107.00652), registered with timm by importing this module.

Half of the heads attend within vertical stripes of the feature map, the other half within horizontal ones; the last
stage attends globally. A depthwise convolution of the values inside each stripe gives the position (LePE). No
parameter and no buffer depends on the image size, so the stripes simply follow it: 1, 2, S/32 and S/32 positions wide
for images of side S, which are the published widths at 224 (7) and 384 (12).

Parameter names are those of the authors' released checkpoints, which therefore load as they are.

Shape legend: N images, H x W positions, C channels, S image side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, get_device_dtype, trunc_normal_, use_fused_attn
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from ..core.errors import ModelError

Window = tuple[int, int]
"""(height, width) of a stripe in positions."""


def split_windows(x: Tensor, window: Window) -> Tensor:
    """Cut a map into windows: [N, H, W, C] -> [N * windows, h, w, C], row by row."""
    n, height, width, c = x.shape
    h, w = window
    x = x.reshape(n, height // h, h, width // w, w, c)
    return x.transpose(2, 3).reshape(-1, h, w, c)


def join_windows(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `split_windows`: [N * windows, h, w, C] -> [N, H, W, C]."""
    (height, width), (h, w, c) = grid, x.shape[1:]
    x = x.reshape(-1, height // h, width // w, h, w, c)
    return x.transpose(2, 3).reshape(-1, height, width, c)


class StripeAttention(nn.Module):
    """Attention within windows, plus a depthwise convolution of the values (LePE); has no projections of its own.

    Args:
        dim: channels C.
        num_heads: heads over these channels.
        attn_drop: dropout of the attention weights.
    """

    fused_attn: bool

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
        """Queries, keys and values [N, H, W, C] to [N, H, W, C]; `window` divides H x W."""
        grid = (q.shape[1], q.shape[2])
        q, k, v = (split_windows(x, window) for x in (q, k, v))
        # the convolution sees zeros, not the neighbouring stripe, beyond the edge of a stripe
        position = self.get_v(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            weights = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(weights.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(position.shape) + position
        return join_windows(x, grid)


class CSWinBlock(nn.Module):
    """Attention in crossing stripes (in the last stage: global attention) and an MLP, both residual.

    Args:
        dim: channels C.
        num_heads: heads; even, except in the last stage.
        stripe: width of the stripes in positions; None is half of the side of the map.
        whole: attend over the whole map, without stripes.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: the query, key and value projection has a bias.
        proj_drop: dropout after the projection and in the MLP.
        attn_drop: dropout of the attention weights.
        drop_path: probability of skipping each of the two branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: int | None,
        *,
        whole: bool,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        **dd: Any,
    ):
        super().__init__()
        parts = 1 if whole else 2
        if dim % num_heads or num_heads % parts:
            raise ModelError(f"CSWin: {dim} channels and {num_heads} heads do not divide over {parts} kinds of stripes")
        self.stripe, self.whole = stripe, whole
        self.norm1 = norm_layer(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attns = nn.ModuleList(
            StripeAttention(dim // parts, num_heads // parts, attn_drop, **dd) for _ in range(parts)
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def windows(self, grid: tuple[int, int]) -> list[Window]:
        """The window of each part of the heads on a map of H x W positions.

        Raises:
            ModelError: the stripes do not divide the map.
        """
        height, width = grid
        if self.whole:
            return [grid]
        rows, columns = (self.stripe or max(1, side // 2) for side in grid)
        if width % columns or height % rows:
            raise ModelError(
                f"CSWin: stripes of {columns} columns and {rows} rows do not divide a map of {height} x {width} "
                "positions; allowed: image sides that are multiples of 32, stripes that divide every map they meet"
            )
        return [(height, columns), (rows, width)]

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] to the same shape."""
        windows = self.windows((x.shape[1], x.shape[2]))
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        split = [part.chunk(len(windows), dim=-1) for part in (q, k, v)]
        parts = [attend(*qkv, window) for attend, window, *qkv in zip(self.attns, windows, *split, strict=True)]
        attended = parts[0] if self.whole else torch.cat(parts, dim=-1)
        x = x + self.drop_path1(self.proj_drop(self.proj(attended)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2 and a norm: [N, H, W, C] -> [N, H/2, W/2, C']."""

    def __init__(self, dim: int, out_dim: int, norm_layer: Callable[..., nn.Module] = nn.LayerNorm, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = norm_layer(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ToChannelsLast(nn.Module):
    """[N, C, H, W] -> [N, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.permute(0, 2, 3, 1)


class CSWin(nn.Module):
    """CSWin Transformer for classification; takes images of any sides that are multiples of 32.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: "avg", or "" for none.
        embed_dim: channels of the first stage; every later stage has twice as many.
        depths: blocks of the four stages.
        num_heads: heads of the four stages.
        stripes: width of the stripes in positions, by stage; None follows the image: half of the map's side, which is
            S/32 in the third stage. The last stage always attends over the whole map.
        mlp_ratio: hidden width of the MLPs over their channels.
        qkv_bias: query, key and value projections have a bias.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections and in MLPs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over the blocks.
    """

    total_stride = 32

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripes: Sequence[int | None] = (1, 2, None, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not len(depths) == len(num_heads) == len(stripes) == 4:
            raise ModelError("CSWin has 4 stages: give 4 depths, 4 num_heads and 4 stripes")
        if global_pool not in ("avg", ""):
            raise ModelError(f'CSWin: global_pool "{global_pool}"; allowed: "avg" or ""')
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [embed_dim * 2**stage for stage in range(4)]
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.embed_dim = embed_dim
        self.num_features = self.head_hidden_size = widths[-1]
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**stage, "module": f"stage{stage + 1}"}
            for stage, width in enumerate(widths)
        ]
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2, **dd), ToChannelsLast(), norm_layer(embed_dim, **dd)
        )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for stage, width in enumerate(widths):
            if stage:
                self.add_module(f"merge{stage}", Downsample(widths[stage - 1], width, norm_layer, **dd))
            blocks = [
                CSWinBlock(
                    width,
                    num_heads[stage],
                    stripes[stage],
                    whole=stage == 3,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    **dd,
                )
                for rate in rates[stage]
            ]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*blocks))
        self.norm = norm_layer(widths[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(widths[-1], num_classes, **dd) if num_classes > 0 else nn.Identity()
        named_apply(_init_weights, self)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond those of one dimension: none, there is no embedding."""
        return set()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Position of a parameter, by its name, in the order of layers that timm decays the learning rate by.

        A down-sampling belongs to the first block after it, the last norm to the last block; with `coarse` the stages
        are the layers.
        """

        def position(name: str) -> tuple[float, ...]:
            head, _, rest = name.partition(".")
            if head == "stage1_conv_embed":
                return (0,)
            if head.startswith("merge"):
                head, rest = f"stage{int(head[5:]) + 1}", "0"
            if head == "norm":
                return (1, 4, 99_999)  # timm: with what comes before
            if not head.startswith("stage"):
                return (float("inf"),)
            return (1, int(head[5:])) if coarse else (1, int(head[5:]), int(rest.split(".")[0]))

        return position

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, or not."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes > 0 else nn.Identity()
        )
        _init_weights(self.head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the chosen stages; see timm's method of this name.

        Raises:
            ModelError: another format than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ModelError(f'CSWin: output_fmt "{output_fmt}"; allowed: "NCHW"')
        wanted = range(4) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        chosen = [range(4)[index] for index in wanted]
        maps: list[Tensor] = []
        x = self.stage1_conv_embed(x)
        for stage in range(max(chosen) + 1 if stop_early else 4):
            x = self._stage(x, stage)
            if stage in chosen:
                found = self.norm(x) if norm and stage == 3 else x
                maps.append(found.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return maps
        return (self.norm(x) if x.shape[-1] == self.num_features else x), maps

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        if stage:
            x = self.get_submodule(f"merge{stage}")(x)
        blocks = self.get_submodule(f"stage{stage + 1}")
        if not self.grad_checkpointing or torch.jit.is_scripting():
            return blocks(x)
        for block in blocks.children():
            x = checkpoint(block, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, 3, S, S] to features [N, S/32, S/32, C].

        Raises:
            ModelError: a side is not a multiple of 32.
        """
        if x.shape[-2] % 32 or x.shape[-1] % 32:
            raise ModelError(f"CSWin: images of {x.shape[-2]} x {x.shape[-1]} pixels; allowed: multiples of 32")
        x = self.stage1_conv_embed(x)
        for stage in range(4):
            x = self._stage(x, stage)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [N, H, W, C] to logits [N, classes], or with `pre_logits` to what the classifier would see."""
        if self.global_pool:
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, S, S] to logits [N, classes]."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module, name: str = "") -> None:
    """Linear layers as in the authors' code; convolutions and norms keep torch's initial values."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)},
    "small": {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)},
    "base": {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)},
}
_CFG = {
    "num_classes": 1000,
    "pool_size": None,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stage1_conv_embed.0",
    "classifier": "head",
    "license": "mit",
    "paper_ids": "arXiv:2107.00652",
    "paper_name": "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
    "origin_url": "https://github.com/microsoft/CSWin-Transformer",
}
default_cfgs = generate_default_cfgs(
    {
        f"cswin_{size}_{side}": {**_CFG, "input_size": (3, side, side), "crop_pct": crop}
        for size in _SIZES
        for side, crop in ((224, 0.9), (384, 1.0))
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    model = {**_SIZES[name.split("_")[1]], **kwargs}
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(CSWin, name, pretrained, feature_cfg=feature_cfg, **model)


@register_model
def cswin_tiny_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-T; 224 is the size of the published weights, any multiple of 32 works."""
    return _create("cswin_tiny_224", pretrained, **kwargs)


@register_model
def cswin_tiny_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-T with the evaluation settings of 384 pixels."""
    return _create("cswin_tiny_384", pretrained, **kwargs)


@register_model
def cswin_small_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-S."""
    return _create("cswin_small_224", pretrained, **kwargs)


@register_model
def cswin_small_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-S with the evaluation settings of 384 pixels."""
    return _create("cswin_small_384", pretrained, **kwargs)


@register_model
def cswin_base_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-B."""
    return _create("cswin_base_224", pretrained, **kwargs)


@register_model
def cswin_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-B with the evaluation settings of 384 pixels."""
    return _create("cswin_base_384", pretrained, **kwargs)


@register_model
def cswin_large_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-L."""
    return _create("cswin_large_224", pretrained, **kwargs)


@register_model
def cswin_large_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-L with the evaluation settings of 384 pixels."""
    return _create("cswin_large_384", pretrained, **kwargs)
