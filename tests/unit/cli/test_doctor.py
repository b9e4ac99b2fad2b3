from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from efftrain_ds.cli import main as cli
from efftrain_ds.cli import screen
from efftrain_ds.cli.doctor import check_lines
from efftrain_ds.doctor import comm, compute, software, storage, table
from efftrain_ds.doctor.check import FAIL, NONE, OK, WARN, Check, Setup, run_checks, verdict
from efftrain_ds.doctor.environment import environment
from efftrain_ds.zero.shared_buffers import PREFIX

CONFIG = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 32,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "efftrain": {
        "run": {"epochs": 2},
        "model": {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "depth": 2}, "ema": {}},
        "data": {"train": "bundled:fashion_mnist/train", "val": "bundled:fashion_mnist/val", "resolution": 28},
    },
}


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    def make(world: int = 2, **changes: Any) -> Setup:
        config = json.loads(json.dumps(CONFIG))
        config["efftrain"]["run"]["output"] = str(tmp_path / "run" / "deep")
        for path, value in changes.items():
            node = config
            *parents, last = path.split("/")
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
        file = tmp_path / "c.json"
        file.write_text(json.dumps(config))
        made = table.make_setup(str(file), (), world)
        made.gpus = 0  # the same on a machine with GPUs
        return made

    return make


def by_name(setup: Setup, name: str) -> dict[str, Check]:
    return {c.name: c for c in run_checks(setup, [c for c in table.CHECKS if c[0] == name])}


# the table


def test_an_exception_is_a_cross_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(setup: Setup) -> Check:
        sys.stdout.write("noise")
        raise ZeroDivisionError("by\nzero")

    def half(setup: Setup) -> Any:
        yield Check("a", OK, "fine")
        raise OSError("gone")

    found = list(run_checks(Setup(1), [("x", broken), ("y", half), ("z", lambda s: Check("z", OK, "fine"))]))
    assert [(c.name, c.status) for c in found] == [("x", FAIL), ("y", FAIL), ("z", OK)]
    assert found[0].text == "the check itself failed: ZeroDivisionError: by zero"
    assert all(c.fix for c in found if c.status == FAIL)
    assert capsys.readouterr().out == ""


def test_verdict() -> None:
    checks = [Check("a", OK, ""), Check("b", WARN, ""), Check("c", NONE, "")]
    assert verdict(checks, "x.json") == (True, "ready for x.json, 1 warning (b)")
    good, line = verdict([*checks, Check("d", FAIL, ""), Check("e", FAIL, "")], "x.json")
    assert (good, line) == (False, "not ready for x.json: 2 problems (d, e), 1 warning (b)")


def test_lines_wrap_under_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "width", lambda: 60)
    lines = check_lines(Check("shared memory", FAIL, "word " * 20, "do this"))
    assert lines[0].startswith("FAIL shared memory")
    assert max(map(len, lines)) <= 60
    assert len({len(line) - len(line.lstrip()) for line in lines[1:-1]}) == 1
    assert lines[-1].strip() == "fix: do this"


