"""Which implementation an operation runs: its Triton kernels or plain torch.

``EFFTRAIN_KERNELS=reference`` forces plain torch, ``EFFTRAIN_KERNELS=triton`` forces the kernels (an error where they
cannot run). Without it the kernels run on NVIDIA GPUs from compute capability 8.0 on, everything else in plain torch.
With ``TRITON_INTERPRET=1`` (set before Triton is imported) the same kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

VARIABLE = "EFFTRAIN_KERNELS"
SIDES = ("", "reference", "triton")
MIN_CAPABILITY = (8, 0)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "default")
FUSED = {"enable_fp_fusion": True}
"""Option of every launch: fused multiply-add, said aloud because newer Triton versions will not do it by default."""

_said: set[str] = set()


def requested() -> str:
    """The forced side: "reference", "triton" or "" for none.

    Raises:
        ValueError: the environment variable has another value.
    """
    side = os.environ.get(VARIABLE, "")
    if side not in SIDES:
        raise ValueError(f'{VARIABLE} is "reference" or "triton", found {side!r}')
    return side


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """True where Triton kernels run through its interpreter, as decided when the first kernel was defined."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def architecture(capability: tuple[int, int]) -> str:
    """The class of GPUs that a compute capability belongs to: its members share tiles, launch options and limits.

    One of `ARCHITECTURES`, by the shared memory of a program and the tensor cores' instructions: "sm_80" (8.0, 8.7) has
    163 KiB and mma, "sm_89" (8.6, 8.9, and 12.x: Blackwell for workstations, which has neither Hopper's instructions
    nor its memory) 99 KiB and mma, "sm_90" (9.0) 227 KiB and wgmma, "sm_100" (10.x) 227 KiB and tcgen05. "default" is
    what we do not know; it gets what needs least.
    """
    major = {8: "sm_80" if capability[1] in (0, 7) else "sm_89", 10: "sm_100", 12: "sm_89"}.get(capability[0])
    return major or ("sm_90" if capability == (9, 0) else "default")


@lru_cache(maxsize=16)
def why_not(device_type: str, index: int = 0) -> str | None:
    """Why Triton kernels cannot run on a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    if device_type != "cuda":
        return f"no Triton kernels for {device_type} tensors (TRITON_INTERPRET=1 runs them there, for tests)"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    found = torch.cuda.get_device_capability(index)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def use_triton(op: str, device: torch.device, unable: str | None = None) -> bool:
    """Decide between the kernels and plain torch, and say once where a GPU has to do without.

    Args:
        op: name of the operation.
        device: where its tensors are.
        unable: why the kernels cannot take these arguments (a dtype, a size); None where they can.

    Raises:
        RuntimeError: the kernels are forced and cannot run.
        ValueError: see `requested`.
    """
    side = requested()
    if side == "reference":
        return False
    reason = why_not(device.type, device.index or 0) or unable
    if side == "triton":
        if reason is not None:
            raise RuntimeError(f"{VARIABLE}=triton, but {op} cannot run its kernels: {reason}")
        return True
    if reason is None:
        return device.type == "cuda"
    if f"{op}: {reason}" not in _said:
        _said.add(f"{op}: {reason}")
        logger.log(logging.WARNING if device.type == "cuda" else logging.DEBUG, "%s runs in torch: %s", op, reason)
    return False
