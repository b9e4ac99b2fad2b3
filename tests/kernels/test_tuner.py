import json

import pytest
import torch

pytest.importorskip("triton", reason="the tuner launches Triton kernels")

from efftrain_ds.kernels import timing
from efftrain_ds.kernels.attention import table, tuner
from efftrain_ds.kernels.attention.table import Key, Launch
from efftrain_ds.kernels.gate import Compiled
from efftrain_ds.kernels.timing import Timing, measure, ratio
from tests.kernels.common import DEVICE, INTERPRETED, needs_kernels

CHEAP = {"sets": 1, "rounds": 1, "repeats": 1, "warmup": 0}
DTYPE = "fp32" if INTERPRETED else "bf16"


@pytest.fixture(autouse=True)
def _own_table(tmp_path, monkeypatch):
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.clear_cache()
    yield
    table.clear_cache()


def key(sparse, length="64"):
    return Key(table.architecture(DEVICE), DTYPE, 32, length, sparse, 16)


@needs_kernels
def test_finds_and_stores_a_row(monkeypatch):
    launches = {
        "forward": [Launch("list"), Launch("resident", 4, 1, 64)],
        "backward": [Launch("list", 4, 1)],
    }
    monkeypatch.setattr(tuner, "SPARSITIES", (0.5,))
    device = torch.device(DEVICE)
    tuned = tuner.tune(key(True), device, shape=(1, 17, 1), launches=launches, **CHEAP)
    assert tuned.rejected == {}
    assert set(tuned.times) == {("forward", launch) for launch in launches["forward"]} | {
        ("backward", launches["backward"][0])
    }
    assert tuned.row["forward"] == min(launches["forward"], key=lambda launch: tuned.times["forward", launch])
    assert tuned.row["prefer"] in ("kernel", "sdpa")
    path = tuner.store(device, [tuned])
    other = tuner.Tuned(key(False), {**tuned.row, "sparse": False, "prefer": "sdpa", "min_sparsity": 0.0})
    tuner.store(device, [other])
    tuner.store(device, [other])
    (rows,) = json.loads(path.read_text()).values()
    assert [row["sparse"] for row in rows] == [False, True]
    entry = table.lookup(device, getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[DTYPE]), 32, 33, 33, True, 16)
    assert entry.origin == str(path)
    assert entry.forward == tuned.row["forward"]


class FakeProblem(tuner.Problem):
    """Kernels that compute the reference, and one each that fails, is wrong, or spills."""

    def forward(self, launch, index):
        if launch.num_warps == 1:
            raise ValueError("out of resources")
        out, lse, _ = self.reference()
        self.out.copy_(out + (launch.num_warps == 2))
        self.lse.copy_(lse)

    def backward(self, launch, index):
        self.dqkv.copy_(self.reference()[2])


def test_rejects(monkeypatch):
    compiled = []
    monkeypatch.setattr(tuner, "Problem", FakeProblem)
    monkeypatch.setattr(tuner, "SPARSITIES", (0.5,))

    class Watch:
        def __enter__(self):
            stack = 8 if len(compiled) == 2 else 0
            compiled.append(stack)
            return [("kernel", Compiled(128, 1024, stack, stack), 90)]

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(tuner, "compiled_kernels", Watch)
    launches = {
        "forward": [Launch("list", 1), Launch("list", 2), Launch("list", 4), Launch("list", 8)],
        "backward": [Launch("list", 8)],
    }
    arguments = {"shape": (2, 33, 1), "launches": launches, **CHEAP}
    wanted = Key("sm_90", "fp64", 32, "64", True, 16)
    tuned = tuner.tune(wanted, torch.device("cpu"), **arguments)
    assert tuned.row["forward"] == Launch("list", 8)
    reasons = {launch.num_warps: text for (_, launch), text in tuned.rejected.items()}
    assert reasons[1] == "ValueError: out of resources"
    assert reasons[2].startswith("wrong out: relative error")
    assert reasons[4].startswith("kernel: spills: 8 bytes of stack")
    with pytest.raises(RuntimeError, match="no launch of the forward kernels works.*out of resources"):
        tuner.tune(wanted, torch.device("cpu"), **{**arguments, "launches": {"forward": [Launch("list", 1)]}})


