"""What nvidia-smi tells of the GPU that `kernels.py` runs on."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence

import torch


class Clocks:
    """The GPU's clock while something runs, as a command beside it prints it, one number a line. It is never set."""

    def __init__(self, command: Sequence[str]):
        """Start the command; OSError where there is none."""
        self.samples: list[tuple[float, float]] = []  # time, MHz
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            try:
                self.samples.append((time.monotonic(), float(text)))
            except ValueError:  # a GPU that does not tell
                continue

    def since(self, begin: float) -> list[float] | None:
        """Lowest and highest since `begin`, with the sample before it; None before the first one."""
        found = [mhz for when, mhz in self.samples if when >= begin] + [s[1] for s in self.samples if s[0] < begin][-1:]
        return [min(found), max(found)] if found else None

    def close(self) -> None:
        """End the command."""
        self.process.terminate()
        self.process.wait()
        self.reader.join(5)


def smi(device: torch.device, query: str, form: str, *more: str) -> list[str]:
    """A command of nvidia-smi for this GPU, whatever number it has outside of CUDA_VISIBLE_DEVICES."""
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return ["nvidia-smi", f"--query-gpu={query}", f"--format={form}", f"--id={name}", *more]


def watch(device: torch.device) -> Clocks | None:
    """The clock of this GPU from now on; None without nvidia-smi."""
    if device.type != "cuda":
        return None
    try:
        return Clocks(smi(device, "clocks.sm", "csv,noheader,nounits", "--loop-ms=100"))
    except OSError:
        return None
