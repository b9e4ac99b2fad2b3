"""Functions run on the ranks by the S2ViTE tests."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, gelu

import efftrain_ds
from efftrain_ds.methods.svite import s2vite_slots as slots
from efftrain_ds.methods.svite.s2vite import S2ViTE
from efftrain_ds.models.units import compact_, units_of
from efftrain_ds.zero import access
from tests.distributed.svite_jobs import CLIP, DECAY, LR, config_of, one_step, samples, vit
from tests.distributed.zero_jobs import dtype_of, full_state, same, weights

HALF = {"heads": 0.5, "neurons": 0.5, "update_every": "2st", "end": 1.0}


def start(stage: int, dtype: str, method: dict, steps: int, gas: int = 1, ema: bool = True, **kwargs):
    model = kwargs.pop("model", None) or vit()
    config = config_of(stage, dtype, None, steps, gas, ema)
    if kwargs.pop("offload", False):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    config["efftrain"]["methods"] = {"s2vite": {**HALF, **method}, **kwargs.pop("others", {})}
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config, **kwargs)
    return engine


def method_of(engine) -> S2ViTE:
    return next(m for m in engine.methods if m.name == "s2vite")


def favour_dead_heads(engine) -> None:
    """Let heads move at every update; by their scores the ones dropped often come back."""
    units = method_of(engine).units
    decide = units.decide

    def decided(prune, grow, *rest):
        for block in grow:
            grow[block]["heads"][units.dead(block)["heads"]] += 1e6
        return decide(prune, grow, *rest)

    units.decide = decided


def plain_model(engine, state: dict[str, torch.Tensor], key: str = "fp32") -> nn.Module:
    """The engine's compact model in plain torch, with masters (or the average)."""
    model = vit()
    if method_of(engine).config.revive:
        counts = method_of(engine).units.counts()
        compact_(model, {b: (list(range(of["heads"])), list(range(of["neurons"]))) for b, of in counts.items()})
    model.load_state_dict({n[len(key) + 1 :]: v for n, v in state.items() if n.startswith(f"{key}/")})
    return model.eval()


def kind_of(name: str) -> str:
    return "heads" if ".attn." in name else "neurons"


def entries(block: str, name: str, units, chosen) -> tuple[int, torch.Tensor] | None:
    """(dimension, indices) of some slots in one parameter, written out once more; None where it has none."""
    d = units.head_dim
    rows = [units.heads * d * p + h * d + i for p in range(3) for h in chosen for i in range(d)]
    found = {
        "attn.qkv.weight": (0, rows),
        "attn.qkv.bias": (0, rows),
        "attn.proj.weight": (1, [h * d + i for h in chosen for i in range(d)]),
        "mlp.fc1.weight": (0, list(chosen)),
        "mlp.fc1.bias": (0, list(chosen)),
        "mlp.fc2.weight": (1, list(chosen)),
    }.get(name.removeprefix(block + "."))
    return found and (found[0], torch.tensor(found[1], dtype=torch.long))


def grown_values(name: str, full, unit: int, step: int, block: str) -> torch.Tensor:
    """What a unit that begins to live has in one parameter."""
    part, d = name.removeprefix(block + "."), full.head_dim
    if part.startswith("attn"):
        drawn = slots.head_draws(full.heads, d, full.width, 5, step, block)
        return {
            "attn.qkv.weight": torch.cat([*drawn.query_key[unit], torch.zeros(d, full.width)]),
            "attn.qkv.bias": torch.zeros(3 * d),
            "attn.proj.weight": drawn.proj[unit],
        }[part]
    return {
        "mlp.fc1.weight": slots.neuron_draws(full.neurons, full.width, 5, step, block)[unit][None],
        "mlp.fc1.bias": torch.zeros(1),
        "mlp.fc2.weight": torch.zeros(full.width, 1),
    }[part]