def test_variants_of_earlier_launches_are_checked_again(monkeypatch):
    # Triton's listener tells of a kernel once in a process: a spilling variant would pass under another key
    from triton import knobs

    from efftrain_ds.kernels.attention import lists_bwd, lists_fwd, resident_bwd, resident_fwd

    kernels = [lists_fwd.forward_kernel, lists_bwd.dq_kernel, lists_bwd.dkv_kernel]
    kernels += [resident_fwd.forward_kernel, resident_bwd.backward_kernel]
    for kernel in kernels:
        monkeypatch.setattr(kernel, "device_caches", {0: "variants"}, raising=False)
    before = knobs.compilation.listener
    with tuner.compiled_kernels() as seen:
        assert all(kernel.device_caches == {} for kernel in kernels)
        assert knobs.compilation.listener is not before
    assert seen == []
    assert knobs.compilation.listener is before


@pytest.mark.parametrize("sparse", [True, False])
def test_times_the_variant_of_the_model(sparse, monkeypatch):
    # without a mask a model passes no lists, and the kernels without them are others
    from efftrain_ds.kernels.attention import lists, resident

    given = []
    monkeypatch.setattr(lists, "forward", lambda *args: given.append(args[5:7]))
    monkeypatch.setattr(lists, "backward", lambda *args: given.append(args[9:13]))
    monkeypatch.setattr(resident, "forward", lambda *args: given.append(args[5:6]))
    monkeypatch.setattr(resident, "backward", lambda *args: given.append(args[9:10]))
    problem = tuner.Problem(Key("sm_90", "fp32", 16, "64", sparse, 16), torch.device("cpu"), 1, 33, 2, 1)
    for kernel in ("list", "resident"):
        problem.forward(Launch(kernel), 0)
        problem.backward(Launch(kernel), 0)
    assert [len(one) for one in given] == [2, 4, 1, 1]
    assert all((one is not None) == sparse for arguments in given for one in arguments)


@pytest.mark.parametrize("length", table.LENGTHS)
def test_candidates_are_valid_rows(length):
    found = tuner.candidates(key(True, length))
    for side, launches in found.items():
        assert len(launches) == len(set(launches)) > 3, side
        assert {launch.kernel for launch in launches} == ({"list"} if length == "list" else {"list", "resident"})
    row = {"length": length, "forward": found["forward"][-1], "backward": found["backward"][-1]}
    table.save_user_rows("none", [row])


@pytest.mark.parametrize(
    ("gains", "prefer", "sparsity"),
    [
        ([(0.0, 0.5), (0.5, 0.9)], "sdpa", 1.0),
        ([(0.0, 1.1), (0.5, 2.0)], "kernel", 0.0),
        ([(0.0, 0.5), (0.5, 1.5)], "kernel", 0.25),
        ([(0.0, 0.8), (0.3, 0.9), (0.5, 1.4)], "kernel", 0.34),
        ([(0.0, 1.2), (0.3, 0.9), (0.5, 1.4)], "kernel", 0.34),
    ],
)
def test_break_even(gains, prefer, sparsity):
    assert tuner.break_even(gains) == {"prefer": prefer, "min_sparsity": sparsity}


def test_timing_takes_turns():
    order = []
    calls = {"a": lambda index: order.append(("a", index)), "b": lambda index: order.append(("b", index))}
    times = measure(calls, torch.device("cpu"), sets=2, rounds=2, repeats=3, warmup=0)
    assert list(times) == ["a", "b"]
    assert all(len(timing.rounds) == 2 and not timing.graph for timing in times.values())
    rounds = [[("a", i % 2) for i in range(3)], [("b", i % 2) for i in range(3)]]
    assert order[-12:] == sum(rounds * 2, [])
    found = ratio(Timing((4.0, 6.0, 9.0)), Timing((2.0, 2.0, 2.0)))
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.5)


@pytest.mark.parametrize("captured", [True, False])
def test_graphs_for_all_or_for_none(captured, monkeypatch):
    replayed = []

    def capture(call, sets, rotations):
        return (lambda _: replayed.append(call), 5) if captured or call != slow else "not now"

    def fast(_):
        return None

    def slow(_):
        return None

    monkeypatch.setattr(timing, "_device_clock", lambda call, sets, count: [call(0) and 0.0 or 10.0] * count)
    monkeypatch.setattr(timing, "_capture", capture)
    times = measure({"fast": fast, "slow": slow}, torch.device("cuda"), rounds=2, repeats=3, warmup=0)
    assert [one.graph for one in times.values()] == [captured, captured]
    assert [one.median for one in times.values()] == [2.0 if captured else 10.0] * 2
    note = "" if captured else "without graphs: slow cannot be captured: not now"
    assert {one.note for one in times.values()} == {note}
    assert bool(replayed) == captured
