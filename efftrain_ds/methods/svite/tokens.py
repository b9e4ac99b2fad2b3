"""Token selection as a method: from the first step on a learned scorer chooses which tokens the blocks see.

Source: SViTE+ (Chen et al., NeurIPS 2021, arXiv 2106.04533). There is no loss of its own: the scorer trains with the
ordinary one, with the optimizer and the learning rate of the other weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn

from ...core.context import Context
from ...core.errors import ModelError, NoEffectWarning, PlanError
from ...core.method import Method
from ...core.registry import register_method
from ...core.timeline import PlanSpec, Segment, Stage, Timeline
from ...cost.macs import vit_macs
from ...cost.plan import bandwidth_of
from ...models.masked import masks_of
from ...models.tokens import TokenSelector, check_keep, insert_selector, kept_tokens, selector_of
from .accounting import LiveCounts, grid_of, live_counts, live_macs
from .densities import clean_name
from .tokens_config import KEY, SETTING, SViTETokensConfig


@register_method
class SViTETokens(Method):
    """Keep only the tokens of an image that a scorer, trained with the model, finds best."""

    name: ClassVar[str] = "svite_tokens"
    Config: ClassVar[type[SViTETokensConfig]] = SViTETokensConfig
    phase: ClassVar[str] = "model"
    # the scorer is a new parameter
    changes_parameters: ClassVar[bool] = True
    # autoprog_zero: the scorer lies below all blocks, so its gradient needs the backward pass that freezing saves
    conflicts_with: ClassVar[tuple[str, ...]] = ("autoprog_zero", "elasticvit", "svite_attention")

    config: SViTETokensConfig

    def __init__(self, config: SViTETokensConfig):
        super().__init__(config)
        self._keep = config.keeps[0]
        self._run_seed = 0
        self._dense: LiveCounts | None = None

    # -- before the run ----------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """One stage for each kept share, with the setting "keep_ratio"."""
        self._run_seed = spec.seed  # `prepare_model` sees no seed
        spans = pairwise([*self.config.edges, 1.0])
        return Timeline(
            tuple(Segment(a, b, {SETTING: keep}) for (a, b), keep in zip(spans, self.config.keeps, strict=True))
        )

    def cost_factor(self, spec: PlanSpec, stage: Stage) -> float:
        """MACs with the kept tokens over those with all of them.

        Exact up to the classifier for a ViT whose MLPs are four times as wide; the share of the tokens where the
        width of the model is not known.
        """
        keep = stage.settings.get(SETTING)
        if keep is None or self.config.select == "mask":
            return 1.0
        side, prefix = bandwidth_of(stage.settings, spec.resolution), spec.prefix
        tokens = (-(-side // spec.stride)) ** 2 + prefix
        kept = kept_tokens(keep, tokens, prefix)
        if not spec.width:
            return kept / tokens
        width, depth = spec.width, stage.settings.get("depth") or spec.depth or 12
        full = vit_macs(side, patch=spec.stride, dim=width, depth=depth, num_classes=0, prefix=prefix)
        block = 12 * width * width * (tokens - kept) + 2 * width * (tokens**2 - kept**2)
        return 1 - depth * block / full

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put the selector into the model, in place.

        Raises:
            ModelError: the model has no place for it, or a share leaves no patch.
        """
        config = self.config
        try:
            insert_selector(
                model, self._keep, config.select, seed=self._run_seed if config.seed is None else config.seed
            )
            for keep in config.keeps:
                check_keep(model, keep)
        except ModelError as error:
            raise ModelError(f"{KEY}: {error}") from error
        with suppress(ModelError, AttributeError):  # a patch embedding or blocks of another kind
            self._dense = live_counts(model)
        if config.keeps == (1.0,):
            warnings.warn(f"{KEY}.keep: 1 keeps all tokens", NoEffectWarning, 2)
        return model

    def architecture(self) -> dict[str, Any]:
        """Kept share now, and the form of the selection."""
        return {"keep": self._keep, "select": self.config.select}

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Put the selector into the model, in place."""
        return self.prepare_model(model)

    # -- run ---------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> None:
        """Take over the kept share of the stage."""
        self._keep = stage.settings.get(SETTING, self._keep)
        selector = self._set(ctx)
        tokens, kept, macs = self._counts(ctx, selector)
        ctx.record("token_selection", keep=self._keep, tokens=tokens, kept=kept, select=self.config.select, **macs)

    def on_rebuilt(self, ctx: Context) -> None:
        """The module is new: set what is not a parameter."""
        self._set(ctx)

    def on_step_start(self, ctx: Context) -> None:
        """Set the temperature and the noise of the step.

        Raises:
            PlanError: the length of the run is not known.
        """
        selector = self._set(ctx)
        selector.tau.fill_(self._tau(ctx))
        selector.noise.fill_(self._noise(ctx))

    @contextmanager
    def on_eval(self, ctx: Context) -> Iterator[None]:
        """Evaluations keep as many tokens as training does at this time, also just after a resume."""
        self._set(ctx)
        yield

    def _set(self, ctx: Context) -> TokenSelector:
        selector = selector_of(ctx.engine.module)
        assert selector is not None
        if selector.keep != self._keep:
            selector.keep = self._keep
        return selector

    def _tau(self, ctx: Context) -> float:
        if ctx.schedule is None:
            return _constant("tau", self.config.tau.start, self.config.tau.end)
        return self.config.tau_at(ctx.step, ctx.schedule.total_steps)

    def _noise(self, ctx: Context) -> float:
        if ctx.schedule is None:
            return _constant("noise", self.config.noise.start, self.config.noise.end)
        return self.config.noise_at(ctx.step, ctx.schedule.total_steps)

    def _counts(self, ctx: Context, selector: TokenSelector) -> tuple[int, int, dict[str, int]]:
        """Tokens of an image of this stage, kept ones, and forward MACs where they can be told.

        "macs" of what lives, "dense_macs" of all tokens, weights, heads and neurons of a model of this depth.
        """
        model: Any = ctx.engine.module
        grid = grid_of(model, bandwidth_of(ctx.settings, ctx.schedule.spec.resolution if ctx.schedule else 0))
        tokens = grid[0] * grid[1] + selector.prefix
        kept = selector.kept(tokens)
        masks = {clean_name(name): mask for name, mask in masks_of(model).items()}
        try:
            dense = live_counts(model)
            if self._dense is not None and len(self._dense.blocks) == len(dense.blocks):
                dense = self._dense  # heads and neurons may be gone since
            macs = {
                "macs": live_macs(model, grid, masks, kept=kept if selector.select == "gather" else None),
                "dense_macs": dense.macs(grid[0] * grid[1], selector.prefix),
            }
        except (ModelError, AttributeError):  # a patch embedding or blocks of another kind
            macs = {}
        return tokens, kept, macs

    # -- state and words ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Kept share now; temperature and noise follow from the step and torch's generator."""
        return {"keep": self._keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._keep = float(state["keep"])

    def decision(self, ctx: Context) -> str:
        """Kept share, temperature and noise; which tokens are kept is every image's own."""
        return f"keep {self._keep:g} tau {self._tau(ctx):.9g} noise {self._noise(ctx):.9g}"

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Kept share, temperature, noise, and the entropy of the scores in nats (see `TokenSelector.entropy`)."""
        selector = selector_of(ctx.engine.module)
        if selector is None:
            return {}
        found = {f"tokens/{name}": float(getattr(selector, name)) for name in ("tau", "noise", "entropy")}
        return {"tokens/keep": self._keep, **found}

    def describe(self, stage: Stage) -> str:
        """For example ``"keep 0.7"``, ``"keep 0.7 masked"``."""
        words = f"keep {stage.settings.get(SETTING, self.config.keep):g}"
        return words + (" masked" if self.config.select == "mask" else "")


def _constant(key: str, start: float, end: float) -> float:
    """The value of a course where the length of the run is not known.

    Raises:
        PlanError: it is not constant.
    """
    if start != end:
        raise PlanError(f"{KEY}.{key} needs the length of the run: set efftrain.run.steps")
    return start
