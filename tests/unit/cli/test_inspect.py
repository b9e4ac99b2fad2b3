from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from efftrain_ds.checkpoint.plain import to_plain
from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.checkpoint.survey import newest, survey
from efftrain_ds.cli import main as cli
from efftrain_ds.core.errors import CheckpointError

SHAPES = {"a.weight": [3, 4], "b.weight": [5], "a.bias": [2]}
GROUPS = {"decay": ["a.weight", "b.weight"], "no_decay": ["a.bias"]}


def values_of(name: str, key: str = "fp32") -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(name) + 10 * len(key))
    return torch.randn(SHAPES[name], generator=rng)


def write_checkpoint(
    folder: Path, *, step: int = 7, architecture: bool = False, client: dict | None = None, **changes: Any
) -> Path:
    """A checkpoint of two ranks under ZeRO-1 in the form on disk: each group is one tensor, cut in half."""
    folder.mkdir(parents=True)
    indices: list[list] = [[], []]
    tensors: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, names in enumerate(GROUPS.values()):
        sizes = [values_of(n).numel() for n in names]
        half = -(-sum(sizes) // 2)
        for key in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
            flat = torch.cat([values_of(n, key).view(-1) for n in names] + [torch.zeros(2 * half - sum(sizes))])
            for rank in range(2):
                tensors[rank][f"{key}.{number}"] = flat[rank * half : (rank + 1) * half].clone()
        at = 0
        for name, size in zip(names, sizes, strict=True):
            for rank in range(2):
                low, high = max(at, rank * half), min(at + size, (rank + 1) * half)
                if low < high:
                    indices[rank].append([name, low - at, high - low, number, low - rank * half])
            at += size
    for rank in range(2):
        tensors[rank]["local.buffer.mean"] = torch.full((3,), float(rank))
        save_file(tensors[rank], str(folder / f"rank-{rank:05d}.safetensors"))
        document = {
            "rng": {},
            "keys": ["fp32", "exp_avg", "exp_avg_sq", "ema"],
            "fragments": indices[rank],
            "scalars": [{"step": float(step)}] * 2,
        }
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(document))
    lifted: dict[str, torch.Tensor] = {"frozen.c.weight": torch.arange(4).to(torch.bfloat16)}
    state: dict[str, Any] = {"step": step, "methods": {"grow": {"depth": 3, "search": None, "table": [[1, 2]] * 40}}}
    if architecture:
        history = [{"step": 4, "reason": "depth 2 -> 3, interpolation", "parent": "p", "child": "c"}]
        members = [[label, names] for label, names in GROUPS.items()]
        state["architecture"] = {"methods": {}, "groups": members, "digest": "00ff", "history": history}
    groups = [{"name": "decay", "lr": 1e-3, "weight_decay": 0.05}, {"name": "no_decay", "lr": 1e-3, "weight_decay": 0}]
    document = {
        "format": 1,
        "step": step,
        "world": 2,
        "zero_stage": 1,
        "versions": {"torch": "9.9", "deepspeed": "0.1"},
        "shapes": SHAPES,
        "counters": {"global_steps": step, "skipped_steps": 1},
        "scaler": {"cur_scale": 1.0},
        "groups": to_plain(groups, "groups", lifted),
        "scheduler": {"current": step - 1},
        "ema": {"updates": step, "decay": 0.9},
        "extra": to_plain({"efftrain": state, "client": client or {}}, "extra", lifted),
        **changes,
    }
    (folder / "state.json").write_text(json.dumps(document))
    save_file(lifted, str(folder / "state.safetensors"))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(folder.iterdir())
        if p.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


CLIENT = {
    "config": json.dumps({"bf16": {"enabled": True}, "efftrain": {"data": {"train": "bundled:fashion_mnist/train"}}}),
    "data": {"consumed": 9000, "seed": 5, "streams": 60, "manifest": "m" * 64},
    "best": {"top1": 0.5, "loss": 1.25},
    "chrono": {"train": 61.0},
    "plan": "p" * 16,
}


