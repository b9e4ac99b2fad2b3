"""Functions run on the ranks by the tests of attention sparsity."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import efftrain_ds
from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.methods.svite.attention import SViTEAttention
from efftrain_ds.methods.svite.densities import clean_name, mask_digest
from efftrain_ds.models.adapters import create_model
from efftrain_ds.models.attention import masked_attention
from efftrain_ds.zero.request import RebuildRequest
from tests.distributed.zero_jobs import dtype_of, full_state, same

SIDE, PATCH, WIDTH, HEADS, CLASSES, BATCH, LR, CLIP = 64, 4, 32, 2, 10, 8, 3e-3, 1.0
TOKENS, BLOCK = (SIDE // PATCH) ** 2 + 1, 64
"""257 tokens: 5 x 5 blocks, the last one of a single token."""
METHOD = {"update_every": "2st", "density": 0.6, "initial": 0.5}


def vit(dynamic: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return create_model(
        "vit_tiny_patch16_224",
        resolution=SIDE,
        num_classes=CLASSES,
        dynamic=dynamic,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
    )


def start(stage: int, dtype: str = "fp32", method: dict | None = None, steps: int = 20, gas: int = 1, **kwargs):
    model, world = kwargs.pop("model", None) or vit(), dist.get_world_size()
    methods = {"svite_attention": {**METHOD, **(method or {})}, **kwargs.pop("others", {})}
    if methods["svite_attention"].get("pattern", "learned") != "learned":
        methods["svite_attention"] = {**(method or {})}
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world // gas,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "steps_per_print": 10**9,
        "efftrain": {"run": {"steps": steps, "seed": 5}, "data": {"resolution": SIDE}, "methods": methods},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config, **kwargs)[0]


def samples(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    rng = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=rng), torch.randint(0, CLASSES, (BATCH,), generator=rng)


def one_step(engine, step: int, gas: int = 1, factor: float = 1.0) -> None:
    """A step on this rank's part of the global batch."""
    images, labels = samples(step)
    size = BATCH // dist.get_world_size() // gas
    for micro in range(gas):
        first = (micro * dist.get_world_size() + dist.get_rank()) * size
        x, y = images[first : first + size], labels[first : first + size]
        engine.backward(cross_entropy(engine(x.to(dtype_of(engine))).float(), y) * factor)
        engine.step()


def keeps(engine) -> dict[str, Tensor]:
    return {clean_name(n): m.block_mask.keep.clone() for n, m in masked_attention(engine.module).items()}


def method_of(engine) -> SViTEAttention:
    return next(m for m in engine.methods if m.name == "svite_attention")


def stale(engine) -> list[str]:
    """Layers whose lists are not those of their mask, or that still collect scores."""
    found = []
    for name, module in masked_attention(engine.module).items():
        mask = module.block_mask
        if not torch.equal(mask.row_cnt, mask.keep.sum(-1, dtype=torch.int32)) or module.score_probe is not None:
            found.append(name)
    return found


def run_job(stage: int, dtype: str, method: dict | None = None, steps: int = 8, gas: int = 1, how: str = "") -> dict:
    """A short run, checked after each step."""
    model = vit()
    if how == "checkpointing":
        model.set_grad_checkpointing()
    engine = start(stage, dtype, method, steps, gas, model=model, rebuildable=how == "rebuild")
    records, problems, digests = [], [], []
    engine.context.record = lambda event, **data: records.append((event, data))
    old = keeps(engine)
    first = {name: keep.sum((1, 2)) for name, keep in old.items()}
    for step in range(steps):
        if how == "rebuild" and step in (3, 6):
            engine.rebuild(RebuildRequest(reason="identity"))
        one_step(engine, step, gas)
        new = keeps(engine)
        for name, keep in new.items():
            problems += [f"{step} {name}: count"] * (not torch.equal(keep.sum((1, 2)), first[name]))
            problems += [f"{step} {name}: empty row"] * (not keep.any(-1).all())
            problems += [f"{step} {name}: prefix"] * (not (keep[:, 0].all() and keep[:, :, 0].all()))
            changed = not torch.equal(keep, old[name])
            problems += [f"{step} {name}: changed"] * (changed and step % 2 == 1)
        problems += stale(engine)
        old = new
        digests.append(mask_digest(new))
    result = {
        "problems": problems,
        "digests": digests,
        "updates": method_of(engine).updates,
        "events": [event for event, _ in records if event != "rebuild"],
        "last": records[-1][1],
        "scalars": method_of(engine).scalars(engine.context),
        "live": {name: count.tolist() for name, count in first.items()},
        "decision": method_of(engine).decision(engine.context),
    }
    engine.destroy()
    return result


