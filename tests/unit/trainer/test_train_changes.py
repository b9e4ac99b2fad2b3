"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import copy

import pytest

from efftrain_ds.core.errors import CheckpointError
from efftrain_ds.core.timeline import PlanSpec, Segment, Timeline, merge_timelines
from efftrain_ds.train_changes import check, compare, past_stages

SPEC = PlanSpec(seed=0, epochs=10, samples=1000, batch=10, micro_batch=10, world=1, resolution=32, stride=4)


def schedule(*depths):
    edges = [i / len(depths) for i in range(len(depths) + 1)]
    segments = [Segment(a, b, {"depth": d}) for a, b, d in zip(edges[:-1], edges[1:], depths, strict=True)]
    return merge_timelines([Timeline(tuple(segments))], SPEC)


OLD = {
    "train_batch_size": 10,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
    "efftrain": {
        "run": {"seed": 0, "epochs": 10, "output": "runs/a"},
        "model": {"name": "vit", "kwargs": {"depth": 4}, "ema": {"decay": 0.9}},
        "data": {"train": "shards", "workers": 4, "resolution": 32},
        "optim": {"schedule": "cosine", "warmup": "5%", "label_smoothing": 0.1},
        "methods": {"autoprog": {"stages": 2}},
        "observe": {"log_every": 10},
    },
}


def changed(path, value):
    new = copy.deepcopy(OLD)
    node = new
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    return new


def differences(new, now, step=300, then=None):
    then = then or now
    return compare(OLD, new, past=past_stages(then, step), schedule=now, step=step)


def test_nothing_changed():
    assert differences(OLD, schedule(2, 4)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("efftrain.run.seed", 1),
        ("efftrain.run.epochs", 20),
        ("efftrain.model.name", "deit"),
        ("efftrain.model.kwargs.depth", 6),
        ("efftrain.data.resolution", 64),
        ("efftrain.optim.warmup", "10%"),
        ("optimizer.params.lr", 1e-4),
    ],
)
def test_refused(path, value):
    found = differences(changed(path, value), schedule(2, 4))
    assert [change.key for change in found] == [path]
    with pytest.raises(CheckpointError) as error:
        check(found, "runs/a/checkpoints/step-00000300")
    for word in (path, "->", str(value).replace("1e-4", "0.0001"), "step-00000300", "efftrain.run.output"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gradient_clipping", 0.5),
        ("zero_optimization.stage", 3),
        ("efftrain.run.output", "runs/b"),
        ("efftrain.model.ema", None),
        ("efftrain.data.train", "elsewhere/shards"),
        ("efftrain.data.workers", 8),
        ("efftrain.optim.label_smoothing", 0.0),
        ("efftrain.observe.log_every", 50),
    ],
)
def test_allowed_and_listed(path, value):
    found = differences(changed(path, value), schedule(2, 4))
    check(found, "x")
    assert all(change.key.startswith(path) for change in found)
    assert found
    assert "->" in str(found[0])


def test_future_stages_may_change_and_past_ones_may_not():
    new = changed("efftrain.methods.autoprog.stages", 3)
    early = differences(new, schedule(2, 3), step=300, then=schedule(2, 4))
    check(early, "x")
    assert [str(change) for change in early] == ["efftrain.methods.autoprog.stages: 2 -> 3"]
    late = differences(new, schedule(2, 3), step=700, then=schedule(2, 4))
    with pytest.raises(CheckpointError, match="autoprog.stages: 2 -> 3 .the stages so far would have been others"):
        check(late, "x")


def test_other_past_stages_without_another_key_are_refused():
    found = differences(OLD, schedule(3, 4), then=schedule(2, 4))
    with pytest.raises(CheckpointError, match="the past of a run stays as it is"):
        check(found, "x")
