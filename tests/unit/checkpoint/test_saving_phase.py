"""Waiting for a save in the background has the time of a checkpoint, as the watchdog sees it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from efftrain_ds import checkpointing
from efftrain_ds.checkpointing import Checkpointing
from efftrain_ds.core.errors import CheckpointError


class _Engine(Checkpointing):
    def __init__(self, guard, saving):
        self.guard, self._saving = guard, saving


@pytest.mark.parametrize("guarded", [True, False])
def test_waiting_is_of_the_checkpoint_phase(monkeypatch, guarded):
    phases, seen = ["train"], []

    @contextmanager
    def phase(name):
        phases.append(name)
        yield
        phases.pop()

    guard = SimpleNamespace(phase=phase) if guarded else None
    saving = SimpleNamespace(leave=lambda: seen.append(("leave", phases[-1])))
    monkeypatch.setattr(checkpointing.store, "finish", lambda what: seen.append((what, phases[-1])))
    engine = _Engine(guard, saving)
    engine.finish_saving()
    engine.finish_saving()  # there is nothing left to wait for
    engine._saving = saving
    engine.leave_saving()
    engine.leave_saving()
    during = "checkpoint" if guarded else "train"
    assert seen == [(saving, during), ("leave", during)]
    assert phases == ["train"]


@pytest.mark.parametrize(
    ("given", "named"),
    [({"keep": 2}, "keep"), ({"background": "sync"}, "background"), ({"keep": 1, "background": True}, "keep and back")],
)
def test_what_the_form_of_deepspeed_cannot_do_is_refused(tmp_path, given, named):
    with pytest.raises(CheckpointError, match=f'save_checkpoint: found {named}.* together with form="deepspeed"'):
        _Engine(None, None).save_checkpoint(tmp_path, form="deepspeed", **given)
