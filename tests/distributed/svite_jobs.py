"""Functions run on the ranks by the SViTE tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import efftrain_ds
from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.methods.svite.densities import clean_name, mask_digest
from efftrain_ds.methods.svite.method import SViTE
from efftrain_ds.models import masked
from efftrain_ds.models.adapters import create_model
from efftrain_ds.zero.masks import ShardedMasks
from tests.distributed.zero_jobs import dtype_of, full_state, same, weights

SIDE, CLASSES, BATCH, LR, DECAY, CLIP = 32, 10, 16, 3e-3, 0.05, 1.0
"""BATCH samples a step over all ranks and micro-batches."""


def vit(embed_dim: int = 64) -> nn.Module:
    """The small model of the acceptance checks: 17 tokens, 2 blocks, width 64."""
    torch.manual_seed(3)
    return create_model(
        "vit_tiny_patch16_224",
        resolution=SIDE,
        num_classes=CLASSES,
        drop_path=0.0,
        dynamic=False,
        patch_size=8,
        embed_dim=embed_dim,
        depth=2,
        num_heads=4,
    )


def config_of(stage: int, dtype: str, method: dict | None, steps: int, gas: int = 1, ema: bool = True) -> dict:
    world = dist.get_world_size()
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world // gas,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "steps_per_print": 10**9,
        "efftrain": {
            "run": {"steps": steps, "seed": 5},
            "model": {"ema": {"decay": 0.9} if ema else None},
            "data": {"resolution": SIDE},
            "methods": {"svite": method} if method is not None else {},
        },
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return config


def start(stage: int, dtype: str, method: dict | None, steps: int = 50, gas: int = 1, **kwargs):
    model = kwargs.pop("model", None) or vit()
    config = config_of(stage, dtype, method, steps, gas)
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config, **kwargs)
    return engine


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step."""
    rng = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=rng), torch.randint(0, CLASSES, (BATCH,), generator=rng)


def one_step(engine, step: int, gas: int = 1, factor: float = 1.0) -> float:
    """A step on this rank's part of the global batch."""
    images, labels = samples(step)
    size, total = BATCH // dist.get_world_size() // gas, 0.0
    for micro in range(gas):
        first = (micro * dist.get_world_size() + dist.get_rank()) * size
        x, y = images[first : first + size], labels[first : first + size]
        loss = cross_entropy(engine(x.to(dtype_of(engine))).float(), y) * factor
        engine.backward(loss)
        engine.step()
        total += float(loss.detach()) / gas
    return total


def masks_now(engine) -> dict[str, torch.Tensor]:
    return {clean_name(n): m.clone() for n, m in masked.masks_of(engine.module).items()}


def method_of(engine) -> SViTE:
    return engine.methods[0]


def stray(engine, moments: bool = True) -> list[str]:
    """Masters, average, working weights (and moments) that are not zero outside of the masks."""
    state, low, found = full_state(engine), weights(engine), []
    for name, mask in masked.masks_of(engine.module).items():
        for key in {full.split("/")[0] for full in state}:
            if (moments or not key.startswith("exp")) and state[f"{key}/{name}"][~mask].count_nonzero():
                found.append(f"{key}/{name}")
        if low[name][~mask].count_nonzero():
            found.append(f"working/{name}")
    return found


