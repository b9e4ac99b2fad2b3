"""The code gate: the rules on small kernels that break one each, then the shipped kernels.

The ordinary tests compile one variant of each kernel, the slow ones every launch of the table. How long a test takes:
``pytest --durations=20 tests/kernels``, with ``TRITON_CACHE_DIR`` set to an empty folder for the time without a cache.

The gate runs in processes of its own, without TRITON_INTERPRET, so that kernels are compiled ones.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the code gate compiles with Triton")

from efftrain_ds.kernels.gate import MODULES, Compiled, GateCase, check, collect, compile_kernel, main, recorded

HERE = Path(__file__).parent
SAMPLES = {"good", "recorded", "mma instead of wgmma", "spilling", "shared", "ampere", "unknown argument"}


def gate(*arguments, timeout=280):
    """Exit code and rows of one run of the gate."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "efftrain_ds.kernels.gate", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout)
    assert done.stdout.startswith("{"), done.stderr
    rows = json.loads(done.stdout)["cases"]
    return done.returncode, {(row["name"], row["capability"]): row for row in rows}


def violations(rows):
    return {f"{name} sm_{capability}": row["wrong"] for (name, capability), row in rows.items() if row["wrong"]}


@pytest.fixture(scope="module")
def quick():
    """Exit code and rows of the samples and of one variant of each kernel: two runs would import everything twice."""
    modules = [part for name in ("gate_samples", *MODULES[:-1]) for part in ("--module", name)]
    code, rows = gate("--quick", *modules, "--processes", "1")  # "recorded" is then found in the cache
    samples = {key: rows.pop(key) for key in list(rows) if key[0] in SAMPLES}
    return code, samples, rows


def test_rules_on_samples(quick):
    code, rows, _ = quick
    assert code == 1
    assert {name for name, _ in rows} == SAMPLES
    wrong = {name: row["wrong"] for (name, _), row in rows.items()}
    assert wrong["good"] == wrong["ampere"] == []
    assert len(wrong["mma instead of wgmma"]) == 2
    assert wrong["mma instead of wgmma"][0] == "no HGMMA"
    assert wrong["spilling"][0].startswith("spills: ")
    assert wrong["shared"] == ["102400 bytes of shared memory, at most 101376"]
    assert "wrong: b, bb, c" in wrong["unknown argument"][0]
    assert wrong["recorded"] == []
    assert {**rows["recorded", 90], "name": "", "seconds": 0} == {**rows["good", 90], "name": "", "seconds": 0}
    good, ampere = rows["good", 90], rows["ampere", 80]
    assert good["instructions"]["HGMMA"] > 0
    assert good["instructions"]["HMMA"] == 0
    assert ampere["instructions"]["HMMA"] > 0
    assert 0 < good["registers"] <= 255
    assert good["instructions"]["MUFU.EX2"] == 32  # 64 x 64 values of 128 threads
    assert rows["spilling", 90]["stack_bytes"] > 0
    assert rows["spilling", 90]["spills"] > 0
    assert good["shared_bytes"] % 1024 == 0
    assert good["shared_bytes"] >= 2 * 64 * 64 * 2


def test_shipped_kernels_quick(quick, monkeypatch):
    _, _, rows = quick
    assert violations(rows) == {}
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr("efftrain_ds.kernels.gate.run_cases", lambda *_: list(rows.values()))
    assert main(["--module", "gate_samples", "--json"]) == 0  # the samples beside them are meant to be wrong
    assert all(capability == 90 for _, capability in rows)
    assert len(rows) == 6  # one of each kernel: a minute of compilation would be too much here


@pytest.mark.slow
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_shipped_kernels(capability):
    code, rows = gate("--capability", str(capability), timeout=2400)
    assert violations(rows) == {}
    assert code == 0


def compiled(**changes):
    counts = changes.pop("instructions", {"HGMMA": 4})
    return Compiled(
        **({"registers": 128, "shared_bytes": 50000, "stack_bytes": 0, "spills": 0} | changes),
        **{"instructions": Counter(counts)},
    )


