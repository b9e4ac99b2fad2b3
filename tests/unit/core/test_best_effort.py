"""A file that a run can do without costs nothing but itself."""

from __future__ import annotations

import os

import pytest

from efftrain_ds.core.best_effort import BestEffort
from efftrain_ds.core.files import write_whole


def test_told_once_and_told_when_it_works_again(tmp_path, caplog):
    effort, path = BestEffort("pictures"), tmp_path / "folder" / "a.png"
    for _ in range(3):
        with effort(path):
            write_whole(path, "x")  # there is no folder
    assert caplog.text.count("a.png: pictures cannot be written, the run goes on without: [Errno 2]") == 1
    path.parent.mkdir()
    for _ in range(2):
        with effort(path):
            write_whole(path, "x")
    assert caplog.text.count("pictures can be written again; lost: 3") == 1
    assert len(caplog.records) == 2


def test_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(ValueError, match="ours"), BestEffort("x")(tmp_path):
        raise ValueError("ours")


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"plan.json": "old"}
