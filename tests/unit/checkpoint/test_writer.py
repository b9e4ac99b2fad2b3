"""Files of a checkpoint: the format of the safetensors library, hashed on the way."""

from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from efftrain_ds.checkpoint import folder, writer
from efftrain_ds.checkpoint.writer import Part, write_parts
from efftrain_ds.core import faults
from efftrain_ds.core.errors import CheckpointError


@pytest.fixture(autouse=True)
def _disarm():
    yield
    faults.arm("")


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_tensor_files_are_safetensors(tmp_path, monkeypatch, block):
    monkeypatch.setattr(writer, "_BLOCK", block)
    dtypes = list(writer._DTYPES)
    tensors = {f"t{i}": (torch.arange(5 * i + 1) % 2).to(dtype) for i, dtype in enumerate(dtypes)}
    base = torch.randn(6, 4)
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "view": base.t(), "part": base[1:3]}
    (entry,) = write_parts(tmp_path, [Part("a.safetensors", tensors)])
    data = (tmp_path / "a.safetensors").read_bytes()
    assert entry == {"name": "a.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    found = load_file(str(tmp_path / "a.safetensors"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_text_files(tmp_path):
    (entry,) = write_parts(tmp_path, [Part("a.json", "[1]\n")])
    assert entry == {"name": "a.json", "bytes": 4, "sha256": hashlib.sha256(b"[1]\n").hexdigest()}


def test_types_without_a_name_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x is torch.complex64, which a checkpoint cannot hold"):
        write_parts(tmp_path, [Part("a.safetensors", {"x": torch.zeros(1, dtype=torch.complex64)})])


def test_owned_parts_do_not_follow_the_training(tmp_path):
    live = torch.ones(3)
    part = Part("a.safetensors", {"x": live})
    buffers = {}
    copy = part.owned(buffers)
    live.zero_()
    write_parts(tmp_path, [copy])
    assert load_file(str(tmp_path / "a.safetensors"))["x"].tolist() == [1, 1, 1]
    assert part.nbytes == copy.nbytes == 12
    again = part.owned(buffers)
    assert again.content["x"].data_ptr() == copy.content["x"].data_ptr()  # the same memory, for the next save
    assert again.content["x"].tolist() == [0, 0, 0]
    other = Part("a.safetensors", {"y": torch.ones(5)}).owned(buffers)
    assert other.content["y"].tolist() == [1] * 5
    assert list(buffers) == ["a.safetensors/y"]


def test_owned_parts_of_every_kind():
    kinds = {
        "low": torch.randn(5, 3).bfloat16(),
        "flags": torch.rand(7) < 0.5,
        "number": torch.tensor(3.0, requires_grad=True),
        "nothing": torch.empty(0, 4),
        "turned": torch.randn(4, 6).t(),
        "spread": torch.arange(12)[::3],
    }
    copy = Part("a.safetensors", kinds).owned({})
    for name, value in kinds.items():
        mine = copy.content[name]
        assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
        assert torch.equal(mine, value)
        assert not mine.requires_grad
        assert not mine.numel() or mine.data_ptr() != value.data_ptr()


def test_space_is_looked_at_before_writing(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 5 * 10**6))
    folder.free_space(tmp_path, 3_000_000)
    with pytest.raises(CheckpointError, match=r"5 MB free, the checkpoint needs 7 MB; free some space"):
        folder.free_space(tmp_path, 6_000_000)


def test_a_file_that_the_first_rank_does_not_see_is_named(tmp_path):
    partial = tmp_path / ".tmp-x"
    partial.mkdir()
    with pytest.raises(CheckpointError, match="a file system that all nodes share"):
        folder.seal(partial, tmp_path / "x", [{"name": "rank-00001.json", "bytes": 3, "sha256": ""}])
    assert not (tmp_path / "x").exists()


def test_fault_points_act_as_told(tmp_path):
    faults.point("save.rank_file")
    faults.arm("save.rank_file:oserror,hit=2")
    write_parts(tmp_path, [Part("a.json", "1")])
    with pytest.raises(OSError, match="No space left on device"):
        write_parts(tmp_path, [Part("b.json", "1")])
    write_parts(tmp_path, [Part("c.json", "1")])
    faults.arm("save.rank_file:error,always,rank=0")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="fault point save.rank_file"):
            faults.point("save.rank_file")
    faults.arm("save.rank_file:error,rank=1")
    faults.point("save.rank_file")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("nowhere:kill", "no point 'nowhere'"),
        ("save.end:melt", "no action 'melt'"),
        ("save.end:kill,x=1", "no option 'x'"),
    ],
)
def test_bad_faults_are_refused(text, what):
    with pytest.raises(ValueError, match=what):
        faults.arm(text)


def test_every_fault_point_stands_in_the_code():
    import re
    from pathlib import Path

    root = Path(faults.__file__).resolve().parents[1]
    found = set()
    for path in root.rglob("*.py"):
        found |= set(re.findall(r'faults\.point\("([a-z_.]+)"\)', path.read_text()))
    assert found == set(faults.POINTS)
