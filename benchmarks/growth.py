"""Growth of the bundled run: full training, manual schedules and the searched one, several seeds, interleaved.

    python benchmarks/growth.py [--seeds 3] [--epochs 12] [--ranks 2] [--arms full,manual] [--out F]

The training time holds the searches, their measurements and the rebuilds (`arms` says how runs are compared).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arms import chosen, compare, parser_of

METHOD = "efftrain.methods.autoprog"
SEARCH = {"stages": 4, "search": {"epochs": 1, "probe_samples": 512}}
ARMS: dict[str, tuple[str, list[str]]] = {
    "full": ("no method", ["efftrain.methods={}"]),
    "manual": ("ramps, MoGrow, optimizer state carried", []),
    "reset": ("ramps, MoGrow, optimizer state reset", [f"{METHOD}.state=reset"]),
    "interpolation": ("ramps, plain interpolation, state carried", [f"{METHOD}.operator=interpolation"]),
    "searched": ("searched (1 epoch each), MoGrow, state carried", [f"{METHOD}={json.dumps(SEARCH)}"]),
}
"""Name of every arm: what it is, and its changes to the configuration."""


def growth_of(folder: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    """What was chosen, and the seconds of every rebuild."""
    rows = [r for e in events if e["event"] == "growth_search" for r in e["table"] if r["chosen"]]
    rebuilds = [e["seconds"] for e in events if e["event"] == "rebuild"]
    return {"rebuilds": rebuilds, "chosen": [[r["depth"], r["resolution"]] for r in rows]}


def main() -> None:
    """Run all arms for all seeds, store the result, print the table."""
    parser = parser_of(__doc__, ARMS, "ds_configs/smoke_autoprog_vit_fmnist.json", 12)
    args = parser.parse_args()
    if args.epochs < 4:
        parser.error("--epochs: 4 stages need at least 4 epochs")
    compare("growth", args, ARMS, chosen(parser, args, ARMS), growth_of, {})


if __name__ == "__main__":
    main()
