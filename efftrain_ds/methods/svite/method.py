"""SViTE as a method: masked layers, and topology updates between two optimizer steps on any ZeRO stage.

Sources: SViTE (Chen et al., NeurIPS 2021, arXiv 2106.04533); the other rules are named in `presets`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core import faults
from ...core.context import Context
from ...core.errors import ModelError, NoEffectWarning
from ...core.method import Method
from ...core.ranks import same_on_all
from ...core.registry import register_method
from ...core.timeline import PlanSpec, Segment, Stage, Timeline
from ...models import masked
from ...zero.masks import ShardedMasks
from ...zero.skip import loss_scale
from .accounting import live_facts
from .block import BlockRule
from .config import KEY, SViTEConfig, interval_of, keeps_dead_weights, preset_of
from .custom import check_counts, custom_shares, read_densities
from .densities import clean_name, exact_counts, layer_densities, mask_digest, mask_rng, maskable
from .packing import counts_of, packed, unpacked
from .pictures import mask_map
from .rules import finite, initial_masks
from .schedule import DensitySchedule, UpdateSchedule, end_step, refuse_without_updates, run_schedule

BACKWARD = "weight_backward"
"""Buffer beside a mask: entries that get a gradient, where these are more than the live ones (Top-KAST)."""


@register_method
class SViTE(Method):
    """Train with most weights at zero, and now and then move the live ones to better places."""

    name: ClassVar[str] = "svite"
    Config: ClassVar[type[SViTEConfig]] = SViTEConfig
    phase: ClassVar[str] = "weight"
    conflicts_with: ClassVar[tuple[str, ...]] = ("autoprog", "autoprog_zero")

    config: SViTEConfig

    def __init__(self, config: SViTEConfig):
        super().__init__(config)
        self.preset = preset_of(config)
        self.rule = self.preset.rule
        self.schedule: UpdateSchedule | None = None
        self.last = 0
        self.updates = 0
        self._density: DensitySchedule | None = None
        self._run_seed = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dense: list[str] = []
        self._custom: dict[str, float] | None = None
        self._union: dict[str, Tensor] = {}
        self._started = self._due = False
        self._gradients: dict[str, Tensor] | None = None
        self._last_facts = {"alpha": 0.0, "regrown": 0.0}
        self._measured: dict[str, float] | None = None
        self._digest: str | None = None

    # -- before the run ----------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """One stage: masks change no shape, no input and no cost that could be promised.

        Raises:
            ConfigError: the file of the densities cannot be read.
            PlanError: the interval of the updates is longer than the run.
        """
        self._run_seed = spec.seed  # `prepare_model` sees no seed
        if self.config.densities is not None:
            self._custom = read_densities(self.config.densities, f"{KEY}.densities")
        total = round(spec.baseline_steps)
        every = interval_of(self.config, self.preset, total, spec)
        if self.config.update_every is not None:
            refuse_without_updates(KEY, self.config.update_every, every, total)
        return Timeline((Segment(0.0, 1.0),))

    @property
    def _seed(self) -> int:
        return self._run_seed if self.config.seed is None else self.config.seed

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Mask the layers, in place; weights outside of the masks become zero.

        Raises:
            ModelError: naming the layer that cannot take a mask of this form.
        """
        first = self._masks(model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in first.items():
                weight = parameters[name]
                if hasattr(weight, "ds_id") or weight.is_meta:  # the first step writes these zeros
                    if self.config.rescale_init:
                        raise ModelError(f"{KEY}.rescale_init: {name} is already partitioned by ZeRO-3")
                    continue
                if self.config.rescale_init:
                    weight.div_((mask.sum() / mask.numel()).sqrt().to(weight))
                if not keeps_dead_weights(self.rule):
                    weight.mul_(mask.to(weight.device))
        return model

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Mask the layers; the checkpoint brings the masks."""
        self._masks(model)
        return model

    def _masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Put the seeded first masks on the layers of a model; the masks by the names of the model's parameters."""
        config, rule = self.config, self.rule
        known = {clean_name(n) for n, _ in [*model.named_modules(), *model.named_parameters()]}
        for name in config.exclude:
            if name not in known:
                raise ModelError(f'{KEY}.exclude: {type(model).__name__} has no module or weight "{name}"')
        wide = keeps_dead_weights(rule)
        try:
            drawn = self._drawn(model)
            real = {clean_name(name): name for name, _ in model.named_parameters()}
            masks = {real[name]: rule.expand(mask, self._shapes[name]) for name, mask in drawn.items()}
            masked.mask_layers(model, masks, "dense" if wide or self.preset.moments == "dense" else "masked")
        except ModelError as error:
            raise ModelError(f"{KEY}: {error}") from error
        if wide:
            for name, module in masked.masked_layers(model).items():
                module.register_buffer(BACKWARD, torch.ones_like(masks[name], device=module.weight_mask.device))
            _hook(model)
        return masks

    def _drawn(self, model: nn.Module) -> dict[str, Tensor]:
        """First masks, in units, of the layers that are not dense for the whole run, by clean name.

        Raises:
            ModelError: a layer that does not fit the form, or none that can be masked.
        """
        config, rule = self.config, self.rule
        self._shapes = maskable(model, config.masked_scope, exclude=config.exclude)
        for name, shape in self._shapes.items():
            rule.unit_shape(name, shape)
        self._dense = rule.dense_layers(self._shapes)
        density = self.preset.density(config.target, 100)
        counts, last = self._counts(density.initial), self._counts(density.final)
        units = {n: math.prod(rule.unit_shape(n, self._shapes[n])) for n in counts}
        chosen = {n: k for n, k in counts.items() if min(k, last[n]) < units[n]}
        if not chosen and config.target < 1:
            raise ModelError(
                f"no layer of {type(model).__name__} can be masked: all {len(self._shapes)} stay dense "
                f"({', '.join(self._dense[:2])}, ...)"
            )
        if not chosen:
            warnings.warn(f"{KEY}: density 1 masks nothing", NoEffectWarning, 2)
        return initial_masks(rule, self._shapes, chosen, self._seed)

    def _counts(self, density: float) -> dict[str, int]:
        """Live units of every layer that is not dense by its form."""
        rule, shapes = self.rule, self._shapes
        units = {name: rule.unit_shape(name, shape) for name, shape in shapes.items()}
        if self.config.densities is None:
            shares = layer_densities(units, density, self.config.distribution, dense=self._dense)
        else:
            where = f"{KEY}.densities"
            self._custom = self._custom or read_densities(self.config.densities, where)
            shares = custom_shares(self._custom, units, f"{where}: {self.config.densities}", dense=self._dense)
        counts = exact_counts(units, shares)
        return {n: rule.fit_count(n, shapes[n], k) for n, k in counts.items() if n not in self._dense}

    # -- steps -------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> None:
        """Count MACs anew: another method may have changed how many tokens the blocks see."""
        self._measured = None

    def on_step_start(self, ctx: Context) -> None:
        """Begin to collect dense gradients where an update is due."""
        if not self._started:
            self._start(ctx)
        assert self.schedule is not None
        self._due = self.schedule.due(ctx.step, self.last)
        if self._due and self.rule.needs_gradient:
            masked.capture(ctx.engine.module, True)

    def _start(self, ctx: Context) -> None:
        """First step of this process: schedules, and in a fresh run the zeros and the journal.

        Raises:
            PlanError: the length of the run is not known.
        """
        run, preset = run_schedule(KEY, ctx), self.preset
        total = run.total_steps
        every = interval_of(self.config, preset, total, run.spec)
        end = end_step(total, preset.end_share)
        self.schedule = UpdateSchedule(total, every, end, preset.alpha, preset.initial)
        self._density = preset.density(self.config.target, total)
        if self._density.initial != self._density.final and self.schedule.steps:
            # counts move at updates only, so the last one has to reach the target
            self._density = replace(self._density, end=self.schedule.steps[-1])
        self._started = True
        layers = self._layers(ctx)
        if self._union:  # resumed
            if self.config.densities is not None:
                live = {name: int(self._units(m.weight_mask).sum()) for name, (_, m) in layers.items()}
                check_counts(live, self._counts(1.0), f"{KEY}.densities: {self.config.densities}")
            return
        self.schedule.warn_if_empty(KEY)
        if keeps_dead_weights(self.rule):
            self._change(ctx, {}, 0)
        else:
            ShardedMasks(ctx.engine).apply({real: m.weight_mask for real, m in layers.values()})
        self._union = {name: self._units(m.weight_mask).clone() for name, (_, m) in layers.items()}
        facts = self._facts(ctx)
        ctx.record(
            "masks",
            density=facts["density"],
            every=every,
            updates=len(self.schedule.steps),
            macs=facts.get("macs"),
            dense_macs=facts.get("dense_macs"),
            live={name: int(m.weight_mask.sum()) for name, (_, m) in layers.items()},
            digest=self.decision(ctx),
        )

    def on_boundary(self, ctx: Context) -> None:
        """Mean over the ranks of the dense gradients. Collective."""
        if self._due and self.rule.needs_gradient:
            module = ctx.engine.module
            found = masked.dense_gradients(module, loss_scale(ctx.engine))
            masked.capture(module, False)
            self._gradients = {clean_name(name): gradient for name, gradient in found.items()}

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Update the masks where it is due; a step that was skipped leaves that to the next one.

        Raises:
            DesyncError: the ranks' masks differ after an update.
        """
        due, gradients = self._due, self._gradients
        self._due, self._gradients = False, None
        if due and self.rule.needs_gradient and gradients is None:  # the guard has refused the step
            masked.capture(ctx.engine.module, False)
        if due and applied and (gradients is not None or not self.rule.needs_gradient):
            self._update(ctx, gradients or {})
        elif due:
            ctx.record("mask_update_postponed", reason="the optimizer step was skipped")
        if applied and self.preset.moments == "dense":
            masks = {real: m.weight_mask for real, m in self._layers(ctx).values()}
            ShardedMasks(ctx.engine).apply(masks, moments=False)

    def _update(self, ctx: Context, gradients: Mapping[str, Tensor]) -> None:
        start = time.monotonic()
        assert self.schedule is not None
        alpha = self.schedule.fraction(ctx.step)
        rows = self._change(ctx, gradients, alpha)
        if rows is None:
            ctx.record("mask_update_postponed", reason="weights or gradients are not finite")
            return
        self.last = ctx.step
        self.updates += 1
        dropped = sum(row["dropped"] for row in rows.values())
        regrown = sum(row["regrown"] for row in rows.values())
        self._last_facts = {"alpha": alpha, "regrown": regrown / max(1, dropped)}
        for name, (_, module) in self._layers(ctx).items():
            self._union[name] = self._union[name].to(module.weight_mask.device) | self._units(module.weight_mask)
        what = f"{KEY}: the masks differ between the ranks after the update at step {ctx.step}"
        digest = same_on_all(self.decision(ctx), what)
        facts = self._facts(ctx)
        ctx.record(
            "mask_update",
            alpha=alpha,
            density=facts["density"],
            explored=facts["explored"],
            macs=facts.get("macs"),
            dropped=dropped,
            regrown_share=self._last_facts["regrown"],
            layers=rows,
            digest=digest,
            seconds=time.monotonic() - start,
        )

    def _change(self, ctx: Context, gradients: Mapping[str, Tensor], alpha: float) -> dict[str, dict] | None:
        """Decide all layers from what is equal on all ranks, then write; None where a value is not finite. Collective.

        Returns:
            Counts in units by layer.
        """
        assert self._density is not None
        layers, sharded = self._layers(ctx), ShardedMasks(ctx.engine)
        full = sharded.magnitudes([real for real, _ in layers.values()])
        if not finite(*full.values(), *gradients.values()):
            return None
        budget = self._counts(self._density.at(ctx.step))
        masks, zeros, rows = {}, {}, {}
        for name, (real, module) in layers.items():
            unit, shape = self._units(module.weight_mask), self._shapes[name]
            generator = mask_rng(self._seed, name, ctx.step)
            k = self.rule.swaps(alpha, unit, budget[name])
            done = self.rule.update(full[real], gradients.get(name), unit, k, generator, budget[name])
            rows[name] = counts_of(done)
            masks[real] = self.rule.expand(done.mask, shape)
            if done.backward is not None:
                getattr(module, BACKWARD).copy_(done.backward)
            if not done.keeps_values:
                zeros[real] = self.rule.expand(done.zero, shape)
        sharded.zero_(zeros, moments=self.preset.moments == "reset")
        faults.point("mask.update")
        masked.set_masks(ctx.engine.module, masks)
        self._measured = self._digest = None
        return rows

    def on_rebuilt(self, ctx: Context) -> None:
        """The module is new: hooks on its parameters are gone."""
        self._measured = self._digest = None
        if keeps_dead_weights(self.rule):
            _hook(ctx.engine.module)

    def _layers(self, ctx: Context) -> dict[str, tuple[str, Any]]:
        """(name in the module, masked layer) by clean weight name, in the module's order."""
        found = masked.masked_layers(ctx.engine.module)
        return {clean_name(real): (real, module) for real, module in found.items()}

    def _units(self, mask: Tensor) -> Tensor:
        """A mask of entries as a mask of units."""
        step = self.rule.block if isinstance(self.rule, BlockRule) else 1
        return mask[::step, ::step] if step > 1 else mask

    # -- state and words ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Last update and what was ever live; the masks are buffers of the module."""
        union = {name: [list(mask.shape), packed(mask)] for name, mask in self._union.items()}
        return {"last": self.last, "updates": self.updates, "facts": dict(self._last_facts), "union": union}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.last, self.updates = int(state["last"]), int(state["updates"])
        self._last_facts = {key: float(value) for key, value in state["facts"].items()}
        self._union = {name: unpacked(bits, shape) for name, (shape, bits) in state["union"].items()}
        self._gradients, self._due = None, False
        self._measured = self._digest = None

    def decision(self, ctx: Context) -> str:
        """Digest of all masks."""
        if self._digest is None:
            self._digest = mask_digest({name: module.weight_mask for name, (_, module) in self._layers(ctx).items()})
        return self._digest

    def _facts(self, ctx: Context) -> dict[str, float]:
        """Live density and, where the model is of a known kind, forward MACs of an image; exploration R_s."""
        if self._measured is None:
            layers = self._layers(ctx)
            masks = {name: m.weight_mask for name, (_, m) in layers.items()}
            side = ctx.schedule.spec.resolution if ctx.schedule is not None else 0
            self._measured = live_facts(ctx.engine.module, side, self._shapes, masks, self._union)
        return self._measured

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Live density, share of the masked entries that was ever live (R_s), updates, the last one's figures, MACs."""
        if not self._started:
            return {}
        facts = self._facts(ctx)
        found = {f"sparse/{key}": value for key, value in self._last_facts.items()}
        found |= {f"sparse/{key}": facts[key] for key in ("density", "explored")}
        found["sparse/updates"] = float(self.updates)
        if "macs" in facts:
            found["sparse/macs_share"] = facts["macs"] / facts["dense_macs"]
        return found

    def pictures(self, ctx: Context) -> dict[str, Tensor]:
        """The masks of all layers."""
        return {"sparse/masks": mask_map({name: m.weight_mask for name, (_, m) in self._layers(ctx).items()})}

    def describe(self, stage: Stage) -> str:
        """For example ``"density 0.5"``, ``"density 0.5 b64"``, ``"2:4"``, ``"density custom"``."""
        if self.config.form == "nm":
            return f"{self.config.n}:{self.config.m}"
        density = "custom" if self.config.distribution == "custom" else f"{self.config.target:g}"
        return f"density {density}" + (f" b{self.config.block}" if self.config.form == "block" else "")


def _hook(model: nn.Module) -> None:
    """Let entries of the wider set alone have a gradient."""
    for module in masked.masked_layers(model).values():
        if hasattr(module, BACKWARD) and not module.weight.is_meta:
            module.weight.register_hook(lambda g, m=module: torch.where(getattr(m, BACKWARD), g, 0.0))
