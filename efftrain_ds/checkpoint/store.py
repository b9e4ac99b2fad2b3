"""Save and load the whole training state of one engine. Every function here is collective."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import CheckpointError
from ..zero import access
from ..zero.access import Layout
from ..zero.ema import ShardedEma
from .folder import name_of, newest_good, prune, seal, sha256_of, sync_file, verify
from .plain import from_plain, to_plain
from .shards import ShardReader, read_into, write_rank

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass
class Loaded:
    """What a load returns beside the state it put back: the folder, the step, the caller's own state, the world."""

    path: Path
    step: int
    extra: dict[str, Any]
    world: int


def _rank_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _agree(error: str | None) -> list[str]:
    """All ranks' errors, on all ranks."""
    _, world = _rank_world()
    if world == 1:
        return [error] if error else []
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, error)
    return [f"rank {rank}: {text}" for rank, text in enumerate(gathered) if text]


def _rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    return tensors, {
        "numpy": [kind, position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_rng_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))


def _group_documents(layout: Layout) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in layout.base.param_groups]


def save(
    engine: Any,
    root: str | Path,
    *,
    step: int,
    extra: dict[str, Any],
    ema: ShardedEma | None = None,
    tag: str | None = None,
    keep: int | None = None,
    latest: bool = True,
) -> Path:
    """Write a checkpoint of a DeepSpeedEngine between two optimizer steps.

    Args:
        engine: the DeepSpeedEngine.
        root: folder of all checkpoints of the run.
        step: optimizer step, names the folder unless `tag` is given.
        extra: the caller's own state (plain types and tensors), equal on all ranks.
        ema: average to store with it.
        tag: folder name.
        keep: newest checkpoints to keep; None keeps all.
        latest: point ``latest`` at the new checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: writing failed on some rank; earlier checkpoints are untouched.
    """
    if ema is not None and ema.swapped:
        raise CheckpointError("a checkpoint cannot be saved while the average is swapped in (evaluating)")
    if not access.at_boundary(engine):
        raise CheckpointError("a checkpoint can be saved only between optimizer steps (accumulation is in flight)")
    rank, world = _rank_world()
    root = Path(root)
    final = root / (tag or name_of(step))
    partial = root / f".tmp-{final.name}"
    layout = access.layout_of(engine)
    frozen = list(access.frozen_parameters(engine.module))
    with access.gather_full([p for _, p in frozen]):
        frozen_values = {name: p.detach().cpu().clone() for name, p in frozen} if rank == 0 else {}
    error = None
    try:
        if rank == 0:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
    except OSError as problem:
        error = str(problem)
    problems = _agree(error)
    written: list[dict] = []
    if not problems:
        try:
            written = _write_all(engine, partial, rank, world, step, extra, ema, layout, frozen_values)
        except Exception as problem:  # whatever it is, the other ranks must hear of it instead of waiting
            error = f"{type(problem).__name__}: {problem}"
        problems = _agree(error)
    entries: list[Any] = [written]
    if world > 1 and not problems:
        entries = [None] * world
        dist.all_gather_object(entries, written)
    if not problems:
        try:
            if rank == 0:
                digests = {
                    entry["name"]: {k: entry[k] for k in ("bytes", "sha256")} for part in entries for entry in part
                }
                seal(partial, final, digests, latest=latest)
                if keep is not None:
                    prune(root, keep, protect=[final])
        except OSError as problem:
            error = str(problem)
        problems = _agree(error)
    if problems:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written; earlier checkpoints are untouched\n  " + "\n  ".join(problems)
        )
    return final


def _write_all(
    engine: Any,
    folder: Path,
    rank: int,
    world: int,
    step: int,
    extra: dict,
    ema: ShardedEma | None,
    layout: Layout,
    frozen: dict[str, Tensor],
) -> list[dict]:
    rng_tensors, rng_plain = _rng_state()
    buffers = {f"buffer.{n}": b for n, b in engine.module.named_buffers() if b is not None}
    shadow = ema.shadow if ema is not None else None
    paths = write_rank(folder, rank, layout, shadow, {**rng_tensors, **buffers}, {"rng": rng_plain})
    if rank == 0:
        tensors: dict[str, Tensor] = {f"frozen.{name}": value for name, value in frozen.items()}
        scheduler = engine.lr_scheduler
        document = {
            "format": FORMAT,
            "step": step,
            "world": world,
            "zero_stage": layout.stage,
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
            "shapes": {name: list(shape) for name, shape in layout.shapes.items()},
            "counters": access.counters(engine),
            "scaler": access.scaler_state(engine),
            "groups": to_plain(_group_documents(layout), "groups", tensors),
            "scheduler": to_plain(scheduler.state_dict(), "scheduler", tensors) if scheduler is not None else None,
            "ema": {"updates": ema.updates, "decay": ema.decay} if ema is not None else None,
            "extra": to_plain(extra, "extra", tensors),
        }
        state, data = folder / "state.json", folder / "state.safetensors"
        state.write_text(json.dumps(document, indent=1) + "\n")
        save_file(tensors, str(data))
        paths += [state, data]
    written = []
    for path in paths:
        sync_file(path)
        written.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    return written


