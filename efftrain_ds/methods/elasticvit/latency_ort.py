"""Latency measured on this machine's processor with ONNX Runtime: a target that exists everywhere.

Sub-networks are written as ONNX with a fixed shape and run with one thread. Networks that are compared are measured in
interleaved rounds, so that other load on the machine meets all of them; the median of the medians of the rounds counts.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...core import packages
from ...core.errors import ConfigError
from ...cost.throughput import machine_name
from ...models.elastic import Space
from ...models.onnx import onnx_program
from .latency import Coverage, Timing
from .latency_keys import block_keys


@dataclass(frozen=True)
class Measured:
    """Times of one network in milliseconds.

    Attributes:
        median: of the medians of the rounds.
        p10: of all runs.
        p90: of all runs.
        rounds: median of each round.
        n: runs in all.
    """

    median: float
    p10: float
    p90: float
    rounds: tuple[float, ...]
    n: int

    @property
    def variation(self) -> float:
        """Standard deviation of the medians of the rounds, by their mean."""
        return statistics.pstdev(self.rounds) / statistics.fmean(self.rounds)

    def timing(self) -> Timing:
        """As an entry of a latency table."""
        return Timing(self.median, self.p10, self.p90, self.n)


def require() -> None:
    """Refuse early where a package is missing.

    Raises:
        ConfigError: names it and how to get it.
    """
    packages.require("latency with ONNX Runtime", packages.ONNX, "export")


def onnx_bytes(model: nn.Module, inputs: torch.Tensor) -> bytes:
    """A network as ONNX for one fixed shape.

    Args:
        model: in evaluation mode.
        inputs: [1, ...] example.

    Raises:
        ModelError: torch cannot express the network in ONNX.
    """
    buffer = io.BytesIO()
    onnx_program(model, inputs).save(buffer)
    return buffer.getvalue()


def session_of(model: bytes, threads: int = 1) -> Any:
    """An ONNX Runtime session on the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def time_sessions(
    sessions: Sequence[Any],
    inputs: Sequence[np.ndarray],
    *,
    warmup: int = 10,
    runs: int = 50,
    rounds: int = 3,
) -> list[Measured]:
    """Time sessions in interleaved rounds.

    Args:
        sessions: with one input each.
        inputs: of each session.
        warmup: runs of each before the first round.
        runs: of each in all rounds together, at least.
        rounds: how many.
    """
    calls: list[Callable[[], Any]] = []
    for session, value in zip(sessions, inputs, strict=True):
        feed = {session.get_inputs()[0].name: value}
        calls.append(lambda session=session, feed=feed: session.run(None, feed))
    for call in calls:
        for _ in range(warmup):
            call()
    each = -(-runs // rounds)
    times: list[list[list[float]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            row = []
            for _ in range(each):
                start = time.perf_counter()
                call()
                row.append(1e3 * (time.perf_counter() - start))
            own.append(row)
    found = []
    for own in times:
        medians = tuple(statistics.median(row) for row in own)
        every = np.concatenate(own)
        p10, p90 = (float(p) for p in np.percentile(every, (10, 90)))
        found.append(Measured(statistics.median(medians), p10, p90, medians, len(every)))
    return found


class OrtLatency:
    """Latency of whole sub-networks with ONNX Runtime on this processor, one image at a time.

    Args:
        space: of the supernet.
        net: supernet whose weights are used; a fresh one if None (times do not depend on the weights).
        threads: of the session.
        warmup: runs before the first round.
        runs: of each network in all, at least.
        rounds: interleaved.

    Attributes:
        known: what was measured, by sub-network.

    Raises:
        ConfigError: a package is missing, or fewer than one run or round.
    """

    unit = "ms"

    def __init__(
        self,
        space: Space[Any],
        net: nn.Module | None = None,
        *,
        threads: int = 1,
        warmup: int = 10,
        runs: int = 50,
        rounds: int = 3,
    ) -> None:
        require()
        if min(threads, runs, rounds) < 1 or warmup < 0:
            raise ConfigError(
                f"latency: {threads} threads, {warmup} warm-ups, {runs} runs in {rounds} rounds; at least 1 thread, "
                "run and round is needed"
            )
        import onnxruntime

        self.space, self.threads = space, threads
        self.warmup, self.runs, self.rounds = warmup, runs, rounds
        self.device = machine_name()
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.known: dict[Any, Measured] = {}
        self._net = net

    def keys(self, config: Any) -> list[str]:
        """Keys of the blocks; this provider measures the network as a whole."""
        return block_keys(self.space, config)

    def measure(self, configs: Sequence[Any]) -> list[Measured]:
        """Time sub-networks together, in interleaved rounds; those known already are not measured again.

        Raises:
            ModelError: a sub-network that the space does not have, or that cannot be written as ONNX.
        """
        new = [config for config in dict.fromkeys(configs) if config not in self.known]
        if self._net is None:
            self._net = self.space.supernet()
        sessions, inputs = [], []
        for config in new:
            model = self.space.extract(self._net, config).eval()
            image = torch.zeros(1, getattr(self.space, "in_chans", 3), config.resolution, config.resolution)
            sessions.append(session_of(onnx_bytes(model.float().cpu(), image), self.threads))
            inputs.append(image.numpy())
        timing = time_sessions(sessions, inputs, warmup=self.warmup, runs=self.runs, rounds=self.rounds)
        self.known.update(zip(new, timing, strict=True))
        return [self.known[config] for config in configs]

    def predict(self, config: Any) -> float:
        """Median time of a sub-network in milliseconds; measured once."""
        return self.measure([config])[0].median

    def coverage(self, space: Space[Any]) -> Coverage:
        """Everything."""
        return Coverage(0, 0, {})
