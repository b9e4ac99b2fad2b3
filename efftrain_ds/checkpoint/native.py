"""DeepSpeed's own checkpoint form, for interchange with tools that read it. Never a checkpoint of record.

Its files are pickles that run code on load, a killed rank leaves ``latest`` pointing at an incomplete folder, damage is
not noticed, and a model that has grown since cannot take them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError

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
        CheckpointError: DeepSpeed could not write it.
    """
    try:
        engine.save_checkpoint(str(root), tag=tag, client_state={_KEY: extra}, save_latest=latest)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{root}: DeepSpeed could not write its checkpoint: {error}") from error


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
        CheckpointError: DeepSpeed could not read it, or it was saved without this package and `full` is asked for.
    """
    logger.warning("%s: loading DeepSpeed's own form, which runs the code in its pickles and verifies nothing", root)
    try:
        path, client = engine.load_checkpoint(
            str(root),
            tag=tag,
            load_optimizer_states=full,
            load_lr_scheduler_states=full,
            load_module_only=not full,
        )
    except Exception as error:  # unpickling fails in many ways
        raise CheckpointError(f"{root}: DeepSpeed could not read it: {type(error).__name__}: {error}") from error
    if path is None:
        return None, None
    extra = (client or {}).get(_KEY)
    if extra is None:
        if full:
            raise CheckpointError(f"{path}: saved without this package; load it with load_module_only=True")
        extra = {"client": client or {}}
    return str(path), extra
