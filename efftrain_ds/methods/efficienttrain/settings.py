"""A tiny model and configuration for the tests that every method shares."""

from __future__ import annotations

from typing import Any

TINY_MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "num_classes": 7,
}
CONFIG: dict[str, Any] = {"schedule": "et++"}
