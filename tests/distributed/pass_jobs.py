"""Functions run on the ranks by the tests of several passes over a batch."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method, unregister_method
from efftrain_ds.core.strict import StrictModel

PASSES, ACCUMULATION, STEPS = 3, 2, 3


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    return [torch.randn(4, 6, generator=generator) for _ in range(STEPS * ACCUMULATION)]


def _loss(output: torch.Tensor, index: int) -> torch.Tensor:
    """Another loss in every pass."""
    return output.float()[:, : index + 2].square().mean()


def _config(stage: int, precision: str) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    return config | ({precision: {"enabled": True}} if precision != "fp32" else {})


def _weights(engine) -> list[torch.Tensor]:
    with deepspeed.zero.GatheredParameters(
        list(engine.module.parameters()), enabled=hasattr(engine.module[0].weight, "ds_id")
    ):
        return [p.detach().float().clone() for p in engine.module.parameters()]


def passes_job(stage: int, precision: str = "fp32") -> dict:
    """Several passes against the sum of their losses in one."""

    @register_method
    class Repeating(Method):
        name = "repeating"
        Config = StrictModel
        owns_loss = True
        seen: list = []

        @property
        def passes(self):
            return PASSES

        def on_pass(self, ctx, index):
            self.index = index
            self.seen.append((ctx.step, index))

        def loss(self, ctx, outputs, batch):
            return _loss(outputs, self.index)

    try:
        config = _config(stage, precision)
        section = {"run": {"steps": STEPS}, "data": {"stride": 1}, "methods": {"repeating": {}}}
        engine, *_ = efftrain_ds.initialize(model=_model(), config={**config, "efftrain": section})
        try:
            engine(_batches()[0].to(engine.device))
            outside = ""
        except ConfigError as error:
            outside = str(error)
        for batch in _batches():
            batch = batch.to(engine.device, next(engine.module.parameters()).dtype)
            for _ in engine.each_pass():
                loss = engine.loss(engine(batch), batch)
                engine.backward(loss)
                engine.step()
        plain, *_ = deepspeed.initialize(model=_model(), config=config)
        for batch in _batches():
            batch = batch.to(plain.device, next(plain.module.parameters()).dtype)
            output = plain(batch)
            plain.backward(sum(_loss(output, index) for index in range(PASSES)))
            plain.step()
        pairs = zip(_weights(engine), _weights(plain), strict=True)
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        moved = max(float((a - b).abs().max()) for a, b in zip(_weights(plain), _model().parameters(), strict=True))
        return {"worst": worst, "moved": moved, "seen": Repeating.seen, "steps": engine.step_index, "outside": outside}
    finally:
        unregister_method("repeating")
