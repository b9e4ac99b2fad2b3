"""Functions run on the ranks by the tests of block attention under ZeRO."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import efftrain_ds
from efftrain_ds.kernels.attention import BlockMask
from efftrain_ds.models.attention import BlockAttention, update_routes, use_block_attention
from efftrain_ds.zero import request as rq
from tests.distributed.zero_jobs import full_state, same, weights

N, HEADS, LAYERS = 17, 2, ("blocks.0.attn", "blocks.1.attn")


def draw(seed: int) -> torch.Tensor:
    return torch.rand(HEADS, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.6


def make(stage: int, seed: int, partitioned: bool = False, start: dict[str, torch.Tensor] | None = None) -> Any:
    """A small ViT with a mask in each layer.

    Args:
        stage: of ZeRO.
        seed: of the masks.
        partitioned: make the model under zero.Init, so that masks are given to partitioned weights.
        start: weights; timm's own initialisation does nothing under zero.Init.
    """
    import deepspeed

    torch.manual_seed(3)
    with deepspeed.zero.Init(enabled=partitioned, dtype=torch.float32):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, num_heads=HEADS, num_classes=5, depth=2
        )
    if start is not None:
        model.load_state_dict(start)
    use_block_attention(model, {name: BlockMask(draw(seed + i), N, N, 16) for i, name in enumerate(LAYERS)})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4 * dist.get_world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    groups = [{"params": list(model.parameters()), "name": "all"}]
    return efftrain_ds.initialize(model=model, model_parameters=groups, config=config, rebuildable=True)[0]


def train(engine: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        rng = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = cross_entropy(engine(torch.randn(4, 3, 16, 16, generator=rng)), torch.randint(0, 5, (4,), generator=rng))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def masks_of(module: nn.Module) -> dict[str, BlockMask]:
    return {name: part for name, part in module.named_modules() if isinstance(part, BlockMask)}


def keeps(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: mask.keep.clone() for name, mask in masks_of(module).items()}


def stale(module: nn.Module) -> list[str]:
    """Masks whose lists or density are not those of `keep`."""
    found = []
    for name, mask in masks_of(module).items():
        fresh = BlockMask(mask.keep, N, N, 16)
        if mask.density != fresh.density or same(dict(mask.named_buffers()), dict(fresh.named_buffers())):
            found.append(name)
    return found


def adapter_job(folder: str, stage: int) -> dict:
    """Train, change the masks, save; a fresh engine with other masks loads and goes on; a rebuild keeps the masks."""
    engine = make(stage, 0)
    found = {"first": train(engine, 0, 2)}
    for i, mask in enumerate(masks_of(engine.module).values()):
        mask.update_(draw(20 + i))
    train(engine, 2, 3)
    engine.save_checkpoint(folder)
    kept, expected = keeps(engine.module), train(engine, 3, 5)
    end, end_weights = full_state(engine), weights(engine)
    engine.destroy()

    again = make(stage, 40)
    found["other_masks"] = same(kept, keeps(again.module))
    again.load_checkpoint(folder)
    found["masks"] = same(kept, keeps(again.module)) + stale(again.module)
    found["losses_equal"] = train(again, 3, 5) == expected
    found["state"] = same(end, full_state(again)) + same(end_weights, weights(again))

    before = masks_of(again.module)
    again.rebuild(rq.RebuildRequest(reason="identity"))
    after = masks_of(again.module)
    found["new_objects"] = all(after[name] is not before[name] for name in before)
    found["rebuilt"] = same(kept, keeps(again.module)) + stale(again.module)
    found["adapted"] = [name for name, part in again.module.named_modules() if isinstance(part, BlockAttention)]
    found["routes"] = sorted(update_routes(again.module))
    found["goes_on"] = all(value == value for value in train(again, 5, 6))
    again.destroy()
    return found


def partitioned_job() -> list[list[float]]:
    """Losses of a model whose weights were partitioned before it got its masks, and of a plain one with its weights."""
    losses, start = [], None
    for partitioned in (True, False):
        engine = make(3, 0, partitioned, start)
        start = weights(engine)
        losses.append(train(engine, 0, 2))
        engine.destroy()
    return losses
