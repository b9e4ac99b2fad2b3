"""Functions run on the ranks by the rebuild tests, and by the table of docs/rebuild.md."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.errors import EffTrainError, RebuildError
from efftrain_ds.core.method import Method
from efftrain_ds.core.timeline import Segment, Timeline
from efftrain_ds.zero import access
from efftrain_ds.zero import request as rq
from tests.distributed.zero_jobs import dtype_of, full_state, same, weights

WIDTH, HIDDEN = 33, 19


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x + self.fc2(self.drop(torch.tanh(self.fc1(self.norm(x)))))


BLOCK_NAMES = ("norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class Toy(nn.Module):
    """Odd sizes, dropout, buffers, a frozen tensor and (on request) a tied one."""

    def __init__(self, depth: int = 4, tied: bool = False):
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.shift = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 7)
        if tied:
            self.extra = nn.Linear(WIDTH, 7)
            self.extra.weight = self.head.weight

    def forward(self, x):
        x = self.blocks(self.embed(x) + self.shift)
        out = self.head(x)
        return out + self.extra(x) if hasattr(self, "extra") else out


def config_of(
    stage: int,
    dtype: str,
    gas: int = 1,
    optimizer: str = "torch",
    ema: bool = True,
    keep_old: bool = True,
    **zero,
) -> dict:
    world = dist.get_world_size()
    params = {"lr": 1e-2, "weight_decay": 0.05}
    if optimizer == "torch":
        params["torch_adam"] = True
    document = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "train_batch_size": 4 * gas * world,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "efftrain": {"model": {"ema": {"decay": 0.9}}} if ema else {},
    }
    document["efftrain"]["run"] = {"keep_old_state": keep_old}
    if dtype.startswith("bf16"):
        document["bf16"] = {"enabled": True}
    if dtype == "bf16_fp32":
        document["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "fp16":
        document["fp16"] = {"enabled": True, "initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 3}
    return document


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_PARAM = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def make(stage: int, dtype: str, *, depth: int = 4, tied: bool = False, grouped: bool = True, **extra):
    torch.manual_seed(3)
    model = Toy(depth, tied)
    rows = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": rows, "weight_decay": 0.05, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    engine, *_ = efftrain_ds.initialize(
        model=model,
        model_parameters=groups if grouped else model.parameters(),
        config=config_of(stage, dtype, **extra),
        rebuildable=True,
    )
    torch.manual_seed(100 + dist.get_rank())
    return engine


def train(engine, first: int, last: int) -> list:
    found = []
    for step in range(first, last):
        for micro in range(engine.gradient_accumulation_steps()):
            rng = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
            x, y = torch.randn(4, 5, generator=rng), torch.randint(0, 7, (4,), generator=rng)
            loss = nn.functional.cross_entropy(engine(x.to(dtype_of(engine))).float(), y)
            engine.backward(loss)
            engine.step()
            found.append(float(loss))
        norm = engine.get_global_grad_norm()
        found.append(float(norm) if norm is not None else None)
    return found


def buffers(engine) -> dict:
    return {n: b.float().clone() for n, b in engine.module.named_buffers()}


def outcome(engine) -> dict:
    return {
        "state": full_state(engine),
        "weights": weights(engine),
        "buffers": buffers(engine),
        "counters": access.counters(engine.deepspeed_engine),
        "scaler": access.scaler_state(engine.deepspeed_engine),
        "lr": engine.get_lr(),
        "updates": engine.ema.updates,
        "groups": [
            {k: v for k, v in g.items() if k != "params"}
            for g in access.layout_of(engine.deepspeed_engine).base.param_groups
        ],
        "steps": [access.layout_of(engine.deepspeed_engine).scalars(0)],
    }


def differing(a: dict, b: dict) -> list[str]:
    found = [f"{part}/{n}" for part in ("state", "weights", "buffers") for n in same(a[part], b[part])]
    return found + [part for part in a if part not in ("state", "weights", "buffers") and a[part] != b[part]]


def identity_job(stage: int, dtype: str, extra: dict) -> dict:
    """k steps, identity rebuild, k steps, against 2 k steps without it."""
    plain = make(stage, dtype, **extra)
    train(plain, 0, 4)
    middle = outcome(plain)
    expected = train(plain, 4, 8)
    end = outcome(plain)
    plain.destroy()
    engine = make(stage, dtype, **extra)
    train(engine, 0, 4)
    report = engine.rebuild(rq.RebuildRequest(reason="identity"))
    at_rebuild = outcome(engine)
    losses = train(engine, 4, 8)
    result = {
        "at_rebuild": differing(middle, at_rebuild),
        "losses": max((abs(a - b) for a, b in zip(expected, losses, strict=True) if a is not None), default=0.0),
        "end": differing(end, outcome(engine)),
        "end_error": max(float((end["state"][k] - v).abs().max()) for k, v in full_state(engine).items()),
        "seconds": report.seconds,
        "skipped": end["counters"]["skipped_steps"],
        "scale": end["scaler"],
    }
    engine.destroy()
    return result


def grow(old: int, new: int, origin: list[int], zero_moments: tuple[int, ...] = ()) -> rq.RebuildRequest:
    """Block j of the new module comes from block origin[j]."""

    def surgery(model):
        blocks = list(model.blocks)
        model.blocks = nn.Sequential(*[copy.deepcopy(blocks[i]) for i in origin])
        return model

    names = [*BLOCK_NAMES, "seen"]
    maps = {
        f"blocks.{j}.{n}": rq.ParameterMap((rq.Piece(f"blocks.{i}.{n}"),), moments=j not in zero_moments)
        for j, i in enumerate(origin)
        for n in names
    }
    drops = frozenset(f"blocks.{i}.{n}" for i in range(old) if i not in origin for n in names)
    return rq.RebuildRequest(surgery, maps, drops, reason=f"{old} -> {new} blocks")


def change_job(stage: int, dtype: str, what: str, extra: dict) -> dict:
    """A change of the model against an oracle written with plain indexing, and five more steps."""
    depth = 6 if what == "shrink" else 4
    engine = make(stage, dtype, depth=depth, **extra)
    at = 8 if dtype == "fp16" else 3  # its first steps overflow, so there would be no moments to carry
    train(engine, 0, at)
    before = full_state(engine)
    frozen = weights(engine)["shift"]
    if what == "grow":
        origin = [0, 1, 2, 2, 3, 3]
        request = grow(4, 6, origin, zero_moments=(3,))
    elif what == "shrink":
        origin = [0, 2, 3, 5]
        request = grow(6, 4, origin)
    else:
        request, origin = widen(), [0, 1, 2, 3]
    engine.rebuild(request)
    after = full_state(engine)
    wrong = []
    for full_name, value in after.items():
        key, name = full_name.split("/")
        want = oracle(key, name, before, origin, what)
        if not torch.equal(value, want):
            wrong.append(full_name)
    low, layout = weights(engine), access.layout_of(engine.deepspeed_engine)
    cast = [
        n for n, s in layout.shapes.items() if not torch.equal(low[n], after[f"fp32/{n}"].to(dtype_of(engine)).float())
    ]
    getter = []
    for name, p in engine.module.named_parameters():
        if p.requires_grad and stage > 0:
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(p)
            if not torch.equal(value.float().cpu(), after[f"fp32/{name}"]):
                getter.append(name)
    steps = {
        g["name"]: layout.scalars(i).get("step")
        for i, g in enumerate(layout.base.param_groups)
        if i < len(layout.flats)
    }
    losses = train(engine, at, at + 5)
    result = {
        "at": at,
        "wrong": wrong,
        "cast": cast,
        "getter": getter,
        "keys": sorted({n.split("/")[0] for n in after}),
        "names": len({n.split("/")[1] for n in after}) == len(layout.shapes),
        "frozen": torch.equal(low["shift"], frozen),
        "groups": [g["name"] for g in layout.base.param_groups],
        "steps": steps,
        "losses": losses,
        "history": engine.rebuilds,
        "moved": len(same(after, full_state(engine))),
    }
    engine.destroy()
    return result


def oracle(key, name, before, origin, what):
    if what == "widen" and ".fc" in name:
        old = before[f"{key}/{name}"]
        twice = [*range(HIDDEN), 0, 1]
        copies = torch.ones(HIDDEN)
        copies[:2] = 2
        if name.endswith(("fc1.weight", "fc1.bias")):
            factor = {"fp32": 1.0, "ema": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}[key]
            grown = old[twice].clone()
            for row in (0, 1, HIDDEN, HIDDEN + 1):
                grown[row] *= factor
            return grown
        if name.endswith("fc2.weight"):
            factor = 0.5 if key in ("fp32", "ema") else 1.0
            grown = old[:, twice].clone()
            for column in (0, 1, HIDDEN, HIDDEN + 1):
                grown[:, column] *= factor
            return grown
        return old
    if not name.startswith("blocks."):
        return before[f"{key}/{name}"]
    _, j, rest = name.split(".", 2)
    value = before[f"{key}/blocks.{origin[int(j)]}.{rest}"]
    if what == "grow" and int(j) == 3 and key.startswith("exp"):
        return torch.zeros_like(value)
    return value


def widen() -> rq.RebuildRequest:
    """Net2Net: two hidden units of every block are doubled, their outgoing weights halved."""
    doubled = [0, 1]
    plain = list(range(2, HIDDEN))

    def surgery(model):
        for block in model.blocks:
            for layer, shape in ((block.fc1, (HIDDEN + 2, WIDTH)), (block.fc2, (WIDTH, HIDDEN + 2))):
                layer.weight = nn.Parameter(torch.empty(shape, device="meta"))
            block.fc1.bias = nn.Parameter(torch.empty(HIDDEN + 2, device="meta"))
        return model

    moments = {"exp_avg": 0.5, "exp_avg_sq": 0.25}
    new = [HIDDEN, HIDDEN + 1]
    maps = {}
    for i in range(4):
        for name in (f"blocks.{i}.fc1.weight", f"blocks.{i}.fc1.bias"):
            maps[name] = rq.ParameterMap(
                (
                    rq.Piece(name, {0: plain}, {0: plain}),
                    rq.Piece(name, {0: doubled}, {0: doubled}, moments),
                    rq.Piece(name, {0: doubled}, {0: new}, moments),
                )
            )
        name = f"blocks.{i}.fc2.weight"
        maps[name] = rq.ParameterMap(
            (
                rq.Piece(name, {1: plain}, {1: plain}),
                rq.Piece(name, {1: doubled}, {1: doubled}, {"fp32": 0.5}),
                rq.Piece(name, {1: doubled}, {1: new}, {"fp32": 0.5}),
            )
        )
    return rq.RebuildRequest(surgery, maps, reason="wider")


def rollback_job(stage: int, dtype: str, where: str) -> dict:
    """Failures after the teardown: the old state comes back, to the bit, and the run goes on as if nothing was."""
    plain = make(stage, dtype)
    train(plain, 0, 3)
    expected = train(plain, 3, 6)
    end = outcome(plain)
    plain.destroy()
    engine = make(stage, dtype)
    train(engine, 0, 3)
    before = outcome(engine)
    told = Told()
    engine.methods.append(told)
    rebuilder = engine.rebuilder
    working = rebuilder._create
    calls = []

    def failing(module, groups):
        calls.append(0)
        if where == "create" and len(calls) == 1:
            raise MemoryError("no memory (a test)")
        made = working(module, groups)
        if len(calls) == 1 and (where == "after create" or (where == "one rank" and dist.get_rank() == 1)):
            raise MemoryError("no memory (a test)")
        return made

    rebuilder._create = failing
    from efftrain_ds.zero import exchange

    original, moves = exchange.Exchange.move, []
    if where == "restore":

        def failing_move(self, key, *args, **kwargs):
            moves.append(key)
            if len(moves) == 3:
                raise MemoryError("no memory (a test)")
            return original(self, key, *args, **kwargs)

        exchange.Exchange.move = failing_move
    text = ""
    try:
        engine.rebuild(grow(4, 6, [0, 1, 2, 2, 3, 3]))
    except RebuildError as error:
        text = str(error)
    finally:
        exchange.Exchange.move = original
        rebuilder._create = working
    restored = differing(before, outcome(engine))
    known = told.engines == [id(engine.deepspeed_engine)]
    losses = train(engine, 3, 6)
    later = differing(end, outcome(engine))
    engine.rebuild(grow(4, 6, [0, 1, 2, 2, 3, 3]))  # the next attempt works
    result = {"text": text, "restored": restored, "losses": losses == expected, "end": later}
    result["blocks"], result["history"] = len(engine.module.blocks), len(engine.rebuilds)
    result["told"] = known and told.engines[1:] == [id(engine.deepspeed_engine)]
    engine.destroy()
    return result


class Told(Method):
    """Hears of new engines."""

    name = "told"

    def __init__(self):
        super().__init__(None)
        self.engines = []

    def on_rebuilt(self, ctx):
        self.engines.append(id(ctx.engine.deepspeed_engine))


def leak_job(stage: int, times: int) -> dict:
    """Nothing of a replaced engine may stay alive."""
    engine = make(stage, "bf16")
    train(engine, 0, 2)
    alive, hooks, groups = [], [], []
    for n in range(times):
        layout = access.layout_of(engine.deepspeed_engine)
        references = [
            weakref.ref(engine.deepspeed_engine),
            weakref.ref(engine.optimizer),
            weakref.ref(engine.module),
            *[weakref.ref(p) for p in engine.module.parameters()],
            *[weakref.ref(f.master) for f in layout.flats],
        ]
        del layout
        engine.rebuild(grow(4, 4, [0, 1, 2, 3]))
        train(engine, 2 + n, 3 + n)
        gc.collect()
        alive.append(sum(r() is not None for r in references))
        hooks.append(
            sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                for m in engine.module.modules()
            )
        )
        groups.append(len(torch.distributed.distributed_c10d._world.pg_map))
    engine.destroy()
    return {"alive": alive, "hooks": hooks, "groups": groups}


def negative_job(what: str) -> dict:
    """Losing one carried item must break the equality of the identity test."""
    dtype = "fp16" if what == "scaler" else "bf16"
    plain = make(2, dtype)
    train(plain, 0, 4)
    expected = train(plain, 4, 8)
    end = outcome(plain)
    plain.destroy()
    engine = make(2, dtype)
    train(engine, 0, 4)
    engine.rebuild(rq.RebuildRequest())
    inner = engine.deepspeed_engine
    layout = access.layout_of(inner)
    if what == "moments":
        for key in layout.state_keys():
            for tensor in layout.tensors(key):
                tensor.zero_()
    elif what == "element":
        for fragment in layout.fragments[:1]:
            layout.values(fragment, layout.tensors("exp_avg"))[0] += 1e-6
    elif what == "step":
        for number in range(len(layout.flats)):
            layout.set_scalars(number, {"step": 0.0})
    elif what == "master bits":
        for flat in layout.flats:
            flat.master.data.copy_(flat.master.data.bfloat16().float())
    elif what == "weight decay":
        layout.base.param_groups[0]["weight_decay"] = 0.0
    elif what == "lr":
        for group in layout.base.param_groups:
            group["lr"] *= 1.001
    elif what == "scheduler":
        inner.lr_scheduler.last_batch_iteration = 0
    elif what == "rng":
        torch.manual_seed(1)
    elif what == "counters":
        inner.global_steps = 0
    elif what == "scaler":
        access.load_scaler_state(inner, {"cur_scale": 2.0})
    losses = train(engine, 4, 8)
    result = {"losses": losses == expected, "end": differing(end, outcome(engine))}
    engine.destroy()
    return result


def unfreeze_job(stage: int, dtype: str) -> dict:
    """A frozen tensor becomes trainable, a trainable one frozen."""
    engine = make(stage, dtype)
    train(engine, 0, 3)
    before, low = full_state(engine), weights(engine)

    def surgery(model):
        model.shift.requires_grad_(True)
        model.embed.bias.requires_grad_(False)
        return model

    engine.rebuild(rq.RebuildRequest(surgery, reason="unfreeze"))
    after = full_state(engine)
    layout = access.layout_of(engine.deepspeed_engine)
    carried = [k for k in before if k in after and not torch.equal(before[k], after[k])]
    shift = torch.equal(after["fp32/shift"], low["shift"])
    moments = all(not after[f"{k}/shift"].any() for k in ("exp_avg", "exp_avg_sq"))
    kept = weights(engine)["embed.bias"]
    train(engine, 3, 5)
    now, full = weights(engine), full_state(engine)

    def again(model):
        model.shift.requires_grad_(False)
        model.embed.bias.requires_grad_(True)
        return model

    engine.rebuild(rq.RebuildRequest(again, reason="freeze again"))
    back, end = weights(engine), full_state(engine)
    back_layout = access.layout_of(engine.deepspeed_engine)
    train(engine, 5, 7)
    last = weights(engine)
    result = {
        "back": torch.equal(back["shift"], now["shift"]) and "fp32/shift" not in end,
        "back_bias": torch.equal(end["fp32/embed.bias"], kept) and not end["exp_avg/embed.bias"].any(),
        "back_groups": [g["name"] for g in back_layout.base.param_groups],
        "back_carried": [k for k in full if k in end and not torch.equal(full[k], end[k])],
        "back_moves": torch.equal(last["shift"], now["shift"]) and not torch.equal(last["embed.bias"], kept),
        "carried": carried,
        "shift": shift,
        "moments": moments,
        "gone": "fp32/embed.bias" not in after,
        "groups": [g["name"] for g in layout.base.param_groups],
        "moves": not torch.equal(now["shift"], low["shift"]),
        "stays": torch.equal(now["embed.bias"], kept) and torch.equal(kept, low["embed.bias"]),
    }
    engine.destroy()
    return result


def hooks_job() -> dict:
    """A user's hook, the returned optimizer and the average survive; two requests are one rebuild."""
    engine = make(1, "fp32")
    calls = []
    engine.module.head.register_forward_hook(lambda *a: calls.append(1))
    train(engine, 0, 2)
    engine.rebuild(rq.compose_requests(grow(4, 6, [0, 1, 2, 2, 3, 3]), grow(6, 5, [0, 1, 2, 4, 5])))
    state = full_state(engine)
    train(engine, 2, 4)
    result = {"calls": len(calls), "blocks": len(engine.module.blocks), "rebuilds": len(engine.rebuilds)}
    result["keys"] = sorted({k.split("/")[0] for k in state})
    engine.destroy()
    return result


