"""AutoProg's plan: the stages of a manual schedule, of a searched one as far as it is decided, and its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import PlanError
from ...core.timeline import PlanSpec, Segment, Timeline
from .candidates import Candidate, candidates
from .config import AutoProgConfig, GrowthStageConfig
from .schedules import levels, magnitudes, rates, resolution_step, stage_epochs

KEY = "efftrain.methods.autoprog"


@dataclass(frozen=True)
class Levels:
    """Values of every dimension at each of the K stages; None where the method leaves a dimension alone."""

    depths: tuple[int, ...] | None
    resolutions: tuple[int, ...] | None
    magnitudes: tuple[float, ...] | None
    drop_paths: tuple[float, ...] | None
    erasings: tuple[float, ...] | None

    def nominal(self, stage: int) -> Candidate:
        """(depth, resolution) of the uniform schedule; 0 where a dimension does not grow."""
        depth = self.depths[stage] if self.depths is not None else 0
        return depth, self.resolutions[stage] if self.resolutions is not None else 0


def ramp_levels(config: AutoProgConfig, spec: PlanSpec) -> Levels:
    """The ramps of the configuration for this model and these images.

    Raises:
        PlanError: the depth of the model is not known, or the resolution does not fit the stride.
    """
    stages = config.stages
    depths = resolutions = None
    if config.depth_start is not None:
        if spec.depth < 1:
            raise PlanError(f"{KEY}.depth_start: the depth of this model cannot change; set it to null")
        depths = levels(config.depth_start, spec.depth, 1, stages)
    if config.resolution_start is not None:
        step = resolution_step(spec.resolution, spec.stride, config.resolution_step)
        resolutions = levels(config.resolution_start, spec.resolution, step, stages)
    magnitude = drop_path = erasing = None
    if config.magnitude_start is not None and spec.magnitude is not None:
        magnitude = magnitudes(config.magnitude_start, spec.magnitude, stages)
    if config.drop_path_start is not None and spec.drop_path:
        drop_path = rates(config.drop_path_start, spec.drop_path, stages)
    if config.erasing_start is not None and spec.erasing:
        erasing = rates(config.erasing_start, spec.erasing, stages)
    return Levels(depths, resolutions, magnitude, drop_path, erasing)


def stage_starts(stages: int, spec: PlanSpec) -> tuple[float, ...]:
    """Progress at which each stage starts.

    Raises:
        PlanError: more stages than epochs (or steps, where the user fixed them).
    """
    if spec.steps is not None:
        if spec.steps < stages:
            raise PlanError(f"{KEY}.stages: {stages} stages need at least {stages} steps, found {spec.steps}")
        return tuple(k / stages for k in range(stages))
    try:
        return tuple(float(e) / spec.epochs for e in stage_epochs(spec.epochs, stages))
    except PlanError as error:
        raise PlanError(f"{KEY}.stages: {error}") from error


def manual_timeline(config: AutoProgConfig, spec: PlanSpec) -> Timeline:
    """Stages of the ramps, or of the user's own schedule.

    Raises:
        PlanError: what does not fit the model, the resolution or the length of the run.
    """
    if config.schedule is not None:
        return _own_timeline(config.schedule, spec)
    found = ramp_levels(config, spec)
    starts = (*stage_starts(config.stages, spec), 1.0)
    segments = []
    for k in range(config.stages):
        settings = stage_settings(found, k, found.nominal(k))
        segments.append(Segment(starts[k], starts[k + 1], settings, micro_scale=_micro_scale(found.nominal(k), spec)))
    return Timeline(tuple(segments))


def stage_settings(found: Levels, stage: int, size: Candidate, *, strength: int | None = None) -> dict[str, Any]:
    """Settings of one stage at a given size; `strength` takes regularisation from another stage."""
    depth, resolution = size
    at = stage if strength is None else strength
    settings: dict[str, Any] = {}
    if found.depths is not None:
        settings["depth"] = depth
    if found.resolutions is not None:
        settings["resolution"] = resolution
    for key, values in (
        ("ra_magnitude", found.magnitudes),
        ("drop_path", found.drop_paths),
        ("erasing", found.erasings),
    ):
        if values is not None:
            settings[key] = values[at]
    return settings


def _micro_scale(size: Candidate, spec: PlanSpec) -> float:
    """Activations fall with depth and with the number of tokens, so the micro-batch may grow."""
    depth = size[0] / spec.depth if size[0] else 1.0
    side = size[1] / spec.resolution if size[1] else 1.0
    return 1.0 / (depth * side * side)


def _own_timeline(stages: list[GrowthStageConfig], spec: PlanSpec) -> Timeline:
    problems = []
    for i, stage in enumerate(stages):
        key = f"{KEY}.schedule.{i}"
        if not 0 < stage.depth <= max(spec.depth, 0):
            problems.append(f"{key}.depth: {stage.depth}, the model has {spec.depth} blocks")
        if stage.resolution is not None and (stage.resolution > spec.resolution or stage.resolution % spec.stride):
            problems.append(
                f"{key}.resolution: {stage.resolution}, allowed: multiples of the model's stride {spec.stride} up to "
                f"efftrain.data.resolution {spec.resolution}"
            )
        larger = any(s.resolution is not None and s.resolution < spec.resolution for s in stages[i + 1 :])
        if stage.resolution is None and larger:
            problems.append(f"{key}.resolution: null is the full resolution, but a later stage has a smaller one")
        if stage.drop_path and not spec.drop_path:
            problems.append(
                f"{key}.drop_path: {stage.drop_path}, but the model is built without drop path; set "
                "efftrain.model.drop_path above 0"
            )
    total = spec.baseline_steps
    if len(stages) > 1 and total and round(stages[-2].until * total) >= round(total):
        problems.append(f"{KEY}.schedule.{len(stages) - 2}.until: leaves no step of {total:.0f} for the full model")
    last = stages[-1]
    if last.depth != spec.depth or last.resolution not in (None, spec.resolution):
        problems.append(
            f"{KEY}.schedule.{len(stages) - 1}: the last stage must be the full model (depth {spec.depth}, resolution "
            f"{spec.resolution}), found depth {last.depth}, resolution {last.resolution or spec.resolution}"
        )
    if problems:
        raise PlanError("\n".join(problems))
    segments, start = [], 0.0
    for stage in stages:
        size = (stage.depth, stage.resolution or spec.resolution)
        settings: dict[str, Any] = {"depth": size[0], "resolution": size[1]}
        for key, value in (
            ("drop_path", stage.drop_path),
            ("ra_magnitude", stage.magnitude),
            ("erasing", stage.erasing),
        ):
            if value is not None:
                settings[key] = value
        segments.append(Segment(start, stage.until, settings, micro_scale=_micro_scale(size, spec)))
        start = stage.until
    return Timeline(tuple(segments))


# -- searched schedules --------------------------------------------------------------------------------------------


def search_share(config: AutoProgConfig, spec: PlanSpec) -> float:
    """Progress that one search takes.

    Raises:
        PlanError: the epochs of the run are not known, or a search would be longer than its stage.
    """
    assert config.search is not None
    epochs = spec.epochs
    if spec.steps is not None:
        if not spec.samples:
            raise PlanError(
                f"{KEY}.search.epochs: needs efftrain.data.samples where the length of the run is given in steps"
            )
        epochs = spec.steps * spec.batch / spec.samples
    starts = (*stage_starts(config.stages, spec), 1.0)
    shortest = min(b - a for a, b in zip(starts[:-1], starts[1:-1], strict=False))
    share = config.search.epochs / epochs
    if spec.baseline_steps and share * spec.baseline_steps < 1:
        raise PlanError(
            f"{KEY}.search.epochs: {config.search.epochs:g} epochs are less than one step of {spec.batch} samples"
        )
    if share > shortest + 1e-9:
        raise PlanError(
            f"{KEY}.search.epochs: {config.search.epochs:g} epochs of search do not fit into a stage of "
            f"{shortest * epochs:g} epochs; use fewer stages or a shorter search"
        )
    return share


def searched_timeline(
    config: AutoProgConfig, spec: PlanSpec, decided: Mapping[int, Candidate], policy: str = "uniform"
) -> Timeline:
    """Stages with a search at the start of each but the last.

    Args:
        config: with a search.
        spec: what the run is.
        decided: (depth, resolution) of the stages that are chosen already.
        policy: what the others are assumed to choose: "uniform" (the ramp), "cheapest" or "dearest".

    Raises:
        PlanError: what does not fit.
    """
    assert config.search is not None
    found, share = ramp_levels(config, spec), search_share(config, spec)
    starts = (*stage_starts(config.stages, spec), 1.0)
    segments: list[Segment] = []
    current: Candidate | None = None
    last = config.stages - 1
    for k in range(config.stages):
        start, end = starts[k], starts[k + 1]
        options = stage_candidates(config, spec, current)
        size = decided.get(k) or _assumed(policy, found, k, last, options)
        if current is not None:  # nothing shrinks, also where a choice is ahead of the ramp
            size = (max(size[0], current[0]), max(size[1], current[1]))
        if k < last:
            edge = min(start + share, end)
            middle = _typical(options)
            segments.append(
                Segment(start, edge, {**stage_settings(found, k, middle, strength=last), "growth": k, "search": True})
            )
            start = edge
        if end - start > 1e-9:
            segments.append(Segment(start, end, {**stage_settings(found, k, size), "growth": k}))
        current = size
    return Timeline(tuple(segments))


def _typical(options: tuple[Candidate, ...]) -> Candidate:
    """The candidate whose work is nearest to the mean of all: what a search that draws uniformly costs, about."""
    work = [(depth or 1) * (side or 1) ** 2 for depth, side in options]
    mean = sum(work) / len(work)
    return options[min(range(len(options)), key=lambda i: abs(work[i] - mean))]


def stage_candidates(config: AutoProgConfig, spec: PlanSpec, current: Candidate | None) -> tuple[Candidate, ...]:
    """(depth, resolution) that the search of a stage compares; 0 where a dimension does not grow."""
    assert config.search is not None
    found = ramp_levels(config, spec)
    return candidates(current, found.depths or (0,), found.resolutions or (0,), config.search.force_depth_growth)


def _assumed(policy: str, found: Levels, stage: int, last: int, options: tuple[Candidate, ...]) -> Candidate:
    if stage == last:
        return found.nominal(last)
    if policy == "uniform":
        return found.nominal(stage)
    return (min if policy == "cheapest" else max)(options)
