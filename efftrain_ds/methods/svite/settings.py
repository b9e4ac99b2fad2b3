"""A tiny model and configuration for the tests that every method shares."""

from __future__ import annotations

from typing import Any

TINY_MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4},
    "num_classes": 10,
}
CONFIG: dict[str, Any] = {"density": 0.5, "update_every": "2st"}
