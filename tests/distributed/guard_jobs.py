"""Functions run on the ranks by the guard tests."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import DesyncError, DivergenceError
from efftrain_ds.core.method import Method
from efftrain_ds.guards.replay import read_replay, set_rng
from tests.distributed.zero_jobs import Net, ds_config, dtype_of, full_state, same, weights


class Poison(torch.autograd.Function):
    """Identity whose gradient is not finite while `on`."""

    on = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("inf")) if Poison.on else grad


class Guarded(Net):
    """The gradient of `a` can be poisoned while those of the layers behind it, and the loss, are finite."""

    def forward(self, x):
        x = self.norm(Poison.apply(self.a(x)))
        if self.training:
            self.running.lerp_(x.detach().mean(0).to(self.running.dtype), 0.1)
        return self.b(self.drop(torch.relu(x - self.running.to(x.dtype))))


class Lines(logging.Handler):
    """Messages of the package at WARNING or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def listen() -> Lines:
    found = Lines()
    logging.getLogger("efftrain_ds").addHandler(found)
    return found


def make(
    stage: int, dtype: str, gas: int = 1, guard: dict | None = None, output: str | None = None, zero=(), **options
):
    torch.manual_seed(3)
    model = Guarded()
    config = ds_config(stage, dtype, gas)
    config["efftrain"]["guard"] = guard or {}
    config["zero_optimization"] |= dict(zero)
    config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True} if zero else {}
    if output is not None:
        config["efftrain"]["run"] = {"output": output}
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config, **options)
    torch.manual_seed(100 + dist.get_rank())
    return engine


