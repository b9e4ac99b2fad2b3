"""What a model takes from the weights of a masked autoencoder: its encoder for fine-tuning, or all of it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from .sincos import sincos_positions

_DECODER = ("decoder_", "mask_token")
_GRID, _HEADS = "position_grid", "attention_heads"
"""Buffers of our autoencoders; files of the authors' released code have neither."""


def is_masked_autoencoder(names: Container[str]) -> bool:
    """Whether names of tensors are those of a whole masked autoencoder: ours, or one of the authors' released code."""
    return "mask_token" in names and "decoder_pred.weight" in names


def encoder_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The encoder of a masked autoencoder, for a timm ViT that is to be fine-tuned.

    The decoder is left out. Our autoencoders store no position code: it is computed for the grid of `model`, so no
    table is resampled where the image size differs. As in the released code a classifier that averages the patches
    starts with a new norm behind the average, and the encoder's last norm, which saw single tokens, is left out.

    Another masked autoencoder takes everything (its decoder must have the same widths), so that a pre-training can
    start from an earlier one.

    Args:
        weights: tensors by name.
        model: the classifier, or an autoencoder; it is not changed.

    Returns:
        Tensors for `weights.start_from`.

    Raises:
        ModelError: the weights say that they were trained with another number of attention heads.
    """
    own = model.state_dict()
    if _HEADS in weights:
        _check_heads(weights[_HEADS], model)
    if is_masked_autoencoder(own):
        ours = (_GRID, _HEADS, "pos_embed", "decoder_pos_embed")
        return {key: value for key, value in weights.items() if key not in ours}
    taken = {key: value for key, value in weights.items() if not key.startswith(_DECODER) and key != _HEADS}
    full = taken.pop(_GRID, None)
    if full is not None and "pos_embed" not in taken and isinstance(getattr(model, "pos_embed", None), nn.Parameter):
        taken["pos_embed"] = _positions(model, (int(full[0]), int(full[1])))
    if "cls_token" not in own and taken.pop("cls_token", None) is not None and full is None and "pos_embed" in taken:
        taken["pos_embed"] = taken["pos_embed"][:, 1:]  # released weights have a row for the token
    if "fc_norm.weight" in own and "norm.weight" not in own:
        taken = {key: value for key, value in taken.items() if not key.startswith("norm.")}
        taken |= {key: value.clone() for key, value in own.items() if key.startswith("fc_norm.")}
    return taken


def _check_heads(trained: Tensor, model: nn.Module) -> None:
    """Refuse another split into heads: every tensor would fit, and the network would be another one."""
    for key, name, heads in zip(("", "decoder_"), ("blocks", "decoder_blocks"), trained.tolist(), strict=True):
        first = next(iter(getattr(model, name, ())), None)
        own = getattr(getattr(first, "attn", None), "num_heads", None)
        if own is not None and own != int(heads):
            raise ModelError(
                f"efftrain.model.kwargs.{key}num_heads: the weights were trained with {int(heads)} heads, "
                f"the model has {own}"
            )


def _positions(model: Any, full: tuple[int, int]) -> Tensor:
    """Position codes [1, prefix + patches, D] of the classifier's own grid; prefix tokens have none."""
    rows, columns = model.patch_embed.grid_size
    _, length, dim = model.pos_embed.shape
    codes = sincos_positions((rows, columns), full, dim)
    return torch.cat((torch.zeros(length - len(codes), dim), codes))[None]
