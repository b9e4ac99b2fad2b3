"""Functions run on the ranks by the tests of what a change of parameters refuses."""

from __future__ import annotations

import torch
import torch.distributed as dist

from efftrain_ds.core.errors import EffTrainError, RebuildError
from efftrain_ds.zero import access
from efftrain_ds.zero import request as rq
from tests.distributed.rebuild_jobs import grow, make, train
from tests.distributed.zero_jobs import full_state, same, weights

FEATURES = {
    "zero_hpz_partition_size": 2,
    "zero_quantized_weights": True,
    "zenflow": {"topk_ratio": 0.1},
}


class AsksForNothing:
    """A method whose request changes nothing."""

    def on_stage_enter(self, ctx, stage):
        return rq.RebuildRequest(reason="asked for")


class RequestsByItself:
    """A method that calls `rebuild` where it should return a request."""

    def on_stage_enter(self, ctx, stage):
        self.rebuild()


def refusal_job(what: str) -> dict:
    """One mistake; nothing may be touched and every rank hears of it."""
    engine = make(2, "fp32", **({"gas": 2} if what == "accumulation" else {}))
    train(engine, 0, 2)
    before, identity, history = full_state(engine), id(engine.deepspeed_engine), list(engine.rebuilds)
    before_weights = weights(engine)
    request = rq.RebuildRequest(reason=what)
    zero = engine.deepspeed_engine._config.zero_config
    undo = lambda: None  # noqa: E731
    wrapper = type(engine.optimizer)
    if what == "accumulation":
        loss = engine(torch.ones(4, 5)).square().mean()
        engine.backward(loss)
        engine.step()
    elif what == "unmapped":
        request = rq.RebuildRequest(surgery=grow(4, 6, [0, 1, 2, 2, 3, 3]).surgery, reason=what)
    elif what == "lost":
        origin = grow(4, 3, [0, 1, 2])
        request = rq.RebuildRequest(origin.surgery, origin.maps, reason=what)
    elif what == "shape":
        request = rq.RebuildRequest(maps={"head.weight": rq.copy("embed.weight")}, reason=what)
    elif what == "source":
        request = rq.RebuildRequest(maps={"head.bias": rq.copy("nowhere")}, reason=what)
    elif what == "target":
        request = rq.RebuildRequest(maps={"nowhere": rq.copy("head.bias")}, reason=what)
    elif what == "index":
        request = rq.RebuildRequest(maps={"head.bias": rq.gather("head.bias", {0: [0, 1, 2, 3, 4, 5, 7]})}, reason=what)
    elif what == "one rank" and dist.get_rank() == 1:
        request = rq.RebuildRequest(maps={"head.bias": rq.copy("nowhere")}, reason=what)
    elif what == "one rank's surgery" and dist.get_rank() == 1:
        request = rq.RebuildRequest(surgery=lambda model: model.no_such_block, reason=what)
    elif what == "ranks differ":
        order = list(range(7)) if dist.get_rank() == 0 else list(range(6, -1, -1))
        request = rq.RebuildRequest(maps={"head.bias": rq.gather("head.bias", {0: order})}, reason=what)
    elif what == "state":
        layout = access.layout_of(engine.deepspeed_engine)
        state = layout.base.state[layout.flats[0].master]
        state["history"] = torch.zeros(3)
        undo = lambda: state.pop("history")  # noqa: E731
    elif what == "class":
        engine.optimizer.__class__ = type("Other", (wrapper,), {})
        undo = lambda: setattr(engine.optimizer, "__class__", wrapper)  # noqa: E731
    elif what in FEATURES:
        kept = getattr(zero, what)
        zero.__dict__[what] = FEATURES[what]
        undo = lambda: zero.__dict__.update({what: kept})  # noqa: E731
    elif what == "evaluating":
        engine.ema.swapped = True
        undo = lambda: setattr(engine.ema, "swapped", False)  # noqa: E731
    elif what == "frozen by hand":
        engine.module.head.bias.requires_grad_(False)
        undo = lambda: engine.module.head.bias.requires_grad_(True)  # noqa: E731
    elif what == "while others ask":
        nested = RequestsByItself()
        engine._hooks["on_stage_enter"] = [AsksForNothing(), nested]
        engine.rebuild, rebuild = (lambda _: engine._enter_stage(engine.stage)), engine.rebuild
        nested.rebuild = lambda: rebuild(request)
    try:
        engine.rebuild(request)
        text = "nothing was refused"
    except RebuildError as error:
        text = str(error)
    undo()
    untouched = (
        identity == id(engine.deepspeed_engine)
        and not same(before_weights, weights(engine))
        and history == engine.rebuilds
        and not same(before, full_state(engine))
    )
    engine.destroy()
    return {"text": text, "untouched": untouched}


def start_refusal_job(stage: int, dtype: str, extra: dict) -> str:
    """What can never be rebuilt is refused before training starts."""
    try:
        make(stage, dtype, **extra).destroy()
    except EffTrainError as error:
        return str(error)
    return "nothing was refused"


def streamed_failure_job() -> str:
    """A failure where the old state was not kept says so."""
    engine = make(2, "bf16", keep_old=False)
    train(engine, 0, 1)
    engine.rebuilder._create = None  # not callable
    try:
        engine.rebuild(rq.RebuildRequest())
    except RebuildError as error:
        return str(error)
    return "nothing was refused"