def test_whole_command(setup: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = setup()
    monkeypatch.setattr(table, "CHECKS", [c for c in table.CHECKS if c[0] not in ("collectives", "libraries")])
    monkeypatch.setattr(compute, "_compiled_again", lambda root, names: None)
    code = cli.main(["doctor", made.path, "--world", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (code == 0)
    names = [c["name"] for c in found["checks"]]
    assert names == [
        *("Python", "GPU", "Triton", "kernels", "compiler", "extensions", "clocks", "configuration", "plan"),
        *("data.train", "data.val", "shared memory", "output", "disk space", "open files", "processors"),
    ]
    assert found["environment"]["versions"]["torch"]
    assert cli.main(["doctor", made.path, "--set", "efftrain.run.epoks=3", "--world", "2"]) == 2
    out = capsys.readouterr().out
    assert re.search(r'(?m)^FAIL configuration +efftrain.run.epoks: unknown key. Did you mean "epochs"\?$', out)
    assert "fix: correct the file, then: efftrain validate" in out
    assert "\n\nverdict: not ready for" in out
    assert "\033" not in out


def test_environment_keeps_secrets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFTRAIN_API_KEY", "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    found = environment()
    assert found["variables"]["NCCL_DEBUG"] == "INFO"
    assert "hunter2" not in json.dumps(found)
    assert not {"host", "cwd"} & set(found)


# software


def test_libraries_by_the_projects_own_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = software.requirements()
    assert {"torch", "deepspeed", "timm", "webdataset"} <= set(allowed)
    assert "pytest" not in allowed  # an extra
    real = software.installed
    fake = {"timm": "0.1", "webdataset": None, "numpy": "0.9"}
    monkeypatch.setattr(software, "installed", lambda name: fake.get(name, real(name)) if name in fake else real(name))
    monkeypatch.setattr(software.importlib, "import_module", lambda name: None)
    found = {c.name: c for c in software.libraries(Setup(1))}
    assert found["timm"].status == FAIL
    assert found["timm"].fix == f'pip install "timm{allowed["timm"]}"'
    assert found["webdataset"].text == "not installed"
    assert found["other libraries"].text.startswith("numpy 0.9 (allowed: ")
    assert found["torch"].status == OK


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.metadata, "requires", lambda name: ["torch==2.0.1", "numpy"])
    assert "was made for torch ==2.0.1" in (software._other_torch("0.15.2") or "")


def test_untested_deepspeed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda name: "0.19.99" if name == "deepspeed" else real(name))
    monkeypatch.setattr(software.importlib, "import_module", lambda name: None)
    found = {c.name: c for c in software.libraries(Setup(1))}["deepspeed"]
    assert (found.status, found.text) == (WARN, "0.19.99, in the allowed range but tested was 0.19.8")


def test_configuration_and_plan(setup: Any) -> None:
    good = setup()
    assert by_name(good, "configuration")["configuration"].status == OK
    assert by_name(good, "plan")["plan"].text.startswith("188 steps in 1 stages on 2 ranks")
    bad = setup(amp={})
    assert "amp: removed from DeepSpeed" in by_name(bad, "configuration")["configuration"].text
    short = setup(**{"efftrain/model/name": "vit_nothing"})
    plan = by_name(short, "plan")["plan"]
    assert plan.status == FAIL
    assert "vit_nothing" in plan.text
    assert by_name(Setup(1), "plan")["plan"].status == NONE


# compiling


def fake_program(folder: Path, name: str, output: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_compiler_and_ninja(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))  # training looks beside it
    found = by_name(setup(), "compiler")["compiler"]
    assert found.status == FAIL
    assert "ninja: installed, but its folder is not on PATH" in found.text
    fake_program(programs, "ninja", "1.0")
    found = by_name(setup(), "compiler")["compiler"]
    assert (found.status, found.text) == (FAIL, "no C++ compiler (c++)")
    fake_program(programs, "g++", "")
    assert by_name(setup(), "compiler")["compiler"].status == OK


def test_extensions(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    found = by_name(setup(), "extensions")["extensions"]
    assert found.status == WARN
    assert found.fix == "python tools/build_extensions.py"
    found = by_name(setup(**{"optimizer/params/torch_adam": False}), "extensions")["extensions"]
    assert "deepspeed_shm_comm, fused_adam" in found.text
    assert found.fix.endswith("--optimizers")
    folder = tmp_path / "ext" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "deepspeed_shm_comm.so").touch()
    assert by_name(setup(), "extensions")["extensions"].status == OK
    # what one ninja built, another one would build again
    (folder / "build.ninja").touch()
    for output, status in (("ninja: no work to do.", OK), ("[1/3] c++ x", WARN)):
        fake_program(tmp_path / "bin", "ninja", output)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        assert by_name(setup(), "extensions")["extensions"].status == status


def test_kernels_without_a_gpu(setup: Any) -> None:
    found = by_name(setup(), "kernels")
    assert found["kernels"].status == OK
    assert "on cpu" in found["kernels"].text
    assert by_name(setup(), "Triton")["Triton"].status == NONE
    assert by_name(setup(), "GPU")["GPU"].status in (NONE, FAIL)  # FAIL where a driver is there and was hidden


# processes


def test_all_reduce_between_two_processes() -> None:
    found = comm.all_reduce("gloo", 2, megabytes=1)
    assert found.status == OK, found.text
    assert found.data["seconds"] > 0


def test_all_reduce_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm.sys, "executable", "/bin/false")
    found = comm.all_reduce("gloo", 2, megabytes=1)
    assert (found.status, found.text) == (FAIL, "rank 0 of 2: no message")
    assert "GLOO_SOCKET_IFNAME" in found.fix