def micro_batch(step: int, micro: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
    ids = torch.arange(4) + 1000 * dist.get_rank() + 100 * step + 10 * micro
    return Batch(torch.randn(4, 5, generator=rng), torch.randint(0, 7, (4,), generator=rng), ids=ids)


def run_step(engine, step: int, gas: int = 1, loss_of: int | None = None, grad_of: int | None = None, bad: int = 0):
    """One optimizer step; in micro-batch `bad` the loss or a gradient of one rank is not finite."""
    losses = []
    for micro in range(gas):
        batch = engine.prepare_batch(micro_batch(step, micro))
        images = batch.images.to(dtype_of(engine))
        if dist.get_rank() == loss_of and micro == bad:
            images = images.clone()
            images[2, 1] = float("nan")
        Poison.on = dist.get_rank() == grad_of and micro == bad
        logits = engine(images)
        loss = engine.loss(logits.float(), batch, lambda out, b: nn.functional.cross_entropy(out, b.labels))
        engine.backward(loss)
        Poison.on = False
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def everything(engine) -> dict:
    found = {**full_state(engine), **{f"weight/{n}": v for n, v in weights(engine).items()}}
    found |= {f"buffer/{n}": b.clone() for n, b in engine.module.named_buffers()}
    return found | {"lr": torch.tensor(engine.get_lr()), "average": torch.tensor(engine.ema.updates)}


def refused_job(stage: int, dtype: str, gas: int, folder: str, zero: tuple = ()) -> dict:
    """Two steps; one with a bad loss on rank 1, one with a bad gradient on rank 0; one more step."""
    lines, events = listen(), []
    engine = make(
        stage, dtype, gas, output=folder, zero=zero, record=lambda event, **data: events.append((event, data))
    )
    run_step(engine, 0, gas), run_step(engine, 1, gas)
    before = everything(engine)
    result = {"names": dict.fromkeys(n for n, _ in engine.module.named_parameters())}
    run_step(engine, 2, gas, loss_of=1, bad=gas - 1)
    result["applied"] = [engine.was_step_applied()]
    result["loss"] = same(before, everything(engine))
    run_step(engine, 3, gas, grad_of=0)
    result["applied"].append(engine.was_step_applied())
    result["gradient"] = same(before, everything(engine))
    result["left"] = [n for n, p in engine.module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    counters = (engine.step_index, engine.global_steps, engine.skipped_steps, engine.guard.count)
    result["counters"] = (*counters, engine.guard.consecutive)
    losses = run_step(engine, 4, gas)
    result["after"] = (engine.was_step_applied(), engine.guard.consecutive, all(v == v for v in losses))
    now = everything(engine)
    result["moved"] = [n for n in now if n.startswith("fp32/") and torch.equal(now[n], before[n])]
    result["finite"] = all(bool(torch.isfinite(v).all()) for v in now.values())
    result["events"] = [(name, data) for name, data in events if name == "nonfinite"]
    result["lines"] = lines.lines
    logging.getLogger("efftrain_ds").removeHandler(lines)
    engine.guard.close()
    engine.destroy()
    return result


def replay_job(folder: str) -> dict | None:
    """Computes the refused micro-batch again from the file that rank 1 wrote, in a fresh model of the same seed."""
    engine = make(0, "fp32", output=folder)
    run_step(engine, 0, loss_of=1)
    weights_then = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    files = sorted(p.name for p in (Path(folder) / "faults").iterdir())
    if dist.get_rank() == 0:
        engine.destroy()
        return {"files": files}
    replay = read_replay(Path(folder) / "faults" / "step-00000000.rank1.json")
    model = Guarded()
    model.load_state_dict(weights_then | {"running": torch.zeros(33)})
    micro = replay.micros[0]
    set_rng(micro)
    out = model(micro["images"])
    loss = nn.functional.cross_entropy(out, micro["labels"])
    engine.destroy()
    return {"files": files, "info": replay.info, "loss": float(loss), "rows": out.isnan().any(1).tolist()}


def abort_job(stage: int) -> dict:
    """Three bad steps with a limit of two; and a good step in between two bad ones with the same limit."""
    engine = make(stage, "fp32", guard={"max_nonfinite": 2})
    taken = []
    try:
        for step, bad in enumerate([True, False, True, True, True]):
            run_step(engine, step, loss_of=1 if bad else None)
            taken.append(step)
    except DivergenceError as error:
        result = {"text": str(error), "code": error.exit_code}
    result |= {"taken": taken, "steps": engine.step_index, "faults": engine.guard.faults is not None}
    engine.destroy()
    return result


def plain_deepspeed_job(stage: int, dtype: str, folder: str) -> dict:
    """The same fault without a guard: what DeepSpeed does and says."""
    lines = Lines()
    logging.getLogger("DeepSpeed").addHandler(lines)
    torch.manual_seed(3)
    model = Guarded()
    config = ds_config(stage, dtype, ema=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    images = micro_batch(0).images.to(dtype_of(engine))
    if dist.get_rank() == 1:
        images[2, 1] = float("nan")
    engine.backward(engine(images).float().sum())
    engine.step()
    found = weights(engine)
    logging.getLogger("DeepSpeed").removeHandler(lines)
    result = {
        "poisoned": [n for n, v in found.items() if v.isnan().any()],
        "skipped": engine.skipped_steps,
        "names_rank": any("rank 1" in line.lower() for line in lines.lines),
    }
    engine.destroy()
    return result


def other_faults_job(stage: int, dtype: str) -> dict:
    """Gradients are not looked at: what only shows in the reduced gradients is refused all the same."""
    engine = make(stage, dtype, guard={"gradients": False})
    run_step(engine, 0)
    before = everything(engine)
    run_step(engine, 1, grad_of=1)
    result = {"changed": same(before, everything(engine)), "count": engine.guard.count, "skips": engine.skipped_steps}
    engine.destroy()
    return result


def fp16_job(stage: int) -> dict:
    """An overflow of the gradients is the scaler's business, a non-finite loss is not."""
    engine = make(stage, "fp16")
    found = []
    for step, kinds in enumerate([{}, {"grad_of": 0}, {"loss_of": 1}, {}]):
        run_step(engine, step, **kinds)
        found.append((engine.was_step_applied(), engine.guard.count))
    engine.destroy()
    return {"steps": found}


def own_loop_job(stage: int, gas: int) -> dict:
    """loss.backward() of a loop of the user's own, sample ids given by hand."""
    lines = listen()
    engine = make(stage, "fp32", gas)
    for step in range(3):
        for micro in range(gas):
            batch = micro_batch(step, micro)
            logits = engine(batch.images)
            engine.guard.note(batch.ids.tolist())
            loss = nn.functional.cross_entropy(logits.float(), batch.labels) / gas
            Poison.on = step == 1 and micro == 0 and dist.get_rank() == 1
            loss.backward()
            Poison.on = False
            engine.step()
    logging.getLogger("efftrain_ds").removeHandler(lines)
    result = {"lines": lines.lines, "steps": (engine.step_index, engine.skipped_steps)}
    engine.destroy()
    return result


class Chooser(Method):
    """Decides something; on one rank otherwise where it is told to."""

    name = "chooser"
    choice = "12 blocks"

    def decision(self, ctx):
        return self.choice


def decisions_job(what: str) -> dict:
    """Two steps alike, then rank 1 decides otherwise."""
    method = Chooser(None)
    config = copy.deepcopy(ds_config(1, "fp32"))
    config["efftrain"] |= {"run": {"steps": 8}, "data": {"stride": 1}}
    model = Guarded()
    engine, *_ = efftrain_ds.initialize(
        model=model, model_parameters=model.parameters(), config=config, methods=[method], schedule=None
    )
    run_step(engine, 0), run_step(engine, 1)
    before = everything(engine)
    if dist.get_rank() == 1:
        if what == "method":
            method.choice = "10 blocks"
        elif what == "lr":
            engine.optimizer.param_groups[0]["lr"] *= 1.5
        elif what == "step":
            engine.context.step += 1
    result = {"text": None}
    try:
        run_step(engine, 2)
    except DesyncError as error:
        result = {"text": str(error), "code": error.exit_code}
    after = everything(engine)
    result["changed"] = [n for n in same(before, after) if n.startswith(("fp32", "exp"))]
    engine.destroy()
    return result


def stop_job() -> dict:
    """A stop asked on one rank reaches all: at the next step, and in an evaluation."""
    engine = make(1, "fp32")
    run_step(engine, 0)
    found = [engine.guard.stop_agreed, engine.guard.poll()]
    if dist.get_rank() == 1:
        engine.guard.request_stop()
    found.append(engine.guard.stop_agreed)
    run_step(engine, 1)
    found.append((engine.guard.stop_agreed, engine.was_step_applied()))
    engine.destroy()
    other = make(1, "fp32")
    if dist.get_rank() == 0:
        other.guard.request_stop()
    polls = [other.guard.poll(), other.guard.stop_agreed]
    other.destroy()
    return {"found": found, "polls": polls}


def rebuilt_job(stage: int, dtype: str) -> dict:
    """After a change of parameters the new module is watched, and the old one is gone."""
    import gc
    import weakref

    from tests.distributed import rebuild_jobs

    document = rebuild_jobs.config_of(stage, dtype)
    document["efftrain"]["guard"] = {}
    torch.manual_seed(3)
    model = rebuild_jobs.Toy(4)
    engine, *_ = efftrain_ds.initialize(
        model=model, model_parameters=model.parameters(), config=document, rebuildable=True
    )
    rebuild_jobs.train(engine, 0, 2)
    old = weakref.ref(engine.module)
    del model
    engine.rebuild(rebuild_jobs.grow(4, 6, [0, 1, 2, 2, 3, 3]))
    gc.collect()
    result = {"gone": old() is None}
    rebuild_jobs.train(engine, 2, 3)
    before = full_state(engine)

    def poison(module, inputs, out):
        if dist.get_rank() == 1:
            out.register_hook(lambda grad: grad * float("nan"))

    handle = engine.module.blocks[5].fc1.register_forward_hook(poison)
    found = []
    engine.guard.on_nonfinite = lambda findings: found.append([(f.rank, f.what) for f in findings])
    rebuild_jobs.train(engine, 3, 4)
    handle.remove()
    result |= {"found": found, "changed": same(before, full_state(engine))}
    rebuild_jobs.train(engine, 4, 5)
    result["applied"] = engine.was_step_applied()
    engine.destroy()
    return result


def off_job() -> dict:
    """Where nothing is configured there is no guard; a key, a keyword or a method brings one."""
    found = {}
    for name, section, keyword in [
        ("nothing", {}, None),
        ("key", {"guard": {}}, None),
        ("keyword", {}, True),
        ("null", {"guard": None}, None),
        ("refused", {"guard": {}}, False),
    ]:
        model = nn.Linear(4, 4)
        config = {**ds_config(1, "fp32", ema=False), "efftrain": section}
        engine, *_ = efftrain_ds.initialize(
            model=model, model_parameters=model.parameters(), config=config, guard=keyword
        )
        found[name] = engine.guard is not None
        found[f"{name} plain"] = engine._plain
        engine.destroy()
    return json.loads(json.dumps(found))
