"""How many samples each optimizer step loads where a stage replays: a pure function of the schedule.

A stage with the settings "replay" (r, the mean number of uses of a sample) and "replay_steps" (S, the capacity of the
buffer in steps) takes batch / r new samples a step and the rest from a buffer of what the last S steps loaded. It
begins with a few steps of new samples only. Steps, batches and learning rates are those of the schedule, whatever r is.
"""

from __future__ import annotations

from .errors import PlanError
from .timeline import Schedule, Stage

REPLAY, REPLAY_STEPS = "replay", "replay_steps"
"""Settings of a stage."""
WARM_SHARE = 8
"""A stage loads new samples only until the buffer is filled to this part (1/8), so that the first are not overused."""


def mean_uses(stage: Stage) -> int:
    """r: how often a sample that is loaded in this stage is used on average; 1 = no replay."""
    return int(stage.settings.get(REPLAY, 1))


def warm_steps(stage: Stage) -> int:
    """First steps of the stage, that load their whole batch."""
    uses = mean_uses(stage)
    if uses == 1:
        return 0
    return min(stage.steps, -(-int(stage.settings[REPLAY_STEPS]) // (WARM_SHARE * uses)))


def fresh_batch(stage: Stage, step: int) -> int:
    """Samples, over all ranks, that optimizer step `step` of the stage loads; the others of its batch are replayed."""
    return stage.batch if step < stage.start_step + warm_steps(stage) else stage.batch // mean_uses(stage)


def fresh_samples(stage: Stage, steps: int | None = None) -> int:
    """Samples, over all ranks, that the first `steps` steps of a stage load; None = all of its steps."""
    steps = stage.steps if steps is None else steps
    warm = min(steps, warm_steps(stage))
    return warm * stage.batch + (steps - warm) * (stage.batch // mean_uses(stage))


def capacity(stage: Stage, world: int) -> int:
    """Samples that one rank's buffer holds in this stage: those of S steps, or all of a stage that loads fewer."""
    if mean_uses(stage) == 1:
        return 0
    window = int(stage.settings[REPLAY_STEPS]) * (stage.batch // mean_uses(stage))
    return min(window, fresh_samples(stage)) // world


def window_start(stage: Stage, step: int) -> int:
    """First step whose samples may still be in the buffer when optimizer step `step` of the stage begins."""
    return step if mean_uses(stage) == 1 else max(stage.start_step, step - int(stage.settings[REPLAY_STEPS]))


def loaded(schedule: Schedule, step: int) -> int:
    """Samples, over all ranks, that are loaded before optimizer step `step`."""
    return sum(fresh_samples(s, min(step, s.end_step) - s.start_step) for s in schedule.stages if step > s.start_step)


def total_loaded(schedule: Schedule) -> int:
    """Samples, over all ranks, that the whole run loads."""
    return loaded(schedule, schedule.total_steps)


def replays(schedule: Schedule) -> bool:
    """True where some stage replays."""
    return any(mean_uses(stage) > 1 for stage in schedule.stages)


def step_after(schedule: Schedule, count: int) -> int:
    """Optimizer step that begins after `count` loaded samples (over all ranks).

    Raises:
        PlanError: `count` is not at a step boundary of this schedule.
    """
    left = count
    for stage in schedule.stages:
        whole = fresh_samples(stage)
        if left >= whole and stage is not schedule.stages[-1]:
            left -= whole
            continue
        warm = warm_steps(stage)
        begun = min(warm, left // stage.batch)
        step, left = stage.start_step + begun, left - begun * stage.batch
        if begun == warm and left:
            fresh = stage.batch // mean_uses(stage)
            step, left = step + left // fresh, left % fresh
        if left:
            break
        return step
    raise PlanError(f"{count} loaded samples is not a step boundary of this schedule")
