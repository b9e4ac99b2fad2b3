"""Changing a model's parameters in the middle of a DeepSpeed run, on any ZeRO stage, losing nothing.

The way: plan on a blueprint while the engine is alive (a failure there costs nothing), take *views* of the old fp32
masters and moments, destroy the engine, make a fresh module and engine, and move every state key from the old
fragments to the new ones. Until the new engine stands the old state is kept, and a failure brings it back.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core import faults
from ..core.errors import RebuildError, RolledBackError
from ..core.ranks import agree, text_of
from ..core.rng import torch_rng
from . import access
from .blueprint import copy_blueprint, hooks_of, materialise, put_hooks
from .bundle import Bundle, capture, held_in, regrouped, restore_buffers, rng_state, set_rng_state
from .checks import RebuildPlan, agree_equal, check_maps, identity_of
from .ema import ShardedEma
from .exchange import Exchange, Held, Table
from .groups import GroupPlan
from .request import DrawnAs, ParameterMap, RebuildRequest

logger = logging.getLogger(__name__)

Create = Callable[[nn.Module, list[dict[str, Any]]], Any]
"""Makes a DeepSpeedEngine from a module and its parameter groups."""


@dataclass(frozen=True)
class Report:
    """What a rebuild did.

    Attributes:
        reason: of the request.
        seconds: total wall time.
        parts: seconds by part ("plan", "teardown", "create", "restore").
        parameters: trainable elements before and after.
    """

    reason: str
    seconds: float
    parts: Mapping[str, float]
    parameters: tuple[int, int]


class Rebuilder:
    """Owns the blueprint and the groups of a run and replaces its DeepSpeedEngine.

    Args:
        blueprint: of the module that runs now.
        groups: its parameter groups.
        create: makes a DeepSpeedEngine.
        seed: of the run; initial values come from (seed, step, name).
        keep_old: keep the old state until the new engine stands, so that a failure is rolled back; False frees it key
            by key while moving (a third less memory on top).
    """

    def __init__(
        self, blueprint: nn.Module, groups: GroupPlan, create: Create, *, seed: int = 0, keep_old: bool = True
    ):
        self.blueprint = blueprint
        self.groups = groups
        self.seed = seed
        self.keep_old = keep_old
        self._create = create

    # -- plan --------------------------------------------------------------------------------------------------

    def plan(self, engine: Any, request: RebuildRequest, *, step: int, ema: ShardedEma | None = None) -> RebuildPlan:
        """Check a request against the running engine. Collective; nothing is changed.

        Raises:
            RebuildError: on all ranks, saying what does not fit.
        """
        found: RebuildPlan | None = None
        problem = None
        try:
            found = self._plan(engine, request, step, ema)
        except Exception as error:  # whatever a surgery raises on one rank, the others must hear of it
            problem = text_of(error)
        what = f"rebuild ({request.reason or 'no reason given'})"
        agree(problem, RebuildError, what)
        assert found is not None
        agree_equal(identity_of(found), what)
        return found

    def _plan(self, engine: Any, request: RebuildRequest, step: int, ema: ShardedEma | None) -> RebuildPlan:
        if not access.at_boundary(engine):
            raise RebuildError("parameters can change only between optimizer steps (accumulation is in flight)")
        if ema is not None and ema.swapped:
            raise RebuildError("parameters cannot change while the average is swapped in (evaluating)")
        if request.values == "ema" and ema is None:
            raise RebuildError("the values of the average are asked for, but none is kept; set efftrain.model.ema")
        why = access.unsupported(engine)
        if why is not None:
            raise RebuildError(why)
        now = {name: p.requires_grad for name, p in engine.module.named_parameters()}
        by_hand = [n for n, p in self.blueprint.named_parameters() if now.get(n) != p.requires_grad]
        if by_hand:
            raise RebuildError(
                f"requires_grad of {', '.join(by_hand[:3])} was changed on the module itself; freeze and unfreeze with "
                "engine.rebuild(RebuildRequest(surgery=...)), so that the optimizer follows"
            )
        layout = access.layout_of(engine)
        strange = access.unmapped_state(layout)
        if strange:
            raise RebuildError(
                f"optimizer {type(layout.base).__name__} keeps {', '.join(strange)}, which cannot be moved; allowed: "
                "optimizers whose state has the shape of the parameters (Adam, AdamW, SGD, Lion, ...)"
            )
        rng = rng_state()
        try:
            blueprint = request.surgery(copy_blueprint(self.blueprint))
        finally:
            set_rng_state(rng)  # a surgery that constructs modules draws numbers for weights that nobody uses
        shapes = {name: p.shape for name, p in blueprint.named_parameters()}
        old_shapes = {name: access.full_shape(p) for name, p in engine.module.named_parameters()}
        buffers = {name: b.shape for name, b in blueprint.named_buffers()}
        old_buffers = {name: b.shape for name, b in engine.module.named_buffers()}
        if request.composed:
            known = {*shapes, *buffers}
            request = replace(request, maps={name: m for name, m in request.maps.items() if name in known})
        check_maps(request, {**shapes, **buffers}, {**old_shapes, **old_buffers})
        _check_kinds(request, shapes, buffers, old_shapes, old_buffers)
        groups = self._groups_after(request, blueprint, step)
        trainable = [name for name, p in blueprint.named_parameters() if p.requires_grad]
        return RebuildPlan(request, blueprint, groups, shapes, old_shapes, trainable, step)

    def _groups_after(self, request: RebuildRequest, blueprint: nn.Module, step: int) -> GroupPlan:
        sources = {name: m.pieces[0].source if m.pieces else None for name, m in request.maps.items()}
        if request.reset:
            return GroupPlan(self.groups.hypers, {}, self.groups.home).changed(blueprint, sources, {}, step=0)
        new = {name: not m.moments for name, m in request.maps.items()}
        return self.groups.changed(blueprint, sources, new, step=step)

    # -- carry it out ------------------------------------------------------------------------------------------

    def execute(self, holder: Any, plan: RebuildPlan) -> Report:
        """Replace ``holder.deepspeed_engine`` (and the state of ``holder.ema``). Collective.

        Args:
            holder: owns the only reference to the engine; has attributes `deepspeed_engine` and `ema`.
            plan: from `plan`.

        Raises:
            RolledBackError: it failed; the previous state is back, in a new engine (with `keep_old`).
            RebuildError: it failed, and the state is lost.
        """
        clock = _Clock()
        hooks = hooks_of(holder.deepspeed_engine.module)
        bundle = capture(holder.deepspeed_engine, holder.ema)
        before = sum(bundle.shapes[name].numel() for name in bundle.trainable)
        clock.part("plan")
        skeleton = _skeleton_of(holder.deepspeed_engine)
        faults.point("rebuild.teardown")
        self._tear_down(holder)
        clock.part("teardown")
        old_groups, old_blueprint = self.groups, self.blueprint
        try:
            faults.point("rebuild.create")
            self._build(holder, plan.blueprint, plan.groups, skeleton, "creating the new engine failed")
            clock.part("create")
            faults.point("rebuild.restore")
            self._restore(holder, bundle, plan, clock)
        except Exception as error:
            # a collective that failed on one rank only cannot be mended; every failure that all ranks know of is
            problem = text_of(error)
            traceback.clear_frames(error.__traceback__)  # its frames hold the half-made engine
            if not self.keep_old:
                raise RebuildError(f"{problem}; the old state was given up (keep_old is false)") from error
            self._roll_back(holder, bundle, old_blueprint, old_groups, skeleton)
            put_hooks(hooks, holder.deepspeed_engine.module)
            raise RolledBackError(f"{problem}; the state before the rebuild is restored") from error
        put_hooks(hooks, holder.deepspeed_engine.module)
        self.blueprint, self.groups = plan.blueprint, plan.groups
        after = sum(plan.shapes[name].numel() for name in plan.trainable)
        return Report(plan.request.reason, clock.total, clock.parts, (before, after))

    def recreate(self, holder: Any, blueprint: nn.Module, groups: GroupPlan) -> None:
        """An engine for another architecture with no state moved; a checkpoint is loaded into it next. Collective."""
        engine = holder.deepspeed_engine
        average = holder.ema and (holder.ema.decay, holder.ema.warmup)
        skeleton, training = _skeleton_of(engine), engine.module.training
        batch = (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
        rng, loader, hooks = rng_state(), engine.training_dataloader, hooks_of(engine.module)
        del engine
        self._tear_down(holder)
        self._build(holder, blueprint, groups, skeleton, "creating the engine failed")
        self.blueprint, self.groups = blueprint, groups
        engine = holder.deepspeed_engine
        engine.training_dataloader = loader
        put_hooks(hooks, engine.module)
        access.set_batch(engine, *batch)
        engine.train(training)
        if average:
            holder.ema = ShardedEma(access.layout_of(engine), *average)
        set_rng_state(rng)

    def _tear_down(self, holder: Any) -> None:
        engine = holder.deepspeed_engine
        if holder.ema is not None:
            holder.ema.layout = None
        holder.deepspeed_engine = None
        access.tear_down(engine)
        del engine
        gc.collect()

    def _build(
        self,
        holder: Any,
        blueprint: nn.Module,
        groups: GroupPlan,
        skeleton: tuple[torch.dtype, torch.device],
        what: str,
    ) -> None:
        module, problem = None, None
        try:
            module = materialise(blueprint, dtype=skeleton[0], device=skeleton[1])
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.zero_()  # garbage bits could be NaN, which some constructors multiply by zero
        except Exception as error:
            problem = text_of(error)
        agree(problem, RebuildError, what)
        try:
            holder.deepspeed_engine = self._create(module, groups.for_optimizer(module))
        except Exception as error:
            problem = text_of(error)
        agree(problem, RebuildError, what)

    def _roll_back(
        self,
        holder: Any,
        bundle: Bundle,
        blueprint: nn.Module,
        groups: GroupPlan,
        skeleton: tuple[torch.dtype, torch.device],
    ) -> None:
        if holder.deepspeed_engine is not None:
            self._tear_down(holder)
        gc.collect()
        self._build(holder, blueprint, groups, skeleton, "bringing the old engine back failed")
        shapes = dict(bundle.shapes)
        trainable = [name for name, p in blueprint.named_parameters() if p.requires_grad]
        identity = RebuildPlan(RebuildRequest(), blueprint, groups, shapes, shapes, trainable, 0)
        self._restore(holder, bundle, identity, _Clock(), keep=True)

    @torch.no_grad()
    def _restore(self, holder: Any, bundle: Bundle, plan: RebuildPlan, clock: _Clock, keep: bool | None = None) -> None:
        """Fill the new engine from the bundle. Collective."""
        engine, request = holder.deepspeed_engine, plan.request
        keep = self.keep_old if keep is None else keep
        layout = access.layout_of(engine)
        frozen, replicated, _ = access.frozen_fragments(engine)
        frozen_held = [Held(name, start, values) for name, start, values in frozen]
        masters = held_in(layout, layout.tensors("fp32"))
        everything = frozenset(layout.shapes) if layout.replicated else frozenset()
        old_table = Table.gather(bundle.held["fp32"], bundle.replicated)
        new_table = Table.gather([*masters, *frozen_held], everything | replicated)
        untiled = new_table.untiled({name: shape.numel() for name, shape in plan.shapes.items()})
        if untiled:
            raise RebuildError(f"DeepSpeed's new partitions do not cover {', '.join(untiled[:3])}")
        exchange = Exchange(
            old_table, new_table, request.maps, plan.shapes, plan.old_shapes, torch.device(engine.device)
        )
        names, old_names = sorted(plan.shapes), frozenset(plan.old_shapes)
        drawn = _Initial(request.maps, plan.shapes, self.seed, plan.step)
        values = bundle.held["fp32"]
        if request.values == "ema":
            averaged = {h.name for h in bundle.held["ema"]}
            values = [*bundle.held["ema"], *(h for h in values if h.name not in averaged)]
        exchange.move("fp32", values, [*masters, *frozen_held], names=names, present=old_names, initial=drawn)
        trainable = sorted(plan.trainable)
        if bundle.average is not None:
            decay, warmup, updates = bundle.average
            shadow = [torch.zeros_like(flat) for flat in layout.tensors("fp32")]
            targets = held_in(layout, shadow)
            # a parameter that was frozen until now has no average: its weight is one
            sources = [*bundle.held["ema"], *(h for h in bundle.held["fp32"] if h.name not in bundle.trainable)]
            exchange.move("ema", sources, targets, names=trainable, present=old_names, initial=drawn)
            del sources
            average = ShardedEma(layout, decay, warmup, shadow=shadow)
            average.updates = updates
            holder.ema = average
        if not keep:
            del values, bundle.held["fp32"]
            bundle.held.pop("ema", None)
        keys = bundle.state_keys
        if request.reset:
            keys = []
        self._start_state(layout, bundle, plan, keys)
        for key in keys:
            targets = held_in(layout, layout.tensors(key))
            exchange.move(key, bundle.held[key], targets, names=trainable, present=bundle.trainable)
            if not keep:
                del bundle.held[key]
        layout.push()  # ZeRO-3 reads the frozen partitions anew here too
        restore_buffers(engine.module, bundle.buffers, request.maps)
        self._continue(engine, layout, bundle, plan)
        clock.part("restore")

    def _start_state(self, layout: access.Layout, bundle: Bundle, plan: RebuildPlan, keys: Sequence[str]) -> None:
        """Step counts of the new flats; state that a constructor has made is set to zero."""
        for flat in layout.flats:
            for key, value in layout.base.state.get(flat.master, {}).items():
                if torch.is_tensor(value) and value.shape == flat.master.shape and key not in keys:
                    value.zero_()
        members: dict[int, list[str]] = {}
        for fragment in layout.fragments:
            members.setdefault(fragment.flat, []).append(fragment.name)
        whole_groups: dict[int, list[str]] = {}
        for name, group in layout.groups.items():
            whole_groups.setdefault(group, []).append(name)
        for number, flat in enumerate(layout.flats):
            names = members.get(number) or whole_groups.get(flat.group, [])
            found = [self._scalars_of(name, bundle, plan) for name in names]
            keys_found = {key for scalars in found for key in scalars}
            merged = {key: max(s.get(key, 0.0) for s in found) for key in keys_found}
            # a step count alone would look like state to an optimizer that makes its state at the first step
            if merged and (keys or layout.base.state.get(flat.master)):
                layout.set_scalars(number, merged)
        access.replay_steps(layout)

    def _scalars_of(self, name: str, bundle: Bundle, plan: RebuildPlan) -> dict[str, float]:
        target = plan.request.maps.get(name)
        source = name if target is None else (target.pieces[0].source if target.pieces else None)
        carried = target is None or target.moments
        # a parameter that never had a gradient has no count where each has its own
        known = {key: 0.0 for scalars in bundle.scalars.values() for key in scalars}
        if source in bundle.scalars and carried and not plan.request.reset:
            return {**known, **bundle.scalars[source]}
        return known

    def _continue(self, engine: Any, layout: access.Layout, bundle: Bundle, plan: RebuildPlan) -> None:
        """Counters, scaler, scheduler, group hyper-parameters, mode and RNG, in this order."""
        micro, accumulation = bundle.carried["batch"]
        access.set_batch(engine, micro, accumulation)
        access.continue_from(engine, bundle.carried)
        parents = plan.groups.parents()
        labels = list(plan.groups.members)
        origins = [label if label in bundle.hypers else parents[label] for label in labels]
        order = list(bundle.hypers)
        if engine.lr_scheduler is not None and bundle.scheduler is not None:
            rows = [order.index(o) if o in bundle.hypers else None for o in origins]
            scheduler = engine.lr_scheduler
            scheduler.load_state_dict(regrouped(bundle.scheduler, scheduler.state_dict(), len(order), rows))
        for group in layout.base.param_groups:
            label = group["name"]
            origin = label if label in bundle.hypers else parents[label]
            if origin in bundle.hypers:
                group.update({k: v for k, v in bundle.hypers[origin].items() if k not in ("name", "params")})
            else:
                _join_schedule(group, next(iter(bundle.hypers.values())), engine.lr_scheduler)
        engine.train(bundle.training)
        for name, module in engine.module.named_modules():
            module.training = bundle.modes.get(name, module.training)
        set_rng_state(bundle.rng)


def _check_kinds(request: RebuildRequest, shapes: Any, buffers: Any, old_shapes: Any, old_buffers: Any) -> None:
    """Refuse values that would move between a parameter and a buffer.

    Raises:
        RebuildError: names both.
    """
    for names, old in ((shapes, old_shapes), (buffers, old_buffers)):
        for name in names:
            target = request.maps.get(name)
            for source in [name] if target is None else [p.source for p in target.pieces]:
                if source not in old:
                    raise RebuildError(f"{name} <- {source}: values cannot move between a parameter and a buffer")


def _join_schedule(group: dict[str, Any], other: dict[str, Any], scheduler: Any) -> None:
    """Rate of a group that had no member until now: its own peak at the present point of the schedule."""
    if group.get("initial_lr") and other.get("initial_lr"):  # torch's schedulers
        group["lr"] = group["initial_lr"] * other["lr"] / other["initial_lr"]
    elif type(scheduler).__module__.startswith("deepspeed"):  # one rate for all groups
        group["lr"] = other["lr"]
    # ours has set it already


def _skeleton_of(engine: Any) -> tuple[torch.dtype, torch.device]:
    """Training dtype (the module is made in it: its values are overwritten anyway) and where to make it."""
    dtype = torch.float32
    if engine.bfloat16_enabled():
        dtype = torch.bfloat16
    elif engine.fp16_enabled():
        dtype = torch.float16
    return dtype, torch.device("cpu") if access.offloaded(engine, "param") else torch.device(engine.device)


class _Initial:
    """Initial values of new tensors from (seed, step, name): equal on all ranks, drawn when needed, not kept."""

    def __init__(self, maps: Mapping[str, ParameterMap], shapes: Mapping[str, torch.Size], seed: int, step: int):
        self.maps, self.shapes, self.seed, self.step = maps, shapes, seed, step

    def __call__(self, name: str) -> Tensor | None:
        init = self.maps[name].init
        if init is None:
            return None
        drawn_as = init.name if isinstance(init, DrawnAs) else name
        values = init(self.shapes[name], torch_rng("cpu", self.seed, "rebuild", self.step, drawn_as))
        if values.shape != self.shapes[name]:
            raise RebuildError(
                f"{name}: initial values of shape {list(values.shape)}, needed {list(self.shapes[name])}"
            )
        return values.float()


class _Clock:
    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._start = self._last = time.monotonic()

    def part(self, name: str) -> None:
        now = time.monotonic()
        self.parts[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._start


__all__ = ["Bundle", "Rebuilder", "RebuildPlan", "Report", "capture"]
