"""Save and load the whole training state of one engine. Every function here is collective."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor

from ..core import faults, ranks
from ..core.errors import CheckpointError
from ..zero import access
from ..zero.access import Layout
from ..zero.ema import ShardedEma
from .background import BackgroundSave
from .folder import free_space, name_of, newest_good, prune, recover, seal, verify
from .plain import from_plain, to_plain
from .random_state import plain_rng_state, set_plain_rng_state
from .shards import ShardReader, rank_parts, read_into, read_tensors
from .writer import Part, write_parts, write_unsynced

logger = logging.getLogger(__name__)

FORMAT = 1
Settle = Callable[[], list[dict[str, Any]]]


@dataclass
class Loaded:
    """What a load returns beside the state it put back: the folder, the step, the caller's own state, the world."""

    path: Path
    step: int
    extra: dict[str, Any]
    world: int


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
    background: bool | Literal["sync"] = False,
    buffers: dict[str, Tensor] | None = None,
) -> BackgroundSave | None:
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
        background: True copies the state in host memory and lets threads write it, "sync" writes it and lets threads
            wait for the disk; `finish` tells how it went.
        buffers: with `background` True, host memory of the save before, to be used again; the save before is finished.

    Returns:
        What `finish` takes, with `background`.

    Raises:
        CheckpointError: writing failed on some rank; earlier checkpoints are untouched.
    """
    if ema is not None and ema.swapped:
        raise CheckpointError("a checkpoint cannot be saved while the average is swapped in (evaluating)")
    if not access.at_boundary(engine):
        raise CheckpointError("a checkpoint can be saved only between optimizer steps (accumulation is in flight)")
    faults.point("save.begin")
    rank, world = ranks.rank(), ranks.world_size()
    root = Path(root)
    final = root / (tag or name_of(step))
    partial = root / f".tmp-{final.name}"

    def finished(entries: list[dict[str, Any]]) -> None:
        seal(partial, final, entries, latest=latest)
        if keep is not None:
            prune(root, keep, protect=[final])

    parts: list[Part] = []
    frozen = list(access.frozen_parameters(engine.module))
    frozen_values: dict[str, Tensor] = {}

    def copied() -> None:
        frozen_values.update({name: p.detach().cpu().clone() for name, p in frozen})

    def collected() -> None:
        memory = {} if buffers is None else buffers
        for part in _parts(engine, rank, world, step, extra, ema, frozen_values):
            parts.append(part.owned(memory) if background is True else part)

    # whatever fails on one rank, the others must hear of it instead of waiting
    with access.gather_full([p for _, p in frozen]):
        error = ranks.problem_of(copied) if rank == 0 else None
    problems = ranks.problems(error or ranks.problem_of(collected))
    sizes = ranks.gather(sum(part.nbytes for part in parts))
    if not problems:
        problems = ranks.problems(ranks.problem_of(lambda: _begin(root, partial, sum(sizes)) if rank == 0 else None))
    if not problems and background is True:
        return BackgroundSave(partial, final, lambda: write_parts(partial, parts), rank, world, finished)
    if not problems and background == "sync":
        problems, settle = _write_unsynced(partial, parts)
        if settle is not None:
            return BackgroundSave(partial, final, settle, rank, world, finished)
    if not problems and not background:
        written: list[dict[str, Any]] = []
        problems = ranks.problems(ranks.problem_of(lambda: written.extend(write_parts(partial, parts))))
    if not problems:  # nothing is left to a thread
        entries = [entry for of_rank in ranks.gather(written) for entry in of_rank]
        problems = ranks.problems(ranks.problem_of(lambda: finished(entries) if rank == 0 else None))
    if problems:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise _failed(final, problems)
    return None


def _write_unsynced(partial: Path, parts: Sequence[Part]) -> tuple[list[str], Settle | None]:
    """Write the files of all ranks; returns the problems, or what waits for the disk where there are none."""
    settle: Settle | None = None
    error: str | None = None
    try:
        settle = write_unsynced(partial, parts)
    except Exception as problem:  # whatever it is, the other ranks must hear of it instead of waiting
        error = ranks.text_of(problem)
    problems = ranks.problems(error)
    if problems and settle is not None:  # nothing stays open on the ranks that could write
        ranks.problem_of(settle)
    return problems, None if problems else settle


def finish(saving: BackgroundSave) -> None:
    """Wait until a checkpoint that is written in the background is complete. Collective.

    Raises:
        CheckpointError: on all ranks, where writing failed on some; earlier checkpoints are untouched.
    """
    problems = ranks.problems(saving.wait_written())
    if problems:
        saving.abandon()  # the first rank may be waiting for a receipt that cannot come
        if saving.rank == 0:
            shutil.rmtree(saving.partial, ignore_errors=True)
    else:
        problems = ranks.problems(saving.wait())
    if problems:
        raise _failed(saving.final, problems)


def _failed(final: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{final}: could not be written; earlier checkpoints are untouched\n  " + "\n  ".join(problems)
    )


def _begin(root: Path, partial: Path, size: int) -> None:
    """An empty temporary folder, where there is room for `size` bytes."""
    shutil.rmtree(partial, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    free_space(root, size)
    partial.mkdir()


def _parts(
    engine: Any,
    rank: int,
    world: int,
    step: int,
    extra: dict,
    ema: ShardedEma | None,
    frozen: dict[str, Tensor],
) -> list[Part]:
    """The files of one rank, their tensors being views of the training state."""
    layout = access.layout_of(engine)
    rng_tensors, rng_plain = plain_rng_state()
    buffers = {f"buffer.{n}": b for n, b in engine.module.named_buffers() if b is not None}
    shadow = ema.shadow if ema is not None else None
    parts = rank_parts(rank, layout, shadow, {**rng_tensors, **buffers}, {"rng": rng_plain})
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
        parts += [Part("state.json", json.dumps(document, indent=1) + "\n"), Part("state.safetensors", tensors)]
    return parts


def find(root: str | Path, tag: str | None = None) -> Path | None:
    """The checkpoint to load: `tag`, or the newest that verifies; None where there is none. Rank 0 decides for all.

    Whatever a run that was killed while it replaced a checkpoint has left is tidied up first, see `folder.recover`.

    Raises:
        CheckpointError: on all ranks, where checkpoints exist but none can be used.
    """

    def chosen() -> Path | None:
        recover(Path(root))
        if tag is not None:
            verify(Path(root) / tag)
            return Path(root) / tag
        return newest_good(Path(root))

    try:
        return ranks.from_first(chosen)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(ranks.text_of(error)) from error


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
    return from_plain(read_document(path)["extra"], read_tensors(path / "state.safetensors"))


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
        CheckpointError: on all ranks. It belongs to another model, or a rank cannot read it: the engine is then
            unchanged. Or reading failed half way: the text says that the engine cannot be used any more.
    """
    faults.point("load.begin")
    rank, world = ranks.rank(), ranks.world_size()
    layout = access.layout_of(engine)
    error = None
    try:
        document = read_document(path)
        state_tensors = read_tensors(path / "state.safetensors")
        reader = ShardReader(path, document["world"])
        reader.check(layout.shapes)
        own = rank if world == document["world"] else 0
        local = reader.local(own)
        rng = reader.rank_document(own)["rng"] if optimizer_state and world == document["world"] else None
        _check_model(engine, document, state_tensors, layout, optimizer_state, path)
        _check_buffers(engine, local, path)
        if check is not None:
            check(from_plain(document["extra"], state_tensors))
    except Exception as problem:
        error = ranks.text_of(problem)
    ranks.agree(error, CheckpointError)
    shadow = ema.shadow if ema is not None else None
    error = ranks.problem_of(lambda: read_into(reader, layout, shadow, optimizer_state))
    ranks.agree(error, CheckpointError, f"{path}: read in part only, the engine cannot be used any more")
    layout.push()
    _load_frozen(engine, state_tensors)
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
        if rng is not None:
            set_plain_rng_state(local, rng)
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


def _check_buffers(engine: Any, local: dict[str, Tensor], path: Path) -> None:
    """Shapes of buffers: `copy_` would take one that broadcasts, and refuse others after the weights are written."""
    wrong = [
        f"{name} is {list(saved.shape)}, the model's is {list(buffer.shape)}"
        for name, buffer in engine.module.named_buffers()
        if (saved := local.get(f"buffer.{name}")) is not None and saved.shape != buffer.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: the checkpoint's buffers (masks and the like) are of another form\n  " + "\n  ".join(wrong[:5])
        )


def _load_frozen(engine: Any, tensors: dict[str, Tensor]) -> None:
    for name, parameter in access.frozen_parameters(engine.module):
        with access.gather_full([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(tensors[f"frozen.{name}"])
