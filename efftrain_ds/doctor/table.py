"""All checks in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import comm, compute, software, storage
from .check import Function, Setup, quiet

CHECKS: tuple[tuple[str, Function], ...] = (
    ("Python", software.python),
    ("libraries", software.libraries),
    ("GPU", compute.gpu),
    ("Triton", compute.triton),
    ("kernels", compute.kernels),
    ("compiler", compute.compiler),
    ("extensions", compute.extensions),
    ("collectives", comm.collectives),
    ("clocks", comm.clocks),
    ("configuration", software.configuration),
    ("plan", software.plan),
    ("data", storage.shards),
    ("shared memory", storage.shared_memory),
    ("left memory", storage.abandoned_memory),
    ("output", storage.output),
    ("open files", storage.open_files),
    ("processors", storage.processors),
)


def make_setup(path: str | None, overrides: Sequence[str], world: int) -> Setup:
    """Read the configuration; what is wrong with it is kept for its check."""
    setup = Setup(world=world, path=path)
    if path is None:
        return setup
    try:
        with quiet():
            from ..config.loader import check_config

            setup.config = check_config(Path(path), overrides=overrides, world=world)
    except Exception as error:
        setup.error = error
    return setup
