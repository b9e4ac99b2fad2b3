"""Masked autoencoder pre-training: target and loss against plain ones, masks, plan, evaluation, pictures."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from efftrain_ds.config.loader import build_methods, load_config
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import ConfigError, ModelError, PlanError
from efftrain_ds.data.augment import normalize
from efftrain_ds.guards.nonfinite import Micro
from efftrain_ds.guards.replay import read_replay, write_replay
from efftrain_ds.methods.mae.config import MaeConfig
from efftrain_ds.methods.mae.method import MaskedAutoencoding
from efftrain_ds.methods.mae.pictures import reconstruction_picture
from efftrain_ds.methods.mae.target import drawn_order, make_target, sample_losses
from efftrain_ds.models.adapters import create_model
from efftrain_ds.models.mae import masked_patches, patchify, visible_patches
from efftrain_ds.planning import make_plan
from efftrain_ds.trainer import Trainer

ROOT = Path(__file__).resolve().parents[3]
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return create_model("mae_vit_tiny_patch16", resolution=12, num_classes=5, **sizes, **decoder)


def method_and_context(**changes) -> tuple[MaskedAutoencoding, SimpleNamespace]:
    method = MaskedAutoencoding(MaeConfig(**changes))
    module = method.prepare_model(tiny())

    def forward(images: torch.Tensor) -> torch.Tensor:
        return module(images)

    engine = type("Engine", (), {"module": module, "__call__": staticmethod(forward)})()
    return method, SimpleNamespace(engine=engine, seed=3, step=0, rank=0, world=1, schedule=None, settings={})


# -- target and loss -------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_plain_loops():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 8, 12)).astype(np.float32)
    predicted = rng.normal(size=(2, 6, 48)).astype(np.float32)
    hidden = rng.random((2, 6)) < 0.6
    for normalised in (True, False):
        expected = []
        for n in range(2):
            errors = []
            for index, (row, column) in enumerate(itertools.product(range(2), range(3))):
                pixels = images[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                values = [float(pixels[c, y, x]) for y in range(4) for x in range(4) for c in range(3)]
                if normalised:
                    values = [(v - np.mean(values)) / np.sqrt(np.var(values, ddof=1) + 1e-6) for v in values]
                if hidden[n, index]:
                    errors.append(np.mean([(v - p) ** 2 for v, p in zip(values, predicted[n, index], strict=True)]))
            expected.append(np.mean(errors))
        target = make_target(torch.from_numpy(images), 4, normalised)
        found = sample_losses(torch.from_numpy(predicted), target.values, torch.from_numpy(hidden))
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_perfect_prediction_costs_nothing_and_visible_patches_do_not_count(normalised):
    images = torch.randn(3, 3, 12, 12) * 2 + 1
    images[0, :, :4, :4] = 0.7  # a flat patch
    target = make_target(images, 4, normalised)
    assert torch.isfinite(target.values).all()
    if normalised:
        assert target.values.mean(dim=2).abs().max() < 1e-4
        assert torch.allclose(target.values[1:].var(dim=2), torch.ones(2, 9), atol=1e-4)
    hidden = masked_patches(torch.stack([torch.randperm(9) for _ in range(3)]), 2)
    predicted = torch.where(hidden[..., None], target.values, 100.0)
    assert sample_losses(predicted, target.values, hidden).tolist() == [0.0] * 3
    assert sample_losses(predicted.bfloat16(), target.values, hidden).dtype == torch.float32
    assert torch.allclose(target.pixels(target.values), patchify(images, 4), atol=1e-5)


# -- masks -----------------------------------------------------------------------------------------------------


def test_a_mask_depends_on_seed_step_and_sample_only():
    samples = np.arange(1000)
    orders = drawn_order(0, "mae/3", samples, 9)
    parts = [drawn_order(0, "mae/3", part, 9) for part in np.split(samples, [1, 500])]
    assert torch.equal(torch.cat(parts), orders)
    assert not torch.equal(drawn_order(0, "mae/4", samples, 9), orders)
    assert not torch.equal(drawn_order(1, "mae/3", samples, 9), orders)
    share = (~masked_patches(orders, 2)).float().mean(dim=0)
    assert (share - 2 / 9).abs().max() < 4 * (2 / 9 * 7 / 9 / 1000) ** 0.5


def test_batches_of_one_step_have_other_masks_also_without_positions():
    method, ctx = method_and_context()
    images = torch.randn(4, 3, 12, 12)
    seen = []
    for ctx.step, ctx.rank in ((0, 0), (0, 1), (1, 0)):
        method.on_step_start(ctx)
        for _ in range(2):
            method.on_batch(ctx, Batch(images=images))
            seen.append(ctx.engine.module.order)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    ctx.rank = 0
    method.on_step_start(ctx)
    method.on_batch(ctx, Batch(images=images))
    assert torch.equal(ctx.engine.module.order, seen[4])  # the same again, as after a resume


def test_masks_come_from_the_seed_of_the_run_or_their_own():
    images, positions = torch.randn(4, 3, 12, 12), torch.arange(4)
    for own, expected in ((None, 3), (8, 8), (0, 0)):
        method, ctx = method_and_context(seed=own)
        method.on_batch(ctx, Batch(images=images, positions=positions))
        assert torch.equal(ctx.engine.module.order, drawn_order(expected, "mae/0", positions.numpy(), 9))


def test_a_replay_file_is_enough_to_repeat_a_loss(tmp_path):
    method, ctx = method_and_context()
    ctx.step = 7
    batch = Batch(images=torch.randn(5, 3, 12, 12), positions=torch.arange(20, 25))
    method.on_batch(ctx, batch)
    with torch.no_grad():
        expected = method.loss(ctx, ctx.engine(batch.images), batch)
    micro = Micro({"images": batch.images})
    micro.note(batch)
    replay = read_replay(write_replay(tmp_path, ctx.step, 0, [(0, micro)], {"seed": ctx.seed}))
    # as in docs/guards.md
    info, stored, model = replay.info, replay.micros[0], tiny()
    images, positions = stored["images"].float(), stored["positions"].numpy()
    patches = (images.shape[2] // model.patch) * (images.shape[3] // model.patch)
    order = drawn_order(info["seed"], f"mae/{info['step']}", positions, patches)
    hidden = masked_patches(order, visible_patches(patches, model.mask_ratio))
    target = make_target(images, model.patch, norm_pixels=True)
    with torch.no_grad():
        losses = sample_losses(model(images, order), target.values, hidden)
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-6)


# -- a step ----------------------------------------------------------------------------------------------------


def test_images_as_they_leave_the_loader_are_normalised_for_the_target():
    method, ctx = method_and_context()
    raw = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8)
    floats = normalize(raw, MEAN, STD, torch.float32)
    valid = torch.tensor([True, False, True, True, False])
    losses = []
    for images, flags in ((raw, None), (floats, None), (floats, valid)):
        method.on_step_start(ctx)
        batch = Batch(images=images, positions=torch.arange(5), valid=flags, mean=MEAN, std=STD)
        batch = method.on_batch(ctx, batch)
        outputs = ctx.engine(floats)
        losses.append(method.loss(ctx, outputs, batch))
    values = [float(loss.detach()) for loss in losses]
    target = make_target(floats, 4, True)
    hidden = masked_patches(drawn_order(3, "mae/0", np.arange(5), 9), 2)
    each = sample_losses(outputs.detach(), target.values, hidden)
    assert values[0] == values[1] == pytest.approx(float(each.mean()))
    assert values[2] == pytest.approx(float(each[valid].mean()))
    losses[2].backward()
    method.on_step_end(ctx, True)
    assert ctx.engine.module.order is None
    with pytest.raises(ConfigError, match="before it"):
        method.loss(ctx, outputs, batch)


def test_every_valid_sample_of_a_step_weighs_the_same():
    method, ctx = method_and_context()
    flags = (torch.tensor([True, False, True]), torch.ones(3, dtype=torch.bool))
    parts = [
        Batch(images=torch.randn(3, 3, 12, 12), positions=torch.arange(3) + 3 * i, valid=valid)
        for i, valid in enumerate(flags)
    ]
    own = [float(each) for batch in parts for each in _own_losses(method, ctx, batch)]
    losses = []

    def loss(outputs: torch.Tensor, batch: Batch, default: object) -> torch.Tensor:
        losses.append(method.loss(ctx, outputs, batch).detach())
        return losses[-1]

    trainer = MagicMock(_loss_sum=torch.zeros(()))
    trainer.run_parts.configure_mock(device=torch.device("cpu"), world=1)
    trainer.run_parts.augment.configure_mock(**{"before.side_effect": _first, "after.side_effect": _first})
    trainer.engine.configure_mock(passes=1, **{"each_pass.side_effect": lambda: range(1), "loss.side_effect": loss})
    trainer.engine.prepare_batch.side_effect = lambda batch: method.on_batch(ctx, batch)
    trainer.engine.side_effect = ctx.engine
    trainer.engine.context.stage.accumulation = 2
    trainer._due.return_value = False
    trainer._valid_share = lambda micro: Trainer._valid_share(trainer, micro)
    Trainer._train_step(trainer, iter(parts))
    assert len(losses) == 2
    assert float(sum(losses) / 2) == pytest.approx(np.mean(own), rel=1e-6)  # the engine divides by the accumulation
    assert float(trainer._loss_sum) == pytest.approx(np.mean(own), rel=1e-6)
    alone = Batch(images=parts[0].images, positions=parts[0].positions, valid=flags[0])  # without the trainer
    method.on_batch(ctx, alone)
    assert float(method.loss(ctx, ctx.engine(alone.images), alone).detach()) == pytest.approx(
        np.mean(own[:2]), rel=1e-6
    )


def _first(batch: Batch, *_: object) -> Batch:
    return batch


@torch.no_grad()
def _own_losses(method: MaskedAutoencoding, ctx: SimpleNamespace, batch: Batch) -> torch.Tensor:
    method.on_batch(ctx, batch)
    hidden = masked_patches(ctx.engine.module.order, 2)
    return sample_losses(ctx.engine(batch.images), make_target(batch.images, 4, True).values, hidden)[batch.valid]


def test_evaluation_has_the_same_mask_for_a_sample_every_time():
    method, ctx = method_and_context(norm_pixels=False)
    images, ids = torch.randn(6, 3, 12, 12), torch.tensor([4, 2, 9, 7, 5, -1])
    with torch.no_grad():
        whole = method.evaluate(ctx, Batch(images=images, ids=ids))["loss"]
        ctx.step = 8
        parts = [method.evaluate(ctx, Batch(images=images[s], ids=ids[s]))["loss"] for s in (slice(0, 2), slice(2, 6))]
    assert whole.shape == (6,)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    assert ctx.engine.module.order is None


# -- pictures --------------------------------------------------------------------------------------------------


def test_a_picture_shows_image_visible_patches_and_prediction():
    images = normalize(torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8), MEAN, STD, torch.float32)
    hidden = torch.ones(2, 4, dtype=torch.bool)
    hidden[:, 1] = False
    target = make_target(images, 28, True)
    picture = reconstruction_picture(images, target.pixels(target.values), hidden, 28, MEAN, STD)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 2 * 114 - 2, 3 * 114 - 2)  # every pixel twice, gaps of 2
    image, seen, filled = (picture[:, :112, 114 * i : 114 * i + 112] for i in range(3))
    assert torch.equal(image, filled)  # a perfect prediction
    assert torch.equal(seen[:, :56, 56:], image[:, :56, 56:])
    assert set(seen[:, 56:].unique().tolist()) <= {127, 128}


def test_pictures_of_a_step():
    method, ctx = method_and_context()
    assert method.pictures(ctx) == {}
    images = torch.randn(8, 3, 12, 12)
    batch = method.on_batch(ctx, Batch(images=images, positions=torch.arange(8), mean=MEAN, std=STD))
    method.loss(ctx, ctx.engine(images), batch)
    method.on_step_end(ctx, True)  # pictures are made after the step
    (tag, picture), *rest = method.pictures(ctx).items()
    assert (tag, rest) == ("mae/seen_visible_predicted", [])
    assert picture.shape[0] == 3
    assert picture.float().std() > 0


# -- plan and errors -------------------------------------------------------------------------------------------


def _document(**changes) -> dict:
    config = load_config(ROOT / "ds_configs/smoke_mae_fmnist.json", world=2)
    document = {**config.deepspeed, "efftrain": config.efftrain.model_dump(mode="json", by_alias=True)}
    for path, value in changes.items():
        *parents, last = path.split("/")
        node = document["efftrain"]
        for key in parents:
            node = node[key]
        node[last] = value
    return document


def _error(**changes) -> str:
    with pytest.raises((PlanError, ConfigError)) as caught:
        make_plan(load_config(_document(**changes), world=2), world=2)
    return str(caught.value)


def test_the_plan_of_the_curriculum():
    plan = make_plan(load_config(_document(), world=2), world=2)
    assert [stage.stage.settings for stage in plan.stages] == [{"bandwidth": b} for b in (20, 24, 28)]
    assert 0.6 < plan.relative < 0.7
    assert dict(plan.methods)["mae"] == "mask 0.75"


def test_images_are_only_cropped_and_flipped():
    changes = {"data/randaugment": {}, "data/erasing": 0.25, "data/mixup": 0.8}
    text = _error(**changes)
    for words in ("randaugment (magnitude 9)", "erasing 0.25", "mix_prob 1", '"randaugment": null', '"mixup": 0'):
        assert words in text
    assert "randaugment" not in _error(**{"data/cutmix": 1.0})
    text = _error(**{"methods/efficienttrain/magnitude": True})
    assert "stage 1 sets ra_magnitude" in text
    assert '"magnitude": false in efftrain.methods.efficienttrain' in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods/mae/mask_ratio": 1.0}, "efftrain.methods.mae.mask_ratio"),
        ({"methods/mae/mask_ratio": 0.0}, "efftrain.methods.mae.mask_ratio"),
        ({"methods/mae/mask_ratio": 0.97}, "leaves 0 of 25 patches visible at 20 pixels"),
        ({"methods/mae/mask_share": 0.5}, "mask_share"),
        ({"methods/svite": {}}, "cannot run together with svite"),
        ({"methods/efficienttrain/schedule": [{"until": 1, "bandwidth": 22}]}, "22 is not a multiple"),
        ({"data/eval_resolution": 30}, "efftrain.data.eval_resolution: 30 pixels do not divide into the patches of 4"),
        (
            {"data/eval_resolution": 12, "methods/mae/mask_ratio": 0.9},
            "leaves 0 of 9 patches visible at 12 pixels of efftrain.data.eval_resolution",
        ),
        ({"data/resolution": 30, "methods/efficienttrain": {"schedule": "et", "magnitude": False}}, "multiple"),
    ],
)
def test_settings_that_cannot_run(changes, words):
    assert words in _error(**changes)


def test_sizes_that_do_not_divide_without_a_curriculum():
    document = _document(**{"data/resolution": 30})
    del document["efftrain"]["methods"]["efficienttrain"]
    with pytest.raises((PlanError, ModelError), match="do not divide into patches|divisible"):
        make_plan(load_config(document, world=2), world=2)


def test_another_model_is_refused():
    (method,) = build_methods(load_config({"efftrain": {"run": {"steps": 1}, "methods": {"mae": {}}}}))
    with pytest.raises(ModelError, match="VisionTransformer is no masked autoencoder.*mae_vit_base_patch16"):
        method.prepare_model(create_model("vit_tiny_patch16_224", resolution=16, num_classes=2, depth=1))
