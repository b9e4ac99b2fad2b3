"""Functions run on the ranks by the ZeRO tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.errors import CheckpointError
from efftrain_ds.zero import access


class Net(nn.Module):
    """Odd sizes, dropout and a buffer, so that padding, RNG and buffers matter."""

    def __init__(self, frozen: bool = False):
        super().__init__()
        self.a = nn.Linear(5, 33)
        self.norm = nn.LayerNorm(33)
        self.register_buffer("running", torch.zeros(33))
        self.drop = nn.Dropout(0.2)
        self.b = nn.Linear(33, 7)
        if frozen:
            self.a.weight.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.a(x))
        if self.training:
            self.running.lerp_(x.detach().mean(0).to(self.running.dtype), 0.1)
        return self.b(self.drop(torch.relu(x - self.running.to(x.dtype))))


def ds_config(stage: int, dtype: str, gas: int = 1, ema: bool = True, **extra) -> dict:
    world = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "train_batch_size": 4 * gas * world,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.05, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **extra,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if dtype == "bf16_fp32":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if ema:
        config["efftrain"] = {"model": {"ema": {"decay": 0.9}}}
    return config


def dtype_of(engine) -> torch.dtype:
    if engine.bfloat16_enabled():
        return torch.bfloat16
    return torch.float16 if engine.fp16_enabled() else torch.float32


def make(stage: int, dtype: str, gas: int = 1, ema: bool = True, frozen: bool = False, **extra):
    torch.manual_seed(3)
    model = Net(frozen)
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": 0.05, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    config = ds_config(stage, dtype, gas, ema, **extra)
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=groups, config=config)
    torch.manual_seed(100 + dist.get_rank())
    return engine


def train(engine, first: int, last: int, gas: int = 1) -> list[float]:
    losses = []
    for step in range(first, last):
        for micro in range(gas):
            rng = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
            x = torch.randn(4, 5, generator=rng)
            y = torch.randint(0, 7, (4,), generator=rng)
            loss = nn.functional.cross_entropy(engine(x.to(dtype_of(engine))).float(), y)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    return losses


def full_state(engine) -> dict[str, torch.Tensor]:
    """Masters, moments and average of all parameters, whole, by "key/name"."""
    layout = access.layout_of(engine.deepspeed_engine)
    sources = {key: layout.tensors(key) for key in ["fp32", *layout.state_keys()]}
    if engine.ema is not None:
        sources["ema"] = engine.ema.shadow
    found = {}
    for key, tensors in sources.items():
        for name, shape in layout.shapes.items():
            whole = torch.zeros(shape.numel())
            for fragment in layout.fragments:
                if fragment.name == name and not (layout.replicated and dist.get_rank() > 0):
                    whole[fragment.start : fragment.start + fragment.length] = layout.values(fragment, tensors)
            dist.all_reduce(whole)
            found[f"{key}/{name}"] = whole.reshape(shape)
    return found


def weights(engine) -> dict[str, torch.Tensor]:
    named = dict(engine.module.named_parameters())
    with access.gather_full(list(named.values())):
        return {name: p.detach().float().clone() for name, p in named.items()}


def release(engine) -> None:
    engine.destroy()


def same(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def resume_job(folder: str, stage: int, dtype: str, gas: int) -> dict:
    """Train 3 + 3 steps, saving in the middle; load into a fresh engine and repeat the last 3."""
    engine = make(stage, dtype, gas)
    train(engine, 0, 3, gas)
    engine.save_checkpoint(folder, client_state={"note": "x", "n": 3, "t": torch.arange(3), "pair": (1, 2)})
    at_save = full_state(engine)
    expected = train(engine, 3, 6, gas)
    end, end_weights = full_state(engine), weights(engine)
    counters = access.counters(engine.deepspeed_engine)
    lr = engine.get_lr()
    release(engine)
    again = make(stage, dtype, gas)
    path, client = again.load_checkpoint(folder)
    at_load = full_state(again)
    losses = train(again, 3, 6, gas)
    result = {
        "path": Path(path).name,
        "client": (client["note"], client["n"], client["t"].tolist(), client["pair"]),
        "losses_equal": losses == expected,
        "state_at_load": same(at_save, at_load),
        "state_at_end": same(end, full_state(again)),
        "weights_at_end": same(end_weights, weights(again)),
        "counters_equal": counters == access.counters(again.deepspeed_engine),
        "lr_equal": lr == again.get_lr(),
        "keys": sorted({k.split("/")[0] for k in at_save}),
        "moved": float(sum((at_save[k] - end[k]).abs().sum() for k in end)),
    }
    release(again)
    return result


def save_job(folder: str, stage: int, dtype: str) -> dict:
    engine = make(stage, dtype)
    train(engine, 0, 3)
    engine.save_checkpoint(folder)
    state = full_state(engine)
    release(engine)
    return {k: v.tolist() for k, v in state.items()}


def load_job(folder: str, stage: int, dtype: str) -> dict:
    engine = make(stage, dtype)
    engine.load_checkpoint(folder)
    state = full_state(engine)
    w = weights(engine)
    layout = access.layout_of(engine.deepspeed_engine)
    steps = sorted({layout.scalars(i).get("step") for i in range(len(layout.flats))})
    low = {n: state[f"fp32/{n}"].to(dtype_of(engine)).float() for n in w if f"fp32/{n}" in state}
    result = {
        "state": {k: v.tolist() for k, v in state.items()},
        "stale": same(low, {n: w[n] for n in low}),
        "steps": steps,
    }
    release(engine)
    return result


def ema_job(stage: int, dtype: str) -> dict:
    """The sharded average against a plain one computed from whole masters; swap and back."""
    engine = make(stage, dtype)
    plain = {k[5:]: v.double() for k, v in full_state(engine).items() if k.startswith("fp32/")}
    for step in range(4):
        train(engine, step, step + 1)
        decay = min(0.9, (2 + step) / (11 + step))
        for name in plain:
            plain[name] = decay * plain[name] + (1 - decay) * full_state(engine)[f"fp32/{name}"].double()
    state = full_state(engine)
    error = max(float((state[f"ema/{n}"].double() - plain[n]).abs().max()) for n in plain)
    before_weights, before_rng = weights(engine), torch.get_rng_state()
    with engine.evaluating(ema=True):
        during = weights(engine)
        training_mode = engine.module.training
    after = full_state(engine)
    dtype_ = dtype_of(engine)
    result = {
        "error": error,
        "swapped": max(float((during[n] - state[f"ema/{n}"].to(dtype_).float()).abs().max()) for n in plain),
        "differs": any(not torch.equal(during[n], before_weights[n]) for n in plain),
        "restored": same(state, after) + same(before_weights, weights(engine)),
        "mode": (training_mode, engine.module.training),
        "rng": torch.equal(before_rng, torch.get_rng_state()),
        "goes_on": all(v == v for v in train(engine, 4, 6)),
    }
    release(engine)
    return result


def frozen_job(folder: str, stage: int) -> dict:
    engine = make(stage, "fp32", frozen=True)
    train(engine, 0, 2)
    with torch.no_grad(), access.gather_full([engine.module.a.weight], modifier_rank=0):
        if dist.get_rank() == 0 or not hasattr(engine.module.a.weight, "ds_id"):
            engine.module.a.weight.fill_(0.25)
    engine.save_checkpoint(folder)
    release(engine)
    again = make(stage, "fp32", frozen=True)
    again.load_checkpoint(folder)
    value = weights(again)["a.weight"]
    release(again)
    return {"frozen": bool((value == 0.25).all())}


def wrong_model_job(folder: str) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 7))
    engine, *_ = efftrain_ds.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config(1, "fp32", ema=False)
    )
    before = full_state(engine)
    try:
        engine.load_checkpoint(folder)
        text = "loaded"
    except CheckpointError as error:
        text = str(error)
    unchanged = not same(before, full_state(engine))
    release(engine)
    return json.dumps([text, unchanged])


def batch_job(stage: int) -> dict:
    """Changing micro-batch and accumulation on the way keeps boundaries right."""
    engine = make(stage, "fp32", gas=2, ema=False)
    steps = []
    for micro, gas in [(4, 2), (2, 4), (8, 1), (4, 2)]:
        access.set_batch(engine.deepspeed_engine, micro, gas)
        for index in range(2 * gas):
            x = torch.ones(micro, 5) + index
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
        steps.append((engine.global_steps, engine.step_index, engine.train_batch_size()))
    release(engine)
    return {"steps": steps}


def guard_job(folder: str) -> dict:
    """Saving inside an evaluation of the average, a failed evaluation, a transposed layer, a foreign folder."""
    engine = make(2, "bf16")
    train(engine, 0, 2)
    found = {}
    before, seen = full_state(engine), weights(engine)
    try:
        with engine.evaluating(ema=True):
            try:
                engine.save_checkpoint(folder)
            except CheckpointError as error:
                found["inside"] = str(error)
            raise KeyError("a mistake in the user's validation")
    except KeyError:
        found["stale"] = engine.ema.stale
    found["masters"] = same(before, full_state(engine))
    with torch.no_grad():
        engine(torch.zeros(1, 5, dtype=torch.bfloat16))
    found["refreshed"] = same(seen, weights(engine)), engine.ema.stale
    engine.save_checkpoint(folder, tag="best")
    engine.save_checkpoint(folder, tag="best", save_latest=False)
    release(engine)
    model = nn.Sequential()
    model.a, model.b = nn.Linear(33, 5), nn.Linear(33, 7)  # a.weight transposed: as many elements, another shape
    model.norm = nn.LayerNorm(33)
    model.a.bias = nn.Parameter(torch.zeros(33))
    other, *_ = efftrain_ds.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config(1, "fp32", ema=False)
    )
    try:
        other.load_checkpoint(folder, "best")
    except CheckpointError as error:
        found["shape"] = str(error)
    native = Path(folder) / "native"
    if dist.get_rank() == 0:
        (native / "global_step7").mkdir(parents=True)
        (native / "global_step7" / "mp_rank_00_model_states.pt").write_bytes(b"pickle")
        (native / "latest").write_text("global_step7")
    dist.barrier()
    try:
        other.load_checkpoint(native)
    except CheckpointError as error:
        found["native"] = str(error)
    release(other)
    return found
