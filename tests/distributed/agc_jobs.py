"""Functions run on the ranks by the tests of clipping by unit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.nn.functional import cross_entropy

import efftrain_ds
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.models import masked
from efftrain_ds.zero import access
from efftrain_ds.zero.agc import UnitClip
from efftrain_ds.zero.masks import ShardedMasks
from tests.distributed.mask_jobs import (
    DECAY,
    GAS,
    MICRO,
    OFFLOAD,
    Net,
    batch,
    forward_backward,
    groups_of,
    masked_net,
    plain_gradients,
    relative,
)
from tests.distributed.zero_jobs import dtype_of, weights

FACTOR, SGD = 0.15, {"lr": 0.5, "momentum": 0.9, "weight_decay": DECAY}
"""Not Adam: it would hide by how much a gradient is too long."""


def make(stage: int, dtype: str, model: nn.Module, *, clipping: float = 0.0, **zero):
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": clipping,
        "optimizer": {"type": "SGD", "params": SGD},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if dtype in ("bf16", "bf16_fp32"):
        config["bf16"] = {"enabled": True}
    if dtype == "bf16_fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=groups_of(model), config=config)
    return engine.deepspeed_engine


class Recorder:
    """Copies of all gradients and masters of the base optimizer in its steps, whole, by name."""

    def __init__(self, engine):
        self.layout = access.layout_of(engine)
        self.calls = 0
        self.layout.base.register_step_pre_hook(self._record)
        self._grads, self._masters = {}, {}

    def _record(self, optimizer, *_):
        self.calls += 1
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for i, flat in enumerate(self.layout.flats):
            if id(flat.master) in stepped and flat.master.grad is not None:
                self._grads[i] = flat.master.grad.detach().clone().cpu()
                self._masters[i] = flat.master.detach().clone().cpu()

    def whole(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(gradients, masters) of the last step."""
        found = []
        for kept in (self._grads, self._masters):
            tensors = [kept.get(i, torch.zeros(flat.master.shape)) for i, flat in enumerate(self.layout.flats)]
            whole = {name: torch.zeros(shape.numel()) for name, shape in self.layout.shapes.items()}
            if not (self.layout.replicated and dist.get_rank() > 0):
                for part in self.layout.fragments:
                    whole[part.name].narrow(0, part.start, part.length).copy_(self.layout.values(part, tensors))
            for value in whole.values():
                dist.all_reduce(value)
            found.append({name: value.view(self.layout.shapes[name]) for name, value in whole.items()})
        return found[0], found[1]


def clipped(gradients: dict[str, torch.Tensor], masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's own, on whole tensors in one process."""
    found = {}
    for name, value in masters.items():
        parameter = nn.Parameter(value.clone())
        parameter.grad = gradients[name].clone()
        adaptive_clip_grad(parameter, FACTOR)
        found[name] = parameter.grad
    return found


def clip_job(stage: int, dtype: str, extra: dict, masks: bool = False) -> dict:
    """Three steps of accumulated gradients: what the optimizer gets against timm on whole tensors."""
    torch.manual_seed(3)
    model = masked_net() if masks else Net()
    engine = make(stage, dtype, model, **(OFFLOAD if extra.get("offload") else {}))
    before = Recorder(engine)
    clip = UnitClip(engine, FACTOR)
    after = Recorder(engine)
    reference = Net()
    found = {"splits": clip.splits, "worst": 0.0, "units": 0, "short": 0, "gradient": 0.0}
    for step in range(3):
        start = weights(engine)
        forward_backward(engine, step)
        engine.step()
        gradients, masters = before.whole()
        got = after.whole()[0]
        expected = clipped(gradients, masters)
        found["worst"] = max(found["worst"], *(relative(got[n], expected[n]) for n in expected))
        changed = [(expected[n] != gradients[n]).flatten(1 if expected[n].ndim > 1 else 0).any(-1) for n in expected]
        found["short"] += sum(int(c.sum()) for c in changed)
        found["units"] += sum(c.numel() for c in changed)
        if not masks:
            plain = plain_gradients(start, 2, step, dtype_of(engine))
            found["gradient"] = max(found["gradient"], *(relative(gradients[n], plain[n]) for n in plain))
        if step == 0:
            reference.load_state_dict(masters)
            optimizer = torch.optim.SGD(groups_of(reference), **SGD)
        own = {n: p.detach().clone() for n, p in reference.named_parameters()}
        plain = plain_gradients(own, 2, step)
        for name, parameter in reference.named_parameters():
            mask = masked.masks_of(engine.module).get(name)
            parameter.grad = plain[name] if mask is None else plain[name] * mask
        adaptive_clip_grad(reference.parameters(), FACTOR)
        optimizer.step()
    end = weights(engine)
    found["trajectory"] = max(float((end[n] - p.detach()).abs().max()) for n, p in reference.named_parameters())
    found["strays"] = ShardedMasks(engine).strays(masked.masks_of(engine.module)) if masks else {}
    clip.remove()
    forward_backward(engine, 3)
    engine.step()
    first, second = before.whole()[0], after.whole()[0]
    found["removed"] = all(torch.equal(first[name], second[name]) for name in first)
    engine.destroy()
    return found


def overflow_job(stage: int) -> dict:
    """A gradient that overflows on one rank: nobody clips or moves, and the next step is as if nothing had been."""
    torch.manual_seed(3)
    engine = make(stage, "fp16", Net())
    clip, recorder = UnitClip(engine, FACTOR), Recorder(engine)
    forward_backward(engine, 0)
    engine.step()
    calls, before = recorder.calls, weights(engine)
    for micro in range(GAS):
        x, y = batch(1, micro, dist.get_rank())
        loss = cross_entropy(engine(x.to(torch.float16)).float(), y)
        engine.backward(loss * (float("inf") if dist.get_rank() else 1.0))
        engine.step()
    after = weights(engine)
    found = {
        "skipped": not engine.was_step_applied(),
        "calls": recorder.calls - calls,
        "same": all(torch.equal(before[n], after[n]) for n in before),
    }
    forward_backward(engine, 2)
    engine.step()
    found["goes_on"] = recorder.calls > calls and all(v.isfinite().all() for v in weights(engine).values())
    clip.remove()
    engine.destroy()
    return found


def refused_job() -> list[str]:
    """Set-ups that cannot be clipped by unit."""
    found = []
    for stage, dtype, more in ((1, "fp32", {"clipping": 1.0}), (0, "fp16", {})):
        engine = make(stage, dtype, Net(), **more)
        with pytest.raises(ConfigError) as error:
            UnitClip(engine, FACTOR)
        found.append(str(error.value))
        engine.destroy()
    return found