def run_job(stage: int, dtype: str, method: dict, steps: int = 8, gas: int = 1) -> dict:
    """Whole short run; zeros, counts and the bits of what was dropped and grown again are checked after each step."""
    engine = start(stage, dtype, method, steps, gas)
    records, problems, digests, losses = [], [], [], []
    engine.context.record = lambda event, **data: records.append((event, data))
    reset = method_of(engine).preset.moments == "reset"
    counts = {n: int(m.sum()) for n, m in masks_now(engine).items()}
    before, old = None, masks_now(engine)
    for step in range(steps):
        if step:
            before = full_state(engine)
        losses.append(one_step(engine, step, gas))
        new = masks_now(engine)
        problems += [f"{step} {text}" for text in stray(engine, moments=reset)]
        if {n: int(m.sum()) for n, m in new.items()} != counts:
            problems.append(f"{step}: counts")
        state = full_state(engine)
        for name, mask in new.items():
            grown = mask & ~old[name]
            values = ("fp32", "exp_avg", "exp_avg_sq") if reset else ("fp32",)
            problems += [f"{step} {k}/{name}: grown" for k in values if state[f"{k}/{name}"][grown].count_nonzero()]
            kept = mask & old[name]
            if before is not None and not state[f"fp32/{name}"][kept].count_nonzero():
                problems.append(f"{step} {name}: nothing lives")
        old = new
        digests.append(mask_digest(new))
    state = full_state(engine)
    warm = [float(state[f"exp_avg/{n}"][~m].abs().sum()) for n, m in masks_now(engine).items()]
    result = {
        "problems": problems,
        "digests": digests,
        "losses": losses,
        "updates": method_of(engine).updates,
        "events": [event for event, _ in records],
        "last": records[-1][1],
        "scalars": method_of(engine).scalars(engine.context),
        "counts": counts,
        "warm": sum(warm),
    }
    engine.destroy()
    return result