def test_hosts_of_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert comm.hosts_of({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert comm.hosts_of(torchrun) == comm.Hosts(3, 8, "a", comm._PORT)
    assert comm.hosts_of({**torchrun, "LOCAL_WORLD_SIZE": "8"}) is None
    answer = SimpleNamespace(stdout="node7\nnode9\n")
    monkeypatch.setattr(comm.subprocess, "run", lambda *args, **kwargs: answer)
    slurm = {"SLURM_NNODES": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[7,9]"}
    step = {**slurm, "SLURM_STEP_ID": "0"}
    assert comm.hosts_of(step) == comm.Hosts(1, 2, "node7", comm._PORT)
    assert comm.hosts_of(slurm).world == 1  # the body of an sbatch script runs once: nobody else would answer
    assert comm.hosts_of({**step, "SLURM_NNODES": "1"}) is None


def test_clock_of_another_host() -> None:
    """Two processes, one of them with a clock that is five seconds behind."""
    code = (
        "import sys, time; from efftrain_ds.doctor import comm; rank, port = map(int, sys.argv[1:]);"
        "real = time.time; comm.time.time = lambda: real() - 5 * rank;"
        "print(*comm.clock_offset(comm.Hosts(rank, 2, '127.0.0.1', port)))"
    )
    from tests.pool import free_port

    port = str(free_port())
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    answers = [tuple(map(float, process.communicate(timeout=100)[0].split())) for process in started]
    assert answers[0] == answers[1]
    offset, uncertainty = answers[0]
    assert abs(offset - 5) <= uncertainty + 0.01


# storage


def test_shared_memory_against_the_loaders(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup(**{"efftrain/data/workers": 3, "efftrain/data/prefetch": 2})
    needed = 32 * 3 * 28 * 28 * (3 * 2 + 2) * 2
    assert storage.loader_bytes(made) == needed
    for free, status in ((needed, OK), (needed - 1, FAIL)):
        monkeypatch.setattr(
            storage.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(total=1e10, free=free)
        )
        assert by_name(made, "shared memory")["shared memory"].status == status
    assert storage.loader_bytes(setup(**{"efftrain/data/workers": 0})) == 0


def test_memory_that_ended_runs_left(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SHM", tmp_path)
    made = setup()
    assert "left memory" not in by_name(made, "left memory")
    (tmp_path / f"{PREFIX}_0_127.0.0.1_29500_0").write_bytes(b"0" * (1 << 20))
    (tmp_path / f"{PREFIX}_0_127.0.0.1_29500_1").write_bytes(b"0" * (1 << 20))
    found = by_name(made, "left memory")["left memory"]
    assert found.status == WARN
    assert "2 buffers of ended DeepSpeed runs hold 2 MB" in found.text
    assert found.fix.endswith(f"rm {tmp_path}/{PREFIX}_*")


def test_room_for_checkpoints(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup(**{"efftrain/checkpoint/keep": 3})
    assert storage.checkpoint_bytes(made) == 16 * made.plan.params
    assert storage.checkpoint_bytes(setup(**{"efftrain/model/ema": None})) == 12 * made.plan.params
    found = by_name(made, "output")
    assert (found["output"].status, found["disk space"].status) in ((OK, OK), (WARN, OK))
    assert list(tmp_path.iterdir()) == [tmp_path / "c.json"]  # nothing is left behind, the folder is not made
    usage = SimpleNamespace(total=1, free=4 * 16 * made.plan.params - 1)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    assert by_name(made, "output")["disk space"].status == FAIL


def test_output_that_cannot_be_written(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file")
    assert by_name(setup(), "output")["output"].text == f"{tmp_path / 'run'} is a file"

    def refuse(folder: Path) -> float:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "run").unlink()
    monkeypatch.setattr(storage, "write_rate", refuse)
    found = by_name(setup(), "output")["output"]
    assert (found.status, found.text) == (FAIL, f"{tmp_path} cannot be written: Permission denied")


def test_data(setup: Any, tmp_path: Path) -> None:
    from efftrain_ds.data.build import build_shards
    from efftrain_ds.data.sources import FolderSource

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (48, 36)).save(tmp_path / "images" / name / "a.png")
    folder = tmp_path / "shards"
    build_shards(FolderSource(tmp_path / "images"), folder, split="train", samples_per_shard=1)
    found = by_name(setup(**{"efftrain/data/train": str(folder)}), "data")
    assert found["data.train"].text.startswith("2 samples in 2 shards")
    assert "48 x 36 pixels" in found["data.train"].text
    assert found["data.val"].status == OK
    shard = sorted(folder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-512])
    found = by_name(setup(**{"efftrain/data/train": str(folder)}), "data")["data.train"]
    assert found.status == FAIL
    assert "the manifest says" in found.text
    assert "efftrain shards audit" in found.fix
    found = by_name(setup(**{"efftrain/data/train": "s3://bucket/shards"}), "data")["data.train"]
    assert found.status == NONE


def test_limits(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.resource, "getrlimit", lambda kind: (1024, 4096))
    assert by_name(setup(), "open files")["open files"].fix == "ulimit -n 4096"
    monkeypatch.setattr(storage, "cpu_count", lambda: 4.0)
    found = by_name(setup(**{"efftrain/data/workers": 4}), "processors")["processors"]
    assert (found.status, found.fix) == (WARN, "lower efftrain.data.workers to 1")
    assert by_name(setup(**{"efftrain/data/workers": 1}), "processors")["processors"].status == OK
