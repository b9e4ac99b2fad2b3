"""Functions run on the ranks by the AutoProg tests."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.models.growth import interpolation
from efftrain_ds.zero import access
from tests.distributed.zero_jobs import dtype_of, full_state, same, weights

SIDE, CLASSES = 32, 7


def vit(depth: int = 6, **kwargs) -> nn.Module:
    from efftrain_ds.models.adapters import create_model

    return create_model(
        "vit_tiny_patch16_224",
        resolution=SIDE,
        num_classes=CLASSES,
        drop_path=kwargs.pop("drop_path", 0.1),
        dynamic=True,
        patch_size=8,
        embed_dim=24,
        depth=depth,
        num_heads=2,
        **kwargs,
    )


def config_of(stage: int, dtype: str, method: dict | None, steps: int, scheduler: bool = False) -> dict:
    world = dist.get_world_size()
    config = {
        "train_batch_size": 4 * world,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "steps_per_print": 10**9,
        "efftrain": {
            "run": {"steps": steps},
            "model": {"ema": {"decay": 0.9}},
            "data": {"resolution": SIDE, "samples": 4 * world * 4},
            "methods": {"autoprog": method} if method is not None else {},
        },
    }
    if scheduler:
        config["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 4, "total_num_steps": 100}}
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def probes(samples: int) -> list[Batch]:
    """Fixed labelled samples of this rank."""
    found = []
    for n in range(max(1, samples // 4 // dist.get_world_size())):
        rng = torch.Generator().manual_seed(7000 + 10 * n + dist.get_rank())
        images = torch.randn(4, 3, SIDE, SIDE, generator=rng)
        found.append(Batch(images=images, labels=torch.randint(0, CLASSES, (4,), generator=rng)))
    return found


def start(stage: int, dtype: str, method: dict | None, steps: int = 16, scheduler: bool = False):
    torch.manual_seed(3)
    model = vit()
    config = config_of(stage, dtype, method, steps, scheduler)
    engine, *_ = efftrain_ds.initialize(
        model=model, model_parameters=model.parameters(), config=config, probe_batches=probes
    )
    torch.manual_seed(100 + dist.get_rank())
    return engine


def one_step(engine, step: int) -> float:
    rng = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(4, 3, SIDE, SIDE, generator=rng)
    y = torch.randint(0, CLASSES, (4,), generator=rng)
    x, y = engine.prepare_batch(x, y)
    loss = nn.functional.cross_entropy(engine(x.to(dtype_of(engine))).float(), y)
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def source_of(name: str, origin) -> str:
    """The old name of a parameter, where block j comes from block origin[j]."""
    if not name.startswith("blocks."):
        return name
    _, j, rest = name.split(".", 2)
    return f"blocks.{origin[int(j)]}.{rest}"


def growth_job(stage: int, dtype: str, state: str) -> dict:
    """MoGrow from an average that was set apart from the weights; the first step after the growth is not taken."""
    method = {"stages": 2, "resolution_start": 0.5, "resolution_step": 8, "state": state}
    engine = start(stage, dtype, method, steps=8)
    for step in range(4):
        one_step(engine, step)
    for n, shadow in enumerate(engine.ema.shadow):
        shadow.add_(torch.linspace(-1, 1, shadow.numel()).view_as(shadow) * (n + 1) / 10)
    before = full_state(engine)
    engine.begin_step()
    after = full_state(engine)
    index_map = interpolation(3, 6)
    wrong = []
    for full_name, value in after.items():
        key, name = full_name.split("/")
        source = source_of(name, index_map)
        want = before[f"{'ema' if key == 'fp32' else key}/{source}"]
        if state == "reset" and key.startswith("exp"):
            want = torch.zeros_like(want)
        if not torch.equal(value, want):
            wrong.append(full_name)
    layout = access.layout_of(engine.deepspeed_engine)
    rates = [b.drop_path1.drop_prob for b in engine.module.blocks]
    steps = sorted({layout.scalars(i).get("step", 0.0) for i in range(len(layout.flats))})
    one_step(engine, 4)
    result = {
        "wrong": wrong,
        "states": sorted({k.split("/")[0] for k in after}),
        "online_gone": bool(same({"x": after["fp32/head.bias"]}, {"x": before["fp32/head.bias"]})),
        "steps": steps,
        "rates": rates,
        "blocks": len(engine.module.blocks),
    }
    engine.destroy()
    return result


def lr_job(stage: int) -> dict:
    """Learning rates and step counts with and without growth."""
    found = []
    for method in ({"stages": 4, "depth_start": 0.5, "resolution_start": None}, None):
        engine = start(stage, "fp32", method, steps=12, scheduler=True)
        rates = []
        for step in range(12):
            one_step(engine, step)
            rates.append(engine.get_lr()[0])
        found.append((rates, engine.global_steps, depth_of_engine(engine)))
        engine.destroy()
    return {"lr": found[0][0] == found[1][0], "steps": (found[0][1], found[1][1]), "depths": (found[0][2], found[1][2])}


def depth_of_engine(engine) -> int:
    return len(engine.module.blocks)


SEARCH = {
    "stages": 3,
    "resolution_start": 0.5,
    "resolution_step": 8,
    "search": {"epochs": 1, "probe_samples": 8, "cost": "macs"},
}


def skipped_job(stage: int, dtype: str) -> dict:
    """In a supernet, parameters of blocks that did not run keep masters, moments and weights, to the bit."""
    engine = start(stage, dtype, SEARCH, steps=24)
    moved, still, drawn, norms = [], 0, [], []
    for step in range(3):
        engine.begin_step()
        method = engine.methods[0]
        drawn.append(method._drawn)
        from efftrain_ds.models.elastic import skipped_names

        names = set(skipped_names(engine.module))
        before, low = full_state(engine), weights(engine)
        one_step(engine, step)
        after, now = full_state(engine), weights(engine)
        for full_name, value in after.items():
            key, name = full_name.split("/")
            if key == "ema":
                continue
            held = full_name not in before or torch.equal(before[full_name], value)
            if name in names:
                still += 1
                if full_name not in before:
                    held = not value.any()
                if not held:
                    moved.append(f"{step} {full_name}")
            elif held and key == "fp32" and value.dim() > 1:
                moved.append(f"{step} {full_name} did not move")
        moved += [f"{step} weight {n}" for n in names if not torch.equal(low[n], now[n])]
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    state = full_state(engine)
    result = {"moved": moved, "still": still, "drawn": drawn, "norms": norms, "finite": all(v == v for v in norms)}
    result["end"] = {k: v.double().sum().item() for k, v in state.items()}
    engine.destroy()
    return result


def search_job(stage: int, dtype: str) -> dict:
    """A whole searched run: the choice, what is recycled, and that nothing shrinks."""
    engine = start(stage, dtype, SEARCH, steps=24)
    records, lines = [], []
    engine.context.record = lambda event, **data: records.append((event, data))
    engine.context.say = lambda text: lines.append(text)
    sizes, recycled = [], None
    for step in range(24):
        method = engine.methods[0]
        if step == 4:
            before = full_state(engine)
        engine.begin_step()
        if step == 4:
            recycled = (before, full_state(engine), method.decided[0])
        sizes.append((method.decided_stage, len(engine.module.blocks), method._side(engine.context)))
        one_step(engine, step)
    from efftrain_ds.models.elastic import path_of

    before, after, chosen = recycled
    path = path_of(3, 6, chosen[0])
    wrong = []
    for full_name, value in after.items():
        key, name = full_name.split("/")
        source = source_of(name, path)
        if not torch.equal(value, before[f"{key}/{source}"]):
            wrong.append(full_name)
    tables = [data for event, data in records if event == "growth_search"]
    result = {
        "decided": engine.methods[0].decided,
        "sizes": sizes,
        "wrong": wrong,
        "tables": [[(r["depth"], r["resolution"], r["loss"], r["chosen"]) for r in t["table"]] for t in tables],
        "losses": [len(t["table"][0]["losses"]) for t in tables],
        "lines": lines,
        "global_steps": engine.global_steps,
        "events": [event for event, _ in records],
    }
    engine.destroy()
    return result


def bad_job(method: dict, changes: dict) -> str:
    """The error of a configuration; nothing may have been trained."""
    torch.manual_seed(0)
    model = changes.pop("model", None)
    model = vit() if model is None else nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))
    config = config_of(1, "fp32", method, changes.pop("steps", 16))
    for path, value in changes.items():
        node = config
        *parents, last = path.split("/")
        for key in parents:
            node = node[key]
        node[last] = value
    try:
        engine, *_ = efftrain_ds.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=config,
            probe_batches=None if changes.get("no_probes") else probes,
        )
        one_step(engine, 0)
    except EffTrainError as error:
        return f"{type(error).__name__}: {error}"
    engine.destroy()
    return "no error"


def back_to_back_job(stage: int) -> dict:
    """Searches that fill their stages: one ends where the next begins."""
    method = {**SEARCH, "search": {**SEARCH["search"], "epochs": 2}}
    engine = start(stage, "fp32", method, steps=24)
    sizes = []
    for step in range(24):
        engine.begin_step()
        searching = engine.methods[0].search
        sizes.append((len(engine.module.blocks), searching.stage if searching is not None else None))
        one_step(engine, step)
    result = {"sizes": sizes, "decided": engine.methods[0].decided, "rebuilds": [r["reason"] for r in engine.rebuilds]}
    engine.destroy()
    return result


def resolution_only_job(stage: int) -> dict:
    """A search that leaves the depth alone."""
    method = {**SEARCH, "depth_start": None}
    engine = start(stage, "fp32", method, steps=24)
    sides, rates = [], []
    for step in range(24):
        engine.begin_step()
        sides.append(engine.methods[0]._side(engine.context))
        rates.append(engine.module.blocks[-1].drop_path1.drop_prob)
        one_step(engine, step)
    result = {"sides": sides, "rates": rates, "decided": engine.methods[0].decided, "rebuilds": len(engine.rebuilds)}
    engine.destroy()
    return result


def own_schedule_job() -> dict:
    """An own schedule that says nothing of drop path: the model's rate is spread over the depth of each stage."""
    schedule = [{"until": 0.5, "depth": 3}, {"until": 1.0, "depth": 6}]
    engine = start(1, "fp32", {"schedule": schedule}, steps=4)
    rates = []
    for step in range(4):
        engine.begin_step()
        rates.append([b.drop_path1.drop_prob for b in engine.module.blocks])
        one_step(engine, step)
    engine.destroy()
    return {"first": rates[0], "last": rates[-1]}
