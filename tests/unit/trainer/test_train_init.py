"""What a run starts from: the classes of the head, and that a resume does without the weights it once began with."""

from __future__ import annotations

import json

import pytest
import torch

from efftrain_ds import train_setup
from efftrain_ds.checkpoint.folder import sha256_of
from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import CheckpointError, ConfigError, ModelError
from efftrain_ds.train_init import head_rows


def load(output, resume=True, **init):
    small = {"patch_size": 7, "embed_dim": 8, "depth": 1, "num_heads": 1}
    section = {
        "run": {"steps": 4, "output": str(output)},
        "model": {"name": "vit_tiny_patch16_224", "num_classes": 3, "kwargs": small, "init": init},
        "data": {"resolution": 28, "samples": 8, "train": str(output / "shards")},
        "checkpoint": {"resume": resume},
    }
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    return load_config({**sizes, "efftrain": {"schema": 1, **section}})


def test_the_target_has_the_order_of_the_data(tmp_path):
    (tmp_path / "goal.txt").write_text("owl\ndog\nbee\n")
    (tmp_path / "names.txt").write_text("bee\nowl\nant\ndog\n")
    files = {"labels": str(tmp_path / "names.txt"), "target": str(tmp_path / "goal.txt")}
    config = load(tmp_path, weights="a", head="map", **files)
    init = config.efftrain.model.init
    assert head_rows(init, config, ()) == head_rows(init, config, ("owl", "dog", "bee")) == [1, 3, 0]
    with pytest.raises(ConfigError, match=r"^efftrain\.model\.init\.target: .*goal\.txt is not the order of the train"):
        head_rows(init, config, ("bee", "dog", "owl"))


class Built(Exception):
    """The model is there, its weights are read."""


def test_a_resume_does_not_read_the_first_weights(tmp_path, monkeypatch):
    def stop(**_):
        raise Built

    class Data:
        classes, kept = ("a", "b", "c"), 8

    monkeypatch.setattr(train_setup, "start_processes", lambda config: (0, 1, torch.device("cpu")))
    monkeypatch.setattr(train_setup, "open_data", lambda *args, **kwargs: Data())
    monkeypatch.setattr(train_setup, "initialize", stop)

    def build(resume=True, **more):
        train_setup.build(load(tmp_path, resume, weights=str(tmp_path / "gone")), tmp_path, None, **more)

    with pytest.raises(ModelError, match="no such file"):
        build()
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    files = {"state.json": {"bytes": 2, "sha256": sha256_of(folder / "state.json")}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(Built):
        build()
    for anew in ({"resume": False}, {"measure_steps": 2}):
        with pytest.raises(ModelError, match="no such file"):
            build(**anew)
    (folder / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        build()
