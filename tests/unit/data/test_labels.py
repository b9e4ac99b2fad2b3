"""Label sets of ImageNet's variants, maps between them, and their effect on plan, training and evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from efftrain_ds.config.sections import DataConfig
from efftrain_ds.core.errors import CheckpointError, ConfigError
from efftrain_ds.data.build import build_shards
from efftrain_ds.data.evaluation import EvalLoader
from efftrain_ds.data.labels import apply_labels, label_set, label_sets, make_map, positions_of
from efftrain_ds.data.loader import TicketSpec, TrainLoader
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.data.sources import FolderSource
from efftrain_ds.planning import with_labels

COUNTS = {
    "imagenet-1k": 1000,
    "imagenet-12k": 11821,
    "imagenet-22k": 21841,
    "imagenet-21k-goog": 21843,
    "imagenet-22k-ms": 21842,
    "imagenet-21k-miil": 11221,
    "imagenet-21k-miil-w21": 10450,
}
TEDDY = "n04399382"  # of ILSVRC 2012, and not in the fall 2011 release


def test_the_sets_are_those_of_timm_and_have_their_sizes():
    from timm.data import ImageNetInfo

    assert {name: count for name, (count, _) in label_sets().items()} == COUNTS
    for name, count in COUNTS.items():
        found = label_set(name)
        assert len(found) == len(set(found.synsets)) == count
        assert label_set(str(count)).synsets == found.synsets
        if name != "imagenet-21k-miil-w21":  # which timm ships and does not name
            assert list(found.synsets) == ImageNetInfo(name).label_names()


def test_known_relations_between_the_sets():
    of = {name: label_set(name) for name in COUNTS}
    whole = of["imagenet-22k"]
    # ILSVRC's classes by synset: all but one are in fall 2011, all are in Microsoft's list, in order and first
    rows = positions_of(of["imagenet-1k"].synsets, whole)
    assert [s for s, row in zip(of["imagenet-1k"].synsets, rows, strict=True) if row < 0] == [TEDDY]
    assert positions_of(of["imagenet-1k"].synsets, of["imagenet-22k-ms"]).tolist() == list(range(1000))
    for part in ("imagenet-12k", "imagenet-21k-miil"):
        assert (positions_of(of[part].synsets, whole) >= 0).all()
    assert set(of["imagenet-21k-goog"].synsets) - set(whole.synsets) == {"n09859684", "n03931044"}
    back = positions_of(whole.synsets, of["imagenet-21k-goog"])
    assert [of["imagenet-21k-goog"].synsets[i] for i in back] == list(whole.synsets)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("winter21", ["several label sets", "imagenet-21k-miil-w21 (10450)"]),
        ("imagenet-21k", ["several label sets", "imagenet-21k-goog (21843)"]),
        ("imagenet-22", ["unknown label set", 'Did you mean "imagenet-22k"']),
        ("no/such.txt", ["no such file"]),
    ],
)
def test_names_that_do_not_name_one_set(name: str, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        label_set(name, "efftrain.data.labels.target")
    assert all(word in str(caught.value) for word in ["efftrain.data.labels.target", *words])


def test_a_map_by_name_is_strict(tmp_path):
    path = tmp_path / "goal.txt"
    path.write_text("cat\ndog\n\nowl\n")
    goal = label_set(str(path))
    found = make_map(["dog", "cat"], goal)
    assert found.indices == (1, 0)
    assert not found.drops
    assert found.apply(np.array([[0, 1], [2, -1]])).tolist() == [[1, 0], [-1, -1]]
    with pytest.raises(ConfigError, match=r"1 of 2 classes .* \(ant\)"):
        make_map(["ant", "cat"], goal)
    dropping = make_map(["ant", "cat"], goal, missing="drop")
    assert dropping.indices == (-1, 0)
    assert dropping.drops
    assert dropping.digest != found.digest
    with pytest.raises(ConfigError, match="no class of shards"):
        make_map(["0", "1"], goal, missing="drop")
    with pytest.raises(ConfigError, match="two classes have one name"):
        make_map(["cat", "cat"], goal)
    path.write_text("cat\ncat\n")
    with pytest.raises(ConfigError, match="cat is there more than once"):
        label_set(str(path))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four classes of 9, 10, 11 and 12 images; the shade of an image tells its class."""
    root = tmp_path_factory.mktemp("labels")
    for label, name in enumerate(["ant", "bee", "cat", "dog"]):
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for i in range(9 + label):
            Image.new("RGB", (32, 32), (60 * label, 60 * label, i)).save(folder / f"{i}.png")
    build_shards(FolderSource(root / "images"), root / "shards", split="train", samples_per_shard=10)
    (root / "goal.txt").write_text("owl\ndog\nbee\n")
    (root / "names.txt").write_text("dog\nbee\nowl\nant\n")
    return root