def damage(path: Path) -> None:
    """One byte of the same length."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


# reading


def test_parameters_come_back_whole(tmp_path: Path) -> None:
    found = Checkpoint(write_checkpoint(tmp_path / "step-00000007"))
    for name in SHAPES:
        assert torch.equal(found.parameter(name), values_of(name))
        assert torch.equal(found.parameter(name, average=True), values_of(name, "ema"))
    assert len(found.pieces["a.weight"]) + len(found.pieces["b.weight"]) == 3  # one of them is cut by the ranks
    assert torch.equal(found.parameter("c.weight"), torch.arange(4.0))
    assert found.parameter("c.weight", average=True).dtype == torch.float32
    assert torch.equal(found.buffer("mean"), torch.zeros(3))
    with pytest.raises(CheckpointError, match="has no parameter d"):
        found.parameter("d")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["fragments"][0].__setitem__(2, 8), "do not make up the parameter"),
        (lambda d: d["fragments"].pop(0), "do not make up the parameter"),
        (lambda d: d["fragments"][0].__setitem__(4, -1), "negative position"),
        (lambda d: d["fragments"][0].__setitem__(3, 5), "rank-00000.json: not readable"),
        (lambda d: d.pop("scalars"), "rank-00000.json: not readable"),
    ],
)
def test_damaged_index_is_named(tmp_path: Path, change: Any, text: str) -> None:
    folder = write_checkpoint(tmp_path / "c")
    path = folder / "rank-00000.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    seal(folder)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint(folder).parameter("a.weight")


def test_pieces_beyond_the_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    path = folder / "rank-00001.json"
    document = json.loads(path.read_text())
    document["fragments"][-1][4] += 3
    path.write_text(json.dumps(document))
    seal(folder)
    name = document["fragments"][-1][0]
    with pytest.raises(CheckpointError, match="ends before element"):
        Checkpoint(folder).parameter(name)


def test_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    (tmp_path / "x").write_text("x")
    (folder / "manifest.json").write_text(json.dumps({"files": {"../x": {"bytes": 1, "sha256": "0"}}}))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        Checkpoint(folder)


# one checkpoint


def test_screen_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "step-00000007", architecture=True, client=CLIENT)
    assert cli.main(["inspect", str(folder), "--verify"]) == 0
    out = capsys.readouterr().out
    for text in (
        "SHA-256 of all files verified",
        "step 7, 2 ranks, ZeRO-1, torch 9.9, DeepSpeed 0.1",
        "23 parameters in 4 tensors, 4 of them frozen, 1 buffer; masters fp32, trained in bf16",
        "history     step 4: depth 2 -> 3, interpolation",
        "exp_avg, exp_avg_sq, step 7",
        "decay 0.9, 7 updates",
        "grow: depth 3, no search, table 40 values",
        "epoch 1.50, 9,000 samples consumed; seed 5, 60 streams",
        "top1 50.00 %, loss 1.25",
        "train 1m01s",
        "1 of 7 steps",
    ):
        assert text in out
    rows = [line.split() for line in out.splitlines()]
    assert ["decay", "0.001", "0.05", "2", "17"] in rows
    assert ["no_decay", "0.001", "0", "1", "2"] in rows
    assert max(map(len, out.splitlines())) <= 120


def test_group_members_without_an_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(write_checkpoint(tmp_path / "a")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [g["tensors"] for g in found["groups"]] == [2, 1]
    assert found["history"] is None
    assert found["config_digest"] is None
    # at stage 3 the number of a tensor says nothing about groups
    assert cli.main(["inspect", str(write_checkpoint(tmp_path / "b", zero_stage=3)), "--json"]) == 0
    assert all("tensors" not in g for g in json.loads(capsys.readouterr().out)["groups"])


def test_damage_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "step-00000007")
    damage(folder / "rank-00001.safetensors")
    assert cli.main(["inspect", str(folder)]) == 0  # the size holds
    assert "--verify" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--verify"]) == 2
    error = capsys.readouterr().err
    assert error == f"{folder}/rank-00001.safetensors: SHA-256 differs from the manifest, the file is damaged\n"
    assert cli.main(["inspect", str(folder), "--verify", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "state.json").write_text("{"), "bytes, the manifest says"),
        (lambda f: (f / "rank-00000.json").unlink(), "missing"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json, the checkpoint was not completed"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: not a checkpoint manifest"),
    ],
)
def test_other_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, text: str) -> None:
    folder = write_checkpoint(tmp_path / "step-00000007")
    change(folder)
    assert cli.main(["inspect", str(folder)]) == 2
    assert text in capsys.readouterr().err


def test_other_format_and_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(write_checkpoint(tmp_path / "c", format=2))]) == 2
    assert "format 2, this version reads format 1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for name, text in (("empty", "neither a checkpoint"), ("nowhere", "no such folder")):
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert text in capsys.readouterr().err


# folders


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        write_checkpoint(root / f"step-{step:08d}", step=step)
    (root / "latest").write_text("step-00000030\n")
    return tmp_path / "run"


def test_folder_with_good_and_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    damage(root / "step-00000030" / "rank-00000.safetensors")
    (root / ".tmp-step-00000040").mkdir()
    native = root / "global_step5"
    native.mkdir()
    (native / "mp_rank_00_model_states.pt").write_bytes(b"pickle")
    entries, chosen = survey(root, hashes=True)
    assert chosen == "step-00000020"
    assert {e.name: e.verdict for e in entries} == {
        "step-00000030": "damaged",
        "step-00000020": "good",
        "step-00000010": "good",
        ".tmp-step-00000040": "incomplete",
        "global_step5": "foreign",
    }
    assert newest(run) == root / "step-00000020"
    assert cli.main(["inspect", str(run), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("<- a resume takes this one" in line for line in lines) == 1
    assert any("step-00000020" in line and "<- a resume takes this one" in line for line in lines)
    assert any(line.startswith("  step-00000030: ") and "SHA-256 differs" in line for line in lines)


def test_folder_without_a_good_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "state.json").unlink()
    assert cli.main(["inspect", str(run)]) == 2
    assert "No checkpoint can be used" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"(?s)no usable checkpoint.*step-00000010: damaged"):
        newest(run)


def test_folder_as_json_and_empty(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resume"] == "step-00000030"
    assert [c["step"] for c in found["checkpoints"]] == [30, 20, 10]
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert cli.main(["inspect", str(run)]) == 2
    assert "no checkpoint yet" in capsys.readouterr().out
