"""`initialize`: the ranks have joined when methods prepare the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from efftrain_ds import startup


class Prepared(Exception):
    pass


@pytest.fixture
def calls(monkeypatch):
    found: list = []
    accelerator = SimpleNamespace(
        communication_backend_name=lambda: "theirs",
        device_name=lambda: "cuda",
        set_device=lambda place: found.append(("device", place)),
    )
    monkeypatch.setattr(startup, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(startup.deepspeed, "init_distributed", lambda **given: found.append(("join", given)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return found


def _initialize(found, **given) -> None:
    def prepare(model):
        found.append("prepare")
        raise Prepared

    method = SimpleNamespace(changes_parameters=False, prepare_model=prepare)
    config = {"train_batch_size": 4, "efftrain": {}}
    with pytest.raises(Prepared):
        startup.initialize(model=nn.Linear(2, 2), config=config, methods=[method], schedule=object(), **given)


def test_ranks_join_before_methods_prepare(calls, monkeypatch):
    monkeypatch.setattr(startup.dist, "is_initialized", lambda: False)
    _initialize(calls, distributed_port=1234, dist_init_required=True)
    given = {"dist_backend": "theirs", "distributed_port": 1234, "dist_init_required": True}
    assert calls == [("join", given), ("device", 1), "prepare"]


def test_a_group_that_is_there_stays(calls, monkeypatch):
    monkeypatch.setattr(startup.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(startup.dist, "get_world_size", lambda: 2)
    _initialize(calls, args=SimpleNamespace(device_rank=3))
    assert calls == [("device", 3), "prepare"]
