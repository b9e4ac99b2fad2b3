"""Build the extension that DeepSpeed compiles on first use, so that no run or test pays for it (or times out on it)."""

from __future__ import annotations

import argparse
import os
import sys
import time

# the ninja of this environment, as the trainer uses it: two versions take each other's work for outdated
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ["DS_ACCELERATOR"] = "cpu"  # the tests' gloo processes need it on a GPU machine too


def main() -> None:
    """Build the shared-memory extension of CPU processes (a GPU's fused optimizer is built by its first run)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizers", action="store_true", help="DeepSpeed's CPU Adam and CPU FusedAdam too (3 min)")
    names = ["ShareMemCommBuilder", *(["CPUAdamBuilder", "FusedAdamBuilder"] if parser.parse_args().optimizers else [])]
    from deepspeed.accelerator import get_accelerator

    for name in names:
        start = time.monotonic()
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible():
            raise SystemExit(f"DeepSpeed's CPU extension {name} cannot be built here: is a C++ compiler installed?")
        builder.load()
        print(f"DeepSpeed's CPU extension {name} is ready ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
