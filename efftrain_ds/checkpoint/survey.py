"""What is in a checkpoint, a folder of checkpoints or a run folder: facts as plain values, for people and programs."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import CheckpointError
from .folder import LATEST, MANIFEST, candidates
from .reader import AVERAGE, MASTERS, Checkpoint

FOLDER = "checkpoints"
"""Name of the folder of all checkpoints inside a run's output folder."""

_NATIVE = "mp_rank_*_model_states.pt"


@dataclass(frozen=True)
class Entry:
    """One checkpoint of a folder.

    Attributes:
        name: of its folder.
        verdict: "good", "damaged", "incomplete" or "foreign" (DeepSpeed's own form).
        why: what is wrong with it, in words.
        step: optimizer step, where it can be read.
        world: ranks that wrote it.
        zero_stage: of the run that wrote it.
        bytes: of all files.
        written: seconds since the epoch.
    """

    name: str
    verdict: str
    why: str = ""
    step: int | None = None
    world: int | None = None
    zero_stage: int | None = None
    bytes: int = 0
    written: float = 0.0


def kind_of(path: Path) -> str:
    """What a path is: "checkpoint", "folder" (of checkpoints) or "run".

    Raises:
        CheckpointError: none of them.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / MANIFEST).is_file() and (path / "state.json").is_file():
        return "checkpoint"
    if (path / FOLDER).is_dir():
        return "run"
    if any((path / name).exists() for name in ("state.json", "rank-00000.json", MANIFEST)):
        return "checkpoint"  # a part of one: reading it will say what is missing
    if (path / LATEST).is_file() or any(_is_checkpoint(p) for p in path.iterdir() if p.is_dir()):
        return "folder"
    if any(path.glob(_NATIVE)) or any(path.glob(f"*/{_NATIVE}")):
        return "folder"
    raise CheckpointError(
        f"{path}: neither a checkpoint, nor a folder of checkpoints, nor a run folder (these hold {MANIFEST}, "
        f"{LATEST} and {FOLDER}/)"
    )


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith((".tmp-", "step-")) or (path / MANIFEST).is_file() or any(path.glob(_NATIVE))


def survey(root: Path, *, hashes: bool) -> tuple[list[Entry], str | None]:
    """All checkpoints of a folder, newest first, and the name of the one that a resume would take.

    Args:
        root: folder of checkpoints.
        hashes: compare SHA-256 digests, not only sizes.
    """
    usable = [p.name for p in candidates(root)]
    folders = [p for p in root.iterdir() if p.is_dir() and (p.name in usable or _is_checkpoint(p))]
    entries = [_entry(p, hashes) for p in folders]
    entries.sort(key=lambda e: (e.step is not None, e.step or 0, e.name), reverse=True)
    good = {e.name for e in entries if e.verdict == "good"}
    return entries, next((name for name in usable if name in good), None)


def _entry(folder: Path, hashes: bool) -> Entry:
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    facts: dict[str, Any] = {"name": folder.name, "bytes": size, "written": folder.stat().st_mtime}
    if any(folder.glob(_NATIVE)) and not (folder / MANIFEST).exists():
        return Entry(verdict="foreign", why="DeepSpeed's own form (pickled), not opened", **facts)
    if folder.name.startswith(".tmp-old-"):
        return Entry(verdict="incomplete", why="set aside while a checkpoint of the same name was written", **facts)
    if folder.name.startswith("."):
        return Entry(verdict="incomplete", why="writing it was interrupted, or is going on now", **facts)
    if not (folder / MANIFEST).is_file():
        return Entry(verdict="incomplete", why=f"no {MANIFEST}", **facts)
    try:
        found = Checkpoint(folder, hashes=hashes)
    except CheckpointError as error:
        return Entry(verdict="damaged", why=str(error).replace(f"{folder}/", "").replace(f"{folder}: ", ""), **facts)
    facts |= {"step": found.step, "world": found.world, "zero_stage": found.zero_stage}
    return Entry(verdict="good", **facts)


def newest(path: Path, *, hashes: bool = True) -> Path:
    """The checkpoint that a path stands for: itself, or the one that a resume would take.

    Raises:
        CheckpointError: there is none that is good.
    """
    kind = kind_of(path)
    if kind == "checkpoint":
        return path
    root = path / FOLDER if kind == "run" else path
    entries, chosen = survey(root, hashes=hashes)
    if chosen is None:
        found = "".join(f"\n  {e.name}: {e.verdict}, {e.why}" for e in entries)
        raise CheckpointError(f"{root}: no usable checkpoint{found}")
    return root / chosen


def describe(found: Checkpoint) -> dict[str, Any]:
    """Everything about one checkpoint as JSON types.

    Raises:
        CheckpointError: a file of it cannot be read.
    """
    document, client = found.document, found.client
    sizes = {name: math.prod(shape) for name, shape in (found.shapes | found.frozen).items()}
    config = found.config
    architecture = found.architecture
    data = client.get("data")
    return {
        "path": str(found.folder),
        "step": found.step,
        "world": found.world,
        "zero_stage": found.zero_stage,
        "versions": dict(document.get("versions") or {}),
        "bytes": sum(int(entry["bytes"]) for entry in found.files.values()),
        "files": found.files,
        "model": {
            "name": _section(config, "model").get("name"),
            "parameters": sum(sizes.values()),
            "trained": sum(sizes[name] for name in found.shapes),
            "frozen": sum(sizes[name] for name in found.frozen),
            "tensors": len(sizes),
            "buffers": len(found.buffers),
            "dtype": _dtype(config),
            "digest": architecture.get("digest") if architecture is not None else None,
        },
        "state": {
            "keys": [key for key in found.keys if key not in (MASTERS, AVERAGE)],
            "steps": _steps(found),
        },
        "groups": _groups(found, sizes),
        "scheduler": plain(document.get("scheduler")),
        "counters": plain(document.get("counters")),
        "scaler": plain(document.get("scaler")),
        "ema": plain(document.get("ema")),
        "history": plain(architecture.get("history")) if architecture is not None else None,
        "methods": {name: plain(state) for name, state in found.methods.items()},
        "data": plain(data),
        "best": plain(client.get("best")),
        "seconds": plain(client.get("chrono")),
        "plan": client.get("plan"),
        "config_digest": _digest(config),
        "config": config,
    }


def plain(value: Any) -> Any:
    """JSON types: a tensor becomes its shape in words."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _section(config: dict[str, Any] | None, name: str) -> dict[str, Any]:
    found = ((config or {}).get("efftrain") or {}).get(name)
    return found if isinstance(found, dict) else {}


