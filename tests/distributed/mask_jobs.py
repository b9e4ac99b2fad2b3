"""Functions run on the ranks by the tests of masked layers under ZeRO."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import efftrain_ds
from efftrain_ds.models import masked
from efftrain_ds.zero import access
from efftrain_ds.zero import request as rq
from efftrain_ds.zero.masks import ShardedMasks
from efftrain_ds.zero.skip import loss_scale
from tests.distributed.zero_jobs import dtype_of, same, weights

MICRO, GAS, WIDTH, CLIP, DECAY, LR = 4, 2, 21, 1.0, 0.05, 1e-3
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 13)
        self.fc2 = nn.Linear(13, WIDTH)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Odd sizes, so that fragments straddle the ranks; a convolution; a weight that stays dense (head)."""

    def __init__(self, depth: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.embed = nn.Linear(63, WIDTH, bias=False)
        self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(torch.relu(self.conv(x)).flatten(1))))


def draw(shape, seed: int, density: float = 0.5) -> torch.Tensor:
    numel = shape.numel()
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[: round(density * numel)]] = True
    return mask.view(shape)


def masked_net(gradient: str = "masked", seed: int = 0, depth: int = 2) -> Net:
    torch.manual_seed(3)
    model = Net(depth)
    chosen = {n: p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("head")}
    masks = {n: draw(p.shape, seed + i) for i, (n, p) in enumerate(chosen.items())}
    masked.mask_layers(model, masks, gradient)
    with torch.no_grad():
        for name, mask in masks.items():
            chosen[name].mul_(mask)
    return model


def groups_of(model: nn.Module) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY, "name": "decay"},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, "name": "no_decay"},
    ]


def make(
    stage: int,
    dtype: str,
    model: nn.Module,
    offload: bool = False,
    cpu_adam: bool = False,
    compiled: bool = False,
    autocast: bool = False,
    **zero,
):
    if offload:
        zero.update(OFFLOAD)
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": GAS,
        "train_batch_size": MICRO * GAS * dist.get_world_size(),
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": not cpu_adam}},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "efftrain": {"model": {"ema": {"decay": 0.9}}},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=groups_of(model), config=config, rebuildable=True)
    if compiled:
        engine.compile(backend="aot_eager")
    return engine


def full_state(engine) -> dict[str, torch.Tensor]:
    """Masters, moments and average of all parameters, whole, by "key/name"; one all-reduce for everything."""
    layout = access.layout_of(engine.deepspeed_engine)
    sources = {key: layout.tensors(key) for key in ["fp32", *layout.state_keys()]}
    sources["ema"] = engine.ema.shadow
    sizes = [shape.numel() for _ in sources for shape in layout.shapes.values()]
    whole = torch.zeros(sum(sizes))
    names = [f"{key}/{name}" for key in sources for name in layout.shapes]
    found = dict(zip(names, whole.split(sizes), strict=True))
    if not (layout.replicated and dist.get_rank() > 0):
        for key, tensors in sources.items():
            for part in layout.fragments:
                view = found[f"{key}/{part.name}"].narrow(0, part.start, part.length)
                view.copy_(layout.values(part, tensors))
    dist.all_reduce(whole)
    return {full: value.view(layout.shapes[full.split("/")[1]]) for full, value in found.items()}


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(MICRO, 3, 5, 5, generator=rng), torch.randint(0, 5, (MICRO,), generator=rng)


def whole_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [batch(step, m, r) for m in range(GAS) for r in range(dist.get_world_size())]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def forward_backward(engine, step: int) -> None:
    """All micro-batches of a step; the last one's ``engine.step()`` is left to the caller."""
    for micro in range(GAS):
        x, y = batch(step, micro, dist.get_rank())
        engine.backward(cross_entropy(engine(x.to(dtype_of(engine))).float(), y))
        if micro < GAS - 1:
            engine.step()


