"""Shared fixtures: a pool of gloo workers and the compiled-extension cache."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# another version of ninja on the machine would take the compiled extension for outdated and build it again
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not os.path.exists("/dev/nvidiactl"):
    # Triton decides when a kernel is defined; our kernels still run only where a test asks for them
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """What imports and the collection leave stays: no collection of garbage need look through it."""
    gc.freeze()


def pytest_sessionfinish():
    """What is still frozen at the end of Python would be reported as leaked by some libraries."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def ranks():
    """Callable ``ranks(function, *args, world=2)``: runs ``function(*args)`` on each rank; returns their results."""
    from tests.pool import RankPool

    pools: dict[int, RankPool] = {}

    def run(function, *args, world: int = 2):
        if world not in pools:
            pools[world] = RankPool(world)
        return pools[world].run(function, *args)

    yield run
    for pool in pools.values():
        pool.close()
