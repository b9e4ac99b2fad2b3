"""Sparse training of the bundled run: dense, masked, structured, token selection, both; several seeds, interleaved.

    python benchmarks/sparse_accuracy.py [--seeds 3] [--epochs 12] [--ranks 2] [--arms dense,structured] [--out F]

All arms take the same number of steps. The optimizer state is counted in the last checkpoint: fp32 masters and both
moments over all ranks, as tensors that were really kept (a masked weight is stored dense, its zeros included).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from arms import chosen, compare, parser_of

from efftrain_ds.checkpoint.reader import AVERAGE, Checkpoint
from efftrain_ds.checkpoint.survey import newest

MASKED = {"svite": {"density": 0.5, "update_every": "2%"}}
STRUCTURED = {"s2vite": {"heads": 0.6, "neurons": 0.6, "update_every": "2%"}}
TOKENS = {"svite_tokens": {"keep": 0.7}}


def _methods(*parts: dict[str, Any]) -> list[str]:
    return ["efftrain.methods=" + json.dumps({name: value for part in parts for name, value in part.items()})]


ARMS: dict[str, tuple[str, list[str]]] = {
    "dense": ("no method", _methods()),
    "unstructured": ("masked entries, density 0.5", _methods(MASKED)),
    "structured": ("heads and neurons, density 0.6", _methods(STRUCTURED)),
    "structured_moving": (
        "heads and neurons, density 0.6, no unit grown back at once",
        _methods({"s2vite": {**STRUCTURED["s2vite"], "exclude_just_dropped": True}}),
    ),
    "tokens": ("token selection, keep 0.7", _methods(TOKENS)),
    "structured_tokens": ("heads and neurons 0.6, keep 0.7", _methods(STRUCTURED, TOKENS)),
}
"""Name of every arm: what it is, and its changes to the configuration."""


def state_of(folder: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Megabytes of masters and moments over all ranks."""
    found = Checkpoint(newest(folder, hashes=False), hashes=False)
    tensors = sum(1 for key in found.keys if key != AVERAGE)
    elements = sum(math.prod(shape) for shape in found.shapes.values())
    return {"optimizer_mb": 4 * tensors * elements / 1e6}


def main() -> None:
    """Run all arms for all seeds, store the result, print the table."""
    parser = parser_of(__doc__, ARMS, "ds_configs/smoke_s2vite_vit_fmnist.json", 12)
    args = parser.parse_args()
    names = chosen(parser, args, ARMS)
    compare("sparse_accuracy", args, ARMS, names, state_of, {"optimizer_mb": "Optimizer MB"})


if __name__ == "__main__":
    main()