def compose_job(stage: int, dtype: str, pair: str) -> dict:
    """Two requests at one boundary against the same two one after the other."""
    found = []
    for combined in (True, False):
        engine = make(stage, dtype, depth=4)
        train(engine, 0, 3)
        first, second = PAIRS[pair]()
        if combined:
            engine.rebuild(rq.compose_requests(first, second))
        else:
            engine.rebuild(first)
            engine.rebuild(second)
        at = outcome(engine)
        found.append((at, train(engine, 3, 6), outcome(engine), len(engine.rebuilds)))
        engine.destroy()
    (a, a_losses, a_end, a_count), (b, b_losses, b_end, b_count) = found
    return {
        "at": differing(a, b),
        "losses": a_losses == b_losses,
        "end": differing(a_end, b_end),
        "rebuilds": (a_count, b_count),
    }


def uniform(shape, generator):
    return torch.rand(shape, generator=generator)


def fresh_block(position: int) -> rq.RebuildRequest:
    """A new block with drawn values at the end (behind `position` blocks)."""

    def surgery(model):
        model.blocks.append(copy.deepcopy(model.blocks[0]))
        return model

    maps = {f"blocks.{position}.{n}": rq.fresh(uniform) for n in BLOCK_NAMES}
    return rq.RebuildRequest(surgery, {**maps, f"blocks.{position}.seen": rq.zeros()}, reason="a fresh block")


