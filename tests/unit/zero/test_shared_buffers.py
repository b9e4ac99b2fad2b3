"""Files that DeepSpeed's collectives on CPUs leave in shared memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import deepspeed

from efftrain_ds.zero.shared_buffers import PREFIX, abandoned_buffers, own_buffer


def test_the_name_is_still_deepspeeds(monkeypatch):
    comm = Path(deepspeed.__file__).parent / "ops" / "csrc" / "cpu" / "comm"
    source = (comm / "shm.cpp").read_text()
    assert f'#define SHM_BUFFER_NAME "{PREFIX}"' in source
    assert '"%s_%d_%s_%s"' in source
    assert '"%s_%d", shm_name_prefix, rank' in source
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29501")
    monkeypatch.setattr("os.getuid", lambda: 7)
    assert own_buffer(Path("/x")) == Path(f"/x/{PREFIX}_7_10.0.0.1_29501_0")


def test_what_a_process_has_mapped_is_not_abandoned(tmp_path):
    names = [tmp_path / f"{PREFIX}_0_a_1_{rank}" for rank in range(2)]
    for name in names:
        name.write_bytes(b"0" * mmap.PAGESIZE)
    with names[0].open("r+b") as stream, mmap.mmap(stream.fileno(), 0):
        assert abandoned_buffers(tmp_path) == [names[1]]
    assert abandoned_buffers(tmp_path) == names
    assert abandoned_buffers(tmp_path / "none") == []
