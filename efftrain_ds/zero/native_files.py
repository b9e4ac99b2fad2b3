"""DeepSpeed's own checkpoint files: names, and errors of one rank that must not leave the others waiting.

DeepSpeed ends its saving with a barrier, so an error that leaves it on one rank leaves all others there. Here the
places that touch the disk note their error and go on; the caller lets the ranks agree afterwards. Beside `access` and
`skip` the only file that uses private names of DeepSpeed; `private_names` lists them and a test names them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from ..core.ranks import text_of
from .access import missing_text
from .skip import _override

_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_WRITER = "deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine"
# class -> what this file replaces or calls (checked on 0.19.8)
_PRIVATE: dict[str, tuple[str, ...]] = {
    _ENGINE: ("checkpoint_engine", "_copy_recovery_script", "_get_ckpt_name", "_get_zero_ckpt_name"),
    _WRITER: ("save", "makedirs", "is_decoupled"),
}
_LEGACY = b"\x80"
"""First byte of torch's older files, which are no zip archives and have no check sums."""


def private_names() -> dict[str, tuple[str, ...]]:
    """Private attributes in use, by DeepSpeed class."""
    return dict(_PRIVATE)


def check_names(engine: Any) -> None:
    """Refuse an engine for which this file was not made.

    Raises:
        CheckpointError: an attribute is missing, or its files are written by another process.
    """
    writer = getattr(engine, "checkpoint_engine", None)
    for name, thing in ((_ENGINE, engine), (_WRITER, writer)):
        if text := missing_text(name, thing, _PRIVATE[name]):
            raise CheckpointError(text)
    if writer.is_decoupled():
        raise CheckpointError(
            'form="deepspeed": the writer that "checkpoint" of the DeepSpeed configuration asks for works in another '
            "process, and cannot be waited for; take it out, or save with the engine of DeepSpeed itself"
        )


@contextmanager
def errors_noted(engine: Any) -> Iterator[list[str]]:
    """Inside, what fails on disk while ``engine.save_checkpoint`` runs is put into the list instead of being raised."""
    problems: list[str] = []

    def noting(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if problems:  # the checkpoint is lost, and a full disk does not get emptier
                return None
            try:
                return action(*args, **kwargs)
            except Exception as error:
                problems.append(text_of(error))
                return None

        return call

    writer = engine.checkpoint_engine
    with ExitStack() as stack:
        stack.enter_context(_override(writer, save=noting(writer.save), makedirs=noting(writer.makedirs)))
        stack.enter_context(_override(engine, _copy_recovery_script=noting(engine._copy_recovery_script)))
        yield problems


def files_of_rank(engine: Any, root: Path, tag: str, *, optimizer: bool) -> list[Path]:
    """The files that ``engine.load_checkpoint`` reads on this rank; [] where that cannot be said beforehand.

    Args:
        engine: the DeepSpeedEngine.
        root: folder.
        tag: folder below it.
        optimizer: the optimizer's state is loaded, too.
    """
    if engine.load_universal_checkpoint() or engine.has_moe_layers:
        return []
    found = [Path(engine._get_ckpt_name(str(root), tag))]
    if optimizer and engine.zero_optimization():
        found.append(Path(engine._get_zero_ckpt_name(str(root), tag)))
    return found


def check_readable(path: Path) -> None:
    """Read a file of torch once and compare its check sums, which torch itself does not look at. Nothing is executed.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:
                if stream.read(1) != _LEGACY:
                    raise CheckpointError(f"{path}: not a file of torch.save")
            return
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if bad is not None:
        raise CheckpointError(f"{path}: {bad} is damaged")