PAIRS = {
    "grow, shrink": lambda: (grow(4, 6, [0, 1, 2, 2, 3, 3]), grow(6, 4, [0, 1, 4, 5])),
    "newcomers, renumber": lambda: (grow(4, 6, [0, 1, 2, 2, 3, 3], (3,)), grow(6, 5, [0, 3, 2, 4, 5])),
    "fresh, renumber": lambda: (fresh_block(4), grow(5, 4, [4, 0, 3, 1])),
    "widen, grow": lambda: (widen(), grow(4, 6, [0, 1, 2, 2, 3, 3])),
    "grow, widen": lambda: (grow(4, 4, [3, 2, 1, 0]), widen()),
}


def birth_job(stage: int) -> dict:
    """First update of newcomers in their own group, relative to lr (weight decay off)."""
    engine = make(stage, "fp32")
    train(engine, 0, 40)
    engine.rebuild(grow(4, 5, [0, 1, 2, 3, 3], zero_moments=(4,)))
    before = full_state(engine)["fp32/blocks.4.fc1.bias"]
    train(engine, 40, 41)
    after = full_state(engine)["fp32/blocks.4.fc1.bias"]
    ratio = ((after - before).abs() / 1e-2).median()
    engine.destroy()
    return {"ratio": float(ratio)}


