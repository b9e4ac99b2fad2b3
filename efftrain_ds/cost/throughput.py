"""Measured seconds per optimizer step, kept as JSON, and what they predict for settings that were not measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from ..core.errors import PlanError
from ..core.files import write_whole

FORMAT = 1


def machine_name() -> str:
    """Name of the accelerator, else of the processor, for the source line of a prediction."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Measured:
    """Median time of an optimizer step under one setting.

    Networks of other depths may run under one bandwidth and batch split, so the MACs belong to the identity.

    Attributes:
        bandwidth: side in pixels of what the network sees.
        micro_batch: samples of one rank in one forward.
        accumulation: micro-batches of a step.
        macs: forward MACs of one image (less where frozen layers save work, see `PricedStage.work`).
        seconds: median seconds of a step.
        n: number of steps behind the median.
    """

    bandwidth: int
    micro_batch: int
    accumulation: int
    macs: int
    seconds: float
    n: int

    @property
    def setting(self) -> tuple[int, int, int, int]:
        """What was measured: (bandwidth, micro-batch, accumulation, MACs)."""
        return self.bandwidth, self.micro_batch, self.accumulation, self.macs

    @property
    def work(self) -> float:
        """Forward MACs of one rank in a step."""
        return float(self.macs) * self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Prediction:
    """Seconds of an optimizer step and how they were found ("measured" or "interpolated")."""

    seconds: float
    how: str


@dataclass(frozen=True)
class Throughput:
    """A throughput profile of one machine.

    Attributes:
        machine: accelerator or processor.
        torch: version of torch.
        world: data-parallel ranks it was measured with.
        key: model, precision and ZeRO stage, as `profile_key` writes them.
        date: day of the measurement, ISO.
        entries: one for each measured setting.
    """

    machine: str
    torch: str
    world: int
    key: str
    date: str
    entries: tuple[Measured, ...] = field(default=())

    @property
    def source(self) -> str:
        """One line that names where the figures come from."""
        ranks = f"{self.world} rank{'s' if self.world != 1 else ''}"
        return f"measured {self.date} on {self.machine}, {ranks}, torch {self.torch}"

    def with_entry(self, entry: Measured) -> Throughput:
        """A copy with `entry`, in place of an older one of the same setting."""
        kept = [e for e in self.entries if e.setting != entry.setting]
        return replace(self, entries=(*kept, entry))

    def predict(self, *, bandwidth: int, micro_batch: int, accumulation: int, macs: int) -> Prediction | None:
        """Seconds of a step under a setting: the measured ones, else ``a + b * MACs * batch`` fitted to all entries.

        Returns:
            None for a profile without entries.
        """
        for e in self.entries:
            if e.setting == (bandwidth, micro_batch, accumulation, macs):
                return Prediction(e.seconds, "measured")
        if not self.entries:
            return None
        a, b = fit_line([e.work for e in self.entries], [e.seconds for e in self.entries])
        return Prediction(a + b * float(macs) * micro_batch * accumulation, "interpolated")

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load_throughput(path: str | Path) -> Throughput:
    """Read a profile.

    Raises:
        PlanError: missing, not a profile, or another format version.
    """
    try:
        document = json.loads(Path(path).read_text())
        version = document.pop("format")
        if version != FORMAT:
            raise PlanError(f"{path}: format {version}, this version reads format {FORMAT}")
        entries = tuple(Measured(**entry) for entry in document.pop("entries"))
        profile = Throughput(**document, entries=entries)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path}: not a throughput profile ({type(error).__name__}: {error})") from error
    bad = [
        e for e in profile.entries if not (e.seconds > 0 and e.macs > 0 and e.micro_batch > 0 and e.accumulation > 0)
    ]
    if bad:
        raise PlanError(f"{path}: an entry's numbers must be positive, found {bad[0]}")
    return profile


def profile_key(model: str, precision: str, zero_stage: int) -> str:
    """What a profile belongs to, e.g. ``"deit_small_patch16_224 bf16 zero2"``."""
    return f"{model} {precision} zero{zero_stage}"


def fit_line(work: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Least-squares ``seconds = a + b * work`` with a, b >= 0.

    One point (or points of equal work) cannot tell a from b: then a = 0. A fit that would need a negative constant
    goes through the origin; one that would need a negative slope is a constant.
    """
    x, y = np.asarray(work, dtype=float), np.asarray(seconds, dtype=float)
    scale = x.max()
    x = x / scale
    through_origin = float(x @ y / (x @ x))
    if np.ptp(x) < 1e-9:
        return 0.0, through_origin / scale
    slope, constant = np.polyfit(x, y, 1)
    if slope < 0:
        return float(y.mean()), 0.0
    if constant < 0:
        return 0.0, through_origin / scale
    return float(constant), float(slope) / scale
