"""How many ranks share this machine."""

from __future__ import annotations

import os


def local_world() -> int:
    """Ranks on this node: torchrun's LOCAL_WORLD_SIZE, DeepSpeed's LOCAL_SIZE, else the whole world on one node."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        value = os.environ.get(name)
        if value:
            return max(1, int(value))
    return 1