def plain_gradients(
    values: dict[str, torch.Tensor], depth: int, step: int, kind=torch.float32, scale: float = 1.0, autocast=False
) -> dict[str, torch.Tensor]:
    """Gradients of a plain module on one process: the concatenated batch, or in low precision each piece of it."""
    model = Net(depth)
    model.load_state_dict(values)
    pieces = [whole_batch(step)]
    if kind != torch.float32 or autocast:
        pieces = [batch(step, m, r) for m in range(GAS) for r in range(dist.get_world_size())]
    sums = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    model.to(kind)
    for x, y in pieces:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x.to(kind))
        (cross_entropy(out.float(), y) * scale).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.float() / (scale * len(pieces))
    return sums


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def decide(weight: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    """Drop the k smallest active entries, grow the k inactive ones of largest gradient."""
    flat = mask.clone().view(-1)
    drop = weight.abs().view(-1).masked_fill(~flat, torch.inf).argsort(stable=True)[:k]
    grow = gradient.abs().view(-1).masked_fill(flat, -1.0).argsort(descending=True, stable=True)[:k]
    flat[drop], flat[grow] = False, True
    return flat.view(mask.shape)


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def exact(engine) -> list[str]:
    """What is wrong with the zeros: masters, moments, average and working weights, whole."""
    problems, state, low = [], full_state(engine), weights(engine)
    masks = masked.masks_of(engine.module)
    for name, mask in masks.items():
        for key in {full.split("/")[0] for full in state}:
            if state[f"{key}/{name}"][~mask].count_nonzero():
                problems.append(f"{key}/{name}: not zero outside of the mask")
        missing = mask & (state[f"fp32/{name}"] == 0)
        if dtype_of(engine) != torch.float32:  # the gradient of an entry grown a moment ago may cancel to exactly 0
            missing &= state.get(f"exp_avg_sq/{name}", missing) != 0
        if missing.any():
            problems.append(f"fp32/{name}: {int(missing.sum())} zeros inside the mask")
        if low[name][~mask].count_nonzero():
            problems.append(f"working weight {name}: not zero outside of the mask")
    if ShardedMasks(engine).strays(masks):
        problems.append("strays")
    return problems


class Reference:
    """Masked AdamW with clipping in plain torch, on one process, with the concatenated batch."""

    def __init__(self, engine, depth: int = 2):
        self.model = Net(depth)
        self.model.load_state_dict({n[5:]: v for n, v in full_state(engine).items() if n.startswith("fp32/")})
        self.named = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(groups_of(self.model), lr=LR)

    def step(self, step: int, masks: dict[str, torch.Tensor]) -> float:
        self.optimizer.zero_grad()
        x, y = whole_batch(step)
        cross_entropy(self.model(x), y).backward()
        for name, mask in masks.items():
            self.named[name].grad.mul_(mask)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return float(norm)

    @torch.no_grad()
    def zero_(self, entries: dict[str, torch.Tensor]) -> None:
        for name, chosen in entries.items():
            state = self.optimizer.state[self.named[name]]
            for tensor in (self.named[name], state["exp_avg"], state["exp_avg_sq"]):
                tensor.masked_fill_(chosen, 0.0)


def cell_job(stage: int, dtype: str, extra: dict) -> dict:
    """Six steps with two topology updates; every contract is checked after each step."""
    from deepspeed.utils import safe_get_full_grad

    engine = make(stage, dtype, masked_net(), **extra)
    sharded, reference = ShardedMasks(engine), Reference(engine)
    found = {"problems": [], "capture": [], "to_engine": [], "scale": [], "norm": [], "wrote": [], "collectives": []}
    found["collectives_seen"] = 0
    for step in range(6):
        masks = masked.masks_of(engine.module)
        update = step in (2, 4)
        if update:
            masked.capture(engine.module, True)
        forward_backward(engine, step)
        if update:
            scale = loss_scale(engine)
            dense = masked.dense_gradients(engine.module, scale)
            masked.capture(engine.module, False)
            found["scale"].append(scale)
            start = {n: v for n, v in weights(engine).items()}
            plain = plain_gradients(start, 2, step, dtype_of(engine), scale, "autocast" in extra)
            for name, mask in masks.items():
                found["capture"].append(relative(dense[name], plain[name]))
                parameter = dict(engine.module.named_parameters())[name]
                own = parameter.grad if stage == 0 and dtype == "fp32" else safe_get_full_grad(parameter)
                if own is not None:
                    # an engine without a loss scaler in its getter returns the scaled one
                    factor = 1.0 / scale if dtype == "fp16" else 1.0
                    found["to_engine"].append(relative(dense[name] * mask, own.float() * factor))
                    found["problems"] += [f"{name}: engine's gradient"] * bool(own[~mask].count_nonzero())
        engine.step()
        norm = reference.step(step, masks)
        if engine.get_global_grad_norm() is not None:
            found["norm"].append(abs(float(engine.get_global_grad_norm()) - norm) / norm)
        found["problems"] += exact(engine)
        if update:
            full = sharded.magnitudes(list(masks))
            before, low = full_state(engine), weights(engine)
            found["problems"] += [n for n in masks if not torch.equal(full[n], before[f"fp32/{n}"])]
            new = {n: decide(full[n], dense[n], m, int(0.3 * m.sum())) for n, m in masks.items()}
            entries = {n: m ^ new[n] for n, m in masks.items()}
            with CountCollectives() as counter:
                sharded.zero_(entries)
                masked.set_masks(engine.module, new)
            found["collectives"] += counter.found
            with CountCollectives() as counter:
                sharded.magnitudes(list(masks))
            found["collectives_seen"] += len(counter.found)
            found["wrote"] += wrong_writes(engine, before, low, entries)
            reference.zero_(entries)
    end = full_state(engine)
    found["trajectory"] = max(float((end[f"fp32/{n}"] - p.detach()).abs().max()) for n, p in reference.named.items())
    found["moved"] = float((end["fp32/embed.weight"] - start["embed.weight"]).abs().max())
    engine.destroy()
    return found


def wrong_writes(engine, before: dict, low: dict, entries: dict) -> list[str]:
    """Masters, state, average and working weights that are not what they were with zeros at the entries."""
    after, low_after, wrong = full_state(engine), weights(engine), []
    for full, value in before.items():
        name = full.split("/")[1]
        want = value.masked_fill(entries[name], 0.0) if name in entries else value
        if not torch.equal(after[full], want):
            wrong.append(full)
    for name, value in low.items():
        want = value.masked_fill(entries[name], 0.0) if name in entries else value
        if not torch.equal(low_after[name], want):
            wrong.append(f"working/{name}")
    return wrong


def every_entry_job(stage: int, dtype: str) -> dict:
    """Single entries at the borders of fragments, one parameter at a time; then `apply` of other masks."""
    engine = make(stage, dtype, masked_net(seed=50))
    sharded = ShardedMasks(engine)
    for step in range(2):
        forward_backward(engine, step)
        engine.step()
    layout = access.layout_of(engine.deepspeed_engine)
    borders: list = [None] * dist.get_world_size()
    dist.all_gather_object(borders, [(f.name, f.start, f.start + f.length - 1) for f in layout.fragments])
    wrong = []
    split = {name for of_rank in borders for name, start, _ in of_rank if start > 0}
    for name, shape in layout.shapes.items():
        chosen = torch.zeros(shape.numel(), dtype=torch.bool)
        for border in (b for of_rank in borders for b in of_rank if b[0] == name):
            chosen[list(border[1:])] = True
        entries = {name: chosen.view(shape)}
        before, low = full_state(engine), weights(engine)
        sharded.zero_(entries)
        wrong += wrong_writes(engine, before, low, entries)
    masks = {n: draw(s, 70) for n, s in layout.shapes.items() if len(s) > 1}
    before, low = full_state(engine), weights(engine)
    sharded.apply(masks)
    wrong += wrong_writes(engine, before, low, {n: ~m for n, m in masks.items()})
    refused = []
    for entries in ({"nothing": torch.ones(1, dtype=torch.bool)}, {"head.weight": torch.ones(3, dtype=torch.bool)}):
        try:
            sharded.zero_(entries)
        except efftrain_ds.core.errors.EffTrainError as error:
            refused.append(str(error))
    values = sharded.magnitudes(["head.weight"])["head.weight"]
    forward_backward(engine, 2)
    engine.step()
    found = {
        "wrong": wrong,
        "split": sorted(split),
        "refused": refused,
        "magnitudes": torch.equal(values, before["fp32/head.weight"].masked_fill(~masks["head.weight"], 0.0)),
    }
    engine.destroy()
    return found


def dense_moments_job(stage: int, dtype: str) -> dict:
    """Dense gradients reach the optimizer; zeros are written after every step; against the same in plain torch."""
    engine = make(stage, dtype, masked_net("dense"))
    sharded, reference = ShardedMasks(engine), Reference(engine)
    problems = []
    for step in range(4):
        masks = masked.masks_of(engine.module)
        forward_backward(engine, step)
        engine.step()
        sharded.apply(masks, moments=False)
        reference.step(step, {})
        with torch.no_grad():
            for name, mask in masks.items():
                reference.named[name].mul_(mask)
        state = full_state(engine)
        for name, mask in masks.items():
            for key in ("fp32", "ema"):
                if state[f"{key}/{name}"][~mask].count_nonzero():
                    problems.append(f"{key}/{name}")
    warm = {n: float(state[f"exp_avg/{n}"][~m].count_nonzero() / (~m).sum()) for n, m in masks.items()}
    first = state["exp_avg/embed.weight"], reference.optimizer.state[reference.named["embed.weight"]]["exp_avg"]
    found = {
        "problems": problems,
        "warm": min(warm.values()),
        "strays": bool(sharded.strays(masks)),
        "weights_stray": bool(sharded.strays(masks, moments=False)),
        "trajectory": max(float((state[f"fp32/{n}"] - p.detach()).abs().max()) for n, p in reference.named.items()),
        "moment": relative(*first),
    }
    engine.destroy()
    return found


def doubled(origin: list[int], old: int) -> rq.RebuildRequest:
    """Block j of the new module comes from block origin[j], its masks too."""

    def surgery(model):
        blocks = list(model.blocks)
        model.blocks = nn.Sequential(*[copy.deepcopy(blocks[i]) for i in origin])
        return model

    block = masked_net().blocks[0]
    names = [n for n, _ in [*block.named_parameters(), *block.named_buffers()]]
    maps = {f"blocks.{j}.{n}": rq.copy(f"blocks.{i}.{n}") for j, i in enumerate(origin) for n in names}
    return rq.RebuildRequest(surgery, maps, frozenset(), reason="more blocks")


def rebuild_job(stage: int, dtype: str) -> dict:
    """Masks changed in the run, then a rebuild into more blocks: masks, zeros and capture go on."""
    engine = make(stage, dtype, masked_net())
    sharded = ShardedMasks(engine)
    for step in range(2):
        forward_backward(engine, step)
        engine.step()
    new = {n: draw(m.shape, 30 + i) for i, (n, m) in enumerate(masked.masks_of(engine.module).items())}
    sharded.apply(new)
    masked.set_masks(engine.module, new)
    before = full_state(engine)
    engine.rebuild(rq.RebuildRequest(reason="identity"))
    found = {
        "identity": same(before, full_state(engine)),
        "identity_masks": same(new, masked.masks_of(engine.module)),
    }
    engine.rebuild(doubled([0, 1, 1], 2))
    masks = masked.masks_of(engine.module)
    want = {**new, **{n.replace("blocks.1", "blocks.2"): m for n, m in new.items() if n.startswith("blocks.1")}}
    found["grown_masks"] = same(dict(sorted(want.items())), dict(sorted(masks.items())))
    found["strays"] = sharded.strays(masks)
    found["problems"] = []
    for step in range(2, 5):
        masked.capture(engine.module, step == 4)
        forward_backward(engine, step)
        if step == 4:
            dense = masked.dense_gradients(engine.module, loss_scale(engine))
            plain = plain_gradients(weights(engine), 3, step, dtype_of(engine))
            found["capture"] = max(relative(dense[n], plain[n]) for n in masks)
        engine.step()
        state = full_state(engine)
        found["problems"] += [
            f"{key}/{n}" for n, m in masks.items() for key in ("fp32", "exp_avg", "exp_avg_sq", "ema")
            if state[f"{key}/{n}"][~m].count_nonzero()
        ]  # fmt: skip
    engine.destroy()
    return found


def resume_job(folder: str, stage: int, dtype: str, other: int) -> dict:
    """Masks that changed in the run come back with a checkpoint, also on another stage, and training goes on."""
    engine = make(stage, dtype, masked_net())
    forward_backward(engine, 0)
    engine.step()
    new = {n: draw(m.shape, 90 + i) for i, (n, m) in enumerate(masked.masks_of(engine.module).items())}
    ShardedMasks(engine).apply(new)
    masked.set_masks(engine.module, new)
    engine.save_checkpoint(folder)
    forward_backward(engine, 1)
    engine.step()
    end = full_state(engine)
    engine.destroy()
    found = {}
    for key, target in (("same", stage), ("other", other)):
        again = make(target, dtype, masked_net(seed=7))
        again.load_checkpoint(folder)
        masks = {n: m.clone() for n, m in masked.masks_of(again.module).items()}
        forward_backward(again, 1)
        again.step()
        state = full_state(again)
        found[key] = {
            "masks": same(new, masks),
            "strays": ShardedMasks(again).strays(masks),
            "state": same(end, state),
            "error": max(float((end[n] - v).abs().max()) for n, v in state.items()),
        }
        again.destroy()
    return found


def partitioned_job(dtype: str) -> dict:
    """A module whose weights were partitioned while it was made; zeros are written into the engine's state."""
    import deepspeed

    torch.manual_seed(3)
    with deepspeed.zero.Init(dtype=torch.bfloat16 if dtype == "bf16" else torch.float32):
        model = Net()
    named = {n: access.full_shape(p) for n, p in model.named_parameters()}
    masks = {n: draw(shape, i) for i, (n, shape) in enumerate(named.items()) if n.endswith("fc1.weight")}
    masked.mask_layers(model, masks)
    engine = make(3, dtype, model)
    sharded = ShardedMasks(engine)
    found = {"before": bool(sharded.strays(masks))}
    sharded.apply(masks)
    found["problems"] = exact(engine)
    for step in range(2):
        forward_backward(engine, step)
        engine.step()
        found["problems"] += exact(engine)
    engine.destroy()
    return found


def hook_job(stage: int, dtype: str) -> dict:
    """The other mechanism, measured beside ours: hooks on the parameters of a plain module."""
    model = masked_net()
    masks = {n: m.clone() for n, m in masked.masks_of(model).items()}
    masked.unmask_layers(model)
    engine = make(stage, dtype, model)

    def put() -> None:
        for name, parameter in engine.module.named_parameters():
            if name in masks:
                parameter.register_hook(lambda g, m=masks[name]: torch.where(m, g, 0.0))

    put()
    for step in range(3):
        forward_backward(engine, step)
        engine.step()
    sharded = ShardedMasks(engine)
    found = {"held": not sharded.strays(masks)}
    engine.rebuild(rq.RebuildRequest(reason="identity"))
    forward_backward(engine, 3)
    engine.step()
    found["after_rebuild"] = not sharded.strays(masks)
    engine.destroy()
    return found
