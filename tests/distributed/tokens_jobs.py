"""Functions run on the ranks by the tests of token selection."""

from __future__ import annotations

import torch
import torch.distributed as dist

import efftrain_ds
from efftrain_ds.models import masked
from efftrain_ds.models.tokens import selector_of
from tests.distributed.svite_jobs import SIDE, config_of, one_step, vit
from tests.distributed.zero_jobs import dtype_of, full_state

NAMES = ("patch_drop.scorer.weight", "patch_drop.scorer.bias")


def start(stage: int, dtype: str, methods: dict, steps: int, gas: int = 1, offload: bool = False):
    model = vit()
    config = config_of(stage, dtype, None, steps, gas)
    config["efftrain"]["methods"] = methods
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def logits(engine) -> torch.Tensor:
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    with engine.evaluating(), torch.no_grad():
        return engine(images.to(dtype_of(engine))).float()


def run_job(stage: int, dtype: str, methods: dict, steps: int = 8, gas: int = 1, offload: bool = False) -> dict:
    """A short run: what the blocks see, the temperature, the scorer's training, evaluations, and the journal."""
    engine = start(stage, dtype, methods, steps, gas, offload)
    method = next(m for m in engine.methods if m.name == "svite_tokens")
    records, seen, taus, losses, decisions = [], [], [], [], []
    engine.context.record = lambda event, **data: records.append((event, data))
    engine.module.norm_pre.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape[1]))
    before = full_state(engine)
    torch.manual_seed(50 + dist.get_rank())  # after DeepSpeed: the same noise on every ZeRO stage
    for step in range(steps):
        losses.append(one_step(engine, step, gas))
        taus.append(float(selector_of(engine.module).tau))
        decisions.append(method.decision(engine.context))
    trained = list(seen)
    random = torch.get_rng_state()
    twice = [logits(engine), logits(engine)]
    after = full_state(engine)
    moved = float((after[f"fp32/{NAMES[0]}"] - before[f"fp32/{NAMES[0]}"]).abs().max())
    result = {
        "seen": trained,
        "evaluated": seen[len(trained) :],
        "taus": taus,
        "losses": losses,
        "decisions": decisions,
        "moved": moved,
        "second": float(after[f"exp_avg_sq/{NAMES[0]}"].min()),
        "equal": torch.equal(*twice) and torch.equal(random, torch.get_rng_state()),
        "records": [data for event, data in records if event == "token_selection"],
        "scalars": method.scalars(engine.context),
        "masked": list(masked.masks_of(engine.module)),
        "kind": str(selector_of(engine.module).tau.dtype),
        "first": float(before[f"fp32/{NAMES[0]}"].sum()),
    }
    engine.destroy()
    return result


def resumed_evaluation(folder: str, stage: int, methods: dict) -> dict:
    """An engine that only loads a checkpoint keeps as many tokens as the run did there."""
    engine = start(stage, "fp32", methods, 8)
    for step in range(6):
        one_step(engine, step)
    want, keep = logits(engine), selector_of(engine.module).keep
    engine.save_checkpoint(folder)
    engine.destroy()
    other = start(stage, "fp32", methods, 8)
    first = selector_of(other.module).keep
    other.load_checkpoint(folder)
    found = {"equal": torch.equal(logits(other), want), "keep": [first, keep, selector_of(other.module).keep]}
    other.destroy()
    return found


def wrapped() -> str:
    """What `wrap` says."""
    import deepspeed

    config = config_of(1, "fp32", None, 8)
    section = config.pop("efftrain")
    section["methods"] = {"svite_tokens": {}}
    model = vit()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    try:
        efftrain_ds.wrap(engine, {"efftrain": section})
    except efftrain_ds.core.errors.EffTrainError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""
