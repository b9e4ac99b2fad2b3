"""Evaluation of a split of which some images cannot be read."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efftrain_ds import trainer as loop
from efftrain_ds.config.loader import load_config
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import ShardError
from efftrain_ds.data.bundled import resolve
from efftrain_ds.data.manifest import load_manifest
from efftrain_ds.observe.meters import Chrono
from efftrain_ds.planning import with_labels
from efftrain_ds.train_eval import evaluate
from efftrain_ds.train_setup import _data


class Engine:
    """Says class 0 of everything."""

    methods: tuple[()] = ()

    def evaluating(self, **_: Any) -> Any:
        return nullcontext()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)


def batches(valid: list[bool]) -> list[Batch]:
    flags = torch.tensor(valid)
    labels = torch.where(flags, torch.arange(len(valid)) % 2, -100)
    return [Batch(images=torch.zeros(len(valid), 3, 2, 2), labels=labels, valid=flags)]


def test_means_are_over_the_images_that_could_be_read() -> None:
    told: list[int] = []
    rows = batches([True, True, True, False])
    found = evaluate(Engine(), rows, lambda b: b, 4, strict=False, missed=told.append)
    assert found is not None
    assert found["top1"] == pytest.approx(2 / 3)
    assert told == [1]
    assert evaluate(Engine(), rows, lambda b: b, 3, missed=told.append) == found
    assert told == [1]
    with pytest.raises(ShardError, match="saw 3 samples, the split has 4"):
        evaluate(Engine(), rows, lambda b: b, 4)
    for total, valid in ((2, [True] * 3), (3, [False] * 3)):  # counted twice; nothing could be read
        with pytest.raises(ShardError, match=f"the split has {total}"):
            evaluate(Engine(), batches(valid), lambda b: b, total, strict=False)


@pytest.mark.parametrize("held_out", [True, False])
def test_only_a_part_of_the_training_shards_may_miss_images(
    held_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "bundled:fashion_mnist/train"
    data = {"train": train, "workers": 0, "resolution": 28}
    data |= {"hold_out": {"per_class": 2}} if held_out else {"val": "bundled:fashion_mnist/val"}
    model = {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}}
    section = {"data": data, "model": model, "run": {"epochs": 1, "output": str(tmp_path)}}
    config = load_config({"train_batch_size": 8, "efftrain": section}, world=1)
    manifest = load_manifest(resolve(train))
    part = with_labels(manifest, config.efftrain.data, held_out=True) if held_out else manifest
    schedule = SimpleNamespace(spec=SimpleNamespace(micro_batch=4))
    _, _, loader = _data(config, tmp_path, manifest, part, schedule, 0, 1, 10)  # type: ignore[arg-type]
    assert loader is not None
    assert loader._data.strict is not held_out

    asked: dict[str, Any] = {}

    def fake(*_: Any, strict: bool, missed: Any, **__: Any) -> dict[str, float]:
        asked["strict"] = strict
        if not strict:
            missed(3)
        return {"top1": 0.5}

    monkeypatch.setattr(loop, "evaluate", fake)
    rows: list[dict[str, Any]] = []
    trainer = SimpleNamespace(
        config=config,
        run_parts=SimpleNamespace(val_loader=loader, val_manifest=part),
        chrono=Chrono(),
        guard=SimpleNamespace(phase=lambda _: nullcontext(), poll=None),
        engine=SimpleNamespace(ema=None, methods=(), step_index=7),
        best={},
        console=SimpleNamespace(write=lambda text: rows.append({"screen": text})),
        _record=lambda event, **data: rows.append({"event": event, **data}),
        logs=None,
    )
    loop.Trainer._evaluate(trainer)  # type: ignore[arg-type]
    assert asked["strict"] is not held_out
    assert rows[1] == {"event": "eval", "step": 7, "top1": 0.5, **({"missing": 3} if held_out else {})}
    assert f"{part.kept - 3 * held_out:,} samples" in rows[0]["screen"]
