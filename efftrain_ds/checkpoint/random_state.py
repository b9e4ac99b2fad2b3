"""Random states of this process as tensors and plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..zero.bundle import rng_state, set_rng_state


def plain_rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and JSON values."""
    state = rng_state()
    kind, keys, position, has_gauss, cached = state["numpy"]
    version, internal, gauss = state["python"]
    tensors = {"rng.torch": state["torch"], "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    plain = {"numpy": [kind, position, has_gauss, cached], "python": [version, list(internal), gauss]}
    return tensors, plain


def set_plain_rng_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Restore what `plain_rng_state` returned."""
    kind, position, has_gauss, cached = plain["numpy"]
    version, internal, gauss = plain["python"]
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    set_rng_state(
        {
            "torch": tensors["rng.torch"],
            "cuda": None,
            "numpy": (kind, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, cached),
            "python": (version, tuple(internal), gauss),
        }
    )
