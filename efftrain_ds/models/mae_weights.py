"""What a model takes from the weights of a masked autoencoder: its encoder for fine-tuning, or all of it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sincos import sincos_positions

_DECODER = ("decoder_", "mask_token")
_GRID = "position_grid"


def is_masked_autoencoder(names: Container[str]) -> bool:
    """Whether names of tensors are those of a whole masked autoencoder: ours, or one of the authors' released code."""
    return "mask_token" in names and "decoder_pred.weight" in names


def encoder_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The encoder of a masked autoencoder, for a timm ViT that is to be fine-tuned.

    The decoder is left out. Our autoencoders store no position code: it is computed for the grid of `model`, so no
    table is resampled where the image size differs. As in the released code a classifier that averages the patches
    starts with a new norm behind the average, and the encoder's last norm, which saw single tokens, is left out.

    Another masked autoencoder takes everything, so that a pre-training can start from an earlier one.

    Args:
        weights: tensors by name.
        model: the classifier, or an autoencoder; it is not changed.

    Returns:
        Tensors for `weights.start_from`.
    """
    own = model.state_dict()
    if is_masked_autoencoder(own):
        return {key: value for key, value in weights.items() if key not in (_GRID, "pos_embed", "decoder_pos_embed")}
    taken = {key: value for key, value in weights.items() if not key.startswith(_DECODER)}
    full = taken.pop(_GRID, None)
    if full is not None and "pos_embed" not in taken and isinstance(getattr(model, "pos_embed", None), nn.Parameter):
        taken["pos_embed"] = _positions(model, (int(full[0]), int(full[1])))
    if "cls_token" not in own and taken.pop("cls_token", None) is not None and full is None and "pos_embed" in taken:
        taken["pos_embed"] = taken["pos_embed"][:, 1:]  # released weights have a row for the token
    if "fc_norm.weight" in own and "norm.weight" not in own:
        taken = {key: value for key, value in taken.items() if not key.startswith("norm.")}
        taken |= {key: value.clone() for key, value in own.items() if key.startswith("fc_norm.")}
    return taken


def _positions(model: Any, full: tuple[int, int]) -> Tensor:
    """Position codes [1, prefix + patches, D] of the classifier's own grid; prefix tokens have none."""
    rows, columns = model.patch_embed.grid_size
    _, length, dim = model.pos_embed.shape
    codes = sincos_positions((rows, columns), full, dim)
    return torch.cat((torch.zeros(length - len(codes), dim), codes))[None]
