"""Shared memory that DeepSpeed's collectives on CPUs leave behind.

Each rank of a launched run without accelerators maps a file of 66 MB in ``/dev/shm``, and DeepSpeed (0.19.8) never
removes it: it stays after the run, as memory that nobody can use, until the machine is started again. A file that all
ranks have mapped needs no name, so the name is removed while the run begins; the memory is given back when the last
rank ends, however it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

FOLDER = Path("/dev/shm")
PREFIX = "deepspeed_allreduce_buffer"
"""First part of the names, private to DeepSpeed (csrc/cpu/comm/shm.cpp): PREFIX_uid_address_port_rank."""


def own_buffer(folder: Path = FOLDER) -> Path:
    """The file of this rank."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return folder / f"{PREFIX}_{os.getuid()}_{address}_{port}_{rank}"


def release_own_buffer(device: torch.device, folder: Path = FOLDER) -> bool:
    """Remove the name of this rank's file, once all ranks have joined. Collective on CPUs.

    Args:
        device: of this rank; only CPUs have such files.
        folder: where they are.

    Returns:
        True where a file was removed.
    """
    if device.type != "cpu" or not dist.is_initialized():
        return False
    dist.barrier()  # every rank has mapped the files of all
    try:
        own_buffer(folder).unlink()
    except FileNotFoundError:
        return False
    return True


def abandoned_buffers(folder: Path = FOLDER, processes: Path = Path("/proc")) -> list[Path]:
    """Files of runs that have ended, of this user and of others, as far as this user may see who maps them."""
    found = sorted(folder.glob(f"{PREFIX}_*"))
    if not found:
        return []
    mapped = set(_mapped(processes.glob("[0-9]*/maps")))
    return [path for path in found if str(path) not in mapped]


def _mapped(tables: Iterable[Path]) -> Iterable[str]:
    for table in tables:
        try:
            text = table.read_text(errors="replace")
        except OSError:  # ended meanwhile, or not ours
            continue
        for line in text.splitlines():
            if PREFIX in line:
                yield line.split(maxsplit=5)[5]