def training(manifest, world: int = 2, samples: int = 44) -> list[tuple[int, int, int]]:
    """(shade, label, id) of the first samples over all ranks."""
    found = []
    for rank in range(world):
        spec = TicketSpec(4, 2)
        loader = TrainLoader(
            manifest,
            seed=1,
            rank=rank,
            world=world,
            spec_at=lambda consumed, s=spec: s if consumed < samples else None,
            resolution=32,
            workers=0,
            streams=4,
            shuffle_block=8,
        )
        for batch in loader:
            assert batch.valid.all()
            shades = batch.images[:, 0, 16, 16].tolist()
            found += list(zip(shades, batch.labels.tolist(), batch.ids.tolist(), strict=True))
        loader.close()
    return found


def test_classes_left_out_leave_the_plan_and_the_others_get_their_index(shards):
    plain = load_manifest(shards / "shards")
    with pytest.raises(ConfigError, match="2 of 4 classes"):
        apply_labels(plain, target=str(shards / "goal.txt"))
    manifest = apply_labels(plain, target=str(shards / "goal.txt"), missing="drop")
    assert manifest.classes == ("owl", "dog", "bee")
    assert (manifest.samples, manifest.kept) == (42, 22)
    assert manifest.digest != plain.digest
    assert set(plain.table["label"][manifest.left_out].tolist()) == {0, 2}
    seen = training(manifest)
    assert {(shade, label) for shade, label, _ in seen} == {(180, 1), (60, 2)}
    ids = [row for _, _, row in seen]
    assert len(ids) == 44
    assert sorted(ids) == sorted(2 * [i for i in range(42) if i not in set(manifest.left_out.tolist())])
    assert len({row for _, label, row in seen if label == 1}) == 12


def test_an_evaluation_counts_what_the_map_keeps_once(shards):
    manifest = apply_labels(load_manifest(shards / "shards"), target=str(shards / "goal.txt"), missing="drop")
    rows, labels = [], []
    for rank in range(3):
        loader = EvalLoader(manifest, rank=rank, world=3, batch=4, resolution=32)
        for batch in loader:
            rows += batch.ids[batch.valid].tolist()
            labels += batch.labels[batch.valid].tolist()
        loader.close()
    assert loader.samples == 22
    assert sorted(rows) == [i for i in range(42) if i not in set(manifest.left_out.tolist())]
    assert (labels.count(0), labels.count(1), labels.count(2)) == (0, 12, 10)


def test_indices_of_a_named_set_instead_of_class_names(shards):
    plain = load_manifest(shards / "shards")
    named = apply_labels(plain, target=str(shards / "goal.txt"), source=str(shards / "names.txt"), missing="drop")
    # index 0 is "dog" by that file, 1 "bee", 2 "owl", 3 is left out
    assert named.labels is not None
    assert named.labels.indices == (1, 2, 0, -1)
    assert named.kept == 30
    with pytest.raises(ConfigError, match=r"source: imagenet-1k has 1000 classes, .* has 4"):
        apply_labels(plain, target="imagenet-1k", source="imagenet-1k")
    with pytest.raises(ConfigError, match="no class of"):
        apply_labels(plain, target="imagenet-1k")


def test_errors_of_the_held_out_split_name_its_keys(shards):
    plain, unnamed = load_manifest(shards / "shards"), load_manifest(shards / "shards")
    object.__setattr__(unnamed, "classes", ())
    goal = str(shards / "goal.txt")
    for held_out, prefix in ((False, ""), (True, "val_")):
        for manifest, keys, words in (
            (plain, {"target": goal}, f'{prefix}missing = "drop" leaves'),
            (plain, {"target": "imagenet-1k"}, f"is {prefix}source the label set"),
            (plain, {"target": goal, f"{prefix}source": "imagenet-1k"}, f"labels.{prefix}source: imagenet-1k has"),
            (unnamed, {"target": goal}, f"labels.{prefix}source: {plain.folder} has no class names"),
        ):
            with pytest.raises(ConfigError) as caught:
                with_labels(manifest, DataConfig(labels=keys), held_out=held_out)
            assert words in str(caught.value)
            assert held_out or "val_" not in str(caught.value)


def test_a_resume_with_another_map_is_refused(shards):
    plain = load_manifest(shards / "shards")
    settings = {"seed": 1, "rank": 0, "world": 1, "spec_at": lambda _: None, "resolution": 32, "workers": 0}
    state = TrainLoader(plain, **settings).state_dict()
    other = TrainLoader(apply_labels(plain, target=str(shards / "goal.txt"), missing="drop"), **settings)
    with pytest.raises(CheckpointError, match="manifest"):
        other.load_state_dict(json.loads(json.dumps(state)))