class Growing(Method):
    """A method of one's own: four blocks become six at step `grow_at`."""

    name = "sixth_sense"
    changes_parameters = True

    def __init__(self, grow_at: int = 3, steps: int = 12):
        super().__init__(None)
        self.grow_at, self.steps, self.depth, self.rebuilt = grow_at, steps, 4, 0

    def plan(self, spec):
        edge = self.grow_at / self.steps
        return Timeline((Segment(0.0, edge, {"blocks": 4}), Segment(edge, 1.0, {"blocks": 6})))

    def on_stage_enter(self, ctx, stage):
        if stage.settings["blocks"] == self.depth:
            return None
        self.depth = 6
        return grow(4, 6, [0, 1, 2, 2, 3, 3], zero_moments=(3,))

    def on_rebuilt(self, ctx):
        self.rebuilt += 1

    def architecture(self):
        return {"depth": self.depth}

    def shape_model(self, model, architecture):
        self.depth = architecture["depth"]
        while len(model.blocks) < self.depth:
            model.blocks.append(copy.deepcopy(model.blocks[0]))
        return model


def make_growing(stage: int, dtype: str, **extra):
    torch.manual_seed(3)
    model = Toy(4)
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1], "name": "decay"},
        {
            "params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1],
            "weight_decay": 0.0,
            "name": "rest",
        },
    ]
    config = config_of(stage, dtype, **extra)
    config["efftrain"] = {
        "model": {"ema": {"decay": 0.9}},
        "run": {"steps": 12},
        "data": {"resolution": 32, "stride": 4},
    }
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=groups, config=config, methods=[Growing()])
    torch.manual_seed(100 + dist.get_rank())
    return engine


