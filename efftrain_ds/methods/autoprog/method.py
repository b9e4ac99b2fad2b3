"""AutoProg as a method: the network starts small and grows during training, by a ramp or by a search.

Sources: AutoProg (Li et al., CVPR 2022, arXiv 2203.14509); AutoProg-One in its extension (arXiv 2410.00350).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, ModelError, PlanError
from ...core.method import Method
from ...core.registry import register_method
from ...core.timeline import PlanSpec, Stage, Timeline
from ...models.adapters import accepts_sizes
from ...models.drop_path import ensure_drop_path, set_drop_path
from ...models.elastic import paths_for, set_paths, skipped_names
from ...models.growth import grow_request, select_request
from ...models.stacks import depth_of, full_depth, prepare_growth, split_depth, truncate
from ...zero import access
from ...zero.hold import Hold
from ...zero.request import RebuildRequest
from .candidates import Candidate, candidates, draw
from .config import AutoProgConfig
from .schedules import levels
from .search import Search, StepTimer, normalised, resized
from .timeline import KEY, manual_timeline, searched_timeline, stage_candidates


@register_method
class AutoProg(Method):
    """Grow depth, resolution and regularisation in stages.

    Attributes:
        decided: (depth, resolution) of every searched stage that is chosen.
        search: the search that is going on, or None.
    """

    name: ClassVar[str] = "autoprog"
    Config: ClassVar[type[AutoProgConfig]] = AutoProgConfig
    phase: ClassVar[str] = "model"
    changes_parameters: ClassVar[bool] = True
    changes_inputs: ClassVar[bool] = True
    conflicts_with: ClassVar[tuple[str, ...]] = ("autoprog_zero", "elasticvit")

    config: AutoProgConfig

    def __init__(self, config: AutoProgConfig):
        super().__init__(config)
        self.decided: dict[int, Candidate] = {}
        self.search: Search | None = None
        self._alphas: list[float] = []
        self._drawn: Candidate | None = None
        self._timer = StepTimer()
        self._hold: Hold | None = None

    # -- before the run ----------------------------------------------------------------------------------------

    @property
    def needs_average(self) -> bool:
        """MoGrow takes its weights from the average, and a search measures it."""
        return self.config.operator == "mogrow" or self.config.search is not None

    def plan(self, spec: PlanSpec) -> Timeline:
        """Stages of the ramps, of the own schedule, or of the search with what is decided so far.

        Raises:
            PlanError: the model, the resolution or the length of the run does not fit.
        """
        if self.config.search is not None:
            return searched_timeline(self.config, spec, self.decided)
        return manual_timeline(self.config, spec)

    def alternatives(self, spec: PlanSpec) -> dict[str, Timeline]:
        """The cheapest and the dearest schedule that a search can still choose."""
        if self.config.search is None or len(self.decided) >= self.config.stages - 1:
            return {}
        return {
            policy: searched_timeline(self.config, spec, self.decided, policy) for policy in ("cheapest", "dearest")
        }

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Make the depth changeable and cut the model to that of the first stage.

        Raises:
            ModelError: blocks that cannot be added, or images of one size only.
        """
        resolutions_change = self.config.schedule is not None or self.config.resolution_start not in (None, 1.0)
        accepted, reason = accepts_sizes(model)
        if resolutions_change and not accepted:
            raise ModelError(f"{KEY} needs a model that takes several input sizes: {reason}")
        if not self._grows():
            return self._rated(model)
        model = self._prepared(model)
        self._check_depths(model)
        return truncate(model, self._first_depth(full_depth(model)))

    def _check_depths(self, model: nn.Module) -> None:
        """Refuse levels between which a stack would shrink (VOLO divides its depth by a rule that can do that).

        Raises:
            ModelError: with the two levels.
        """
        full = full_depth(model)
        if self.config.schedule is not None:
            depths = [stage.depth for stage in self.config.schedule]
        else:
            depths = sorted(set(levels(self.config.depth_start, full, 1, self.config.stages)))
        for low, high in pairwise(depths):
            before, after = split_depth(model, low), split_depth(model, high)
            if any(b < a for a, b in zip(before, after, strict=True)):
                raise ModelError(
                    f"{KEY}: depth {low} -> {high} would shrink a stack of {type(model).__name__} "
                    f"({list(before)} -> {list(after)}); choose other depths or another number of stages"
                )

    def _grows(self) -> bool:
        return self.config.schedule is not None or self.config.depth_start is not None

    @staticmethod
    def _prepared(model: nn.Module) -> nn.Module:
        return ensure_drop_path(prepare_growth(model))

    @classmethod
    def _rated(cls, model: nn.Module) -> nn.Module:
        """A model of constant depth, with drop-path rates that can be set where its blocks are of a known kind."""
        try:
            return cls._prepared(model)
        except ModelError:
            return model

    def _first_depth(self, full: int) -> int:
        if self.config.schedule is not None:
            return self.config.schedule[0].depth
        depths = levels(self.config.depth_start, full, 1, self.config.stages)
        return min(d for d, _ in candidates(None, depths, (0,))) if self.config.search is not None else depths[0]

    def architecture(self) -> dict[str, Any]:
        """The depth of the module, of the supernet during a search."""
        return {"depth": self._depth} if self._depth else {}

    _depth = 0

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Cut the full module to a saved depth."""
        if not self._grows():
            return self._rated(model)
        model = self._prepared(model)
        depth = architecture.get("depth")
        return truncate(model, depth) if depth else truncate(model, self._first_depth(full_depth(model)))

    # -- stages ------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> RebuildRequest | None:
        """Grow, start a search, or end one; a second call for the same stage does nothing.

        Raises:
            PlanError: the search has no fixed samples or the model's depth is not the planned one.
        """
        if self._grows() and not self._depth:
            self._depth = depth_of(ctx.engine.blueprint)
        request = self._searched(ctx, stage) if self.config.search is not None else self._manual(ctx, stage)
        if request is None:
            self._regularise(ctx)
        return request

    def _manual(self, ctx: Context, stage: Stage) -> RebuildRequest | None:
        depth = stage.settings.get("depth", self._depth)
        return self._growth(ctx, depth) if self._grows() and depth != self._depth else None

    def _growth(self, ctx: Context, depth: int) -> RebuildRequest:
        """The change to a larger depth by the configured operator."""
        operator = "interpolation" if self.config.operator == "mogrow" else self.config.operator
        # before the first step the average is the weights themselves
        averaged = self.config.operator == "mogrow" and ctx.step > 0
        request = grow_request(
            ctx.engine.blueprint,
            depth,
            operator,
            seed=ctx.seed,
            values="ema" if averaged else "online",
            reset=self.config.state == "reset",
        )
        ctx.record("growth", depth=[self._depth, depth], operator=self.config.operator, map=request.table())
        self._depth = depth
        return request

    def _searched(self, ctx: Context, stage: Stage) -> RebuildRequest | None:
        number, last = stage.settings["growth"], self.config.stages - 1
        if self.search is not None and (self.search.stage != number or not stage.settings.get("search")):
            request = self._choose(ctx)
            if number == self.decided_stage:
                return request
            # the stage ended with its search: the next one grows from what was chosen, in one rebuild each
            if request is not None:
                ctx.engine.rebuild(request)
        if number == last:
            assert ctx.schedule is not None
            if last not in self.decided:
                full = full_depth(ctx.engine.blueprint) if self._grows() else 0
                self.decided[last] = (full, ctx.schedule.spec.resolution if self._resolutions() else 0)
            depth = self.decided[last][0]
            return self._growth(ctx, depth) if self._grows() and depth != self._depth else None
        if number in self.decided or self.search is not None:
            return None
        # a schedule without its searches (as for measuring step times) is a manual one
        return self._open(ctx, number) if stage.settings.get("search") else self._manual(ctx, stage)

    @property
    def decided_stage(self) -> int:
        """The last stage that is chosen, -1 before the first."""
        return max(self.decided, default=-1)

    def _resolutions(self) -> bool:
        return self.config.resolution_start is not None

    def _open(self, ctx: Context, number: int) -> RebuildRequest | None:
        assert ctx.schedule is not None
        if ctx.probe_batches is None:
            raise ConfigError(
                f"{KEY}.search needs fixed labelled samples: use launch/train.py, or pass probe_batches= to "
                "efftrain_ds.initialize"
            )
        options = stage_candidates(self.config, ctx.schedule.spec, self.decided.get(number - 1))
        top = max(d for d, _ in options)
        if len(options) == 1:  # nothing to choose: train it
            self.decided[number] = options[0]
            return self._growth(ctx, top) if top and top != self._depth else None
        base = self._depth
        self.search = Search(number, options, base, top or base)
        ctx.record("growth_supernet", stage=number, base=base, top=self.search.top, options=[list(o) for o in options])
        return self._growth(ctx, top) if top and top != base else None

    def _choose(self, ctx: Context) -> RebuildRequest | None:
        """End the search: the chosen sub-network keeps the weights it was trained with."""
        search, settings = self.search, self.config.search
        assert search is not None
        assert settings is not None
        self._drawn = None  # or the end of the measurement would bring back the path of the last step
        self._set_paths(ctx, None)
        search.measure(ctx, settings.probe_samples, resized)
        chosen, choice = search.finish(ctx, settings.cost, self._alphas[-1] if self._alphas else None)
        self._alphas.append(choice.alpha)
        self.decided[search.stage] = chosen
        depth = search.depth(chosen)
        self.search = None
        if not self._grows() or depth == self._depth:
            return None
        paths = paths_for(ctx.engine.blueprint, search.base, depth)
        request = select_request(ctx.engine.blueprint, paths, reset=self.config.state == "reset")
        ctx.record("growth", depth=[self._depth, depth], operator="select", map=request.table())
        self._depth = depth
        return request

    def on_rebuilt(self, ctx: Context) -> None:
        """The module is new: set what is not a parameter."""
        if self._grows():
            self._depth = depth_of(ctx.engine.blueprint)
        self._hold = None
        self._regularise(ctx)

    def _regularise(self, ctx: Context) -> None:
        """Drop-path rates of the stage, in place."""
        rate = self._rate(ctx)
        if rate is not None and getattr(ctx.engine.module, "growth_slots", None) is not None:
            set_drop_path(ctx.engine.module, rate)

    @staticmethod
    def _rate(ctx: Context) -> float | None:
        """Drop-path rate of the last block: the stage's, else the model's own spread over the depth of now."""
        rate = ctx.settings.get("drop_path")
        if rate is None and ctx.schedule is not None:
            rate = ctx.schedule.spec.drop_path or None
        return rate

    # -- steps -------------------------------------------------------------------------------------------------

    def on_step_start(self, ctx: Context) -> None:
        """In a search: measure where it is due, then draw the sub-network of this step."""
        search = self.search
        if search is None:
            return
        assert ctx.schedule is not None
        assert self.config.search is not None
        start, end = _search_span(ctx, search.stage)
        spec = ctx.schedule.spec
        epoch = spec.samples / spec.batch if spec.samples else float(end - start)
        due = search.instants(start, end, epoch)
        while len(search.losses) < len(due) and due[len(search.losses)] <= ctx.step:
            search.measure(ctx, self.config.search.probe_samples, resized)
        self._drawn = draw(search.options, ctx.seed, ctx.step)
        self._set_paths(ctx, self._drawn)

    def _set_paths(self, ctx: Context, option: Candidate | None) -> None:
        if self.search is None or not self._grows():
            return
        module = ctx.engine.module
        paths = self.search.paths(module, option) if option is not None else None
        set_paths(module, paths)
        rate = self._rate(ctx)
        if rate is not None and option is not None:
            set_drop_path(module, rate, paths)

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Bring the images to the stage's resolution, if they are larger.

        Raises:
            PlanError: images that are not square.
        """
        side = self._side(ctx)
        if self.search is not None:
            self._timer.begin(ctx.device)
        if not side or batch.images.shape[-1] <= side:
            return batch
        if batch.images.shape[-1] != batch.images.shape[-2]:
            raise PlanError(f"{KEY}: square images are needed, found {tuple(batch.images.shape[-2:])}")
        images = normalised(batch.images, batch.mean, batch.std)
        batch.images = resized(images, side)
        return batch

    def _side(self, ctx: Context) -> int:
        if self._drawn is not None:
            return self._drawn[1]
        size = self.decided.get(ctx.settings.get("growth", -1))
        return size[1] if size is not None else ctx.settings.get("resolution", 0)

    def on_boundary(self, ctx: Context) -> None:
        """In a search: blocks that did not run must neither decay nor move."""
        if self.search is None or self._drawn is None:
            return
        seconds = self._timer.end(ctx.device)
        if seconds is not None:
            self.search.time(self._drawn, seconds)
        if not self._grows():
            return
        names = skipped_names(ctx.engine.module)
        if names:
            engine = ctx.engine.deepspeed_engine
            access.zero_skipped_gradients(engine, names)
            self._hold = Hold(access.layout_of(engine), names)

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Put the skipped blocks back as they were."""
        if self._hold is not None:
            if applied:
                self._hold.restore()
            self._hold = None
        if self.search is not None:  # an evaluation of the user's own between steps sees the whole network
            self._drawn = None
            self._set_paths(ctx, None)

    @contextmanager
    def on_eval(self, ctx: Context) -> Iterator[None]:
        """Evaluate the whole network, also inside a search."""
        drawn = self._drawn
        self._set_paths(ctx, None)
        try:
            yield
        finally:
            if drawn is not None:
                self._set_paths(ctx, drawn)

    # -- state and words ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Choices and the search that is going on."""
        return {
            "decided": [[k, *size] for k, size in sorted(self.decided.items())],
            "alphas": list(self._alphas),
            "depth": self._depth,
            "search": self.search.to_plain() if self.search is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.decided = {int(k): (int(d), int(r)) for k, d, r in state["decided"]}
        self._alphas = [float(a) for a in state["alphas"]]
        self._depth = int(state["depth"])
        self.search = Search.from_plain(state["search"]) if state["search"] is not None else None
        self._drawn = self._hold = None

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Depth in blocks, resolution in pixels and alpha of the last search."""
        found = {"stage/depth": float(self._depth)} if self._depth else {}
        side = self._side(ctx)
        if side:
            found["stage/resolution"] = float(side)
        if self._alphas:
            found["search/alpha"] = self._alphas[-1]
        return found

    def decision(self, ctx: Context) -> str:
        """Sub-network of this step, and what the searches have chosen."""
        return repr((self._drawn, sorted(self.decided.items())))

    def describe(self, stage: Stage) -> str:
        """For example ``"d8 R160"``; ``"search d6-12"`` while a supernet is trained."""
        if stage.settings.get("search"):
            if self.search is not None and self.search.stage == stage.settings["growth"]:
                depths = sorted({d for d, _ in self.search.options})
                sides = sorted({r for _, r in self.search.options})
                words = [f"d{depths[0]}-{depths[-1]}"] * bool(depths[-1]) + [f"R{sides[0]}-{sides[-1]}"] * bool(
                    sides[-1]
                )
                return " ".join(["search", *words])
            return "search"
        size = self.decided.get(stage.settings.get("growth", -1))
        depth = size[0] if size is not None else stage.settings.get("depth")
        side = size[1] if size is not None else stage.settings.get("resolution")
        return " ".join([f"d{depth}"] * bool(depth) + [f"R{side}"] * bool(side))


def _search_span(ctx: Context, number: int) -> tuple[int, int]:
    """First step and end of the search of a growth stage (other methods' edges may have cut it)."""
    assert ctx.schedule is not None
    steps = [s for s in ctx.schedule.stages if s.settings.get("search") and s.settings.get("growth") == number]
    return steps[0].start_step, steps[-1].end_step
