"""Files that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from efftrain_ds.core.files import write_whole


def test_a_file_is_written_over(tmp_path: Path):
    path = tmp_path / "state.json"
    write_whole(path, "first")
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode()
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_before_stays_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.json"
    write_whole(path, "good")

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "half of the new one")
    assert path.read_text() == "good"
