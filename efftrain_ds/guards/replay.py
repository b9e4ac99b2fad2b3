"""Replay files: what a rank computed in a step that was refused. Plain tensors and JSON, nothing pickled."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .nonfinite import Micro

logger = logging.getLogger(__name__)

MAX_FILES = 8
"""Replay files of one rank in one folder; further ones are not written."""
MAX_BYTES = 256 << 20
"""Tensors of one replay file; images beyond it are left out."""


@dataclass(frozen=True)
class Replay:
    """A replay file.

    Attributes:
        info: the JSON part: step, rank, what was found, losses, stage, and the values of each micro-batch.
        micros: tensors of each micro-batch by name ("images", "labels", "labels_b", "ids", "positions", "valid", and
            "rng" and "rng_device": states of torch's generators just before its forward pass).
    """

    info: dict[str, Any]
    micros: list[dict[str, Tensor]]


def write_replay(
    folder: Path, step: int, rank: int, micros: list[tuple[int, Micro]], info: Mapping[str, Any]
) -> Path | None:
    """Write ``step-XXXXXXXX.rankN.json`` and ``.safetensors``; returns the JSON's path, or None where none was written.

    A failure to write is logged and does not end the run.

    Args:
        folder: made where it does not exist.
        step: optimizer step.
        rank: of this process.
        micros: (place in the step, micro-batch).
        info: plain values for the JSON.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.glob(f"step-*.rank{rank}.json"))) >= MAX_FILES:
            return None
        tensors: dict[str, Tensor] = {}
        rows, size = [], 0
        for index, micro in micros:
            row: dict[str, Any] = {"index": index, **micro.values}
            for name, value in micro.tensors.items():
                if size + value.nbytes > MAX_BYTES:
                    row["left_out"] = [*row.get("left_out", []), name]
                    continue
                size += value.nbytes
                tensors[f"{len(rows)}.{name}"] = value.detach().cpu().clone().contiguous()
            rows.append(row)
        path = folder / f"step-{step:08d}.rank{rank}.json"
        save_file(tensors, str(path.with_suffix(".safetensors")))
        text = json.dumps({**info, "step": step, "rank": rank, "micro_batches": rows}, indent=1, default=str)
        path.write_text(text + "\n", encoding="utf-8")
    except Exception as error:  # a full disk must not turn a refused step into a crash of one rank
        logger.warning("rank %d: no replay file of step %d: %s", rank, step, error)
        return None
    return path


def read_replay(path: str | Path) -> Replay:
    """Read what `write_replay` wrote.

    Args:
        path: of the JSON file.
    """
    path = Path(path)
    info = json.loads(path.read_text(encoding="utf-8"))
    flat = load_file(str(path.with_suffix(".safetensors")))
    micros: list[dict[str, Tensor]] = [{} for _ in info["micro_batches"]]
    for key, value in flat.items():
        index, _, name = key.partition(".")
        micros[int(index)][name] = value
    return Replay(info, micros)


def set_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put torch's generators where they were before the forward pass of a replayed micro-batch."""
    if "rng" in tensors:
        torch.set_rng_state(tensors["rng"])
    if "rng_device" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_device"])
