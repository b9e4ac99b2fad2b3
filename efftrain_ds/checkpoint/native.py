"""DeepSpeed's own checkpoint form, for interchange with tools that read it. Never a checkpoint of record.

Its files are pickles that run code on load, a rank killed while it writes leaves an incomplete folder, and a model that
has grown since cannot take them. What DeepSpeed leaves out is done here as far as it can be from outside: an error of
one rank is raised on all, ``latest`` moves only after all have succeeded, and before loading each rank compares the
check sums inside the files that it is about to read.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from ..core import ranks
from ..core.errors import CheckpointError
from ..core.files import write_whole
from ..zero import native_files
from .folder import LATEST, latest_name

logger = logging.getLogger(__name__)

_KEY = "efftrain_ds"


def save(engine: Any, root: str | Path, tag: str | None, extra: dict[str, Any], *, latest: bool = True) -> None:
    """DeepSpeed's ``save_checkpoint`` with the caller's state in its client state. Collective.

    Args:
        engine: the DeepSpeedEngine.
        root: folder.
        tag: folder below it; None is DeepSpeed's ``global_stepN``.
        extra: the caller's own state.
        latest: move DeepSpeed's ``latest``.

    Raises:
        CheckpointError: on all ranks, where DeepSpeed could not write it on some; ``latest`` is as it was.
    """
    root = Path(root)
    name = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    ranks.agree(ranks.problem_of(lambda: native_files.check_names(engine)), CheckpointError)
    new = ranks.from_first(lambda: not (root / name).exists())
    error = None
    with native_files.errors_noted(engine) as problems:
        try:
            engine.save_checkpoint(str(root), tag=name, client_state={_KEY: extra}, save_latest=False)
        except Exception as problem:  # not of the disk
            error = ranks.text_of(problem)
    found = ranks.problems(error or "; ".join(problems) or None)
    if not found and latest:
        found = ranks.problems(
            ranks.problem_of(lambda: write_whole(root / LATEST, name)) if ranks.rank() == 0 else None
        )
    if found:
        if new and ranks.rank() == 0:
            shutil.rmtree(root / name, ignore_errors=True)
        raise CheckpointError(f"{root / name}: DeepSpeed could not write its checkpoint\n  " + "\n  ".join(found))


def load(
    engine: Any, root: str | Path, tag: str | None, *, full: bool = True
) -> tuple[str | None, dict[str, Any] | None]:
    """DeepSpeed's ``load_checkpoint``; (path, the caller's state), or (None, None) where there is none. Collective.

    Runs the code that is in the files' pickles.

    Args:
        engine: the DeepSpeedEngine.
        root: folder.
        tag: folder below it; None takes DeepSpeed's ``latest``.
        full: load optimizer and scheduler too.

    Raises:
        CheckpointError: on all ranks: a file is missing or damaged on some (the engine is then unchanged), DeepSpeed
            could not read it, or it was saved without this package and `full` is asked for.
    """
    logger.warning("%s: loading DeepSpeed's own form, which runs the code in its pickles", root)
    root = Path(root)
    if tag is None and not engine.load_universal_checkpoint():
        tag = ranks.from_first(lambda: latest_name(root))
        if tag is None:
            return None, None
    if tag is not None:
        ranks.agree(ranks.problem_of(lambda: _check(engine, root, str(tag), full)), CheckpointError)
    path: str | None = None
    extra: dict[str, Any] | None = None
    error: str | None = None
    try:
        path, client = engine.load_checkpoint(
            str(root),
            tag=tag,
            load_optimizer_states=full,
            load_lr_scheduler_states=full,
            load_module_only=not full,
        )
        if path is not None:
            extra = _extra_of(path, client or {}, full)
    except Exception as problem:  # unpickling fails in many ways
        text = ranks.text_of(problem)
        error = text if isinstance(problem, CheckpointError) else f"{root}: DeepSpeed could not read it: {text}"
    ranks.agree(error, CheckpointError)
    return (str(path), extra) if path is not None else (None, None)


def _check(engine: Any, root: Path, tag: str, full: bool) -> None:
    native_files.check_names(engine)
    for path in native_files.files_of_rank(engine, root, tag, optimizer=full):
        native_files.check_readable(path)


def _extra_of(path: str, client: dict[str, Any], full: bool) -> dict[str, Any]:
    """The caller's own state out of DeepSpeed's client state."""
    extra = client.get(_KEY)
    if extra is None:
        if full:
            raise CheckpointError(f"{path}: saved without this package; load it with load_module_only=True")
        extra = {"client": client}
    return extra
