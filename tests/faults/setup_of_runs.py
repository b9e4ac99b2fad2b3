"""The small run that the fault suite breaks, and how its outcomes are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efftrain_ds.observe.journal import read_journal

STEPS = 12
EVERY = 3


def config_of(output: Path, **changes: Any) -> dict[str, Any]:
    """A growing ViT on the bundled images at ZeRO-2; `changes` are paths with "/" for the dots, ... is the default."""
    config: dict[str, Any] = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "efftrain": {
            "run": {"steps": STEPS, "output": str(output)},
            "model": {
                "name": "vit_tiny_patch16_224",
                "drop_path": 0.1,
                "kwargs": {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 2},
                "ema": {"decay": 0.9},
            },
            "data": {
                "train": "bundled:fashion_mnist/train",
                "resolution": 28,
                "workers": 0,
                "mean": [0.3] * 3,
                "std": [0.3] * 3,
            },
            "methods": {"autoprog": {"stages": 2, "depth_start": 0.5, "resolution_start": None}},
            "checkpoint": {"every": f"{EVERY}st", "keep": 20},
            "observe": {"tensorboard": False, "images_every": None, "log_every": 1, "eval_every": "6st"},
            "guard": {"stall_s": None},
        },
    }
    for path, value in changes.items():
        node = config
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        if value is ...:
            node.pop(last, None)
        else:
            node[last] = value
    return config


def final_state(output: Path) -> dict[str, str]:
    """Digests of the tensors at the end of a run: masters, moments, average, random states, of every rank."""
    folder = output / "checkpoints" / f"step-{STEPS:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("rank-")}


def events(output: Path, name: str) -> list[dict[str, Any]]:
    """Events of one kind in a run's journal."""
    path = output / "journal.jsonl"
    return [e for e in read_journal(path) if e.get("event") == name] if path.exists() else []


def resumed_at(output: Path) -> int:
    """Step of the newest resume; 0 where the run began anew."""
    found = events(output, "resume")
    return int(found[-1]["step"]) if found else 0


def debris(output: Path) -> list[str]:
    """What a finished run must not leave among its checkpoints."""
    return sorted(p.name for p in (output / "checkpoints").iterdir() if p.name.startswith(".") or "partial" in p.name)
