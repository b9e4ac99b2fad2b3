"""Device time of alternatives that take turns, for the tuner and the benchmarks.

Every alternative runs in every round, so that clocks and temperature meet all of them alike, and ratios are taken round
by round. The host queues a round behind a short wait of the device: what is measured is the device's time, not the
interpreter's. Calls rotate over several sets of inputs, so that the L2 cache of one call does not serve the next.
Calls shorter than `GRAPH_BELOW_US` are repeated inside a captured graph, since two events alone are several
microseconds apart.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

Call = Callable[[int], object]
"""What is timed: takes the number of the input set."""

GRAPH_BELOW_US = 50.0
_WAIT_CYCLES = 6_000_000  # some 3 ms, in which the host queues the calls of a round


@dataclass(frozen=True)
class Timing:
    """Microseconds a call.

    Attributes:
        rounds: median of each round.
        graph: measured as repeated calls in a captured graph.
        note: why not, where calls were short enough; "" otherwise.
    """

    rounds: tuple[float, ...]
    graph: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Ratio:
    """How many times longer the other one takes: median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float


def ratio(other: Timing, ours: Timing) -> Ratio:
    """Time of `other` over that of `ours`, round by round; both from one `measure`."""
    values = [a / b for a, b in zip(other.rounds, ours.rounds, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    sets: int = 3,
    rounds: int = 5,
    repeats: int = 10,
    warmup: int = 20,
    seconds: float = 1.5,
    graph: bool = True,
) -> dict[str, Timing]:
    """Time alternatives in turn.

    Args:
        calls: the alternatives by name; each is called with 0 .. sets - 1 in turn.
        device: where they run; on a CPU wall time is taken, which says little.
        sets: input sets.
        rounds: rounds in which every alternative has its turn.
        repeats: timed calls of a round at least; 5 rounds of 10 are 50 in all.
        warmup: calls before any timing.
        seconds: device time for one alternative; slow ones get fewer repeats, but 3 a round at least.
        graph: short calls may be captured; False for a backward pass without its forward, whose stream is another one.

    Returns:
        A `Timing` for each name, in the order of `calls`. All are measured alike: where one alternative cannot be
        captured, none is, and every `Timing` says so.
    """
    clock = _device_clock if device.type == "cuda" else _wall_clock
    rough: dict[str, float] = {}
    for name, call in calls.items():
        for index in range(min(warmup, 3)):
            call(index % sets)
        rough[name] = statistics.median(clock(call, sets, min(3, repeats)))
        for index in range(min(warmup, max(0, int(seconds * 1e6 / 2 / max(rough[name], 1.0))))):
            call(index % sets)
    graphs: dict[str, tuple[Call, int]] = {}
    note = ""
    if graph and device.type == "cuda" and min(rough.values()) < GRAPH_BELOW_US:
        for name, call in calls.items():
            captured = _capture(call, sets, max(1, int(200 / max(rough[name], 1.0))))
            if isinstance(captured, str):
                # launches from the host beside graphs would be compared with their overhead
                graphs, note = {}, f"without graphs: {name} cannot be captured: {captured}"
                logger.warning("%s", note)
                break
            graphs[name] = captured
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count = max(min(3, repeats), min(repeats, int(seconds * 1e6 / rounds / max(rough[name], 1.0))))
            replay, inside = graphs.get(name, (call, 1))
            times[name].append(statistics.median(clock(replay, sets, count)) / inside)
    return {name: Timing(tuple(values), name in graphs, note) for name, values in times.items()}


def _device_clock(call: Call, sets: int, count: int) -> list[float]:
    """Microseconds of each of `count` calls, by events."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda.synchronize()
    torch.cuda._sleep(_WAIT_CYCLES)
    for index, (begin, end) in enumerate(events):
        begin.record()
        call(index % sets)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def _wall_clock(call: Call, sets: int, count: int) -> list[float]:
    """Microseconds of each of `count` calls on the CPU."""
    times = []
    for index in range(count):
        begin = time.perf_counter()
        call(index % sets)
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def _capture(call: Call, sets: int, rotations: int) -> tuple[Call, int] | str:
    """A graph of `rotations` walks over all sets as a call, and the calls in it; why it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(3 * sets):
                call(index % sets)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for index in range(rotations * sets):
                call(index % sets)
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().split("\n")[0][:160] or type(error).__name__
    return (lambda _: graph.replay()), rotations * sets
