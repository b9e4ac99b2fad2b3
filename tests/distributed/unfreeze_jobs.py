"""Functions run on the ranks by the tests of staged unfreezing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.zero import access
from tests.distributed.zero_jobs import dtype_of, full_state, same, weights

SIDE, BLOCKS, STEPS = 32, 6, 6
MANUAL = {"stages": 3, "resolution_start": 0.5, "resolution_step": 8}
SEARCH = {**MANUAL, "search": {"samples": 4, "time_batches": 1}}


def config_of(stage: int, dtype: str, method: dict) -> dict:
    world = dist.get_world_size()
    document = {
        "train_micro_batch_size_per_gpu": 4 // world,
        "train_batch_size": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": 4, "warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3},
        },
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "efftrain": {
            "run": {"steps": STEPS},
            "data": {"resolution": SIDE},
            "model": {"ema": {"decay": 0.9}},
            "methods": {"autoprog_zero": method},
        },
    }
    if dtype == "bf16":
        document["bf16"] = {"enabled": True}
    return document


def probe(total: int) -> list[Batch]:
    """Fixed samples of this rank; the last row is not valid."""
    n = -(-total // dist.get_world_size())
    rng = torch.Generator().manual_seed(50 + dist.get_rank())
    images = torch.randint(0, 256, (n + 1, 3, SIDE, SIDE), generator=rng).to(torch.uint8)
    labels = torch.randint(0, 5, (n + 1,), generator=rng)
    valid = torch.arange(n + 1) < n
    labels[n] = -100
    half = n // 2
    return [
        Batch(images[part], labels[part], valid[part], mean=(0.5,) * 3, std=(0.25,) * 3)
        for part in (slice(half), slice(half, None))
    ]


def make(stage: int, dtype: str, method: dict, **extra):
    import timm

    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIDE,
        patch_size=8,
        embed_dim=48,
        depth=BLOCKS,
        num_heads=3,
        num_classes=5,
        drop_path_rate=0.2,
        dynamic_img_size=True,
    )
    nn.init.trunc_normal_(model.head.weight, std=0.1)  # timm's zeros would give the blocks no gradient at first
    rows = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": rows, "weight_decay": 0.05, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    engine, *_ = efftrain_ds.initialize(
        model=model, model_parameters=groups, config=config_of(stage, dtype, method), **extra
    )
    torch.manual_seed(100 + dist.get_rank())
    return engine


def batch_of(engine, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    count = 4 // dist.get_world_size()
    x = torch.randn(count, 3, SIDE, SIDE, generator=rng)
    return x.to(dtype_of(engine)), torch.randint(0, 5, (count,), generator=rng)


def train(engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x, y = batch_of(engine, step)
        loss = nn.functional.cross_entropy(engine(x).float(), y)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def blocks_in(names) -> list[int]:
    return sorted({int(n.split(".")[1]) for n in names if n.startswith("blocks.")})


def stages_job(stage: int, dtype: str, method: dict) -> list[dict]:
    """What each stage edge and the training after it do to weights, masters and optimizer state."""
    engine = make(stage, dtype, method)
    start, found, before = weights(engine), [], None
    sides = []
    engine.module.patch_embed.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    for index in range(3):
        engine.begin_step()
        layout, now, low = access.layout_of(engine.deepspeed_engine), full_state(engine), weights(engine)
        trainable = {n for n, p in engine.module.named_parameters() if p.requires_grad}
        row = {
            "blocks": blocks_in(trainable),
            "others": all(n in trainable for n in low if not n.startswith("blocks.")),
            "masters_for_trainable": set(layout.shapes) == trainable,
            "flat_numel": sum(flat.master.numel() for flat in layout.flats),
            "groups": [g["name"] for g in layout.base.param_groups],
            "frozen_moved": [n for n in low if n not in trainable and not torch.equal(low[n], start[n])],
        }
        if before is not None:
            carried = [k for k in now if k in before]
            new = [k for k in now if k not in before]
            row["lost"] = [k for k in before if k not in now]
            row["changed"] = [k for k in carried if not torch.equal(now[k], before[k])]
            row["carried"] = blocks_in({k.split("/")[1] for k in carried})
            row["new"] = blocks_in({k.split("/")[1] for k in new})
            row["new_moments"] = float(sum(now[k].abs().sum() for k in new if "exp_avg" in k))
            row["new_masters"] = [
                k for k in new if k.startswith(("fp32/", "ema/")) and not torch.equal(now[k], start[k.split("/")[1]])
            ]
            row["steps"] = {
                layout.base.param_groups[flat.group]["name"]: layout.scalars(i).get("step")
                for i, flat in enumerate(layout.flats)
            }
        losses = train(engine, 2 * index, 2 * index + 2)
        row["finite"] = all(loss == loss for loss in losses)
        after = weights(engine)
        before = full_state(engine)
        # masters: a step may be too small for a bf16 weight
        row["still"] = [n for n in trainable if torch.equal(before[f"fp32/{n}"], now[f"fp32/{n}"])]
        row["drifted"] = [n for n in after if n not in trainable and not torch.equal(after[n], start[n])]
        found.append(row)
    found[0]["sides"] = sides
    found[0]["history"] = [(r["step"], r["reason"]) for r in engine.rebuilds]
    engine.destroy()
    return found


def resume_job(folder: str, stage: int, dtype: str, method: dict, at: int) -> dict:
    """Save before step `at`, load into a fresh engine and go on: as if never stopped."""
    engine = make(stage, dtype, method)
    train(engine, 0, at)
    engine.save_checkpoint(folder)
    expected = train(engine, at, STEPS)
    end, end_weights = full_state(engine), weights(engine)
    engine.destroy()
    again = make(stage, dtype, method)
    again.load_checkpoint(folder)
    level = again.methods[0].architecture()
    losses = train(again, at, STEPS)
    result = {
        "level": level,
        "losses": losses == expected,
        "state": same(end, full_state(again)),
        "weights": same(end_weights, weights(again)),
        "history": [r["step"] for r in again.rebuilds],
    }
    again.destroy()
    return result


def search_job(stage: int, dtype: str) -> dict:
    """A searched run: what is decided and recorded, and that measuring leaves the run alone."""
    events, lines = [], []
    engine = make(stage, dtype, SEARCH, probe_batches=probe, record=lambda event, **data: events.append((event, data)))
    engine.context.say = lines.append
    sides = []
    engine.module.patch_embed.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    untouched = []
    for index in range(3):
        before, rng = weights(engine), torch.get_rng_state()
        engine.begin_step()
        untouched.append(not same(before, weights(engine)) and torch.equal(rng, torch.get_rng_state()))
        train(engine, 2 * index, 2 * index + 2)
    result = {
        "decided": engine.methods[0].state_dict()["decided"],
        "final": engine.methods[0].architecture(),
        "trainable": blocks_in(n for n, p in engine.module.named_parameters() if p.requires_grad),
        "tables": [data["table"] for event, data in events if event == "unfreeze_search"],
        "lines": lines,
        "untouched": untouched,
        "sides": sides,
        "described": engine.methods[0].describe(engine.schedule.stages[1]),
    }
    engine.destroy()
    return result


def search_resume_job(folder: str, at: int) -> dict:
    """A resume keeps what was chosen: nothing is measured again for it."""
    engine = make(2, "fp32", SEARCH, probe_batches=probe)
    train(engine, 0, at)
    engine.save_checkpoint(folder)
    decided, side = engine.methods[0].state_dict()["decided"], engine.methods[0].state_dict()["resolution"]
    expected = train(engine, at, at + 1)
    engine.destroy()
    again = make(2, "fp32", SEARCH)  # without probe batches a search would fail
    again.load_checkpoint(folder)
    result = {"losses": train(again, at, at + 1) == expected}
    state = again.methods[0].state_dict()
    result["kept"] = state["decided"] == decided and state["resolution"] == side
    again.destroy()
    return result


def search_refusals_job() -> list[str]:
    found = []
    for batches in (None, lambda total: [], lambda total: _broken(total)):
        engine = make(1, "fp32", SEARCH, probe_batches=batches)
        try:
            engine.begin_step()
            found.append("nothing was refused")
        except EffTrainError as error:
            found.append(str(error))
        engine.destroy()
    return found


def _broken(total: int) -> list[Batch]:
    """Fails on one rank only."""
    if dist.get_rank() == 1:
        raise OSError("the disk is gone (a test)")
    return probe(total)
