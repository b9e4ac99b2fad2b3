"""Where a run runs: machine, versions and the state of the code, for the journal."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

from ..cost.throughput import machine_name

PACKAGES = ("efftrain-ds", "torch", "torchvision", "deepspeed", "timm", "webdataset", "triton", "numpy")


def environment(code: Path | None = None) -> dict[str, Any]:
    """Plain values for a "start" or "resume" event.

    Args:
        code: folder whose git state is noted; None takes the current one.

    Returns:
        ``{"host", "machine", "cpus", "python", "platform", "cwd", "versions", "git"}``; "git" is
        ``{"commit", "changed_files"}`` or None outside of a repository.
    """
    return {
        "host": socket.gethostname(),
        "machine": machine_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cwd": os.getcwd(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git": git_state(code),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit and number of changed files of the repository around `folder`; None without git or repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    if commit is None or status is None:
        return None
    return {"commit": commit.strip(), "changed_files": len(status.splitlines())}


def _git(folder: Path | None, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
