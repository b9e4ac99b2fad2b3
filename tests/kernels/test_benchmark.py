"""The benchmark's steps on a CPU: it has to work the first time that a GPU is at hand."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmarks_kernels", FOLDER / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run on this GPU")
def test_needs_a_gpu(script, capsys):
    assert script.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "benchmarks/kernels.py needs an NVIDIA GPU; --dry runs its steps on a CPU.\n"
    assert captured.out == ""


def test_two_cases(script, capsys):
    assert script.main(["--dry", "--only", "crop 224 to 96", "--only", "DeiT-S 197 dense"]) == 0
    out = capsys.readouterr().out
    assert "crop 224 to 96, 2 images, forward: ran, with 4 peers" in out
    for step in script.PASSES:
        assert f"DeiT-S 197 dense, {step}: ran, with 3 peers" in out
    assert "8 rows, 0 failures" in out


@pytest.mark.slow
def test_every_case(script, capsys):
    assert script.main(["--dry"]) == 0
    out = capsys.readouterr().out
    assert "0 failures" in out
    assert "WRONG" not in out
    ran = {line.rsplit(": ran", 1)[0] for line in out.splitlines() if ": ran" in line}
    assert {f"{case}, {step}" for case, step in script.TARGETS} <= ran


@pytest.mark.parametrize("tokens", [577, 1025])
def test_masks_keep_what_they_are_named_after(script, monkeypatch, tokens):
    bench, shape = script.Bench(torch.device("cpu"), 1.0), script.SHAPES[f"DeiT-S {tokens}"]
    seen = []
    for percent in (50, 75, 90):
        mask = script.random_mask(bench, shape, percent / 100)
        kept = float(mask.to_dense().double().mean())
        assert kept == pytest.approx(1 - percent / 100, abs=0.02)
        assert mask.keep[:, -1].all(), "CLS sees all"
        assert mask.keep[:, :, -1].all(), "and is seen by all"
        assert mask.keep.diagonal(dim1=1, dim2=2).all()
        seen.append(kept)
    assert seen[0] > seen[1] + 0.1 > seen[2] + 0.2
    monkeypatch.setattr(script, "DENSITY_TOLERANCE", 1e-6)
    with pytest.raises(ValueError, match=f"DeiT-S {tokens}: a mask for 75% pruned keeps 0.25"):
        script.random_mask(bench, shape, 0.75)


@pytest.fixture
def counted(script, monkeypatch):
    """FlexAttention through a backend that counts the graphs and runs them as they are, at most two of them.

    The function makes the case of a length and gives the graphs that it compiled and the names of its good peers.
    """
    import kernel_peers

    from efftrain_ds.kernels.attention import BlockMask

    compiled, graphs = torch.compile, []
    monkeypatch.setattr(
        kernel_peers.torch,
        "compile",
        lambda f, **more: compiled(f, **more, backend=lambda graph, _: graphs.append(1) or graph.forward),
    )
    # its backward is not there on a CPU: what compiles is looked at, not the numbers
    monkeypatch.setattr(kernel_peers.Alternative, "errors", lambda self: {"out": 0.0 * self.forward(0).sum().item()})

    def case(bench, tokens):
        keep = torch.eye(-(-tokens // 64), dtype=torch.bool)[None]
        inputs = kernel_peers.Inputs((1, tokens, 1, 8), torch.float32, bench.device, BlockMask(keep, tokens, tokens), 1)
        inputs.separate = [(tuple(x.detach() for x in leaves), dout) for leaves, dout in inputs.separate]
        peers = kernel_peers.flex_peers(inputs)
        before = len(graphs)
        good = script.correct(bench, f"{tokens} tokens", peers, torch.float32)
        return len(graphs) - before, [alternative.name for alternative in good]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield case
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_peer_that_is_not_compiled_is_dropped_and_each_case_starts_afresh(script, counted):
    bench, both = script.Bench(torch.device("cpu"), 1.0), ["FlexAttention 64", "FlexAttention 128"]
    assert counted(bench, 65) == (2, both)
    assert bench.notes == []
    assert counted(bench, 129) == (0, []), "past the limit of recompilations"
    assert bench.notes[0].startswith("129 tokens, FlexAttention 64: FailOnRecompileLimitHit")
    found = []
    bench.guarded("129 tokens", lambda: found.append(counted(bench, 129)))
    assert found == [(2, both)]
    assert len(bench.notes) == 2


def test_clock_of_the_gpu(script):
    command = "import time\nfor mhz in ('n/a', 1500, 1980, 1700): print(mhz, flush=True); time.sleep(0.02)"
    begin = script.time.monotonic()
    clocks = script.Clocks([sys.executable, "-c", command])
    clocks.reader.join(20)
    assert clocks.since(begin) == [1500, 1980]
    assert clocks.since(script.time.monotonic()) == [1700, 1700], "the last one before"
    clocks.close()
    assert script.watch(torch.device("cpu")) is None


def test_crop_of_other_layouts_is_compared_too(script, monkeypatch, capsys):
    import kernel_peers

    right = kernel_peers.lowfreq_crop

    def wrong(x, *args, **more):
        return right(x, *args, **more) * (1 if x.is_contiguous() else 1.05)

    monkeypatch.setattr(kernel_peers, "lowfreq_crop", wrong)
    assert script.main(["--dry", "--only", "crop 224 to 96"]) == 1
    out = capsys.readouterr().out
    assert "crop 224 to 96, 2 images, HWC, ours: WRONG, error 5" in out
    assert "4 rows, 1 failures" in out


def test_wrong_variants_are_not_timed(script, monkeypatch, capsys):
    import kernel_peers

    right = kernel_peers.attention
    monkeypatch.setattr(kernel_peers, "attention", lambda *args, **more: right(*args, **more) * 1.05)
    assert script.main(["--dry", "--only", "DeiT-S 65 dense"]) == 1
    out = capsys.readouterr().out
    assert "DeiT-S 65 dense, ours: WRONG, errors out 5.0e-02" in out
    assert "0 rows, 1 failures" in out


def test_peers_agree_on_photographs(script, capsys):
    # tiny images are all edge: the tolerance of the peers is that of real sizes
    import kernel_peers

    device = torch.device("cpu")
    pixels = kernel_peers.photographs(1, 224, device, 0)
    reference = kernel_peers.crop_reference(pixels, 96)
    for name, function in kernel_peers.crop_alternatives(96, device, dry=True).items():
        error = kernel_peers.relative_error(function(pixels), reference)
        assert error < (script.CROP_TOLERANCE if name == "ours" else script.CROP_PEERS) or name == "interpolate", name


def test_work_and_rows(script):
    # DeiT-S, 197 tokens, 256 images: 52 us of bytes at 3 TB/s, 19 us of products at 790 TFLOP/s
    size, flops = script.attention_work((256, 197, 6, 64), 2, 1.0, "forward")
    assert size / 3.0e12 * 1e6 == pytest.approx(52, abs=0.5)
    assert flops / 790e12 * 1e6 == pytest.approx(19, abs=0.5)
    half = script.attention_work((256, 197, 6, 64), 2, 0.5, "fwd+bwd")
    assert half[0] == pytest.approx(3 * size)
    assert half[1] == pytest.approx(7 / 2 * flops / 2)
    bench = script.Bench(torch.device("cpu"), 1.0)
    bench.ceilings = {"tflops": 790.0, "tbs": 3.0}
    timing = sys.modules["efftrain_ds.kernels.timing"].Timing
    times = {"ours": timing((100.0,) * 3), "a": timing((150.0, 130.0, 140.0)), "b": timing((200.0,) * 3)}
    bench.add("x", "forward", times, (size, flops), target=(1.3, 1.5))
    row = bench.rows[0]
    assert (row["peer"], row["ratio"], row["ratio_range"]) == ("a", 1.4, [1.3, 1.5])
    assert row["reached"] == "must"
    assert row["percent_of_floor"] == pytest.approx(52, abs=0.5)
    assert math.isclose(row["tbs"], size / 100e-6 / 1e12)
    bench.add("x", "forward", times, (size, flops), target=(1.5, 2.0), peers=["a"])
    assert bench.rows[1]["reached"] == "MISSED"


def test_deadline_and_failures_are_notes(script):
    bench = script.Bench(torch.device("cpu"), 0.0)
    bench.guarded("late", lambda: pytest.fail("must not run"))
    assert bench.notes == ["late: not run, the time was over"]
    bench = script.Bench(torch.device("cpu"), 1.0)

    def fails():
        raise RuntimeError("boom")

    bench.guarded("case", fails)
    assert bench.notes == ["case: FAILED RuntimeError: boom"]


@pytest.fixture
def pretended_gpu(script, monkeypatch, tmp_path):
    """The script with two cases, the second of which is cut off; its results are written into a folder of the test."""
    import common

    from efftrain_ds.kernels.timing import Timing

    def cut_off():
        raise KeyboardInterrupt

    def cases(bench):
        times = {"ours": Timing((2.0,), note="without graphs: peer cannot be captured: no"), "peer": Timing((3.0,))}
        yield "first", lambda: bench.add("first", "forward", times, (1.0, 1.0))
        yield "second", cut_off

    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "environment", dict)
    monkeypatch.setattr(script, "cases", cases)
    monkeypatch.setattr(script, "gpu", lambda device: {"device": str(device)})
    monkeypatch.setattr(script, "watch", lambda device: None)
    monkeypatch.setattr(script.Bench, "measure_ceilings", lambda bench: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return script


def test_result_is_stored_after_every_case(pretended_gpu, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretended_gpu.main([])
    result = json.loads((tmp_path / "benchmarks" / "results" / "kernels.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["first"]
    assert result["notes"] == ["first, forward: without graphs: peer cannot be captured: no"]
    assert result["command"] == "python benchmarks/kernels.py"


def test_some_cases_do_not_replace_the_result(pretended_gpu, tmp_path):
    assert pretended_gpu.main(["--only", "first"]) == 0
    assert not list(tmp_path.rglob("*.json"))
    assert pretended_gpu.main(["--only", "first", "--out", str(tmp_path / "own.json")]) == 0
    result = json.loads((tmp_path / "own.json").read_text())
    assert result["command"] == "python benchmarks/kernels.py --only first"
    assert len(result["rows"]) == 1