def find(root: str | Path, tag: str | None = None) -> Path | None:
    """The checkpoint to load: `tag`, or the newest that verifies; None where there is none. Rank 0 decides for all.

    Raises:
        CheckpointError: on all ranks, where checkpoints exist but none can be used.
    """
    rank, world = _rank_world()
    answer: list[Any] = [None, None]
    if rank == 0:
        try:
            if tag is not None:
                verify(Path(root) / tag)
                answer[0] = str(Path(root) / tag)
            else:
                found = newest_good(Path(root))
                answer[0] = str(found) if found is not None else None
        except (CheckpointError, OSError) as error:
            answer[1] = str(error)
    if world > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return Path(answer[0]) if answer[0] is not None else None


def read_document(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, as stored.

    Raises:
        CheckpointError: not there, or of another format.
    """
    try:
        document = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / 'state.json'}: {error}") from error
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {document.get('format')}, this version reads format {FORMAT}")
    return document


def read_extra(path: Path) -> dict[str, Any]:
    """The caller's own state of a checkpoint."""
    return from_plain(read_document(path)["extra"], load_file(str(path / "state.safetensors")))


def load(
    engine: Any,
    path: Path,
    *,
    ema: ShardedEma | None = None,
    optimizer_state: bool = True,
    scheduler_state: bool = True,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Loaded:
    """Put a verified checkpoint into a DeepSpeedEngine of any world size and ZeRO stage.

    Args:
        engine: the DeepSpeedEngine.
        path: the checkpoint folder.
        ema: average to fill.
        optimizer_state: load moments, counters, scaler, groups and RNG too.
        scheduler_state: load the scheduler.
        check: called with the caller's own state before anything changes; raises CheckpointError to refuse.

    Raises:
        CheckpointError: it belongs to another model. The engine is then unchanged.
    """
    rank, world = _rank_world()
    layout = access.layout_of(engine)
    error = None
    try:
        document = read_document(path)
        state_tensors = load_file(str(path / "state.safetensors"))
        reader = ShardReader(path, document["world"])
        reader.check(layout.shapes)
        _check_model(engine, document, state_tensors, layout, optimizer_state, path)
        if check is not None:
            check(from_plain(document["extra"], state_tensors))
    except Exception as problem:
        error = str(problem) if isinstance(problem, CheckpointError) else f"{type(problem).__name__}: {problem}"
    problems = _agree(error)
    if problems:
        raise CheckpointError(error or problems[0])
    read_into(reader, layout, ema.shadow if ema is not None else None, optimizer_state)
    layout.push()
    _load_frozen(engine, state_tensors)
    own = rank if world == document["world"] else 0
    local = reader.local(own)
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if f"buffer.{name}" in local:
                buffer.copy_(local[f"buffer.{name}"])
    if optimizer_state:
        access.load_counters(engine, document["counters"])
        access.load_scaler_state(engine, document["scaler"])
    if ema is not None and document["ema"] is not None:
        ema.updates = document["ema"]["updates"]
    if scheduler_state and engine.lr_scheduler is not None and document["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(from_plain(document["scheduler"], state_tensors))
    if optimizer_state:
        for group, saved in zip(layout.base.param_groups, from_plain(document["groups"], state_tensors), strict=True):
            group.update(saved)
        if world == document["world"]:
            _set_rng_state(local, reader.rank_document(own)["rng"])
    return Loaded(path, document["step"], from_plain(document["extra"], state_tensors), document["world"])


def _check_model(
    engine: Any, document: dict, tensors: dict[str, Tensor], layout: Layout, optimizer_state: bool, path: Path
) -> None:
    """Shapes of masters and frozen parameters, and the number of parameter groups."""
    shapes = {name: (list(shape), document["shapes"].get(name)) for name, shape in layout.shapes.items()}
    for name, parameter in access.frozen_parameters(engine.module):
        value = tensors.get(f"frozen.{name}")
        shapes[name] = (list(access.full_shape(parameter)), None if value is None else list(value.shape))
    wrong = [f"{name} is {found}, the model's is {own}" for name, (own, found) in shapes.items() if own != found]
    if wrong:
        raise CheckpointError(f"{path}: the checkpoint belongs to another model\n  " + "\n  ".join(wrong[:5]))
    saved = from_plain(document["groups"], tensors)
    if optimizer_state and len(saved) != len(layout.base.param_groups):
        raise CheckpointError(
            f"{path}: {len(saved)} parameter groups, the optimizer has {len(layout.base.param_groups)}"
        )


def _load_frozen(engine: Any, tensors: dict[str, Tensor]) -> None:
    for name, parameter in access.frozen_parameters(engine.module):
        with access.gather_full([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(tensors[f"frozen.{name}"])
