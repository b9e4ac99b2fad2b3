"""Attention sparsity as a method: block masks for the attention of every head, learned by prune-and-grow, or fixed.

The rule is that of SViTE (Chen et al., NeurIPS 2021, arXiv 2106.04533) with blocks of attention in the place of
weights: the live blocks that carry the least attention go, and those come whose softmax entries have the largest
gradient. It is ours; the paper has no sparse attention.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import ModelError, NoEffectWarning, PlanError
from ...core.method import Method
from ...core.ranks import same_on_all
from ...core.registry import register_method
from ...core.timeline import PlanSpec, Segment, Stage, Timeline
from ...cost.plan import bandwidth_of
from ...kernels.attention import BlockMask
from ...models.attention import masked_attention, update_routes
from ...models.attention_scores import BlockScores, capture_scores, collect_scores
from ...zero.skip import loss_scale
from .attention_config import KEY, AttentionConfig
from .attention_masks import SHORT
from .attention_model import Masked, check_length, check_resumed, mask_attention, update_layer
from .attention_sizes import (
    attention_macs,
    check_evaluation,
    check_masks,
    live_share,
    masked_share,
    other_length,
    plan_tokens,
    stage_tokens,
)
from .densities import clean_name, exploration, mask_digest, mask_rng
from .packing import packed, unpacked
from .pictures import mask_map
from .rules import finite
from .schedule import UpdateSchedule, end_step, interval_steps, refuse_without_updates, run_schedule


@register_method
class SViTEAttention(Method):
    """Train with a part of the attention, in blocks that the kernels skip."""

    name: ClassVar[str] = "svite_attention"
    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    phase: ClassVar[str] = "model"
    conflicts_with: ClassVar[tuple[str, ...]] = ("autoprog", "autoprog_zero", "s2vite", "svite_tokens", "elasticvit")

    config: AttentionConfig

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self.schedule: UpdateSchedule | None = None
        self.last = 0
        self.updates = 0
        self._run_seed = 0
        self._side: int | None = None
        self._masked = Masked(0, 0, (0, 0), [])
        self._union: dict[str, Tensor] = {}
        self._started = self._due = False
        self._scores: dict[str, BlockScores] | None = None
        self._last_facts = {"alpha": 0.0, "exchanged": 0.0, "regrown": 0.0}
        self._measured: dict[str, float] | None = None
        self._digest: str | None = None
        self._routed = False

    @property
    def learned(self) -> bool:
        """True where the masks change."""
        return self.config.pattern == "learned"

    # -- before the run ----------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """One stage: masks change no shape and no input.

        Raises:
            PlanError: the sequences are too short, evaluations have others for which there can be no masks, or the
                interval of the updates is longer than the run.
        """
        self._run_seed, self._side = spec.seed, spec.resolution  # `prepare_model` sees neither
        if spec.width:
            check_length(self.config, plan_tokens(spec, spec.resolution), PlanError)
        check_evaluation(self.config, spec)
        total = round(spec.baseline_steps)
        every = interval_steps(self.config.update_every, spec, total)
        if self.learned and "update_every" in self.config.model_fields_set:
            refuse_without_updates(KEY, self.config.update_every, every, total)
        return Timeline((Segment(0.0, 1.0),))

    def cost_factor(self, spec: PlanSpec, stage: Stage) -> float:
        """Share of the MACs that is left: ``1 - s (1 - density) N / (6 d + N)`` with the live share of the blocks.

        Counts the blocks of a ViT whose MLPs are four times as wide, what lies before and after them as nothing; s is
        the share of these blocks that is not excluded. 1 where the width d is not known, or blocks are excluded and
        their number is not known. Whether time follows is for the dispatch table to say.

        Raises:
            PlanError: learned masks and a stage with another number of tokens, or a pattern that cannot be for so many.
        """
        tokens, full = (
            plan_tokens(spec, side) for side in (bandwidth_of(stage.settings, spec.resolution), spec.resolution)
        )
        if self.learned and tokens != full:
            raise PlanError(other_length(stage, tokens, full))
        if not spec.width or (tokens <= SHORT and not self.config.allow_short):
            return 1.0
        check_masks(self.config, tokens, spec.prefix, _where(stage))
        dead = masked_share(self.config, spec.depth) * (1 - live_share(self.config, tokens, spec.prefix))
        return 1 - dead * tokens / (6 * spec.width + tokens)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Give the attention layers their masks, in place; no parameter is touched.

        Raises:
            ModelError: naming what cannot take a mask.
        """
        self._mask(model)
        return model

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Give the attention layers masks; the checkpoint brings their values.

        Raises:
            ModelError: the checkpoint's masks have other blocks or another number of tokens.
        """
        self._mask(model)
        if architecture != (own := self.architecture()):
            raise ModelError(f"{KEY}: the checkpoint has masks with {architecture}, they would now be {own}")
        return model

    def _mask(self, model: nn.Module) -> None:
        self._masked = mask_attention(model, self.config, self._side, self._seed)

    @property
    def _seed(self) -> int:
        return self._run_seed if self.config.seed is None else self.config.seed

    def architecture(self) -> dict[str, Any]:
        """Block and length of the masks."""
        return {"tokens": self._masked.tokens, "block": self.config.block, "layers": list(self._masked.layers)}

    # -- steps -------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> None:
        """Refuse stages of other lengths, for which learned masks cannot be; make the masks of fixed patterns.

        Raises:
            PlanError: see above, no stage is long enough, or the pattern cannot be for one of them.
        """
        assert ctx.schedule is not None
        self._measured = None
        module = ctx.engine.module
        full = next(iter(masked_attention(module).values())).block_mask.q_len
        lengths = {s.index: stage_tokens(module, s, full, ctx.schedule.spec) for s in ctx.schedule.stages}
        if self.learned:
            for other in ctx.schedule.stages:
                if lengths[other.index] != full:
                    raise PlanError(other_length(other, lengths[other.index], full))
            return
        check_length(self.config, max(lengths.values()), PlanError)
        for other in ctx.schedule.stages:
            if lengths[other.index] != full:
                check_masks(self.config, lengths[other.index], self._masked.prefix, _where(other))
        self._current(ctx)

    def on_step_start(self, ctx: Context) -> None:
        """Begin to collect scores where an update is due."""
        if not self._started:
            self._start(ctx)
        if not self._routed:
            self._route(ctx)
        self._due = self.schedule is not None and self.schedule.due(ctx.step, self.last)
        if self._due:
            capture_scores(masked_attention(ctx.engine.module), True)

    def _start(self, ctx: Context) -> None:
        """First step of this process: the schedule, and in a fresh run the journal.

        Raises:
            PlanError: masks are learned, and the length of the run is not known.
            ConfigError: a resumed run's masks do not follow the configuration.
        """
        config, total, every, end = self.config, 0, 0, 0
        if self.learned:
            run = run_schedule(KEY, ctx)
            total = run.total_steps
            every, end = interval_steps(config.update_every, run.spec, total), end_step(total, config.end)
            self.schedule = UpdateSchedule(total, every, end, config.alpha, config.initial)
        layers = self._layers(ctx)
        if self._union:
            check_resumed(config, layers, self._masked)
        self._started = True
        if self._union:
            return
        if self.schedule is not None:
            self.schedule.warn_if_empty(KEY)
        self._union = {name: module.block_mask.keep.clone() for name, module in layers.items()}
        facts = self._facts(ctx)
        ctx.record(
            "attention_masks",
            tokens=self._masked.tokens,
            block=config.block,
            pattern=config.pattern,
            density=facts["density"],
            every=every,
            updates=0 if self.schedule is None else len(self.schedule.steps),
            macs=facts.get("macs"),
            dense_macs=facts.get("dense_macs"),
            live={name: module.block_mask.row_cnt.sum(1).tolist() for name, module in layers.items()},
            routes=self._route(ctx),
            digest=self.decision(ctx),
        )

    def _route(self, ctx: Context) -> dict[str, str]:
        """Let the dispatch table choose between kernels and SDPA for the masks as they are."""
        engine, self._routed = ctx.engine, True
        autocast = getattr(engine, "torch_autocast_enabled", bool)()
        routes = update_routes(engine.module, engine.torch_autocast_dtype() if autocast else None)
        masked = {name: routes[name] for name in masked_attention(engine.module)}
        if ctx.device.type == "cuda" and self.updates == 0 and all(route == "sdpa" for route in masked.values()):
            warnings.warn(
                f"{KEY}: the dispatch table gives these masks to SDPA, which computes every block, so no time is saved "
                "(few pruned blocks, fp32, or a GPU without rows in the table); kernels/attention/README.md says more",
                NoEffectWarning,
                2,
            )
        return masked

    def on_boundary(self, ctx: Context) -> None:
        """Sum the scores over the ranks. Collective."""
        if self._due:
            layers = masked_attention(ctx.engine.module)
            found = collect_scores(layers, loss_scale(ctx.engine))
            capture_scores(layers, False)
            self._scores = {clean_name(name): scores for name, scores in found.items()}

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Update the masks where it is due; a step that was skipped leaves that to the next one.

        Raises:
            DesyncError: the ranks' masks differ after an update.
        """
        due, scores = self._due, self._scores
        self._due, self._scores = False, None
        if due and scores is None:  # the guard has refused the step
            capture_scores(masked_attention(ctx.engine.module), False)
        if not due:
            return
        if not applied or scores is None:
            ctx.record("attention_update_postponed", reason="the optimizer step was skipped")
        elif not finite(*(tensor for pair in scores.values() for tensor in pair)):
            ctx.record("attention_update_postponed", reason="scores are not finite")
        else:
            self._update(ctx, scores)

    def _update(self, ctx: Context, scores: Mapping[str, BlockScores]) -> None:
        start = time.monotonic()
        assert self.schedule is not None
        alpha, layers = self.schedule.fraction(ctx.step), self._layers(ctx)
        rows = {}
        for name, module in layers.items():
            rng = mask_rng(self._seed, name, "attention", ctx.step)
            rows[name] = update_layer(module.block_mask, scores[name], self.config, self._masked.prefix, alpha, rng)
        self.last, self.updates = ctx.step, self.updates + 1
        self._measured = self._digest = None
        live, dropped, regrown = (sum(sum(row[key]) for row in rows.values()) for key in ("live", "dropped", "regrown"))
        self._last_facts = {
            "alpha": alpha,
            "exchanged": (dropped - regrown) / max(1, live),
            "regrown": regrown / max(1, dropped),
        }
        for name, module in layers.items():
            keep = module.block_mask.keep
            self._union[name] = self._union[name].to(keep.device) | keep
        self._route(ctx)
        what = f"{KEY}: the masks differ between the ranks after the update at step {ctx.step}"
        digest = same_on_all(self.decision(ctx), what)
        facts = self._facts(ctx)
        ctx.record(
            "attention_update",
            alpha=alpha,
            density=facts["density"],
            explored=facts["explored"],
            macs=facts.get("macs"),
            dropped=dropped,
            exchanged=self._last_facts["exchanged"],
            regrown_share=self._last_facts["regrown"],
            layers=rows,
            digest=digest,
            seconds=time.monotonic() - start,
        )

    def on_rebuilt(self, ctx: Context) -> None:
        """The module is new: its routes are those of the start."""
        self._measured = self._digest = None
        self._route(ctx)

    def _layers(self, ctx: Context) -> dict[str, nn.Module]:
        """Masked attention layers by clean name, in the module's order."""
        return {clean_name(name): module for name, module in masked_attention(ctx.engine.module).items()}

    def _current(self, ctx: Context) -> dict[str, tuple[BlockMask | None, int]]:
        """The mask that each layer uses in the current stage, and the number of tokens."""
        found = {}
        for name, module in self._layers(ctx).items():
            mask = module.block_mask
            tokens = mask.q_len
            if ctx.schedule is not None and ctx.stage is not None:
                tokens = stage_tokens(ctx.engine.module, ctx.stage, mask.q_len, ctx.schedule.spec)
            if tokens != mask.q_len and module.length_masks is not None:
                mask = module.length_masks.at(tokens, mask.keep.device)
            found[name] = (mask, tokens)
        return found

    # -- state and words ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Last update and what was ever live; the masks are buffers of the module."""
        union = {name: [list(keep.shape), packed(keep)] for name, keep in self._union.items()}
        return {"last": self.last, "updates": self.updates, "facts": dict(self._last_facts), "union": union}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.last, self.updates = int(state["last"]), int(state["updates"])
        self._last_facts = {key: float(value) for key, value in state["facts"].items()}
        self._union = {name: unpacked(bits, shape) for name, (shape, bits) in state["union"].items()}
        self._scores, self._due, self._routed = None, False, False
        self._started = False  # the next step compares these masks with the configuration
        self._measured = self._digest = None

    def decision(self, ctx: Context) -> str:
        """Digest of all masks."""
        if self._digest is None:
            self._digest = mask_digest({n: module.block_mask.keep for n, module in self._layers(ctx).items()})
        return self._digest

    def _facts(self, ctx: Context) -> dict[str, float]:
        """Live share of the blocks, share that was ever live, and forward MACs of an image where the model is known."""
        if self._measured is None:
            current = self._current(ctx)
            live = sum(int(mask.keep.sum()) for mask, _ in current.values() if mask is not None)
            blocks = sum(mask.keep.numel() for mask, _ in current.values() if mask is not None)
            self._measured = {"density": live / blocks if blocks else 1.0, "explored": exploration(self._union)}
            try:
                self._measured |= attention_macs(ctx.engine.module, current)
            except (ModelError, AttributeError):  # no plain vision transformer
                pass
        return self._measured

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Live share of the blocks, share that was ever live, the last update's figures, share of the MACs."""
        if not self._started:
            return {}
        facts = self._facts(ctx)
        found = {"sparse_attention/density": facts["density"]}
        if "macs" in facts:
            found["sparse_attention/macs_share"] = facts["macs"] / facts["dense_macs"]
        if self.learned:
            found |= {f"sparse_attention/{key}": value for key, value in self._last_facts.items()}
            found["sparse_attention/explored"] = facts["explored"]
            found["sparse_attention/updates"] = float(self.updates)
        return found

    def pictures(self, ctx: Context) -> dict[str, Tensor]:
        """The blocks of all layers, heads below each other."""
        return {
            "sparse_attention/masks": mask_map(
                {n: m.block_mask.keep.flatten(0, 1) for n, m in self._layers(ctx).items()}
            )
        }

    def describe(self, stage: Stage) -> str:
        """For example ``"attention 0.5 b64"``, ``"attention window 9 b64"``."""
        config = self.config
        what = {"window": f"window {config.window}", "strided": f"stride {config.stride}"}
        return f"attention {what.get(config.pattern, f'{config.target:g}')} b{config.block}"


def _where(stage: Stage) -> str:
    return f"stage {stage.index} ({dict(stage.settings)})"