class Reference:
    """The same training in plain torch on one process with the concatenated batch: dense, with a gate on each pair."""

    def __init__(self, masks: dict[str, Tensor], schedule):
        self.model, self.schedule, self.masks = vit(), schedule, {n: m.clone() for n, m in masks.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.05)
        self.gates: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for name in masks:
            module = self.model.get_submodule(name)
            module.forward = lambda x, m=module, n=name, **_: self._attend(m, n, x)

    def _attend(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        batch = x.shape[0]
        qkv = module.qkv(x).reshape(batch, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        dense = self.masks[name].repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :TOKENS, :TOKENS]
        gate = self.gates[name] = dense.float().expand(batch, -1, -1, -1).clone().requires_grad_()
        scores = (qkv[0] * module.scale) @ qkv[1].transpose(-2, -1)
        exponent = gate * (scores - scores.amax(-1, keepdim=True).detach()).exp()
        share = exponent / exponent.sum(-1, keepdim=True)
        self.weights[name] = share.detach()
        return module.proj((share @ qkv[2]).transpose(1, 2).reshape(batch, TOKENS, -1))

    def step(self, step: int) -> None:
        images, labels = samples(step)
        self.optimizer.zero_grad()
        cross_entropy(self.model(images), labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        if self.schedule.is_update(step):
            for name in self.masks:
                slope, mass = (self._sums(x) for x in (self.gates[name].grad.abs(), self.weights[name]))
                for head in range(HEADS):
                    self._update(self.masks[name][head], mass[head], slope[head], self.schedule.fraction(step))

    @staticmethod
    def _sums(values: Tensor) -> Tensor:
        """[B, H, N, N] to sums by block, without padding or views."""
        n, total = math.ceil(TOKENS / BLOCK), values.double().sum(0)
        rows = [total[:, i * BLOCK : (i + 1) * BLOCK].sum(1) for i in range(n)]
        return torch.stack(
            [torch.stack([r[:, j * BLOCK : (j + 1) * BLOCK].sum(1) for j in range(n)], -1) for r in rows], 1
        )

    @staticmethod
    def _update(keep: Tensor, mass: Tensor, slope: Tensor, alpha: float) -> None:
        free = [(i, j) for i in range(1, len(keep)) for j in range(1, len(keep))]
        live = [place for place in free if keep[place]]
        k = min(len(live), int((~keep).sum()), max(int(alpha * int(keep.sum())), int(alpha > 0.05)))
        for place in sorted(live, key=lambda p: (float(mass[p]), p))[:k]:
            keep[place] = False
        for place in sorted((p for p in free if not keep[p]), key=lambda p: (-float(slope[p]), p))[:k]:
            keep[place] = True


def reference_job(stage: int, gas: int, updates: int) -> dict:
    """Masks after every update against those of one process; weights at the end."""
    steps = 2 * updates + 2
    engine = start(stage, "fp32", {"end": 1.0, "alpha": "constant", "initial": 0.2}, steps, gas)
    first, plain, wrong, moved = keeps(engine), None, [], 0
    for step in range(steps):
        before = keeps(engine)
        one_step(engine, step, gas)
        plain = plain or Reference(first, method_of(engine).schedule)
        plain.step(step)
        now = keeps(engine)
        wrong += [f"{step} {n}" for n in now if not torch.equal(now[n], plain.masks[n])]
        moved += sum(int((before[n] ^ now[n]).sum()) for n in now)
    state = full_state(engine)
    result = {
        "wrong": wrong,
        "moved": moved,
        "updates": method_of(engine).updates,
        "error": max(float((state[f"fp32/{n}"] - p.detach()).abs().max()) for n, p in plain.model.named_parameters()),
        "digest": mask_digest(now),
    }
    engine.destroy()
    return result


def resume_job(folder: str, stage: int, dtype: str, method: dict, stop: int, steps: int) -> dict:
    """A run without a break against one that is saved at `stop` and goes on in a new engine, seeded otherwise."""
    whole = start(stage, dtype, method, steps)
    for step in range(steps):
        one_step(whole, step)
    want, masks, union = full_state(whole), keeps(whole), dict(method_of(whole)._union)
    scalars, digest = method_of(whole).scalars(whole.context), method_of(whole).decision(whole.context)
    whole.destroy()
    first = start(stage, dtype, method, steps)
    for step in range(stop):
        one_step(first, step)
    first.save_checkpoint(folder)
    first.destroy()
    other = {} if "pattern" in method else {"seed": 99}  # the masks come from the checkpoint
    second = start(stage, dtype, {**method, **other}, steps)
    fresh = keeps(second)
    second.load_checkpoint(folder)
    method_of(second).config = method_of(second).config.model_copy(update={"seed": None})
    for step in range(stop, steps):
        one_step(second, step)
    found = {
        "state": same(want, full_state(second)),
        "masks": same(masks, keeps(second)),
        "union": same(union, method_of(second)._union),
        "scalars": scalars == method_of(second).scalars(second.context),
        "digest": digest == method_of(second).decision(second.context),
        "stale": stale(second),
        "other_start": bool(same(fresh, masks)),
        "updates": method_of(second).updates,
    }
    second.destroy()
    return found


def overflow_job(stage: int, dtype: str) -> dict:
    """Losses blown up at two update steps: the update waits for the next step that is applied."""
    forced = {"alpha": "constant", "exclude_just_dropped": True}
    engine = start(stage, dtype, {"update_every": "3st", "end": 1.0, **forced}, 10)
    events, changed, applied, digest = [], [], [], mask_digest(keeps(engine))
    engine.context.record = lambda event, **data: events.append((engine.step_index, event))
    for step in range(10):
        bad = step in (3, 6, 7)
        one_step(engine, step, factor=float("inf") if bad and dtype != "fp16" else 2.0**60 if bad else 1.0)
        applied.append(engine.was_step_applied())
        now = mask_digest(keeps(engine))
        changed += [step] * (now != digest)
        digest = now
    result = {
        "changed": changed,
        "applied": applied,
        "events": [(s, e) for s, e in events if e.startswith("attention_update")],
        "stale": stale(engine),
    }
    engine.destroy()
    return result


def lengths_job(stage: int, method: dict) -> dict | str:
    """Beside EfficientTrain: 65 tokens, then 257. What each stage computes, and an evaluation at full size in each."""
    schedule = [{"until": 0.5, "bandwidth": 32}, {"until": 1.0, "bandwidth": 64}]
    others = {"efficienttrain": {"schedule": schedule, "pacing": "samples"}}
    try:
        engine = start(stage, "fp32", method, 6, model=vit(dynamic=True), others=others)
        found: dict = {"density": [], "share": [], "tokens": []}
        for step in range(6):
            one_step(engine, step)
            scalars = method_of(engine).scalars(engine.context)
            found["density"].append(scalars["sparse_attention/density"])
            found["share"].append(scalars["sparse_attention/macs_share"])
            with engine.evaluating(), torch.no_grad():
                found["tokens"].append(engine.module.forward_features(samples(0)[0][:1]).shape[1])
    except EffTrainError as error:
        return f"{type(error).__name__}: {error}"
    found["made"] = sorted(t for t, _ in next(iter(masked_attention(engine.module).values())).length_masks.made)
    found["buffers"] = sum("block_mask" in name for name, _ in engine.module.named_buffers())
    engine.destroy()
    return found


def desync_job(stage: int) -> tuple[str, list[str]]:
    """A rank that draws other blocks ends the run on both, at the first update."""
    engine, events = start(stage, "fp32", {"growth": "random"}, 8), []
    engine.context.record = lambda event, **data: events.append(event)
    method = method_of(engine)
    method.config = method.config.model_copy(update={"seed": 10 + dist.get_rank()})
    try:
        for step in range(8):
            one_step(engine, step)
    except EffTrainError as error:
        return f"{type(error).__name__}: {error}", events
    finally:
        engine.destroy()
    return "no error", events


def wrap_job(stage: int, steps: int = 8) -> dict:
    """An engine that was made before."""
    import deepspeed

    model = vit()
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    plain = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    run = {"run": {"steps": steps, "seed": 5}, "data": {"resolution": SIDE}, "methods": {"svite_attention": METHOD}}
    engine, digests = efftrain_ds.wrap(plain, {"efftrain": run}), []
    for step in range(steps):
        one_step(engine, step)
        digests.append(mask_digest(keeps(engine)))
    engine.destroy()
    return {"digests": digests}
