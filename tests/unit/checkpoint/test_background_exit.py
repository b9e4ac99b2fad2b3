"""A process that ends while a thread of it writes a checkpoint."""

from __future__ import annotations

import subprocess
import sys

from efftrain_ds.checkpoint.folder import verify

_SCRIPT = """
import sys
from pathlib import Path
import torch
from efftrain_ds.checkpoint import background
from efftrain_ds.checkpoint.folder import seal
from efftrain_ds.checkpoint.writer import Part, write_parts
from efftrain_ds.core import faults

background._GRACE = 0.2
faults.arm("save.rank_file:sleep=0.2,always")
for name, world in (("alone", 1), ("forsaken", 2)):
    final = Path(sys.argv[1]) / name
    partial = final.parent / f".tmp-{name}"
    partial.mkdir(parents=True)
    parts = [Part(f"{i}.safetensors", {"x": torch.ones(1000)}) for i in range(3)]
    background.BackgroundSave(
        partial, final, lambda p=partial, s=parts: write_parts(p, s), 0, world,
        lambda entries, p=partial, f=final: seal(p, f, entries),
    )
print("the end")
"""


def test_the_end_of_a_process_waits_but_not_for_ever(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "root")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the end"
    verify(tmp_path / "root" / "alone")
    # the second one waits for a rank that never writes
    assert "given up before rank 1 had written its part" in done.stderr
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["alone", "latest"]
