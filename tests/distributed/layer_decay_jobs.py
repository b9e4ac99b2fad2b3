"""Functions run on the ranks: learning rates by layer under ZeRO, through changes of parameters."""

from __future__ import annotations

import copy

import timm
import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.timeline import PlanSpec, merge_timelines
from efftrain_ds.lr_schedule import ProgressLR
from efftrain_ds.models.growth import grow_request, select_request
from efftrain_ds.models.layer_decay import SCALE, layer_decay_groups
from efftrain_ds.models.stacks import prepare_growth
from efftrain_ds.zero import access
from efftrain_ds.zero import request as rq
from tests.distributed.zero_jobs import full_state

RATE, STEPS, EPS = 1e-2, 12, 1e-3
"""A large eps: gradients that are zero but for rounding (biases of keys) must not become steps of full size."""


def _model() -> nn.Module:
    torch.manual_seed(5)
    small = {"patch_size": 4, "embed_dim": 12, "depth": 4, "num_heads": 2, "img_size": 8, "num_classes": 5}
    return prepare_growth(timm.create_model("vit_tiny_patch16_224", **small))


def _groups(model: nn.Module) -> list[dict]:
    return layer_decay_groups(model, 0.05, lr=RATE, decay=0.5)


def _scheduler(optimizer) -> ProgressLR:
    spec = PlanSpec(0, 0.0, 0, 8, 4, 2, 8, 4, steps=STEPS)
    return ProgressLR(optimizer, merge_timelines([], spec), warmup=0.2, min_lr=1e-4, shape="cosine")


def _batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, 8, 8, generator=rng), torch.randint(0, 5, (4,), generator=rng)


def _reference(steps: int) -> dict[str, torch.Tensor]:
    """The same run in one process with torch's optimizer; (master values by name)."""
    model = _model()
    optimizer = torch.optim.AdamW(_groups(model), lr=RATE, eps=EPS)
    schedule = _scheduler(optimizer)
    for step in range(steps):
        schedule.set_step(step)
        losses = [nn.functional.cross_entropy(model(x), y) for x, y in (_batch(step, r) for r in range(2))]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _train(engine, first: int, last: int) -> None:
    for step in range(first, last):
        engine.lr_scheduler.set_step(step)
        x, y = _batch(step, dist.get_rank())
        engine.backward(nn.functional.cross_entropy(engine(x), y))
        engine.step()


def _shares(engine) -> dict[str, float]:
    """Present rate of every parameter as a share of the head's."""
    layout = access.layout_of(engine.deepspeed_engine)
    rows = [layout.base.param_groups[layout.groups[name]] for name in layout.shapes]
    top = max(group["lr"] for group in layout.base.param_groups)
    assert all(abs(group["lr"] - top * group[SCALE]) < 1e-12 for group in rows)
    return {name: group[SCALE] for name, group in zip(layout.shapes, rows, strict=True)}


def layer_decay_job(stage: int) -> dict:
    """Six steps with an unchanging rebuild after the third, against one process; then growth and selection."""
    model = _model()
    document = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "weight_decay": 0.05, "eps": EPS, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = efftrain_ds.initialize(
        model=model,
        model_parameters=_groups(model),
        lr_scheduler=_scheduler,
        config=copy.deepcopy(document),
        rebuildable=True,
    )
    expected = _expected(4)
    wrong = [f"start {n}" for n, s in _shares(engine).items() if s != expected[n]]
    _train(engine, 0, 3)
    engine.rebuild(rq.RebuildRequest(reason="nothing"))
    _train(engine, 3, 6)
    masters = {k.removeprefix("fp32/"): v for k, v in full_state(engine).items() if k.startswith("fp32/")}
    error = max(float((masters[n] - v).abs().max()) for n, v in _reference(6).items())
    wrong += [f"unchanged {n}" for n, s in _shares(engine).items() if s != expected[n]]
    engine.rebuild(select_request(engine.blueprint, [[0, 3]]))
    _train(engine, 6, 7)
    kept = {f"blocks.{j}.": f"blocks.{i}." for j, i in enumerate((0, 3))}
    wrong += _differing("selected", engine, expected, kept)
    engine.rebuild(grow_request(engine.blueprint, 4, "stacking", seed=0))
    _train(engine, 7, 9)
    origin = {f"blocks.{j}.": f"blocks.{i}." for j, i in enumerate((0, 3, 0, 3))}
    wrong += _differing("grown", engine, expected, origin)
    found = {"wrong": wrong, "error": error, "groups": len(engine.optimizer.param_groups)}
    engine.destroy()
    return found


def _expected(depth: int) -> dict[str, float]:
    """Share of every parameter, counted by hand: head 1, norm and last block a half, ..., the stem last."""
    shares = {}
    for name, _ in _model().named_parameters():
        if name.startswith("head."):
            layer = depth + 1
        elif name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        else:
            layer = depth if name.startswith("norm.") else 0
        shares[name] = 0.5 ** (depth + 1 - layer)
    return shares


def _differing(what: str, engine, expected: dict[str, float], origin: dict[str, str]) -> list[str]:
    """A block keeps the rate of the one that it came from."""
    wrong = []
    for name, share in _shares(engine).items():
        head = next((new for new in origin if name.startswith(new)), None)
        source = name if head is None else name.replace(head, origin[head])
        if share != expected[source]:
            wrong.append(f"{what} {name}: {share}, its source {source} had {expected[source]}")
    return wrong
