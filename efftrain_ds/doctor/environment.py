"""The environment for bug reports: versions, machine, and the variables that matter; nothing personal."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

from ..observe import environment as observed

_PREFIXES = ("CUDA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "OMP_", "MKL_", "EFFTRAIN_")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NNODES", "SLURM_NTASKS", "CXX", "CC")
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "KEY")
_PERSONAL = ("host", "cwd")
_MORE = ("pydantic", "safetensors", "pillow", "simplejpeg", "onnx", "onnxscript", "onnxruntime", "nvidia-nccl-cu13")


def environment() -> dict[str, Any]:
    """Versions, machine and variables as JSON types."""
    import torch

    found = {key: value for key, value in observed.environment().items() if key not in _PERSONAL}
    for name in _MORE:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        **found,
        "memory": _first(Path("/proc/meminfo"), "MemTotal"),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if (name.startswith(_PREFIXES) or name in _NAMES) and not any(word in name for word in _SECRET)
        },
    }


def _first(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key) and ":" in line), None)
