"""S2ViTE as a method: only some heads and MLP neurons are trained, and which ones changes between two steps.

Live units sit in compact slots: parameters, gradients, masters, moments and activations exist for them alone, on any
ZeRO stage. An update gives some slots to other units in place; a smaller number of slots is a rebuild of the
partitions at the edge of a stage.

Source: S2ViTE (Chen et al., NeurIPS 2021, arXiv 2106.04533); growth of heads and neurons is repaired, see
`s2vite_reference` for what the published code does.
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
from ...core.timeline import PlanSpec, Stage, Timeline
from ...models import masked
from ...models.unit_probes import Candidates, UnitProbe, UnitScores
from ...models.units import compact_, compact_request, units_of
from ...zero.masks import ShardedMasks
from ...zero.request import RebuildRequest
from ...zero.skip import loss_scale
from . import s2vite_reference as reference
from .densities import clean_name, mask_digest
from .rules import finite
from .s2vite_config import KEY, LEVEL, S2ViTEConfig
from .s2vite_cost import mac_share, measured_macs
from .s2vite_slots import HEADS, KINDS, NEURONS
from .s2vite_units import Exchanges, LiveUnits, Units, sizes_of
from .s2vite_values import Draws, draw_units, head_sizes, neuron_sizes, write_units
from .schedule import UpdateSchedule, end_step, interval_steps, refuse_without_updates, run_schedule


@register_method
class S2ViTE(Method):
    """Train with part of the heads and neurons, and move to better ones now and then.

    Attributes:
        units: which units live.
        last: step of the latest update, 0 before the first.
        updates: updates that took place.
    """

    name: ClassVar[str] = "s2vite"
    Config: ClassVar[type[S2ViTEConfig]] = S2ViTEConfig
    phase: ClassVar[str] = "weight"
    changes_parameters: ClassVar[bool] = True
    conflicts_with: ClassVar[tuple[str, ...]] = ("svite", "autoprog", "autoprog_zero", "elasticvit")

    config: S2ViTEConfig

    def __init__(self, config: S2ViTEConfig):
        super().__init__(config)
        self.units = LiveUnits()
        self.schedule: UpdateSchedule | None = None
        self.last = self.updates = 0
        self._run_seed = self._side = self._dense_macs = 0
        self._began = self._started = self._due = self._edge = False
        self._probe: UnitProbe | None = None
        self._draws: Draws = {}
        self._scores: dict[str, UnitScores] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._edge_scores: dict[str, Tensor] = {}
        self._last_facts = {"alpha": 0.0, "regrown": 0.0}
        self._measured: dict[str, float] | None = None
        self._digest: str | None = None

    # -- before the run ----------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """One stage, or one for each level of the ramp of counts.

        Raises:
            PlanError: the interval of the updates is longer than the run.
        """
        self._run_seed, self._side = spec.seed, spec.resolution  # `prepare_model` sees neither
        total = round(spec.baseline_steps)
        every = interval_steps(self.config.update_every, spec, total)
        if total > 1:
            refuse_without_updates(KEY, self.config.update_every, every, total)
        return self.config.timeline

    def cost_factor(self, spec: PlanSpec, stage: Stage) -> float:
        """MACs with the stage's densities over those of the full model; 1 with masks on full weights."""
        if not self.config.revive:
            return 1.0
        return mac_share(*self._densities(stage), spec, len(self.config.exclude))

    def _densities(self, stage: Stage) -> tuple[float, float]:
        return self.config.levels[stage.settings.get(LEVEL, 0)]

    @property
    def _seed(self) -> int:
        return self._run_seed if self.config.seed is None else self.config.seed

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Leave the seeded first units, in place.

        Raises:
            ModelError: naming the layer whose units are not known.
        """
        self._measure(model)
        first, last = (self.units.counts_at(self.config.levels[at], self.config.exclude) for at in (0, -1))
        if all(last[block] == sizes_of(full) for block, full in self.units.full.items()):
            warnings.warn(f"{KEY}: all heads and neurons are kept, nothing changes", NoEffectWarning, 2)
        self.units.draw(first, self._seed)
        return self._store(model, self.units.slots)

    def _measure(self, model: nn.Module) -> None:
        """Sizes and MACs of the full model.

        Raises:
            ModelError: it cannot be taken.
        """
        try:
            full = self.units.full = units_of(model)
        except ModelError as error:
            raise ModelError(f"{KEY}: {error}") from error
        for name in self.config.exclude:
            if name not in full:
                raise ModelError(f'{KEY}.exclude: {type(model).__name__} has no block "{name}" ({", ".join(full)})')
        self._dense_macs = measured_macs(model, self._side, selected=False)

    def _store(self, model: nn.Module, slots: Units) -> nn.Module:
        """Bring the full model into the form that is trained: compact, or masked."""
        try:
            if self.config.revive:
                return compact_(model, {b: (of[HEADS], of[NEURONS]) for b, of in slots.items()})
            return reference.mask_model(model, self.units.full, slots)
        except ModelError as error:
            raise ModelError(f"{KEY}: {error}") from error

    def architecture(self) -> dict[str, Any]:
        """Live heads and neurons of every block."""
        return {"units": {block: [of[HEADS], of[NEURONS]] for block, of in self.units.counts().items()}}

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Give every block as many slots as the checkpoint has, which then brings values and units.

        Raises:
            ModelError: another model.
        """
        self._measure(model)
        units, full = architecture.get("units", {}), self.units.full
        if set(units) != set(full):
            raise ModelError(f"{KEY}: the checkpoint has the blocks {', '.join(units)}, not {', '.join(full)}")
        slots = {b: {HEADS: tuple(range(h)), NEURONS: tuple(range(n))} for b, (h, n) in units.items()}
        return self._store(model, slots)

    # -- stages ------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> RebuildRequest | None:
        """Give up the units with the lowest scores where the stage has fewer. Collective.

        Raises:
            PlanError: the stage has more units than are there.
        """
        self._changed()  # other methods may have changed how many tokens the blocks see
        counts = self.units.counts_at(self._densities(stage), self.config.exclude)
        now = self.units.counts()
        if counts == now:
            return None
        more = [b for b in counts if any(counts[b][kind] > now[b][kind] for kind in KINDS)]
        if more:
            b = more[0]
            raise PlanError(f"{KEY}.ramp: {b} has {now[b]}, this stage needs {counts[b]}; counts only fall")
        sharded, sizes = ShardedMasks(ctx.engine), units_of(ctx.engine.blueprint)
        scores, by = {}, "score"
        for block in (b for b in counts if counts[b] != now[b]):
            heads = self._edge_scores.get(block)
            if heads is None or not finite(heads):  # the step before the edge was skipped
                heads, by = head_sizes(sharded, block, sizes[block]), "size"
            scores[block] = {HEADS: heads, NEURONS: neuron_sizes(sharded, block)}
        keep, after = self.units.removal(counts, scores)
        request = compact_request(ctx.engine.blueprint, keep)
        self.units.before, self.units.slots, self._edge_scores = self.units.slots, after, {}
        ctx.record("units_removed", live=self.architecture()["units"], by=by, map=request.table())
        return request

    def on_rebuilt(self, ctx: Context) -> None:
        """The module is new."""
        if self._probe is not None:
            self._probe.stop()
        self._probe = self._scores = None
        self._changed()

    def _changed(self) -> None:
        self._measured = self._digest = None

    # -- steps -------------------------------------------------------------------------------------------------

    def on_step_start(self, ctx: Context) -> None:
        """Begin to score units where an update is due, or the counts fall after this step."""
        if not self._started:
            self._start(ctx)
        assert self.schedule is not None
        assert ctx.schedule is not None
        self._edge = ctx.schedule.stage_at(ctx.step + 1).settings.get(LEVEL, 0) != ctx.settings.get(LEVEL, 0)
        # an update would leave units without a score at the edge; it follows after it
        self._due = self.schedule.due(ctx.step, self.last) and not self._edge
        if not (self._due or self._edge):
            return
        candidates: dict[str, Candidates] = {}
        if self._due and self.config.revive:
            self._draws, candidates = draw_units(self.units, self._seed, ctx.step, ctx.device)
        self._probe = UnitProbe(ctx.engine.module, candidates)
        self._probe.start()
        if not self.config.revive:
            masked.capture(ctx.engine.module, True)

    def _start(self, ctx: Context) -> None:
        """First step of this process: the schedule, and in a fresh run the journal.

        Raises:
            PlanError: the length of the run is not known.
        """
        run, config = run_schedule(KEY, ctx), self.config
        total = run.total_steps
        every = interval_steps(config.update_every, run.spec, total)
        end = end_step(total, config.end)
        self.schedule = UpdateSchedule(total, every, end, config.alpha, config.initial)
        self._started = True
        if self._began:  # resumed
            return
        self._began = True
        self.schedule.warn_if_empty(KEY)
        if not config.revive:
            ShardedMasks(ctx.engine).apply(masked.masks_of(ctx.engine.module))
        self.units.explore()
        facts = self._facts(ctx)
        ctx.record(
            "units",
            every=every,
            updates=len(self.schedule.steps),
            revive=config.revive,
            **{key: facts.get(key) for key in ("heads", "neurons", "macs")},
            dense_macs=self._dense_macs or None,
            live=self.architecture()["units"],
            digest=self.decision(ctx),
        )

    def on_boundary(self, ctx: Context) -> None:
        """Scores of the global batch. Collective."""
        if self._probe is None:
            return
        scale, module = loss_scale(ctx.engine), ctx.engine.module
        self._probe.stop()
        self._scores = self._probe.scores(scale)
        self._probe = None
        if not self.config.revive:
            found = masked.dense_gradients(module, scale)
            masked.capture(module, False)
            self._gradients = {clean_name(name): gradient for name, gradient in found.items()}

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Update the units where it is due; a step that was skipped leaves that to the next one.

        Raises:
            DesyncError: the ranks' units differ after an update.
        """
        due, edge, scores = self._due, self._edge, self._scores
        self._due = self._edge = False
        self._scores = None
        if self._probe is not None:  # the guard has refused the step
            self._probe.stop()
            self._probe = None
            if not self.config.revive:
                masked.capture(ctx.engine.module, False)
        if edge:
            self._edge_scores = {b: of.head_prune for b, of in scores.items()} if applied and scores else {}
        elif due and applied and scores is not None:
            self._update(ctx, scores)
        elif due:
            ctx.record("unit_update_postponed", reason="the optimizer step was skipped")
        self._draws, self._gradients = {}, {}
        if applied and not self.config.revive:
            ShardedMasks(ctx.engine).apply(masked.masks_of(ctx.engine.module), moments=False)

    def _update(self, ctx: Context, scores: Mapping[str, UnitScores]) -> None:
        start = time.monotonic()
        assert self.schedule is not None
        alpha, units, sharded = self.schedule.fraction(ctx.step), self.units, ShardedMasks(ctx.engine)
        sizes = {block: neuron_sizes(sharded, block) for block in units.slots}
        if self.config.revive:
            prune = {block: {HEADS: scores[block].head_prune, NEURONS: sizes[block]} for block in units.slots}
            done = units.decide(prune, units.scored(scores), alpha, self.config.exclude_just_dropped)
        else:
            done = units.decide(*reference.scores_of(units, scores, sizes, self._gradients), alpha)
        if done is None:
            ctx.record("unit_update_postponed", reason="weights or scores are not finite")
            return
        units.adopt(done)
        if self.config.revive:
            self._write(ctx, done)
        else:  # `on_step_end` writes the zeros
            masked.set_masks(ctx.engine.module, reference.unit_masks(ctx.engine.module, units.full, units.slots))
        self.last = ctx.step
        self.updates += 1
        self._changed()
        every = [e for of in done.values() for e in of.values()]
        dropped, regrown = sum(len(e.dropped) for e in every), sum(len(e.regrown) for e in every)
        self._last_facts = {"alpha": alpha, "regrown": regrown / max(1, dropped)}
        what = f"{KEY}: the units differ between the ranks after the update at step {ctx.step}"
        digest = same_on_all(self.decision(ctx), what)
        facts = self._facts(ctx)
        ctx.record(
            "unit_update",
            alpha=alpha,
            **{key: facts.get(key) for key in ("explored_heads", "explored_neurons", "macs")},
            dropped=dropped,
            regrown_share=self._last_facts["regrown"],
            layers={b: {k: [len(e.dropped), len(e.regrown)] for k, e in of.items()} for b, of in done.items()},
            heads={block: list(of[HEADS].slots) for block, of in done.items()},
            digest=digest,
            seconds=time.monotonic() - start,
        )

    def _write(self, ctx: Context, done: Exchanges) -> None:
        write_units(ShardedMasks(ctx.engine), done, self._draws)

    # -- state and words ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The unit in every slot, what ever lived, the last update, and scores for the edge of a stage."""
        return {
            **self.units.state_dict(),
            "last": self.last,
            "updates": self.updates,
            "began": self._began,
            "facts": dict(self._last_facts),
            "edge": {block: scores.detach().cpu() for block, scores in self._edge_scores.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.units.load_state_dict(state)
        self.last, self.updates, self._began = int(state["last"]), int(state["updates"]), bool(state["began"])
        self._last_facts = {key: float(value) for key, value in state["facts"].items()}
        self._edge_scores = dict(state["edge"])
        self._due = self._edge = False
        self._probe = self._scores = None
        self._draws, self._gradients = {}, {}
        self._changed()

    def decision(self, ctx: Context) -> str:
        """Digest of the units in all slots."""
        if self._digest is None:
            self._digest = self.units.digest()
            if not self.config.revive:
                self._digest += mask_digest(_masks(ctx))
        return self._digest

    def _facts(self, ctx: Context) -> dict[str, float]:
        """Densities and explored shares of heads and neurons; forward MACs where the model is of a known kind."""
        if self._measured is None:
            found, module = self.units.facts(), ctx.engine.module
            if self.config.revive:
                macs = measured_macs(module, self._side)
            else:
                heads = [of[HEADS] for of in self.units.counts().values()]
                macs = measured_macs(module, self._side, _masks(ctx), heads)
            self._measured = {**found, "macs": macs} if macs and self._dense_macs else found
        return self._measured

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Densities, shares of units that ever lived, updates, the last one's figures, MACs."""
        if not self._started:
            return {}
        facts = {**self._last_facts, **self._facts(ctx), "updates": float(self.updates)}
        if "macs" in facts:
            facts["macs_share"] = facts.pop("macs") / self._dense_macs
        return {f"sparse/{key}": value for key, value in facts.items()}

    def pictures(self, ctx: Context) -> dict[str, Tensor]:
        """Maps of the heads and of the neurons of all blocks."""
        return {f"sparse/{kind}": picture for kind, picture in self.units.maps().items()}

    def describe(self, stage: Stage) -> str:
        """For example ``"heads 0.6 neurons 0.6"``."""
        return "heads {:g} neurons {:g}".format(*self._densities(stage))


def _masks(ctx: Context) -> dict[str, Tensor]:
    return {clean_name(name): mask for name, mask in masked.masks_of(ctx.engine.module).items()}
