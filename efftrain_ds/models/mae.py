"""Masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377), registered with timm by importing this module.

The encoder is timm's VisionTransformer on the visible patches only; a small decoder predicts the pixels of all patches.
Encoder parameters have timm's names and decoder parameters those of the authors' released code, so either's weights fit
by name. Positions are fixed sine-cosine codes computed for the grid of each input: no parameter depends on the image
size, so every bandwidth of a curriculum trains one set of parameters. Which patches are visible comes from outside as
an order of the patches (`order`): a prefix of it is visible, and who draws it decides what it depends on.

Shape legend: N images, C channels, H x W pixels, P patch side, L = (H / P) (W / P) patches, K visible ones, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import checkpoint_seq, register_model
from timm.models.vision_transformer import Block, LayerNorm, VisionTransformer
from torch import Tensor, nn

from ..core.errors import ModelError
from .sincos import Grid, sincos_positions

_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices", "num_classes")
"""What is passed to every builder and means nothing here."""
_FIXED = {"num_classes": 0, "pos_embed": "none", "dynamic_img_size": True, "weight_init": "skip"}
_REFUSED = frozenset(
    (*_FIXED, "global_pool", "class_token", "reg_tokens", "patch_drop_rate", "pos_drop_rate", "drop_rate", "pre_norm")
    + ("fc_norm", "fix_init", "no_embed_class", "pool_include_prefix")
)
"""Arguments of timm's encoder that are fixed here, or that would be taken and have no effect."""


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Patches that stay visible: floor(L (1 - ratio)), as in the released code but safe from binary fractions.

    Raises:
        ModelError: none or all of them would.
    """
    visible = int(patches * (1 - mask_ratio) + 1e-6)
    if not 0 < visible < patches:
        raise ModelError(f"a mask ratio of {mask_ratio:g} leaves {visible} of {patches} patches visible")
    return visible


def random_order(count: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
    """A random order of the patches for each of `count` images, [count, patches] int64, on the generator's device."""
    device = generator.device if generator is not None else None
    return torch.rand(count, patches, generator=generator, device=device).argsort(dim=1)


