"""When a method may act. The docstring of `Event` is the training loop."""

from __future__ import annotations

from enum import Enum


class Event(str, Enum):
    """Points of the loop at which methods are called.

    ::

        method.plan(spec)                        # PLAN, before any device work
        method.prepare_model(model)              # PREPARE, before deepspeed.initialize
        while step < total_steps:
            method.on_stage_enter(ctx, stage)    # STAGE_ENTER, only at an optimizer boundary
            method.on_step_start(ctx)            # STEP_START
            for micro in range(accumulation):
                method.on_batch(ctx, batch)      # BATCH, after collate, on the device
                outputs = engine(batch.images)
                method.loss(ctx, ...)            # LOSS, at most one owner
                engine.backward(loss)
            method.on_boundary(ctx)              # BOUNDARY, gradients complete
            engine.step()
            method.on_step_end(ctx, applied)     # STEP_END
        with method.on_eval(ctx): evaluate()     # EVAL
    """

    PLAN = "plan"
    PREPARE = "prepare"
    STAGE_ENTER = "stage_enter"
    STEP_START = "step_start"
    BATCH = "batch"
    LOSS = "loss"
    BOUNDARY = "boundary"
    STEP_END = "step_end"
    EVAL = "eval"
