"""Build the extension that DeepSpeed compiles on first use, so that no run or test pays for it (or times out on it)."""

from __future__ import annotations

import os
import time

os.environ["DS_ACCELERATOR"] = "cpu"  # the tests' gloo processes need it on a GPU machine too


def main() -> None:
    """Build the shared-memory extension of CPU processes (a GPU's fused optimizer is built by its first run)."""
    from deepspeed.accelerator import get_accelerator

    start = time.monotonic()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        raise SystemExit("DeepSpeed's CPU communication extension cannot be built here: is a C++ compiler installed?")
    builder.load()
    print(f"DeepSpeed's CPU extension is ready ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