def masked_patches(order: Tensor, visible: int) -> Tensor:
    """Which patches are hidden: an order [N, L] to bool [N, L]."""
    hidden = torch.ones_like(order, dtype=torch.bool)
    return hidden.scatter(1, order[:, :visible], False)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, channels last: [N, C, H, W] -> [N, L, P * P * C]."""
    n, c, height, width = images.shape
    cells = images.reshape(n, c, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: Grid) -> Tensor:
    """Undo `patchify`: [N, L, P * P * C] -> [N, C, H, W] for a grid of (H / P, W / P) patches."""
    rows, columns = grid
    cells = patches.unflatten(2, (patch, patch, -1)).unflatten(1, grid)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch, columns * patch)


class MaskedAutoencoder(VisionTransformer):
    """timm's ViT as the encoder of a masked autoencoder.

    Args:
        img_size: side of the full-size images; others are multiples of the patch.
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: heads of the decoder.
        mask_ratio: share of hidden patches.
        **kwargs: further arguments of the encoder.

    Attributes:
        order: the patches' order for the next forward pass, [N, L] int64; None draws one from torch's generator.
        mask_ratio: as given; may be changed at any time.

    Raises:
        ModelError: a width that the positions cannot have, or an argument of timm's that has no place here.
    """

    def __init__(
        self,
        *,
        img_size: int | Grid = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        **kwargs: Any,
    ):
        for key, width in (("embed_dim", embed_dim), ("decoder_embed_dim", decoder_embed_dim)):
            if width % 4:
                raise ModelError(f"efftrain.model.kwargs.{key}: {width} is not a multiple of 4, as positions need")
        clash = sorted(set(kwargs) & _REFUSED)
        if clash:
            raise ModelError(f"efftrain.model.kwargs.{clash[0]}: cannot be chosen for a masked autoencoder")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            **_FIXED,
            **kwargs,
        )
        self.patch = patch_size
        self.mask_ratio = mask_ratio
        self.order: Tensor | None = None
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.Sequential(
            *(
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
                for _ in range(decoder_depth)
            )
        )
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        # tell who reads a checkpoint in which unit the positions are, and the heads, which no shape shows; whole
        # numbers outlive bf16
        self.register_buffer("position_grid", torch.tensor(self.full_grid))
        self.register_buffer("attention_heads", torch.tensor((num_heads, decoder_num_heads)))
        self._draw()

    @property
    def full_grid(self) -> Grid:
        """Patches of the full-size image."""
        rows, columns = self.patch_embed.grid_size
        return int(rows), int(columns)

    def _draw(self) -> None:
        """Weights as the released code draws them: Xavier for all linear layers and the patch embedding."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed."""
        return {*super().no_weight_decay(), "mask_token"}

    def _codes(self, grid: Grid, like: Tensor, dim: int) -> Tensor:
        return sincos_positions(grid, self.full_grid, dim, like.device).to(like.dtype)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions and put the class token before: [N, rows, columns, D] -> [N, 1 + L, D]."""
        patches = x.flatten(1, 2) + self._codes((x.shape[1], x.shape[2]), x, self.embed_dim)
        return torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1)

    def forward(self, images: Tensor, order: Tensor | None = None) -> Tensor:
        """Predict the pixels of all patches from some of them.

        Args:
            images: [N, C, H, W], sides multiples of P.
            order: [N, L] int64, for each image the patches with the visible ones first; None takes `self.order`.

        Returns:
            [N, L, P * P * C] in the layout of `patchify`.

        Raises:
            ModelError: sides that the patch does not divide, or an order of another shape.
        """
        n, _, height, width = images.shape
        if height % self.patch or width % self.patch:
            raise ModelError(f"images of {height} x {width} pixels do not divide into patches of {self.patch}")
        grid = (height // self.patch, width // self.patch)
        patches = grid[0] * grid[1]
        order = self.order if order is None else order
        if order is None:
            order = random_order(n, patches).to(images.device)
        if order.shape != (n, patches):
            raise ModelError(f"the order of the patches is {list(order.shape)}, the images need {[n, patches]}")
        return self.decode(self.encode(images, order[:, : visible_patches(patches, self.mask_ratio)]), order, grid)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Tokens of the visible patches after the encoder.

        Args:
            images: [N, C, H, W].
            visible: [N, K] int64, indices of the visible patches.

        Returns:
            [N, 1 + K, D], class token first, then in the order of `visible`.
        """
        x = self._pos_embed(self.patch_embed(images))
        chosen = x[:, 1:].gather(1, visible[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat((x[:, :1], chosen), dim=1)
        return self.norm(self._run(self.blocks, x))

    def decode(self, tokens: Tensor, order: Tensor, grid: Grid) -> Tensor:
        """Predicted pixels from the encoder's tokens [N, 1 + K, D]; [N, L, P * P * C]."""
        x = self.decoder_embed(tokens)
        hidden = self.mask_token.expand(len(x), order.shape[1] - x.shape[1] + 1, -1)
        shuffled = torch.cat((x[:, 1:], hidden), dim=1)
        patches = shuffled.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat((x[:, :1], patches + self._codes(grid, x, x.shape[2])), dim=1)
        return self.decoder_pred(self.decoder_norm(self._run(self.decoder_blocks, x)))[:, 1:]

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(blocks, x) if self.grad_checkpointing and self.training else blocks(x)


_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _build(size: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ModelError("efftrain.model.pretrained: there are no weights of masked autoencoders")
    given = {key: value for key, value in kwargs.items() if key not in _TIMM and value is not None}
    return MaskedAutoencoder(**{**_SIZES[size], **given})


@register_model
def mae_vit_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Masked autoencoder with a ViT-T encoder (a size of ours)."""
    return _build("tiny", pretrained, kwargs)


@register_model
def mae_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Masked autoencoder with a ViT-S encoder (a size of ours)."""
    return _build("small", pretrained, kwargs)


@register_model
def mae_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Masked autoencoder with a ViT-B encoder."""
    return _build("base", pretrained, kwargs)


@register_model
def mae_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Masked autoencoder with a ViT-L encoder."""
    return _build("large", pretrained, kwargs)