def watch_writes(engine, found: dict) -> None:
    """Check every update of a compact model: what is written where, nothing else, and the function."""
    method = method_of(engine)
    write = method._write

    def checked(ctx, done):
        before, low = full_state(engine), weights(engine)
        write(ctx, done)
        after, low_after = full_state(engine), weights(engine)
        now = units_of(engine.module)
        without = {key: value.clone() for key, value in before.items()}
        for full, value in before.items():
            key, name = full.split("/")
            want, block = value.clone(), ".".join(name.split(".")[:2])
            exchange = done[block][kind_of(name)] if block in done else None
            for slot in exchange.written if exchange is not None else ():
                place = entries(block, name, now[block], [slot])
                if place is None:
                    continue
                without[full].index_fill_(*place, 0.0)
                if key in ("fp32", "ema"):
                    values = grown_values(name, method.units.full[block], exchange.slots[slot], ctx.step, block)
                    want.index_copy_(*place, values)
                else:
                    want.index_fill_(*place, 0.0)
            if not torch.equal(after[full], want):
                found["problems"].append(f"{ctx.step} {full}: not what an update writes")
        for name, value in low_after.items():
            touched = after[f"fp32/{name}"] != before[f"fp32/{name}"]
            want = torch.where(touched, after[f"fp32/{name}"].to(dtype_of(engine)).float(), low[name])
            if not torch.equal(value, want):
                found["problems"].append(f"{ctx.step} working/{name}")
        images, labels = samples(99)
        with torch.no_grad():
            losses = [
                float(cross_entropy(plain_model(engine, state)(images), labels)) for state in (before, without, after)
            ]
        found["losses_around"].append(losses)
        found["written"] += sum(len(e.written) for of in done.values() for e in of.values())

    method._write = checked


def run_job(stage: int, dtype: str, method: dict, steps: int = 8, gas: int = 1, how: str = "") -> dict:
    """Whole short run with every update checked."""
    engine = start(stage, dtype, method, steps, gas, offload=how == "offload")
    if how == "compile":
        engine.compile(backend="aot_eager")
    unit = method_of(engine)
    records, losses, digests, counts = [], [], [], []
    engine.context.record = lambda event, **data: records.append((event, data))
    found = {"problems": [], "losses_around": [], "written": 0}
    watch_writes(engine, found)
    favour_dead_heads(engine)
    first = unit.units.slots
    for step in range(steps):
        losses.append(one_step(engine, step, gas))
        counts.append(unit.units.counts())
        digests.append(unit.decision(engine.context))
        seen = {b: {"heads": u.heads, "neurons": u.neurons} for b, u in units_of(engine.module).items()}
        if seen != counts[-1]:
            found["problems"].append(f"{step}: {seen} slots for {counts[-1]} units")
    layout = access.layout_of(engine.deepspeed_engine)
    elements = torch.tensor([sum(f.length for f in layout.fragments), sum(f.master.numel() for f in layout.flats)])
    if not layout.replicated:
        dist.all_reduce(elements)
    found |= {
        "losses": losses,
        "digests": digests,
        "counts_constant": all(c == counts[0] for c in counts),
        "counts": counts[0],
        "updates": unit.updates,
        "events": [event for event, _ in records],
        "last": records[-1][1],
        "scalars": unit.scalars(engine.context),
        "moved": sum(
            len(set(first[b][k]) - set(u)) for b, of in unit.units.slots.items() for k, u in of.items()
        ),
        "elements": elements.tolist(),
        "keys": layout.state_keys(),
        "parameters": sum(shape.numel() for shape in layout.shapes.values()),
        "pictures": {name: list(p.shape) for name, p in unit.pictures(engine.context).items()},
    }  # fmt: skip
    engine.destroy()
    return found