def _dtype(config: dict[str, Any] | None) -> str | None:
    """Precision of the working weights; the masters are always fp32."""
    if config is None:
        return None
    for key, name in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        if isinstance(config.get(key), dict) and config[key].get("enabled"):
            return name
    return "fp32"


def _digest(config: dict[str, Any] | None) -> str | None:
    if config is None:
        return None
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _steps(found: Checkpoint) -> list[int]:
    """Different step counts of the optimizer's state; more than one where parameters were born in mid-run."""
    steps = {int(s["step"]) for name in found.shapes if "step" in (s := found.scalars_of(name))}
    return sorted(steps)


def _groups(found: Checkpoint, sizes: dict[str, int]) -> list[dict[str, Any]]:
    members = _members(found)
    rows = []
    for number, group in enumerate(found.groups):
        row = {key: plain(group.get(key)) for key in ("name", "lr", "weight_decay")}
        if members is not None:
            row |= {"tensors": len(members[number]), "parameters": sum(sizes[name] for name in members[number])}
        rows.append(row)
    return rows


def _members(found: Checkpoint) -> list[list[str]] | None:
    """Parameters of each group: as the architecture says, else by the tensor they lie in; None where neither says."""
    count = len(found.groups)
    architecture = found.architecture
    if architecture is not None:
        members = [[str(name) for name in names] for _, names in architecture["groups"]]
        return members if len(members) == count and {n for m in members for n in m} == set(found.shapes) else None
    flats = {name: {piece.flat for piece in pieces} for name, pieces in found.pieces.items()}
    if found.zero_stage not in (1, 2) or Counter(map(len, flats.values())).keys() != {1}:
        return None  # only ZeRO-1 and 2 keep exactly one tensor for each group
    if not {flat for of_name in flats.values() for flat in of_name} <= set(range(count)):
        return None
    return [[name for name in found.shapes if flats[name] == {number}] for number in range(count)]
