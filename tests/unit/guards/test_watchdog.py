"""The stall watchdog on real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from efftrain_ds.core.errors import STALL_EXIT_CODE
from efftrain_ds.guards.watchdog import Beat, Watchdog, collective_place, kill, late_ranks

STALL = 2.0

RANK = """
import logging, multiprocessing, os, signal, sys, time
from pathlib import Path
from efftrain_ds.guards.watchdog import Watchdog
logging.basicConfig(level=logging.WARNING)
rank, world, folder, what = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
dog = Watchdog(folder / "watch", rank=rank, world=world, stall_s=float(sys.argv[5]))
dog.start()
multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
def lost_in_its_own_code():
    while True:
        time.sleep(0.01)
def together(step):  # a collective: nobody goes on before all are here
    (folder / f"at-{rank}-{step}").touch()
    while not all((folder / f"at-{r}-{step}").exists() for r in range(world)):
        time.sleep(0.01)
for step in range(10 ** 6):
    dog.beat("train", step)
    if step == 3 and rank == 1:
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "lost":
            lost_in_its_own_code()
        if what == "long":
            with dog.during("checkpoint"):
                time.sleep(1.5 * dog.stall_s)
    dog.beat("train", step)
    together(step)
    time.sleep(0.02)
    if what == "long" and step == 10:
        break
dog.stop()
"""


def start(folder: Path, what: str, world: int = 2) -> list[subprocess.Popen]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(world), str(folder), what, str(STALL)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def end(processes: list[subprocess.Popen], children: list[psutil.Process]) -> tuple[list[int], str]:
    """Exit codes and what was logged; nothing may be left."""
    try:
        texts = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    return [process.returncode for process in processes], "".join(texts)


def wait_for(path: Path) -> float:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.parametrize("what", ["stop", "lost"])
def test_a_stalled_rank_ends_all(tmp_path, what):
    processes = start(tmp_path, what)
    begin = wait_for(tmp_path / "at-0-3")
    children = [child for p in processes for child in psutil.Process(p.pid).children(recursive=True)]
    codes, log = end(processes, children)
    assert time.monotonic() - begin < STALL + 10
    assert codes == [STALL_EXIT_CODE, -signal.SIGKILL if what == "stop" else STALL_EXIT_CODE]
    assert len(children) == 2
    assert "late: rank 1 (step " in log
    assert log.count("no progress for") == 1
    assert ("its process stands still" in log) == (what == "stop")
    first = (tmp_path / "watch" / "stall.rank0.txt").read_text()
    assert "late: rank 1" in first
    assert "in together" in first
    second = tmp_path / "watch" / "stall.rank1.txt"
    assert second.exists() == (what == "lost")
    if what == "lost":
        assert "in lost_in_its_own_code" in second.read_text()


def test_a_long_phase_of_another_rank_is_no_stall(tmp_path):
    processes = start(tmp_path, "long")
    codes, log = end(processes, [])
    assert codes == [0, 0], log
    assert not (tmp_path / "watch" / "stall.json").exists()
    assert json.loads((tmp_path / "watch" / "rank-00001.json").read_text())["done"]


def beat(rank: int, step: int = 0, beats: int = 0, age: float = 0.0, waits: bool = False, done: bool = False) -> Beat:
    return Beat(rank, 1, 0.0, "host", "train", step, beats, age, waits=waits, done=done)


@pytest.mark.parametrize(
    ("beats", "silent", "late"),
    [
        ([beat(0, 5, 9), beat(1, 4, 9)], set(), [1]),
        ([beat(0, 5, 9), beat(1, 5, 8)], set(), [1]),
        ([beat(0, 5, 9), beat(1, 5, 9)], set(), [0, 1]),
        ([beat(0, 5, 9), beat(1, 5, 9)], {0}, [0]),
        ([beat(0, 5, 9), beat(1, 5, 9, waits=True)], set(), [0]),
        ([beat(0, 5, 9, waits=True), beat(1, 5, 9, waits=True)], set(), [0, 1]),
        ([beat(0, 5, 9), beat(1, 5, 7, age=30), beat(2, 5, 7, age=9)], set(), [1]),
        ([beat(0, 5, 9), beat(1, 3, 2, done=True)], set(), [0]),
        ([beat(0, 5, 9), None], {1}, [1]),
    ],
)
def test_who_is_late(beats, silent, late):
    assert late_ranks(dict(enumerate(beats)), silent) == late


def waiting(*places: str) -> dict[int, Beat]:
    return {i: Beat(i, 1, 0.0, "host", "train", 5, 9, 4.0, waits=bool(p), place=p) for i, p in enumerate(places)}


@pytest.mark.parametrize(
    ("places", "late", "text"),
    [
        (("a", "a", "b"), [2], "rank 2 (step 5, train, 4 s ago, in b; process 1 on host)"),
        (("a", "a", "a"), [0, 1, 2], "none, all 3 ranks stand at the same place"),
        (("a", "b"), [0, 1], "none, but the ranks stand at different places: rank 0 in a, rank 1 in b"),
        (("", ""), [0, 1], "none, all 2 ranks stand at the same place"),
    ],
)
def test_ranks_in_different_collectives(tmp_path, places, late, text):
    beats = waiting(*places)
    assert late_ranks(beats, set()) == late
    dog = Watchdog(tmp_path, rank=0, world=len(places), stall_s=1.0)
    assert dog._describe(late, beats, set()) == text


def test_where_a_rank_waits():
    assert collective_place() == ""
    found = []
    scope = {"look": lambda: found.append(collective_place())}
    exec(compile("def wrapper(f):\n f()\ndef barrier():\n wrapper(look)", "/x/torch/distributed/d.py", "exec"), scope)
    own = "def loss_term():\n barrier()"
    exec(compile(own, "/home/me/mine/poison.py", "exec"), scope)
    scope["loss_term"]()
    assert found == ["wrapper, called by loss_term (mine/poison.py:2)"]


def test_a_killed_process_is_the_one_that_was_meant():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    born = psutil.Process(process.pid).create_time()
    kill(process.pid, born - 5)
    assert process.poll() is None
    kill(process.pid, born)
    assert process.wait(30) == -signal.SIGKILL
    kill(process.pid, born)


def test_alone_and_without_a_usable_folder(tmp_path):
    codes: list[int] = []
    dog = Watchdog(tmp_path, rank=0, world=1, stall_s=0.2, scales={}, end=codes.append)
    dog.start()
    dog._thread.join(30)
    assert codes == [STALL_EXIT_CODE]
    assert "none, all 1 ranks" in (tmp_path / "stall.rank0.txt").read_text()
    dog.stop()

    broken = Watchdog(tmp_path / "gone", rank=0, world=1, stall_s=0.2, scales={}, end=codes.append)
    broken.folder.mkdir()
    broken.start()
    for path in broken.folder.iterdir():
        path.unlink()
    broken.folder = tmp_path / "not" / "there"
    broken._thread.join(30)
    assert codes == [STALL_EXIT_CODE] * 2


def test_marker_of_another_run_is_ignored(tmp_path):
    codes: list[int] = []
    (tmp_path / "stall.json").write_text(json.dumps({"text": "x", "late": [], "by": 1, "ranks": {"0": [1, 2.0]}}))
    dog = Watchdog(tmp_path, rank=0, world=2, stall_s=60, interval=0.01, end=codes.append)
    dog.start()
    while dog._mine.sequence < 5:
        time.sleep(0.01)
    dog.stop()
    assert codes == []