class Reference:
    """The same training in plain torch on one process with the concatenated batch; scores by autograd alone."""

    def __init__(self, first: dict, schedule, full: dict, exclude: bool, seed: int = 5):
        self.model, self.schedule, self.full, self.exclude, self.seed = vit(), schedule, full, exclude, seed
        self.slots = {b: {k: list(u) for k, u in of.items()} for b, of in first.items()}
        compact_(self.model, {b: (of["heads"], of["neurons"]) for b, of in self.slots.items()})
        self.named = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=DECAY)

    def step(self, step: int) -> None:
        images, labels = samples(step)
        kept, hooks = {}, []
        for block in self.slots:
            attn, mlp = self.model.get_submodule(block + ".attn"), self.model.get_submodule(block + ".mlp")

            def hook(module, args, output, block=block, what=""):
                output.retain_grad()
                kept[block, what] = (args[0], output)

            for what, module in (("proj", attn.proj), ("fc1", mlp.fc1), ("fc2", mlp.fc2)):
                hooks.append(module.register_forward_hook(lambda m, a, o, w=what, h=hook: h(m, a, o, what=w)))
        self.optimizer.zero_grad()
        cross_entropy(self.model(images), labels).backward()
        for handle in hooks:
            handle.remove()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        scored = {b: self._scores(step, b, kept) for b in self.slots} if self.schedule.is_update(step) else {}
        self.optimizer.step()
        for block, found in scored.items():
            for kind in ("heads", "neurons"):
                self._update(step, block, kind, *found[kind])

    @torch.no_grad()
    def _scores(self, step: int, block: str, kept: dict) -> dict:
        full = self.full[block]
        (a, out), (x, _), (hidden, last) = (kept[block, what] for what in ("proj", "fc1", "fc2"))
        weight = self.named[f"{block}.attn.proj.weight"]
        gamma = (out.grad @ weight).unflatten(-1, (-1, full.head_dim))
        prune = (a.unflatten(-1, (-1, full.head_dim)) * gamma).sum((1, 3)).abs().mean(0)
        drawn = slots.head_draws(full.heads, full.head_dim, full.width, self.seed, step, block)
        grow = torch.stack([(out.grad @ drawn.proj[h]).abs().sum((1, 2)).mean() for h in range(full.heads)])
        live = self.slots[block]["heads"]
        grow[live] = gamma.abs().sum((1, 3)).mean(0)
        rows = slots.neuron_draws(full.neurons, full.width, self.seed, step, block)
        z = last.grad.flatten(0, 1)
        neurons = (z.T @ gelu(x.flatten(0, 1) @ rows.T)).abs().sum(0)
        neurons[self.slots[block]["neurons"]] = (z.T @ hidden.flatten(0, 1)).abs().sum(0)
        return {"heads": (prune, grow), "neurons": (None, neurons)}

    @torch.no_grad()
    def _update(self, step: int, block: str, kind: str, prune, grow) -> None:
        full, live = self.full[block], self.slots[block][kind]
        if prune is None:
            names = (f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.weight")
            prune = self.named[names[0]].abs().sum(1) + self.named[names[1]].abs().sum(0)
        k = -int(-self.schedule.fraction(step) * len(live) // 1)
        order = sorted(range(len(live)), key=lambda i: (float(prune[i]), live[i]))
        dropped = {live[i] for i in order[:k]}
        kept = set(live) - dropped
        candidates = [u for u in range(grow.numel()) if u not in (set(live) if self.exclude else kept)]
        chosen = set(sorted(candidates, key=lambda u: (-float(grow[u]), u))[:k])
        fresh = iter(sorted(chosen - dropped))
        units = units_of(self.model)[block]
        for slot, unit in enumerate(live):
            if unit in dropped - chosen:
                live[slot] = next(fresh)
                for name, parameter in self.named.items():
                    mine = name.startswith(block + ".") and kind_of(name) == kind
                    place = entries(block, name, units, [slot]) if mine else None
                    if place is None:
                        continue
                    parameter.index_copy_(*place, grown_values(name, full, live[slot], step, block))
                    for moment in ("exp_avg", "exp_avg_sq"):
                        self.optimizer.state[parameter][moment].index_fill_(*place, 0.0)


def reference_job(stage: int, gas: int, updates: int, exclude: bool) -> dict:
    """Units after every update against those of one process; weights at the end."""
    steps = 2 * updates + 2
    engine = start(stage, "fp32", {"initial": 0.4, "exclude_just_dropped": exclude}, steps, gas)
    method, plain, wrong = method_of(engine), None, []
    history = [method.units.slots]
    for step in range(steps):
        one_step(engine, step, gas)
        if plain is None:
            plain = Reference(history[0], method.schedule, method.units.full, exclude)
        plain.step(step)
        for block, of in method.units.slots.items():
            wrong += [f"{step} {block} {k}" for k, u in of.items() if list(u) != plain.slots[block][k]]
        history.append(method.units.slots)
    state = full_state(engine)
    found = {
        "wrong": wrong,
        "updates": method.updates,
        "moved": {
            kind: sum(a[b][kind] != c[b][kind] for a, c in pairwise(history) for b in a) for kind in slots.KINDS
        },
        "error": max(float((state[f"fp32/{n}"] - p.detach()).abs().max()) for n, p in plain.named.items()),
        "digest": method.units.digest(),
    }  # fmt: skip
    engine.destroy()
    return found


def resume_job(folder: str, stage: int, dtype: str, method: dict, stop: int, steps: int, to: int | None = None) -> dict:
    """A run without a break against one that is saved at `stop` and goes on in a new engine with other first units."""
    whole = start(stage, dtype, method, steps)
    for step in range(steps):
        one_step(whole, step)
    want, state = full_state(whole), method_of(whole).state_dict()
    scalars, digest = method_of(whole).scalars(whole.context), method_of(whole).decision(whole.context)
    whole.destroy()
    first = start(stage, dtype, method, steps)
    for step in range(stop):
        one_step(first, step)
    first.save_checkpoint(folder)
    first.destroy()
    second = start(stage if to is None else to, dtype, {**method, "seed": 99}, steps)
    other = method_of(second).units.digest()
    second.load_checkpoint(folder)
    method_of(second).config = method_of(second).config.model_copy(update={"seed": None})
    for step in range(stop, steps):
        one_step(second, step)
    again = method_of(second)
    end = full_state(second)
    found = {
        "state": same(want, end),
        "gap": max(float((end[n] - v).abs().max()) for n, v in want.items()) if want.keys() == end.keys() else None,
        "units": all(
            torch.equal(again.state_dict()[what][b][k], u)
            for what in ("slots", "before")
            for b, of in state[what].items()
            for k, u in of.items()
        ),
        "union": all(
            torch.equal(again.state_dict()["union"][b][k][1], u[1])
            for b, of in state["union"].items()
            for k, u in of.items()
        ),
        "digest": digest == again.decision(second.context),
        "scalars": scalars == again.scalars(second.context),
        "other_start": other != digest,
        "updates": again.updates,
        "counts": again.units.counts(),
    }
    second.destroy()
    return found


def grown_job(stage: int, dtype: str) -> dict:
    """Heads that begin to live: their queries and keys have a gradient within ten steps."""
    engine = start(stage, dtype, {"update_every": "3st", "end": 0.4, "initial": 1.0, "alpha": "constant"}, 14)
    favour_dead_heads(engine)
    method, grown = method_of(engine), []
    write = method._write

    def noted(ctx, done):
        write(ctx, done)
        grown.extend((b, slot) for b, of in done.items() for slot in of["heads"].written)

    method._write = noted
    for step in range(4):
        one_step(engine, step)
    moments = []
    for step in range(4, 14):
        method.last = step  # no other update
        one_step(engine, step)
        state, units = full_state(engine), units_of(engine.module)
        row = []
        for block, slot in grown:
            name = f"{block}.attn.qkv.weight"
            _, rows = entries(block, name, units[block], [slot])
            parts = state[f"exp_avg/{name}"][rows].split(units[block].head_dim)
            row.append([float(part.abs().max()) for part in parts])
        moments.append(row)
    engine.destroy()
    return {"grown": len(grown), "moments": moments}


def ramp_job(stage: int, dtype: str, method: dict, steps: int = 9) -> dict:
    """Counts that fall at the edges of stages: which units go, and that what is left of the others is as it was."""
    engine = start(stage, dtype, {"ramp": {"start": 1.0, "levels": 3, "until": 0.5}, **method}, steps)
    unit, events, problems, edges, counts, losses = method_of(engine), [], [], [], [], []
    engine.context.record = lambda event, **data: events.append((event, engine.step_index, data.get("by")))
    rebuild = engine.rebuild

    def watched(request):
        before, slots_before = full_state(engine), unit.units.before
        scores = ramp_job.scores
        sizes = {b: before[f"fp32/{b}.mlp.fc1.weight"].abs().sum(1) for b in slots_before}
        sizes = {b: s + before[f"fp32/{b}.mlp.fc2.weight"].abs().sum(0) for b, s in sizes.items()}
        old = units_of(engine.module)
        report = rebuild(request)
        after, low = full_state(engine), weights(engine)
        for block, of in unit.units.slots.items():
            for kind, score in (("heads", scores[block]), ("neurons", sizes[block])):
                gone = set(slots_before[block][kind]) - set(of[kind])
                by_unit = dict(zip(slots_before[block][kind], score.tolist(), strict=True))
                if gone and max(by_unit[u] for u in gone) > min(by_unit[u] for u in of[kind]):
                    problems.append(f"{block} {kind}: not the lowest")
        for full, value in before.items():
            name = full.split("/")[1]
            block = ".".join(name.split(".")[:2])
            want = value
            if block in unit.units.slots:
                kind = kind_of(name)
                kept = [slots_before[block][kind].index(u) for u in unit.units.slots[block][kind]]
                place = entries(block, name, old[block], kept)
                want = value if place is None else value.index_select(*place)
            if not torch.equal(after[full], want):
                problems.append(f"{full}: changed")
            if full.startswith("fp32/") and not torch.equal(low[name], want.to(dtype_of(engine)).float()):
                problems.append(f"working/{name}")
        edges.append(engine.step_index)
        return report

    engine.rebuild = watched
    enter = unit.on_stage_enter

    def noted(ctx, stage):
        ramp_job.scores = dict(unit._edge_scores)
        return enter(ctx, stage)

    unit.on_stage_enter = noted
    for step in range(steps):
        losses.append(one_step(engine, step))
        now = units_of(engine.module)
        counts.append([(u.heads, u.neurons) for u in now.values()])
        if counts[-1] != [(len(of["heads"]), len(of["neurons"])) for of in unit.units.slots.values()]:
            problems.append(f"{step}: slots")
    found = {
        "problems": problems,
        "edges": edges,
        "counts": counts,
        "losses": losses,
        "events": [e for e in events if e[0] != "stage"],
        "updates": unit.updates,
        "digest": unit.decision(engine.context),
        "scalars": unit.scalars(engine.context),
    }
    engine.destroy()
    return found


def overflow_job(stage: int, dtype: str) -> dict:
    """Losses blown up at two update steps, and at the last step before an edge."""
    method = {"update_every": "3st", "ramp": {"start": 0.75, "levels": 2, "until": 0.75}}
    engine = start(stage, dtype, method, 16)
    unit, events, changed, applied = method_of(engine), [], [], []
    engine.context.record = lambda event, **data: events.append((engine.step_index, event, data.get("by")))
    digest = unit.units.digest()
    for step in range(16):
        bad = step in (3, 6, 7, 11)
        one_step(engine, step, factor=float("inf") if bad and dtype != "fp16" else 2.0**60 if bad else 1.0)
        applied.append(engine.was_step_applied())
        now = unit.units.digest()
        changed += [step] * (now != digest)
        digest = now
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules())
    found = {
        "changed": changed,
        "applied": applied,
        "events": [e for e in events if e[1].startswith("unit_") or e[1] == "units_removed"],
        "off": unit._probe is None and unit._scores is None and not unit._draws,
        "finite": all(bool(v.isfinite().all()) for v in full_state(engine).values()),
        "hooks": hooks,
    }
    engine.destroy()
    return found


def masked_job(stage: int, dtype: str, steps: int = 8) -> dict:
    """The published code's way: full weights, masks, dense moments; neurons that never change."""
    from efftrain_ds.models import masked

    engine = start(stage, dtype, {"revive": False, "initial": 0.5}, steps)
    favour_dead_heads(engine)
    unit, problems, heads = method_of(engine), [], []
    names = [n for n in masked.masks_of(engine.module)]
    first = {n: m.clone() for n, m in masked.masks_of(engine.module).items()}
    slots_first = unit.units.slots
    for step in range(steps):
        one_step(engine, step)
        state, low = full_state(engine), weights(engine)
        for name, mask in masked.masks_of(engine.module).items():
            for key in ("fp32", "ema"):
                if state[f"{key}/{name}"][~mask].count_nonzero():
                    problems.append(f"{step} {key}/{name}")
            if low[name][~mask].count_nonzero():
                problems.append(f"{step} working/{name}")
        heads.append({b: of["heads"] for b, of in unit.units.slots.items()})
    masks = masked.masks_of(engine.module)
    grown = {b: sorted(set(heads[-1][b]) - set(slots_first[b]["heads"])) for b in slots_first}
    dead_bias, query_key = [], []
    for block, units in unit.units.full.items():
        name, d = f"{block}.attn.qkv", units.head_dim
        for h in grown[block]:
            rows = state[f"fp32/{name}.weight"].view(3, units.heads, d, -1)[:, h]
            query_key.append([float(part.abs().max()) for part in rows])
        dead = sorted(set(range(units.heads)) - set(heads[-1][block]))
        dead_bias.append(float(state[f"fp32/{name}.bias"].view(3, units.heads, d)[2, dead].abs().max()))
    found = {
        "problems": problems,
        "names": names,
        "neurons_moved": sum(int((first[n] ^ masks[n]).sum()) for n in masks if ".mlp." in n),
        "heads_moved": len({str(h) for h in heads}) > 1,
        "heads": [{b: len(u) for b, u in h.items()} for h in heads],
        "query_key": query_key,
        "dead_bias": dead_bias,
        "warm": min(float(state[f"exp_avg/{n}"][~m].abs().max()) for n, m in masks.items() if "qkv" in n),
        "updates": unit.updates,
        "digest": unit.decision(engine.context),
        "parameters": sum(s.numel() for s in access.layout_of(engine.deepspeed_engine).shapes.values()),
        "macs_share": unit.scalars(engine.context)["sparse/macs_share"],
    }
    engine.destroy()
    return found


def average_job(stage: int) -> dict:
    """Evaluating with the average is the plain compact model with these weights."""
    engine = start(stage, "fp32", {}, 6)
    for step in range(6):
        one_step(engine, step)
    model = plain_model(engine, full_state(engine), "ema")
    images, _ = samples(0)
    with engine.evaluating(ema=True), torch.no_grad():
        gap = float((engine(images) - model(images)).abs().max())
    engine.destroy()
    return {"gap": gap}


def desync_job(stage: int) -> str:
    """A rank that decides otherwise ends the run on all ranks."""
    from efftrain_ds.core.errors import DesyncError

    engine = start(stage, "fp32", {}, 8)
    unit = method_of(engine)
    decide = unit.units.decide

    def other(prune, grow, *rest):
        return decide(prune, {b: {k: -s for k, s in of.items()} for b, of in grow.items()}, *rest)

    if dist.get_rank() == 1:
        unit.units.decide = other
    text = "no error"
    try:
        for step in range(4):
            one_step(engine, step)
    except DesyncError as error:
        text = str(error)
    engine.destroy()
    return text
