"""Build the extension that DeepSpeed compiles on first use, so that no run or test pays for it (or times out on it)."""

from __future__ import annotations

import time

import torch


def main() -> None:
    """Build what this machine needs; on a GPU machine DeepSpeed builds its fused optimizer on first use."""
    if torch.cuda.is_available():
        return
    from deepspeed.accelerator import get_accelerator

    start = time.monotonic()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        raise SystemExit("DeepSpeed's CPU communication extension cannot be built here: is a C++ compiler installed?")
    builder.load()
    print(f"DeepSpeed's CPU extension is ready ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
