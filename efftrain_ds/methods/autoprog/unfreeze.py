"""AutoProg-Zero for vision transformers: blocks are unfrozen and the resolution grows in stages, by ramps or a search.

From AutoProg-Zero (arXiv 2410.00350), whose released code fine-tunes diffusion transformers; what belongs to diffusion
(time steps, prompts, stage embeddings) is left out. A parameter that is not trained has no master weight and no
optimizer state, so every stage that unfreezes blocks asks for a rebuild: what trained already keeps its state.

Shape legend: N images, C channels, H x W pixels, K stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, ModelError, PlanError
from ...core.method import Method
from ...core.registry import register_method
from ...core.timeline import PlanSpec, Segment, Stage, Timeline
from ...data.augment.chain import normalize
from ...models.adapters import accepts_sizes
from ...zero.request import RebuildRequest
from .candidates import Candidate, unfreezing_candidates
from .config import AutoProgZeroConfig
from .levels import step_cost, trained_blocks
from .schedules import levels, resolution_step, stage_epochs
from .unfreeze_search import search_candidates, shrink

_KEY = "efftrain.methods.autoprog_zero"
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre")
"""What a ViT has before its blocks (names of timm)."""


@register_method
class AutoProgZero(Method):
    """Staged unfreezing and growing resolution for fine-tuning a vision transformer."""

    name: ClassVar[str] = "autoprog_zero"
    Config: ClassVar[type[AutoProgZeroConfig]] = AutoProgZeroConfig
    phase: ClassVar[str] = "model"
    changes_parameters: ClassVar[bool] = True
    changes_inputs: ClassVar[bool] = True
    conflicts_with: ClassVar[tuple[str, ...]] = ("autoprog",)

    config: AutoProgZeroConfig

    def __init__(self, config: AutoProgZeroConfig):
        super().__init__(config)
        self._level = 1
        self._resolution: int | None = None
        self._decided: dict[int, Candidate] = {}
        self._always_frozen: frozenset[str] = frozenset()

    # -- plan --------------------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """K equal stages with "resolution" and "unfrozen" (level 1..K).

        With a search, stages but the last also have "search" and their number "growth"; their values are the ramp's
        where nothing is chosen yet.

        Raises:
            PlanError: more stages than epochs or blocks, or resolutions that do not fit the model.
        """
        chosen, last = [], (0, 0)
        for stage, nominal in enumerate(self._ramp(spec)):
            found = self._decided.get(stage, (max(nominal[0], last[0]), max(nominal[1], last[1])))
            chosen.append(found)
            last = found
        return self._timeline(spec, chosen)

    def alternatives(self, spec: PlanSpec) -> dict[str, Timeline]:
        """What a search can choose at the least and at the most; empty without one.

        Raises:
            PlanError: as `plan`.
        """
        if self.config.search is None:
            return {}
        count, sizes = self.config.stages, sorted(set(self._resolutions(spec)))
        full = (count, spec.resolution)
        dearest = [(min(k + 2, count), sizes[min(k + 1, len(sizes) - 1)]) for k in range(count - 1)]
        return {
            "cheapest": self._timeline(spec, [(1, sizes[0])] * (count - 1) + [full]),
            "dearest": self._timeline(spec, [*dearest, full]),
        }

    def _resolutions(self, spec: PlanSpec) -> tuple[int, ...]:
        config = self.config
        if config.resolution_start is None:
            return (spec.resolution,) * config.stages
        if spec.resolution % spec.stride:
            raise PlanError(
                f"efftrain.data.resolution: {spec.resolution} is not a multiple of the model's stride {spec.stride}"
            )
        step = resolution_step(spec.resolution, spec.stride, config.resolution_step, key=f"{_KEY}.resolution_step")
        return levels(config.resolution_start, spec.resolution, step, config.stages)

    def _ramp(self, spec: PlanSpec) -> list[Candidate]:
        return list(zip(range(1, self.config.stages + 1), self._resolutions(spec), strict=True))

    def _edges(self, spec: PlanSpec) -> list[float]:
        """Progress at which each stage starts.

        Raises:
            PlanError: there are more stages than epochs, or than steps where the user fixed these.
        """
        count = self.config.stages
        if spec.steps is None and spec.epochs:
            try:
                return [float(start) / spec.epochs for start in stage_epochs(spec.epochs, count)]
            except PlanError as error:
                raise PlanError(f"{_KEY}.stages: {error}") from error
        if spec.steps is not None and spec.steps < count:
            raise PlanError(f"{_KEY}.stages: {count} stages need at least {count} steps, found {spec.steps}")
        return [k / count for k in range(count)]

    def _timeline(self, spec: PlanSpec, chosen: Sequence[Candidate]) -> Timeline:
        count = self.config.stages
        if spec.depth and count > spec.depth:
            raise PlanError(f"{_KEY}.stages: {count} levels for {spec.depth} blocks; allowed: 1 to {spec.depth}")
        segments = []
        edges = [*self._edges(spec), 1.0]
        for k, (level, resolution) in enumerate(chosen):
            settings: dict[str, Any] = {"unfrozen": level}
            if self.config.resolution_start is not None:
                settings["resolution"] = resolution
            if self.config.search is not None and k < count - 1:
                settings |= {"search": True, "growth": k}
            segments.append(Segment(edges[k], edges[k + 1], settings))
        return Timeline(tuple(segments))

    def cost_factor(self, spec: PlanSpec, stage: Stage) -> float:
        """``(1 + v + u) / 3``: u is the share of blocks that train, v of those the backward pass runs through.

        Blocks are counted as equal, what lies before and after them as nothing.
        """
        level, count = stage.settings.get("unfrozen"), self.config.stages
        if level is None:
            return 1.0
        blocks = spec.depth or count
        on = trained_blocks(blocks, level, count, self.config.order)
        embeddings_train = level == count or not self.config.freeze_embeddings
        return step_cost(len(on) / blocks, 1.0 if embeddings_train else 1 - min(on) / blocks)

    # -- model -------------------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Freeze what the first level does not train. Parameters that arrive frozen stay so in every stage.

        Raises:
            ModelError: the model has no list of blocks, fewer of them than levels, or takes one size only.
        """
        if self.config.resolution_start not in (None, 1.0):
            accepted, reason = accepts_sizes(model)
            if not accepted:
                raise ModelError(
                    f"{_KEY}.resolution_start: {reason}; or set it to null to keep the resolution as it is"
                )
        self._check_blocks(model)
        self._always_frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        return self._set_level(model, 1)

    def architecture(self) -> dict[str, Any]:
        """The level that trains now."""
        return {"level": self._level}

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Freeze what the level of a checkpoint does not train.

        Raises:
            ModelError: as `prepare_model`, or the level is not one of this configuration.
        """
        level = int(architecture["level"])
        if not 1 <= level <= self.config.stages:
            raise ModelError(f"{_KEY}.stages: the checkpoint is at level {level}; allowed: 1 to {self.config.stages}")
        self._check_blocks(model)
        return self._set_level(model, level)

    def _check_blocks(self, model: nn.Module) -> None:
        blocks, kind = getattr(model, "blocks", None), type(model).__name__
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
            raise ModelError(
                f"{_KEY}: {kind} has no list of blocks to unfreeze; allowed: models of the ViT family, with an "
                "nn.Sequential or nn.ModuleList named blocks (ViT, DeiT, EVA, BEiT, ...)"
            )
        if self.config.stages > len(blocks):
            raise ModelError(
                f"{_KEY}.stages: {self.config.stages} levels for the {len(blocks)} blocks of {kind}; allowed: 1 to "
                f"{len(blocks)}"
            )

    def trained(self, model: nn.Module, level: int) -> frozenset[str]:
        """Names of the parameters that train at an unfreezing level."""
        config = self.config
        slots = {name: i for i, (name, _) in enumerate(model.blocks.named_children())}
        on = trained_blocks(len(slots), level, config.stages, config.order)
        off = _EMBEDDINGS if config.freeze_embeddings and level < config.stages else ()
        found = set()
        for name, _ in model.named_parameters():
            head, _, rest = name.partition(".")
            # the whole name of the block is compared: a prefix would take block 10 for block 1
            frozen = slots[rest.split(".")[0]] not in on if head == "blocks" else head in off
            if not frozen and name not in self._always_frozen:
                found.add(name)
        return frozenset(found)

    def _set_level(self, model: nn.Module, level: int) -> nn.Module:
        names = self.trained(model, level)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return model

    # -- run ---------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> RebuildRequest | None:
        """Choose level and resolution; asks for a rebuild where the trained parameters differ from those of now.

        Raises:
            ConfigError: a search without samples to measure on.
            RebuildError: measuring failed on some rank.
        """
        if "unfrozen" not in stage.settings:
            return None
        level, resolution = stage.settings["unfrozen"], stage.settings.get("resolution")
        if stage.settings.get("search"):
            level, resolution = self._decide(ctx, stage)
        before, self._level = self._level, level
        self._resolution = None if self.config.resolution_start is None else resolution
        blueprint = ctx.engine.blueprint
        if self.trained(blueprint, level) == {n for n, p in blueprint.named_parameters() if p.requires_grad}:
            return None
        reason = f"unfreezing level {before} -> {level} of {self.config.stages}"
        return RebuildRequest(surgery=lambda model: self._set_level(model, level), reason=reason)

    def _decide(self, ctx: Context, stage: Stage) -> Candidate:
        """The choice of a searched stage: made once, then kept (also over a resume)."""
        assert ctx.schedule is not None
        assert self.config.search is not None
        number = stage.settings["growth"]  # stages of the run may be cut finer than ours by other methods
        if number not in self._decided:
            earlier = [k for k in self._decided if k < number]
            current = self._decided[max(earlier)] if earlier else None
            sizes = self._resolutions(ctx.schedule.spec)
            found = unfreezing_candidates(current, range(1, self.config.stages + 1), sizes)
            self._decided[number] = (
                found[0] if len(found) == 1 else search_candidates(ctx, number, found, self.trained, self.config.search)
            )
        return self._decided[number]

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Shrink the images to the resolution of the stage; smaller ones stay as they are.

        uint8 images leave as normalised fp32, floating-point images keep their dtype.

        Raises:
            PlanError: the images are not square.
            ConfigError: uint8 images without mean and std.
        """
        side, (height, width) = self._resolution, batch.images.shape[-2:]
        if side is None or max(height, width) <= side:
            return batch
        if height != width:
            raise PlanError(f"{_KEY}: images of {height} x {width} pixels arrived, square ones are needed")
        dtype = batch.images.dtype
        images = shrink(batch.images, side)
        if dtype == torch.uint8:
            if batch.mean is None or batch.std is None:
                raise ConfigError("efftrain.data: uint8 images arrived without mean and std (Batch.mean, Batch.std)")
            batch.images = normalize(images, batch.mean, batch.std, torch.float32)
        else:
            batch.images = images.to(dtype)
        return batch

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Level and resolution of now, and what the searches have chosen, as [stage, level, resolution]."""
        decided = [[k, *chosen] for k, chosen in sorted(self._decided.items())]
        return {"level": self._level, "resolution": self._resolution, "decided": decided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._level, self._resolution = state["level"], state["resolution"]
        self._decided = {k: (level, resolution) for k, level, resolution in state["decided"]}

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Unfreezing level and resolution in pixels of the current stage."""
        found = {"stage/unfrozen": float(self._level)}
        if self._resolution is not None:
            found["stage/resolution"] = float(self._resolution)
        return found

    def decision(self, ctx: Context) -> str:
        """Level and resolution of now, and what the searches have chosen."""
        return repr((self._level, self._resolution, sorted(self._decided.items())))

    def describe(self, stage: Stage) -> str:
        """For example ``"u2 R64"``."""
        settings = stage.settings
        planned = (settings.get("unfrozen"), settings.get("resolution"))
        level, side = self._decided.get(settings.get("growth", -1), planned)
        return " ".join([f"u{level}"] * (level is not None) + [f"R{side}"] * ("resolution" in settings))
