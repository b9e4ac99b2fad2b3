"""Folders of checkpoints: what is left when a replacement breaks off, and manifests that are none."""

from __future__ import annotations

import json
import logging

import pytest

from efftrain_ds.checkpoint import store
from efftrain_ds.checkpoint.folder import newest_good, recover, seal, verify
from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.checkpoint.writer import Part, write_parts
from efftrain_ds.core import faults
from efftrain_ds.core.errors import CheckpointError


def _save(root, value: int) -> None:
    partial = root / ".tmp-last"
    partial.mkdir(exist_ok=True)
    seal(partial, root / "last", write_parts(partial, [Part("state.json", str(value))]))


@pytest.fixture(autouse=True)
def _disarm():
    yield
    faults.arm("")


@pytest.mark.parametrize("tag", ["last", None])
@pytest.mark.parametrize(("point", "value"), [("save.replacing", "1"), ("save.before_latest", "2"), ("save.end", "2")])
def test_a_replacement_that_broke_off(tmp_path, tag, point, value):
    _save(tmp_path, 1)
    faults.arm(f"{point}:error")
    with pytest.raises(RuntimeError, match=point):
        _save(tmp_path, 2)
    assert store.find(tmp_path, tag) == tmp_path / "last"
    assert (tmp_path / "last" / "state.json").read_text() == value
    assert not (tmp_path / ".tmp-old-last").exists()


def test_the_old_one_stays_where_the_new_one_is_damaged(tmp_path, caplog):
    _save(tmp_path, 1)
    faults.arm("save.before_latest:error")
    with pytest.raises(RuntimeError):
        _save(tmp_path, 2)
    (tmp_path / "last" / "state.json").write_text("3")
    with caplog.at_level(logging.WARNING):
        recover(tmp_path)
    assert (tmp_path / ".tmp-old-last" / "state.json").read_text() == "1"
    assert "the checkpoint that it was to replace is still in" in caplog.text
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        store.find(tmp_path, "last")


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "it names no file"),
        ({"../last/state.json": {"bytes": 1, "sha256": ""}}, "names a file outside of the checkpoint"),
        ({"/etc/hostname": {"bytes": 1, "sha256": ""}}, "names a file outside of the checkpoint"),
        ([], "not a checkpoint manifest"),
        ({"state.json": {"bytes": 1}}, "not a checkpoint manifest"),
        ({"..": {"bytes": 1, "sha256": ""}}, "missing"),
    ],
)
def test_manifests_that_are_none(tmp_path, files, text):
    _save(tmp_path, 1)
    (tmp_path / "last" / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(CheckpointError, match=text):
        verify(tmp_path / "last")
    with pytest.raises(CheckpointError, match=text):
        Checkpoint(tmp_path / "last", hashes=False)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        newest_good(tmp_path)
