"""Controls: plain DeepSpeed fails under faults that the checkpoints of this package survive (see test_faults.py)."""

from __future__ import annotations

import os
import pickle
import signal

import pytest

from tests.faults import plain
from tests.faults.fleet import ROOT

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def test_a_killed_rank_leaves_a_run_that_cannot_start(tmp_path):
    codes, _ = plain.run(tmp_path, "save and be killed", ROOT)
    assert codes[1] == -signal.SIGKILL
    assert (tmp_path / "latest").read_text().strip() == "second"  # although rank 1 has written nothing
    _, results = plain.run(tmp_path, "load", ROOT)
    assert any(isinstance(result, str) and "Error" in result for result in results)  # "first" is intact, and ignored


def test_flipped_bits_load_without_a_word(tmp_path):
    plain.run(tmp_path, "save", ROOT)
    _, (sound, _) = plain.run(tmp_path, "load", ROOT)
    shard = max((tmp_path / "first").glob("*zero_pp_rank_0*optim_states.pt"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    for offset in range(len(data) // 2, len(data) // 2 + 8):
        data[offset] ^= 0xFF
    shard.write_bytes(data)
    _, (damaged, _) = plain.run(tmp_path, "load", ROOT)
    assert isinstance(sound, list)
    assert isinstance(damaged, list)  # no error
    assert damaged[0] == sound[0]
    assert damaged[1:] != sound[1:]  # other numbers


def test_a_pickle_runs_its_code(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {canary}",))

    plain.run(tmp_path, "save", ROOT)
    (tmp_path / "first" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Bomb()))
    plain.run(tmp_path, "load", ROOT)
    assert canary.exists()