def save_grown_job(folder: str, stage: int, dtype: str) -> dict:
    """Six steps with a growth at the third, saved after the fifth; the checkpoint's state and what follows."""
    engine = make_growing(stage, dtype)
    train(engine, 0, 5)
    engine.save_checkpoint(folder)
    saved = outcome(engine)
    losses = train(engine, 5, 8)
    result = {"saved": saved, "losses": losses, "end": outcome(engine), "history": list(engine.rebuilds)}
    engine.destroy()
    return result


def load_grown_job(folder: str, stage: int, dtype: str) -> dict:
    """An engine that starts with four blocks loads the grown checkpoint and goes on."""
    engine = make_growing(stage, dtype)
    engine.load_checkpoint(folder)
    loaded = outcome(engine)
    losses = train(engine, 5, 8)
    result = {
        "saved": loaded,
        "losses": losses,
        "end": outcome(engine),
        "history": list(engine.rebuilds),
        "rebuilt": engine.methods[0].rebuilt,
        "depth": len(engine.module.blocks),
        "groups": [g["name"] for g in access.layout_of(engine.deepspeed_engine).base.param_groups],
    }
    engine.destroy()
    return result


def wrong_grown_job(folder: str) -> dict:
    """A model of another width refuses the grown checkpoint, whatever its method says."""
    global WIDTH
    WIDTH = 21
    try:
        engine = make_growing(1, "fp32")
        before = outcome(engine)
        try:
            engine.load_checkpoint(folder)
            text = "loaded"
        except EffTrainError as error:
            text = str(error)
        result = {"text": text, "untouched": not differing(before, outcome(engine))}
        engine.destroy()
    finally:
        WIDTH = 33
    return result


def many_job(stage: int, times: int) -> dict:
    """Resident memory, open files and process groups over many rebuilds."""
    engine = make(stage, "bf16")
    train(engine, 0, 1)
    resident, files, groups = [], [], []
    for number in range(times):
        engine.rebuild(grow(4, 4, [0, 1, 2, 3]))
        train(engine, 1 + number, 2 + number)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))
        groups.append(len(torch.distributed.distributed_c10d._world.pg_map))
    engine.destroy()
    return {"resident": resident, "files": files, "groups": groups}