@pytest.mark.parametrize(
    ("changes", "capability", "wgmma", "text"),
    [
        ({}, 90, True, None),
        ({"instructions": {"HMMA": 8}}, 89, False, None),
        ({"shared_bytes": 227 * 1024}, 90, True, None),
        ({"shared_bytes": 227 * 1024 + 1}, 90, True, "232449 bytes"),
        ({"shared_bytes": 163 * 1024 + 1}, 80, False, "166913 bytes"),
        ({"shared_bytes": 99 * 1024 + 1}, 89, False, "101377 bytes"),
        ({"registers": 256}, 90, True, "256 registers"),
        ({"stack_bytes": 8}, 90, True, "8 bytes of stack"),
        ({"spills": 2, "instructions": {"HGMMA": 1, "LDL": 1, "STL": 1}}, 90, True, "1 local loads, 1 local stores"),
        ({"instructions": {}}, 90, True, "no HGMMA"),
        ({"instructions": {"HGMMA": 4, "HMMA": 2}}, 90, True, "2 HMMA beside 4 HGMMA"),
        ({}, 75, False, "no shared memory limit"),
    ],
)
def test_check(changes, capability, wgmma, text):
    found = check(compiled(**changes), GateCase("x", None, {}, {}, capability=capability, wgmma=wgmma))
    assert len(found) == (text is not None)
    assert text is None or text in found[0]


def test_check_of_attention():
    case = GateCase("x", None, {}, {}, exp2=True, may_spill=True)
    assert check(compiled(), case) == ["no MUFU.EX2"]
    fine = {"HGMMA": 4, "MUFU.EX2": 8}
    assert check(compiled(instructions=fine, spills=2, stack_bytes=8), case) == []
    assert check(compiled(instructions=fine, registers=256), case) == ["256 registers, at most 255"]


def test_table_is_covered():
    # listed where kernels are compiled ones; what needs no compilation is checked here
    from efftrain_ds.kernels.attention import shipped, table
    from efftrain_ds.kernels.attention.resident import key_pieces, supports
    from efftrain_ds.kernels.runtime import architecture

    keys = [key for key in table.keys(shipped.CAPABILITIES) if key.dtype in shipped.DTYPES]
    for key in keys:
        for side in ("forward", "backward"):
            for tokens in shipped.lengths(key):
                assert table.bucket(tokens, tokens) == key.length
                if shipped.chosen(key, side, tokens).kernel == "resident":
                    version = divmod(shipped.CAPABILITIES[key.arch][0], 10)
                    dtype = torch.bfloat16 if key.dtype == "bf16" else torch.float16
                    reason = supports(key.head_dim, tokens, tokens, dtype, version, backward=side == "backward")
                    assert reason is None
    for arch, capabilities in shipped.CAPABILITIES.items():
        unknown = arch == "default"  # compiled for one with the least memory
        assert unknown or {architecture(divmod(n, 10)) for n in capabilities} == {arch}
    lengths = {n for length in table.LENGTHS[:3] for n in shipped.lengths(table.Key("sm_90", "bf16", 64, length, True))}
    assert {key_pieces(n) for n in lengths} == {key_pieces(n) for n in range(1, 257)}
    preferred = [key for key in keys if table.resolve(key, table.shipped_rows()).prefer == "kernel"]
    assert not any(shipped.may_spill(key) for key in preferred)


def test_refuses_interpreted_kernels_and_double_names(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_kernel(lambda: None, {}, {})
    assert collect(["no_such_module"]) == []
    monkeypatch.syspath_prepend(str(HERE))
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
            recorded(lambda: None)
    with pytest.raises(ValueError, match="two gate cases of one name"):
        collect(["gate_samples", "gate_samples"])
    assert main(["--module", "gate_samples", "--only", "nothing"]) == 2
    assert "no such case" in capsys.readouterr().err
    assert main(["--module", "gate_samples", "--list", "--only", "r"]) == 0
    assert "sm_90 for the long tests\n" in capsys.readouterr().out
    assert main(["--module", "gate_samples", "--list", "--quick", "--only", "r", "--capability", "80"]) == 0
    assert capsys.readouterr().out == "sm_80 ampere\n"
    assert main(["--module", "gate_samples", "--list", "--quick", "--only", "for the long"]) == 2
