"""Functions run on the ranks by the tests of masked autoencoder pre-training and of fine-tuning from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import efftrain_ds
from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.checkpoint.survey import newest
from efftrain_ds.config.loader import load_config
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.ranks import gather
from efftrain_ds.kernels.lowfreq_crop import lowfreq_crop
from efftrain_ds.methods.mae.target import drawn_order
from efftrain_ds.models.adapters import create_model
from efftrain_ds.models.mae import patchify
from efftrain_ds.models.sincos import sincos_positions
from efftrain_ds.zero import access
from tests.distributed import train_jobs

STEPS, SAMPLES, SIDE, SEED = 4, 8, 16, 5
"""SAMPLES a step over all ranks and micro-batches."""
ADAM = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.05, "eps": 1e-3}
"""The epsilon keeps rounding of tiny gradients from being blown up to whole steps."""
SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
STAGES = [{"until": 0.5, "bandwidth": 8, "pace": 1.0}, {"until": 1.0, "bandwidth": 16, "pace": 1.0}]


def autoencoder() -> nn.Module:
    torch.manual_seed(0)
    return create_model("mae_vit_tiny_patch16", resolution=SIDE, num_classes=10, **SIZES, **DECODER)


def _images(step: int) -> Tensor:
    """The images of a step, [SAMPLES, 3, SIDE, SIDE], smooth enough for the low frequencies to matter."""
    generator = torch.Generator().manual_seed(100 + step)
    rough = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=generator)
    return nn.functional.avg_pool2d(rough, 3, stride=1, padding=1) * 2


def _config(stage: int) -> dict[str, Any]:
    methods = {"mae": {}, "efficienttrain": {"schedule": STAGES, "pacing": "samples", "magnitude": False}}
    return {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size() // 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "steps_per_print": 10**9,
        "efftrain": {
            "run": {"steps": STEPS, "seed": SEED},
            "data": {"resolution": SIDE},
            "methods": methods,
        },
    }


def _reference() -> tuple[dict[str, Tensor], list[float]]:
    """The same steps in one process, on the whole batch and plain torch."""
    net = autoencoder()
    optimizer = torch.optim.AdamW(net.parameters(), **ADAM)
    losses = []
    for step in range(STEPS):
        side = 8 if step < STEPS // 2 else SIDE
        images = _images(step)
        if side < SIDE:
            images = lowfreq_crop(images, side, align="center", exact=False)
        patches, visible = (side // 4) ** 2, (side // 4) ** 2 // 4
        order = drawn_order(SEED, f"mae/{step}", (torch.arange(SAMPLES) + SAMPLES * step).numpy(), patches)
        target = patchify(images, 4)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6) ** 0.5
        error = (net(images, order) - target).square().mean(2)
        loss = torch.stack([error[n, order[n, visible:]].mean() for n in range(SAMPLES)]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}, losses


def step_job(stage: int) -> dict[str, Any]:
    """Steps at two sizes, with accumulation, on all ranks against `_reference`."""
    engine, *_ = efftrain_ds.initialize(model=autoencoder(), config=_config(stage))
    world, rank, micro = dist.get_world_size(), dist.get_rank(), engine.train_micro_batch_size_per_gpu()
    snapshots, losses = [_weights(engine)], []
    for step in range(STEPS):
        images, positions = _images(step), torch.arange(SAMPLES) + SAMPLES * step
        total = 0.0
        for index in range(SAMPLES // world // micro):
            rows = slice((index * world + rank) * micro, (index * world + rank + 1) * micro)
            batch = Batch(images=images[rows], positions=positions[rows], valid=torch.ones(micro, dtype=torch.bool))
            batch = engine.prepare_batch(batch)
            loss = engine.loss(engine(batch.images), batch)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / (SAMPLES // world // micro)
        losses.append(total)
        snapshots.append(_weights(engine))
    expected, reference = _reference()
    mean = [sum(parts) / world for parts in zip(*gather(losses), strict=True)]
    still = [
        n
        for before, after in zip(snapshots, snapshots[1:], strict=False)
        for n in before
        if torch.equal(before[n], after[n])
    ]
    result = {
        "worst": max(float((snapshots[-1][n] - expected[n]).abs().max()) for n in expected),
        "moved": max(float((snapshots[0][n] - expected[n]).abs().max()) for n in expected),
        "losses": max(abs(a - b) for a, b in zip(mean, reference, strict=True)),
        "still": still,
    }
    engine.destroy()
    return result


def _weights(engine: Any) -> dict[str, Tensor]:
    named = dict(engine.module.named_parameters())
    with access.gather_full(list(named.values())):
        return {name: parameter.detach().float().clone() for name, parameter in named.items()}


# -- whole runs ------------------------------------------------------------------------------------------------


def _changes(**more: Any) -> dict[str, Any]:
    return {
        "efftrain/model/name": "mae_vit_tiny_patch16",
        "efftrain/model/kwargs": {**SIZES, **DECODER},
        "efftrain/model/drop_path": 0.0,
        "efftrain/methods": {"mae": {}, "efficienttrain": {"schedule": "et", "magnitude": False}},
        "efftrain/data/randaugment": None,
        "efftrain/data/erasing": 0.0,
        "efftrain/data/mixup": 0.0,
        "efftrain/data/cutmix": 0.0,
        "efftrain/run/steps": 6,
        **more,
    }


def _run(folder: str, stage: int, stop: int | None = None) -> dict[str, Tensor]:
    trainer, _ = train_jobs.go(train_jobs.run_config(folder, stage, **_changes()), stop)
    found = train_jobs.final_weights(trainer)
    found |= {f"average {index}": part for index, part in enumerate(train_jobs.average_of(trainer))}
    trainer.engine.destroy()
    return found


def resume_job(folder: str, stage: int, stops: list[int]) -> list[str]:
    """What differs between an uninterrupted run and runs that were stopped and resumed."""
    whole, problems = _run(f"{folder}/whole", stage), []
    for stop in stops:
        _run(f"{folder}/{stop}", stage, stop)
        again = _run(f"{folder}/{stop}", stage)
        problems += [f"stop {stop}: {name}" for name, value in whole.items() if not torch.equal(value, again[name])]
    return problems


def fine_tune_job(folder: str, stage: int) -> dict[str, Any]:
    """A short pre-training with an evaluation and pictures, then a classifier that starts from it."""
    observed = {
        "efftrain/run/steps": 5,
        "efftrain/data/val": "bundled:fashion_mnist/val",
        "efftrain/data/eval_batch": 500,
        "efftrain/observe": {"images_every": "60%", "eval_every": "100%", "log_every": 5},
    }
    first, screen = train_jobs.go(train_jobs.run_config(f"{folder}/pretrain", stage, **_changes(**observed)))
    held_out, order = dict(first.results), first.engine.module.order
    first.engine.destroy()
    source = Checkpoint(newest(Path(folder) / "pretrain"))
    config = train_jobs.run_config(
        f"{folder}/tuned",
        stage,
        **{
            "efftrain/methods": {},
            "efftrain/run/steps": 2,
            "efftrain/model/kwargs": {**SIZES, "global_pool": "avg"},
            "efftrain/model/init": {"weights": f"{folder}/pretrain", "head": "new", "head_scale": 0.001},
            "efftrain/optim/layer_decay": {"rate": 0.65},
            "efftrain/data/val": "bundled:fashion_mnist/val",
            "efftrain/data/eval_batch": 500,
        },
    )
    trainer = train_jobs.Recording(load_config(config, world=dist.get_world_size()))
    start = train_jobs.final_weights(trainer)
    trainer.engine.destroy()
    other = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias", "pos_embed"}
    problems = [
        name
        for name, value in start.items()
        if name not in other and not torch.equal(value, source.parameter(name, average=True))
    ]
    tuned, text = train_jobs.go(config)
    rates = tuned.engine.get_lr()
    result = {
        "problems": problems,
        "from_checkpoint": len(start) - len(other),
        "positions": torch.equal(start["pos_embed"][0, 1:], sincos_positions((7, 7), (7, 7), 24)),
        "head": float(start["head.weight"].std()),
        "held_out": held_out,
        "order": order,
        "screens": (screen, text),
        "rates": sorted({round(rate / rates[0], 6) for rate in rates}, reverse=True),
        "results": tuned.results,
    }
    tuned.engine.destroy()
    return result
