"""Stall watchdog: a thread in every rank that ends the run when training no longer moves, and says who is late.

Each rank's thread writes ``watch/rank-00000.json`` about once a second. A rank that has made no progress for `stall_s`
looks at the others' files: ranks whose files stand still have stopped altogether (they are killed where they run on the
same host), of the others the one that got least far is late. It then leaves ``watch/stall.json`` for the others; each
rank writes the stacks of all its threads to ``stall.rankN.txt`` and ends. No clock is compared between processes, and
time in which a process itself did not run does not count as its stall.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ..core.errors import STALL_EXIT_CODE

logger = logging.getLogger(__name__)

SCALES: Mapping[str, float] = {"start": 5.0, "first step": 5.0, "stage change": 5.0, "checkpoint": 3.0, "data": 5.0}
"""Phases that cannot report in between may take this many times `stall_s`; all others take 1."""

_MARKER = "stall.json"
_COMMUNICATION = ("torch/distributed/", "deepspeed/comm/")


@dataclass
class Beat:
    """What one rank's file says.

    Attributes:
        rank: the rank.
        pid: its process.
        born: when the process started, as psutil says it; guards against a process id that was given out again.
        host: its machine.
        phase: last phase it reported.
        step: last optimizer step it reported.
        beats: reports so far.
        age: seconds since the last one.
        sequence: grows with every writing of the file.
        waits: its main thread stands in a collective (only said when it has not reported for a while).
        place: which one, and where it was called; "" where it does not wait.
        done: the rank has ended its watch.
    """

    rank: int
    pid: int
    born: float
    host: str
    phase: str = "start"
    step: int = -1
    beats: int = 0
    age: float = 0.0
    sequence: int = 0
    waits: bool = False
    place: str = ""
    done: bool = False


def late_ranks(beats: Mapping[int, Beat | None], silent: set[int]) -> list[int]:
    """Who holds the others up: ranks whose process stands still, else those that got least far and do not wait.

    Args:
        beats: by rank; None where there is no file.
        silent: ranks whose file stands still.
    """
    if silent:
        return sorted(silent)
    known = {rank: beat for rank, beat in beats.items() if beat is not None and not beat.done}
    if not known:
        return []
    least = min((beat.step, beat.beats) for beat in known.values())
    found = [rank for rank, beat in known.items() if (beat.step, beat.beats) == least]
    busy = [rank for rank in found if not known[rank].waits]
    if 0 < len(busy) < len(found):  # the others wait for these
        return sorted(busy)
    if len(found) == len(known):
        return odd_ones({rank: known[rank].place for rank in found}) or sorted(found)
    oldest = max(known[rank].age for rank in found)
    return sorted(rank for rank in found if known[rank].age > oldest - 1.0)


def odd_ones(places: Mapping[int, str]) -> list[int]:
    """Ranks that wait in another collective than most do; [] where there is no such majority.

    Args:
        places: where each rank waits.
    """
    common, count = Counter(places.values()).most_common(1)[0]
    return sorted(rank for rank, place in places.items() if place != common) if 2 * count > len(places) else []


class Watchdog:
    """Watches one rank's progress from a thread.

    Args:
        folder: shared by all ranks; made where it does not exist.
        rank: of this process.
        world: number of ranks.
        stall_s: seconds without a `beat` that count as a stall.
        scales: factors on `stall_s` by phase.
        interval: seconds between two looks; None takes a second, less for a small `stall_s`.
        end: called with the exit code at the end of a stall.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int,
        world: int,
        stall_s: float,
        scales: Mapping[str, float] = SCALES,
        interval: float | None = None,
        end: Callable[[int], Any] = os._exit,
    ):
        self.folder = Path(folder)
        self.rank, self.world, self.stall_s = rank, world, stall_s
        self.scales = dict(scales)
        self.interval = interval if interval is not None else min(1.0, stall_s / 10)
        self._end = end
        self._now: tuple[str, int] = ("start", -1)
        self._beats = 0
        self._stack: list[str] = []
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._mine = Beat(rank, os.getpid(), psutil.Process().create_time(), socket.gethostname())
        self._sequences: dict[int, tuple[int, float]] = {}
        self._complained = False

    # -- called by the training thread --------------------------------------------------------------------------

    def beat(self, phase: str, step: int) -> None:
        """Report progress; costs an assignment."""
        self._now = (phase, step)
        self._beats += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The code inside is of this phase; afterwards the phase before goes on."""
        before, step = self._now
        self.beat(phase, step)
        try:
            yield
        finally:
            self.beat(before, self._now[1])

    def start(self) -> None:
        """Begin to watch; a stall ends this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"stall.rank{self.rank}.txt").unlink(missing_ok=True)
        self._write(0.0)  # before anything can stop this process: the others must know its id
        self._thread = threading.Thread(target=self._run, name="efftrain-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; the others no longer wait for this rank."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join(5 * self.interval + 1)
            self._thread = None
            self._mine.done = True
            self._write(0.0)

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        age, seen, last = 0.0, -1, time.monotonic()
        while not self._halt.wait(self.interval):
            now = time.monotonic()
            # a process that was stopped or starved of the interpreter has not stalled in that time
            age, last = age + min(now - last, 3 * self.interval), now
            if self._beats != seen:
                age, seen = 0.0, self._beats
                self._sequences.clear()
            self._write(age)
            try:
                marker = self._marker()
                if marker is not None:
                    self._finish(marker["text"])
                elif age > self._limit(self._now[0]) / 2:
                    beats, silent = self._look(now)
                    if age > self._limit(self._now[0]) + self._patience(beats, silent) and not self._excused(
                        beats, silent
                    ):
                        self._declare(age, beats, silent)
            except Exception as error:  # a watchdog that dies of a full disk guards nothing
                self._complain(error)
                if age > 2 * self._limit(self._now[0]):
                    self._finish("")

    def _limit(self, phase: str) -> float:
        return self.stall_s * self.scales.get(phase, 1.0)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _write(self, age: float) -> None:
        mine = self._mine
        (mine.phase, mine.step), mine.beats, mine.age = self._now, self._beats, round(age, 3)
        mine.place = collective_place() if age > self.stall_s / 4 else ""
        mine.waits = bool(mine.place)
        mine.sequence += 1
        try:
            self._replace(self._path(self.rank), asdict(mine))
        except OSError as error:
            self._complain(error)

    def _replace(self, path: Path, document: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.{self.rank}")
        temporary.write_text(json.dumps(document), encoding="utf-8")
        os.replace(temporary, path)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            self._say(logging.WARNING, f"rank {self.rank}: the stall watchdog cannot use {self.folder}: {error}")

    def _look(self, now: float) -> tuple[dict[int, Beat | None], set[int]]:
        """The other ranks' files, and who of them has not written for a while."""
        beats: dict[int, Beat | None] = {self.rank: self._mine}
        silent = set()
        for rank in range(self.world):
            if rank == self.rank:
                continue
            beat = beats[rank] = self._read(rank)
            sequence = beat.sequence if beat is not None else -1
            known = self._sequences.get(rank)
            if known is None or known[0] != sequence:
                self._sequences[rank] = (sequence, now)
            elif now - known[1] > max(4 * self.interval, self.stall_s / 4) and not (beat is not None and beat.done):
                silent.add(rank)
        return beats, silent

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads(self._path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _patience(self, beats: Mapping[int, Beat | None], silent: set[int]) -> float:
        """Seconds for which this rank lets the first living one speak: one message is enough."""
        living = [rank for rank, beat in beats.items() if beat is not None and rank not in silent and not beat.done]
        return 0.0 if self.rank == min(living, default=self.rank) else 2 * self.interval

    def _excused(self, beats: Mapping[int, Beat | None], silent: set[int]) -> bool:
        """True while some other rank moves, or is in a phase that may take longer than ours."""
        for rank, beat in beats.items():
            if beat is None or rank == self.rank or rank in silent or beat.done:
                continue
            long = self.scales.get(beat.phase, 1.0) > 1
            if beat.age < (self._limit(beat.phase) if long else self.stall_s / 2):
                return True
        return False

    # -- the end -----------------------------------------------------------------------------------------------

    def _declare(self, age: float, beats: Mapping[int, Beat | None], silent: set[int]) -> None:
        late = late_ranks(beats, silent)
        phase, step = self._now
        text = f"no progress for {age:.0f} s at step {step} ({phase}); late: {self._describe(late, beats, silent)}"
        ranks = {str(rank): [beat.pid, beat.born] for rank, beat in beats.items() if beat is not None}
        marker = {"text": text, "late": late, "by": self.rank, "ranks": ranks}
        try:
            self._replace(self.folder / _MARKER, marker)
        except OSError as error:
            self._complain(error)
        self._dump(text)
        self._say(logging.ERROR, f"rank {self.rank}: {text}; stacks in {self.folder}/stall.rank*.txt")
        living = [rank for rank, beat in beats.items() if beat is not None and rank not in silent and not beat.done]
        self._wait_for_stacks(living)
        for rank in silent:
            beat = beats[rank]
            if beat is not None and beat.host == self._mine.host:
                kill(beat.pid, beat.born)
        self._leave()

    def _describe(self, late: list[int], beats: Mapping[int, Beat | None], silent: set[int]) -> str:
        if len(late) == self.world:
            places = {rank: beat.place for rank, beat in beats.items() if beat is not None}
            if len(set(places.values())) < 2:
                return f"none, all {self.world} ranks stand at the same place"
            each = ", ".join(f"rank {rank} in {place or 'its own code'}" for rank, place in sorted(places.items())[:8])
            return f"none, but the ranks stand at different places: {each}" + (" ..." if len(places) > 8 else "")
        parts = []
        for rank in late[:8]:
            beat = beats.get(rank)
            if beat is None:
                parts.append(f"rank {rank} (never reported)")
                continue
            state = "its process stands still" if rank in silent else f"{beat.age:.0f} s ago"
            state += f", in {beat.place}" if beat.place and rank not in silent else ""
            parts.append(f"rank {rank} (step {beat.step}, {beat.phase}, {state}; process {beat.pid} on {beat.host})")
        return ", ".join(parts) + (f" and {len(late) - 8} more" if len(late) > 8 else "")

    def _marker(self) -> dict[str, Any] | None:
        """What another rank has declared, where it means this very process."""
        try:
            marker = json.loads((self.folder / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        mine = [self._mine.pid, self._mine.born]
        return marker if marker["by"] != self.rank and marker["ranks"].get(str(self.rank)) == mine else None

    def _finish(self, text: str) -> None:
        self._dump(text)
        time.sleep(2 * self.interval)  # the launcher ends everybody once the first process is gone
        self._leave()

    def _leave(self) -> None:
        for child in multiprocessing.active_children():  # loader workers
            child.kill()
        self._halt.set()
        self._end(STALL_EXIT_CODE)

    def _dump(self, text: str) -> None:
        try:
            with (self.folder / f"stall.rank{self.rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"rank {self.rank}, process {self._mine.pid} on {self._mine.host}: {text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            self._complain(error)

    def _wait_for_stacks(self, ranks: list[int]) -> None:
        until = time.monotonic() + 5 * self.interval
        while time.monotonic() < until:
            if all((self.folder / f"stall.rank{rank}.txt").exists() for rank in ranks):
                return
            time.sleep(self.interval / 4)

    def _say(self, level: int, text: str) -> None:
        """Log from a thread of its own: the stuck main thread may hold the lock of the handler or the full pipe."""
        thread = threading.Thread(target=logger.log, args=(level, "%s", text), daemon=True)
        thread.start()
        thread.join(2.0)


def collective_place() -> str:
    """Where the main thread of this process is inside torch's or DeepSpeed's communication, else "".

    As "barrier, called by loss_term (faults/poison.py:46)": what it waits for, and the code that asked for it.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    inside = ""
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _COMMUNICATION):
            inside = inside or code.co_name
        elif inside:
            where = "/".join(Path(code.co_filename).parts[-2:])
            return f"{inside}, called by {code.co_name} ({where}:{frame.f_lineno})"
        frame = frame.f_back
    return inside


def kill(pid: int, born: float) -> None:
    """SIGKILL for a process and its children, where it is still the one that started at `born`."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - born) > 0.01:
            return
        children = process.children(recursive=True)
        process.kill()
        for child in children:
            child.kill()
    except psutil.Error:
        return
