"""A part of every class held out of the training shards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efftrain_ds.config.loader import load_config
from efftrain_ds.config.sections import DataConfig
from efftrain_ds.core.errors import ConfigError, ShardError
from efftrain_ds.data.bundled import resolve
from efftrain_ds.data.evaluation import EvalLoader
from efftrain_ds.data.holdout import HoldOutConfig, hold_out
from efftrain_ds.data.labels import LabelMap
from efftrain_ds.data.loader import TicketSpec, TrainLoader
from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard, load_manifest
from efftrain_ds.planning import data_facts, with_labels

COUNTS = {0: 40, 1: 25, 2: 10, 3: 2}


def index_of(folder: Path, labels: np.ndarray, classes: int) -> Manifest:
    """A manifest whose shard does not exist: labels are all that is needed."""
    table = np.zeros(len(labels), ROW)
    table["label"] = labels
    folder.mkdir(parents=True, exist_ok=True)
    table.tofile(folder / INDEX)
    shards = (Shard("a.tar", 1, "0" * 64, len(labels)),)
    return Manifest(folder, "train", tuple(f"c{i}" for i in range(classes)), shards, len(labels), f"{len(labels)}")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    labels = np.concatenate([np.full(n, label) for label, n in COUNTS.items()])
    return index_of(tmp_path / "shards", np.random.default_rng(0).permutation(labels), 4)


def rows_of(manifest: Manifest) -> np.ndarray:
    return np.setdiff1d(np.arange(manifest.samples), manifest.left_out)


def counts_of(manifest: Manifest) -> dict[int, int]:
    labels, counts = np.unique(manifest.table["label"][rows_of(manifest)], return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def test_every_class_gives_its_share(manifest: Manifest) -> None:
    train, held = hold_out(manifest, HoldOutConfig(share=0.2))
    assert counts_of(held) == {0: 8, 1: 5, 2: 2, 3: 1}
    assert counts_of(train) == {0: 32, 1: 20, 2: 8, 3: 1}
    assert sorted([*rows_of(train), *rows_of(held)]) == list(range(77))
    assert train.kept + held.kept == manifest.kept == 77
    assert len({manifest.digest, train.digest, held.digest}) == 3
    fixed, _ = hold_out(manifest, HoldOutConfig(per_class=1))
    assert counts_of(fixed) == {0: 39, 1: 24, 2: 9, 3: 1}
    part, same = hold_out(manifest, HoldOutConfig(share=0.2, train_share=0.25))
    assert counts_of(part) == {0: 8, 1: 5, 2: 2, 3: 1}
    assert rows_of(same).tolist() == rows_of(held).tolist()  # measured on the same images
    assert set(rows_of(part)) < set(rows_of(train))


def test_draws_follow_seed_and_class_alone(manifest: Manifest, tmp_path: Path) -> None:
    _, held = hold_out(manifest, HoldOutConfig(share=0.2))
    _, again = hold_out(replace(manifest), HoldOutConfig(share=0.2))
    _, other = hold_out(manifest, HoldOutConfig(share=0.2, seed=1))
    assert rows_of(held).tolist() == rows_of(again).tolist()
    assert rows_of(held).tolist() != rows_of(other).tolist()
    labels = np.asarray(manifest.table["label"])
    fewer = index_of(tmp_path / "other", labels[labels != 2], 4)  # the other classes keep their places in the class
    _, some = hold_out(fewer, HoldOutConfig(share=0.2))
    for label in (0, 1, 3):
        places = [np.flatnonzero(np.isin(np.flatnonzero(m.table["label"] == label), rows_of(h)))
                  for m, h in ((manifest, held), (fewer, some))]  # fmt: skip
        assert places[0].tolist() == places[1].tolist()


def test_classes_that_are_too_small_are_named(manifest: Manifest) -> None:
    with pytest.raises(ShardError, match=r"2 samples of each class .* 1 of 4 classes .*: c3 \(2\)"):
        hold_out(manifest, HoldOutConfig(per_class=2))
    with pytest.raises(ShardError, match=r"my\.key: 40 samples .* 4 of 4 classes .*c0 \(40\)"):
        hold_out(manifest, HoldOutConfig(per_class=40), "my.key")
    with pytest.raises(ShardError, match=r"at least 1 sample of .*c3 \(2\)"):
        hold_out(manifest, HoldOutConfig(share=0.9))


def test_unlabelled_samples_are_trained_on_and_dropped_classes_are_not(manifest: Manifest, tmp_path: Path) -> None:
    labels = np.asarray(manifest.table["label"]).copy()
    labels[:3] = (-1, 99, -1)
    odd = index_of(tmp_path / "odd", labels, 4)
    train, held = hold_out(odd, HoldOutConfig(share=0.2))
    assert {0, 1, 2} <= set(rows_of(train))
    assert not {0, 1, 2} & set(rows_of(held))
    mapped = replace(manifest, classes=("x", "y", "z"), labels=LabelMap("goal", ("x", "y", "z"), (2, -1, 0, 1)))
    train, held = hold_out(mapped, HoldOutConfig(share=0.2))
    assert counts_of(train) == {0: 32, 2: 8, 3: 1}  # class 1 is in neither part
    assert counts_of(held) == {0: 8, 2: 2, 3: 1}
    assert mapped.kept == 52
    empty = index_of(tmp_path / "none", np.full(5, -1), 4)
    with pytest.raises(ShardError, match="no labelled samples"):
        hold_out(empty, HoldOutConfig())


def test_loaders_see_their_part_only() -> None:
    whole = load_manifest(resolve("bundled:fashion_mnist/train"))
    train, held = hold_out(whole, HoldOutConfig(per_class=4, train_share=0.01))
    spec = TicketSpec(train.kept, train.kept)
    options = {"rank": 0, "world": 1, "resolution": 28, "workers": 0}
    loader = TrainLoader(train, seed=0, spec_at=lambda done: spec if done < train.kept else None, **options)
    evaluation = EvalLoader(held, batch=40, **options)
    trained = [i for batch in loader for i in batch.ids.tolist()]
    measured = [i for batch in evaluation for i in batch.ids[batch.valid].tolist()]
    loader.close()
    evaluation.close()
    assert sorted(trained) == rows_of(train).tolist()
    assert sorted(measured) == rows_of(held).tolist()
    assert len(measured) == 40
    assert not set(trained) & set(measured)


def test_configuration_and_plan() -> None:
    data = {"train": "bundled:fashion_mnist/train", "hold_out": {"per_class": 10}}
    config = load_config({"efftrain": {"data": data, "run": {"epochs": 1}}})
    assert data_facts(config).samples == 5900
    whole = load_manifest(resolve(data["train"]))
    assert with_labels(whole, config.efftrain.data, held_out=True).kept == 100
    assert with_labels(whole, config.efftrain.data).kept == 5900
    with pytest.raises(ValueError, match='"val" or "hold_out", not both'):
        DataConfig(train="a", val="b", hold_out=HoldOutConfig())
    with pytest.raises(ConfigError, match="not both"):
        load_config({"efftrain": {"data": json.loads('{"hold_out": {"share": 0.5, "per_class": 2}}')}})
