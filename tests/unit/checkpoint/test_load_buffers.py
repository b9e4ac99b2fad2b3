"""A checkpoint whose buffers have other shapes is refused before anything is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from efftrain_ds.checkpoint import store
from efftrain_ds.core.errors import CheckpointError


@pytest.mark.parametrize("shape", [[1, 3], [2, 4], [3]])
def test_buffers_of_another_shape(monkeypatch, shape):
    module = nn.Module()
    module.register_buffer("keep", torch.ones(2, 3))
    module.register_buffer("other", torch.ones(5))
    saved = {"buffer.keep": torch.zeros(2, 3), "rng": torch.zeros(7)}
    written = []

    class Reader:
        def __init__(self, path, world):
            assert world == 1

        def check(self, shapes):
            pass

        def local(self, rank):
            return saved

    document = {"world": 1, "extra": {}, "groups": [], "scheduler": None, "ema": None, "step": 3, "shapes": {}}
    layout = SimpleNamespace(shapes={}, push=lambda: None, base=SimpleNamespace(param_groups=[]))
    monkeypatch.setattr(store, "ShardReader", Reader)
    monkeypatch.setattr(store, "read_document", lambda path: document)
    monkeypatch.setattr(store, "read_tensors", lambda path: {})
    monkeypatch.setattr(store.access, "layout_of", lambda engine: layout)
    monkeypatch.setattr(store, "read_into", lambda *args: written.append(args))
    engine = SimpleNamespace(module=module, lr_scheduler=None)

    assert store.load(engine, Path("a"), optimizer_state=False).step == 3
    assert len(written) == 1
    assert not module.keep.any()
    saved["buffer.keep"] = torch.full(shape, 7.0)
    with pytest.raises(CheckpointError, match=r"keep is \[.*, the model's is \[2, 3\]"):
        store.load(engine, Path("a"), optimizer_state=False)
    assert len(written) == 1
    assert not module.keep.any()