class Reference:
    """The same training in plain torch on one process with the concatenated batch, written for entries only."""

    def __init__(self, masks: dict[str, torch.Tensor], schedule, growth: str = "gradient"):
        self.model, self.schedule = vit(), schedule
        self.masks = {n: m.clone() for n, m in masks.items()}
        self.named = dict(self.model.named_parameters())
        self._mask_weights()
        groups = [{"params": list(self.model.parameters()), "weight_decay": DECAY}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR)

    @torch.no_grad()
    def _mask_weights(self) -> None:
        for name, mask in self.masks.items():
            self.named[name].mul_(mask)

    def step(self, step: int) -> None:
        images, labels = samples(step)
        self.optimizer.zero_grad()
        cross_entropy(self.model(images), labels).backward()
        dense = {n: self.named[n].grad.clone() for n in self.masks}
        for name, mask in self.masks.items():
            self.named[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        if self.schedule.is_update(step):
            for name in self.masks:
                self._update(name, dense[name], self.schedule.fraction(step))

    @torch.no_grad()
    def _update(self, name: str, gradient: torch.Tensor, alpha: float) -> None:
        mask, weight = self.masks[name].view(-1), self.named[name]
        live = int(mask.sum())
        k = min(int(alpha * live), mask.numel() - live)
        kept = mask.clone()
        kept[weight.abs().view(-1).masked_fill(~mask, torch.inf).argsort(stable=True)[:k]] = False
        new = kept.clone()
        new[gradient.abs().view(-1).masked_fill(kept, -1.0).argsort(descending=True, stable=True)[:k]] = True
        other = (mask ^ new).view_as(weight)
        state = self.optimizer.state[weight]
        for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
            tensor.masked_fill_(other, 0.0)
        self.masks[name] = new.view_as(weight)


def reference_job(stage: int, gas: int, updates: int = 20) -> dict:
    """Masks after every update against those of one process; weights at the end."""
    steps = 2 * updates + 2
    method = {"update_every": "2st", "end": 1.0, "initial": 0.3}
    engine = start(stage, "fp32", method, steps, gas)
    plain, wrong, moved = None, [], 0
    first = masks_now(engine)
    for step in range(steps):
        one_step(engine, step, gas)
        if plain is None:
            plain = Reference(first, method_of(engine).schedule)
        plain.step(step)
        now = masks_now(engine)
        wrong += [f"{step} {n}" for n in now if not torch.equal(now[n], plain.masks[n])]
    moved = sum(int((first[n] & ~m).sum()) for n, m in now.items())
    state = full_state(engine)
    result = {
        "wrong": wrong,
        "moved": moved,
        "updates": method_of(engine).updates,
        "error": max(float((state[f"fp32/{n}"] - p.detach()).abs().max()) for n, p in plain.named.items()),
        "digest": mask_digest(now),
    }
    engine.destroy()
    return result


def resume_job(
    folder: str, stage: int, dtype: str, method: dict, stop: int, steps: int, cut: int | None = None
) -> dict:
    """A run without a break against one that is saved at `stop` and goes on in a new engine, seeded otherwise."""
    whole = start(stage, dtype, method, steps)
    for step in range(steps):
        one_step(whole, step)
    want, union = full_state(whole), {n: u.clone() for n, u in method_of(whole)._union.items()}
    masks, digest = masks_now(whole), method_of(whole).decision(whole.context)
    scalars = method_of(whole).scalars(whole.context)
    moved = sum(int((m ^ u).sum()) for m, u in zip(masks.values(), union.values(), strict=True) if m.shape == u.shape)
    whole.destroy()
    first = start(stage, dtype, method, steps)
    for step in range(stop):
        one_step(first, step)
    first.save_checkpoint(folder)
    first.destroy()
    second = start(stage, dtype, {**method, "seed": 99}, steps)  # the masks come from the checkpoint
    fresh = masks_now(second)
    second.load_checkpoint(folder)
    method_of(second).config = method_of(second).config.model_copy(update={"seed": None})
    for step in range(stop, steps):
        one_step(second, step)
    found = {
        "state": same(want, full_state(second)),
        "masks": same(masks, masks_now(second)),
        "union": same(union, method_of(second)._union),
        "digest": digest == method_of(second).decision(second.context),
        "scalars": scalars == method_of(second).scalars(second.context),
        "strays": ShardedMasks(second).strays(masked.masks_of(second.module)),
        "other_start": bool(same(fresh, masks)),
        "moved": moved,
        "updates": method_of(second).updates,
    }
    second.destroy()
    return found


def overflow_job(stage: int, dtype: str) -> dict:
    """Losses blown up at two update steps: the update waits for the next step that is applied."""
    engine = start(stage, dtype, {"update_every": "3st", "end": 1.0}, 12)
    events, changed, applied = [], [], []
    engine.context.record = lambda event, **data: events.append((engine.step_index, event))
    digest = mask_digest(masks_now(engine))
    for step in range(12):
        bad = step in (3, 6, 7)
        one_step(engine, step, factor=float("inf") if bad and dtype != "fp16" else 2.0**60 if bad else 1.0)
        applied.append(engine.was_step_applied())
        now = mask_digest(masks_now(engine))
        if now != digest:
            changed.append(step)
        digest = now
    probes = [m.probe is None for m in masked.masked_layers(engine.module).values()]
    result = {
        "changed": changed,
        "applied": applied,
        "events": [(s, e) for s, e in events if e.startswith("mask_update")],
        "strays": stray(engine),
        "off": all(probes),
    }
    engine.destroy()
    return result


def form_job(stage: int, dtype: str, method: dict, steps: int = 10) -> dict:
    """A run with blocks, N:M or another rule: what its masks look like after every step, and the zeros."""
    engine = start(stage, dtype, {"update_every": "2st", **method}, steps)
    svite = method_of(engine)
    rule, masks, problems, live, densities = svite.rule, [masks_now(engine)], [], [], []
    for step in range(steps):
        one_step(engine, step)
        now = masks_now(engine)
        if not svite.rule.__class__.__name__.startswith("TopKast"):
            problems += [f"{step} {t}" for t in stray(engine, moments=svite.preset.moments == "reset")]
        for name, mask in now.items():
            problems += [f"{step} {name}: form"] * (not torch.equal(rule.expand(svite._units(mask), mask.shape), mask))
        live.append({n: int(m.sum()) for n, m in now.items()})
        densities.append(svite.scalars(engine.context)["sparse/density"])
        masks.append(now)
    result = {
        "problems": problems,
        "live": live,
        "densities": densities,
        "moved": sum(int((masks[0][n] ^ m).sum()) for n, m in masks[-1].items()),
        "masks": {n: m.numpy() for n, m in masks[-1].items()},
        "updates": svite.updates,
        "needs_gradient": rule.needs_gradient,
        "digest": mask_digest(masks[-1]),
        "layers": list(masks[-1]),
        "words": svite.describe(engine.stage),
    }
    engine.destroy()
    return result


def topkast_job(stage: int, dtype: str) -> dict:
    """The first masks are the largest weights; only the wider set moves by gradients; what runs is W * M."""
    engine = start(stage, dtype, {"rule": "topkast", "update_every": "3st", "density": 0.3}, 8)
    before, problems = full_state(engine), []
    for step in range(8):
        one_step(engine, step)
        layers = masked.masked_layers(engine.module)
        state = full_state(engine)
        for name, module in layers.items():
            mask, wide = module.weight_mask, module.weight_backward
            if step == 0:
                size = before[f"fp32/{name}"].abs()
                if not size[mask].min() >= size[~mask].max():
                    problems.append(f"{name}: not the largest")
                rest = state[f"fp32/{name}"][~wide] / before[f"fp32/{name}"][~wide]
                if not torch.allclose(rest, torch.full_like(rest, 1 - LR * DECAY), rtol=1e-5):
                    problems.append(f"{name}: moved outside of the wider set")
                if not state[f"exp_avg/{name}"][wide & ~mask].count_nonzero():
                    problems.append(f"{name}: the wider set has no gradient")
            if (mask & ~wide).any() or abs(int(wide.sum()) - int(mask.sum()) - round(0.1 * mask.numel())) > 1:
                problems.append(f"{step} {name}: sets")
            if not state[f"fp32/{name}"][~mask].count_nonzero():
                problems.append(f"{step} {name}: dead weights are zero")
    result = {"problems": problems, "updates": method_of(engine).updates, "layers": len(layers)}
    engine.destroy()
    return result


def average_job(stage: int) -> dict:
    """The average has the zeros of the masks; evaluating with it is the plain model with these weights."""
    engine = start(stage, "fp32", {"update_every": "2st"}, 8)
    for step in range(8):
        one_step(engine, step)
    state, masks = full_state(engine), masks_now(engine)
    model = vit().eval()
    own = {n[4:]: v for n, v in state.items() if n.startswith("ema/")}
    model.load_state_dict(own)
    images, _ = samples(0)
    with engine.evaluating(ema=True), torch.no_grad():
        gap = float((engine(images) - model(images)).abs().max())
    result = {
        "zeros": all(not own[n][~m].count_nonzero() for n, m in masks.items()),
        "alive": all(bool(own[n][m].count_nonzero() > 0.9 * m.sum()) for n, m in masks.items()),
        "gap": gap,
        "differs": any(not torch.equal(own[n], state[f"fp32/{n}"]) for n in masks),
    }
    engine.destroy()
    return result


def embedded_job(stage: int, how: str) -> dict:
    """`wrap` of an engine that was made before, or an engine whose partitions are rebuilt in the run."""
    method = {"update_every": "2st"}
    if how == "wrap":
        import deepspeed

        model = vit()
        config = config_of(stage, "fp32", method, 8, ema=False)
        section = {"efftrain": config.pop("efftrain")}
        plain = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        engine = efftrain_ds.wrap(plain, section)
    else:
        engine = start(stage, "fp32", method, 8, rebuildable=True)
    problems, digests = [], []
    for step in range(8):
        if how == "rebuild" and step in (3, 5):
            from efftrain_ds.zero.request import RebuildRequest

            engine.rebuild(RebuildRequest(reason="identity"))
        one_step(engine, step)
        problems += stray(engine)
        digests.append(method_of(engine).decision(engine.context))
    result = {"problems": problems, "digests": digests, "updates": method_of(engine).updates}
    engine.destroy()
    return result


def bad_job(method: dict, what: str = "", stage: int = 1) -> str:
    """The error of a configuration or model; nothing may have been trained."""
    if what == "mlp":
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Bilinear(4, 4, 2))
    elif what == "odd":
        model = vit(embed_dim=60)
    else:
        model = vit()
    try:
        engine = start(stage, "fp32", method, 20, model=model)
    except EffTrainError as error:
        return f"{type(error).__name__}: {error}"
    engine.destroy()
    return "no error"


def many_job(stage: int, updates: int) -> dict:
    """Resident memory, open files, hooks and process groups over many topology updates, one after every step."""
    engine = start(stage, "bf16", {"update_every": "1st", "end": 1.0}, steps=updates + 2)
    resident, files = [], []
    for step in range(1, updates + 2):
        one_step(engine, step)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))
    result = {
        "updates": method_of(engine).updates,
        "resident": resident,
        "files": files,
        "hooks": sum(len(p._backward_hooks or ()) for p in engine.module.parameters()),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "stray": stray(engine),
    }
    engine.destroy()
    return result
