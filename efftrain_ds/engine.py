"""`EfficientEngine`: a proxy that owns the current DeepSpeedEngine, fires the events and never goes stale.

Three depths of use: (1) `initialize` with DeepSpeed's signature and an unchanged loop; (2) the same plus
`prepare_batch` and `loss`; (3) our trainer. `wrap` serves an engine that exists already.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .checkpointing import Checkpointing
from .core import faults
from .core.batch import Batch
from .core.context import Context
from .core.errors import ConfigError, EffTrainError, NoEffectWarning, RebuildError, RolledBackError
from .core.method import Method
from .core.ranks import agree, rank, text_of, world_size
from .core.timeline import Schedule, Stage
from .guards.guard import Guard
from .zero import access
from .zero.blueprint import copy_blueprint, digest
from .zero.bundle import rng_state, set_rng_state
from .zero.checks import agree_equal
from .zero.ema import ShardedEma
from .zero.rebuild import Rebuilder, Report
from .zero.request import RebuildRequest, compose_requests
from .zero.skip import forget_gradients

_HOOKS = ("on_stage_enter", "on_step_start", "on_pass", "on_batch", "on_boundary", "on_step_end", "loss_term")


class EfficientEngine(Checkpointing):
    """Proxy around the current DeepSpeedEngine.

    Attributes that are not its own are read from, and written to, the DeepSpeedEngine, so code written for DeepSpeed
    goes on working.

    Attributes:
        deepspeed_engine: the current DeepSpeedEngine.
        methods: active methods in run order.
        schedule: stages of the run, or None without a plan.
        context: what the methods see.
        ema: average of the weights, or None.
        rebuilder: changes parameters in mid-run, or None where nothing was set up for it.
        guard: refuses non-finite steps and the like, or None.
        passes: forward and backward passes over each micro-batch, see `each_pass`.
        rebuilds: history of changes of parameters: plain dictionaries, stored in checkpoints.
    """

    def __init__(
        self,
        engine: Any,
        *,
        methods: Sequence[Method] = (),
        schedule: Schedule | None = None,
        seed: int = 0,
        ema: ShardedEma | None = None,
        owns_batch: bool = False,
        record: Callable[..., None] | None = None,
        rebuilder: Rebuilder | None = None,
        original: nn.Module | None = None,
        guard: Guard | None = None,
    ):
        own = self.__dict__
        own["deepspeed_engine"] = engine
        own["rebuilder"] = rebuilder
        own["rebuilds"] = []
        own["_original"] = original
        own["_pending"] = None
        own["_saving"] = None
        own["_buffers"] = {}
        own["_compile"] = None
        own["methods"] = list(methods)
        own["schedule"] = schedule
        own["ema"] = ema
        own["context"] = Context(
            engine=self,
            schedule=schedule,
            seed=seed,
            rank=rank(),
            world=world_size(),
            device=torch.device(engine.device),
        )
        if record is not None:
            self.context.record = record
        own["_owns_batch"] = owns_batch
        own["_batch_set"] = False
        own["_begun"] = False
        own["_in_flight"] = False
        own["_evaluating"] = False
        own["_prepared"] = False
        own["passes"] = _passes_of(methods)
        own["_pass"] = None
        own["_hooks"] = {
            hook: [m for m in methods if getattr(type(m), hook) is not getattr(Method, hook)] for hook in _HOOKS
        }
        own["_loss_owner"] = next((m for m in methods if m.owns_loss), None)
        own["guard"] = guard
        own["_plain"] = not methods and schedule is None and ema is None and guard is None
        if guard is not None:
            guard.bind(self)

    # -- the proxy ---------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        engine = self.__dict__.get("deepspeed_engine")
        if engine is None:  # while the proxy itself is being copied or built
            raise AttributeError(name)
        return getattr(engine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.deepspeed_engine, name, value)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Forward pass; in training the methods act on the first input, unless `prepare_batch` was called before it."""
        if self.ema is not None and self.ema.stale:
            self.ema.refresh()
        if not self._plain and self.deepspeed_engine.module.training:
            self.begin_step()
            if self._pass is None and self.passes > 1:
                name = next(m.name for m in self.methods if m.passes > 1)
                raise ConfigError(
                    f"efftrain.methods.{name} takes {self.passes} passes over every batch: run forward, loss, backward "
                    "and step inside `for _ in engine.each_pass():`"
                )
            if self._hooks["on_batch"] and not self._prepared:
                if not inputs or not isinstance(inputs[0], Tensor):
                    self._warn_no_images()
                    return self.deepspeed_engine(*inputs, **kwargs)
                inputs = (self._run_on_batch(Batch(images=inputs[0])).images, *inputs[1:])
        if self.guard is not None:
            self.guard.forward(inputs[0] if inputs else None, self.deepspeed_engine.module.training)
        return self.deepspeed_engine(*inputs, **kwargs)

    forward = __call__

    def _warn_no_images(self) -> None:
        names = ", ".join(m.name for m in self._hooks["on_batch"])
        warnings.warn(
            f"{names} found no images: pass them as the first positional argument of engine(...), or call "
            "engine.prepare_batch(images, labels) before it",
            NoEffectWarning,
            stacklevel=3,
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's backward; the next forward pass is of another batch."""
        self._prepared = False
        self._in_flight = True
        result = self.deepspeed_engine.backward(loss, *args, **kwargs)
        if self.guard is not None:
            self.guard.after_backward(loss)
        return result

    # -- the loop ----------------------------------------------------------------------------------------------

    def each_pass(self) -> Iterator[int]:
        """The passes over one micro-batch, one where no method asks for more.

        In each, run the forward pass, `loss`, `backward` and `step` (DeepSpeed counts every pass as a micro-batch of
        its accumulation; its batch size is therefore that of all passes together). A batch that was prepared before is
        prepared for all of them.
        """
        prepared = self._prepared
        for index in range(self.passes):
            self.begin_step()
            self._pass, self._prepared = index, prepared
            for method in self._hooks["on_pass"]:
                method.on_pass(self.context, index)
            yield index
        self._pass, self._prepared = None, False

    @property
    def step_index(self) -> int:
        """Optimizer steps completed (skipped ones included)."""
        return self.context.step

    @property
    def stage(self) -> Stage | None:
        """The stage of the current step."""
        return self.schedule.stage_at(self.context.step) if self.schedule is not None else None

    def begin_step(self) -> None:
        """Enter the stage and start the step if this is the first micro-batch; called by the forward pass too.

        Raises:
            RebuildError: a method's change of parameters cannot be carried out; the state before it is kept.
        """
        if self._begun:
            return
        ctx = self.context
        self._begun = True
        self._count_passes()
        if self.schedule is not None:
            stage = self.schedule.stage_at(ctx.step)
            if stage is not ctx.stage:
                with self.guard.phase("stage change") if self.guard is not None else nullcontext():
                    self._try_to_enter(stage)
        for method in self._hooks["on_step_start"]:
            method.on_step_start(ctx)

    def _count_passes(self) -> None:
        """Make DeepSpeed's accumulation that of all passes, where the batch is the user's."""
        if self.passes > 1 and not self._owns_batch and not self._batch_set:
            engine = self.deepspeed_engine
            micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
            access.set_batch(engine, micro, accumulation * self.passes)
            self._batch_set = True  # a rebuild carries it over

    def _try_to_enter(self, stage: Stage) -> None:
        """Enter a stage; where that fails, step and methods are as before, so that it can be tried or left again."""
        ctx = self.context
        before, states = ctx.stage, copy.deepcopy({m.name: m.state_dict() for m in self.methods})
        try:
            self._enter_stage(stage)
        except BaseException:
            ctx.stage, self._begun = before, False
            for method in self.methods:
                method.load_state_dict(states[method.name])
            if self.rebuilder is not None and self.deepspeed_engine is not None:
                for method in self.methods:  # a roll-back has made the module anew
                    method.on_rebuilt(ctx)
            raise

    def _enter_stage(self, stage: Stage) -> None:
        ctx = self.context
        ctx.stage = stage
        faults.point("stage.enter")
        self._run_requests(method.on_stage_enter(ctx, stage) for method in self._hooks["on_stage_enter"])
        if self.guard is not None:
            self.guard.expect_compilation()
        if self._owns_batch:
            access.set_batch(self.deepspeed_engine, stage.micro_batch, stage.accumulation * self.passes)
        ctx.record(
            "stage",
            index=stage.index,
            start_step=stage.start_step,
            settings=dict(stage.settings),
            micro_batch=stage.micro_batch,
            accumulation=stage.accumulation,
        )

    # -- changing parameters -----------------------------------------------------------------------------------

    @property
    def blueprint(self) -> nn.Module:
        """The current module without weights, as requests see it: with the changes asked for at this boundary so far.

        Raises:
            RebuildError: the engine was not set up for changes of parameters.
        """
        if self._pending is not None:
            return self._pending
        if self.rebuilder is None:
            raise RebuildError(
                "this engine cannot change parameters; use efftrain_ds.initialize(..., rebuildable=True)"
            )
        return self.rebuilder.blueprint

    def rebuild(self, request: RebuildRequest) -> Report:
        """Change parameters now, between two optimizer steps. Collective.

        Raises:
            RebuildError: the request does not fit or comes while those of a boundary are collected (nothing was
                touched), or carrying it out failed (the state before is restored).
        """
        if self._pending is not None:
            raise RebuildError(
                "another change of parameters is being collected at this boundary; return the request from "
                "on_stage_enter instead of calling rebuild"
            )
        assert self.blueprint is not None
        assert self.rebuilder is not None
        self._refuse_in_flight(RebuildError, "parameters can change")
        step = self.context.step
        plan = self.rebuilder.plan(self.deepspeed_engine, request, step=step, ema=self.ema)
        parent = digest(self.rebuilder.blueprint)
        try:
            try:
                report = self.rebuilder.execute(self, plan)
            finally:  # also after a roll-back
                if self._compile is not None and self.deepspeed_engine is not None:
                    self.deepspeed_engine.compile(*self._compile[0], **self._compile[1])
        except RolledBackError:
            for method in self.methods:  # module and optimizer are others, too
                method.on_rebuilt(self.context)
            raise
        self.rebuilds.append(
            {"step": step, "reason": request.reason, "parent": parent, "child": digest(self.rebuilder.blueprint)}
        )
        self.context.record(
            "rebuild",
            reason=request.reason,
            seconds=report.seconds,
            parts=dict(report.parts),
            parameters=list(report.parameters),
        )
        for method in self.methods:
            method.on_rebuilt(self.context)
        return report

    def _refuse_in_flight(self, kind: type[Exception], what: str) -> None:
        if self._evaluating:
            raise kind(f"{what} only outside an evaluation")
        if self._in_flight:
            raise kind(f"{what} only between optimizer steps (accumulation is in flight)")

    def _run_requests(self, requests: Iterator[RebuildRequest | None]) -> None:
        """Several requests of one boundary become one rebuild; each sees the module with those before it applied."""
        combined: RebuildRequest | None = None
        problem: Exception | None = None
        try:
            for request in requests:
                if request is None:
                    continue
                combined = request if combined is None else compose_requests(combined, request)
                random = rng_state()
                try:
                    self._pending = request.surgery(copy_blueprint(self.blueprint))
                finally:
                    set_rng_state(random)  # trying a surgery out must not move the run's random numbers
        except Exception as error:
            if self.rebuilder is None:
                raise
            problem = error
        finally:
            self._pending = None
        if self.rebuilder is not None:
            what = "asking for a change of parameters"
            if problem is None or not isinstance(problem, EffTrainError):
                agree(text_of(problem) if problem is not None else None, RebuildError, what)
            else:
                try:
                    agree(text_of(problem), RebuildError, what)
                except RebuildError as error:
                    raise problem from error  # its own kind says more
            agree_equal(str(combined is not None), what)
        if combined is not None:
            self.rebuild(combined)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's compile; done again after each change of parameters."""
        self.deepspeed_engine.compile(*args, **kwargs)
        self._compile = (args, kwargs)

    def _run_on_batch(self, batch: Batch) -> Batch:
        for method in self._hooks["on_batch"]:
            batch = method.on_batch(self.context, batch)
        return batch

    def prepare_batch(self, images: Tensor | Batch, labels: Tensor | None = None) -> Any:
        """Let the methods act on a batch on the device; forward passes up to the next `backward` leave it alone.

        Args:
            images: [N, C, H, W], or a `Batch`.
            labels: [N] or None.

        Returns:
            (images, labels), or the `Batch` where one was given.
        """
        self.begin_step()
        batch = images if isinstance(images, Batch) else Batch(images=images, labels=labels)
        batch = self._run_on_batch(batch)
        if self.guard is not None:
            self.guard.note(batch)
        self._prepared = True
        return batch if isinstance(images, Batch) else (batch.images, batch.labels)

    def loss(self, outputs: Any, batch: Any, default: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """The loss of the method that owns it, else ``default(outputs, batch)``, plus the other methods' terms.

        Raises:
            ConfigError: no method owns the loss and there is no default.
        """
        if self.guard is not None:
            self.guard.note(batch)
        if self._loss_owner is not None:
            total = self._loss_owner.loss(self.context, outputs, batch)
        elif default is not None:
            total = default(outputs, batch)
        else:
            raise ConfigError("engine.loss: no configured method owns the loss; pass default=")
        for method in self._hooks["loss_term"]:
            term = method.loss_term(self.context, outputs, batch)
            if term is not None:
                total = total + term
        # DeepSpeed divides by its accumulation, which counts every pass, but passes are summed
        return total * self.passes if self.passes > 1 else total

    def step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's step; at the boundary the methods act before and after it.

        Raises:
            DivergenceError: with a guard, too many steps in a row were not finite.
            DesyncError: with a guard, the ranks have decided differently.
        """
        engine = self.deepspeed_engine
        if self._plain:
            if engine.is_gradient_accumulation_boundary():
                self.context.step += 1
                self._in_flight = False
            engine.step(*args, **kwargs)
            return
        boundary = engine.is_gradient_accumulation_boundary()
        ctx, guard = self.context, self.guard
        refused = guard is not None and guard.before_step(boundary)
        if boundary and not refused:
            for method in self._hooks["on_boundary"]:
                method.on_boundary(ctx)
        with guard.skip() if guard is not None and refused else nullcontext():
            engine.step(*args, **kwargs)
        if boundary:
            self._in_flight = False
            applied = engine.was_step_applied()
            if self.passes > 1:  # those of the next step may run other layers each
                forget_gradients(engine)
            for method in self._hooks["on_step_end"]:
                method.on_step_end(ctx, applied)
            if applied and self.ema is not None:  # after the methods: they may correct the step (masks, skipped blocks)
                self.ema.update()
            ctx.step += 1
            self._begun = False
            if guard is not None:
                guard.after_step(applied)

    @contextmanager
    def evaluating(self, ema: bool = False, variant: str | None = None) -> Iterator[None]:
        """Evaluation mode; the methods' `on_eval` is entered in run order and left in reverse.

        Args:
            ema: compute with the average of the weights (collective).
            variant: one of the methods' `variants`; None for the main evaluation.

        Raises:
            ConfigError: `ema` is asked for and there is none.
        """
        if ema and self.ema is None:
            raise ConfigError("no average is kept; set efftrain.model.ema")
        module = self.deepspeed_engine.module
        was_training, nested = module.training, self._evaluating
        before, self.context.variant = self.context.variant, variant
        try:
            with ExitStack() as stack:
                if ema:  # first: a method may measure with the weights that are evaluated
                    stack.enter_context(self.ema.swap())
                for method in self.methods:
                    stack.enter_context(method.on_eval(self.context))
                self.deepspeed_engine.eval()
                self._evaluating = True
                try:
                    yield
                finally:
                    self._evaluating = nested
                    self.deepspeed_engine.train(was_training)
        finally:
            self.context.variant = before


def _passes_of(methods: Sequence[Method]) -> int:
    """Passes over each micro-batch.

    Raises:
        ConfigError: two methods ask for several.
    """
    repeating = [m for m in methods if m.passes > 1]
    if len(repeating) > 1:
        names = ", ".join(m.name for m in repeating)
        raise ConfigError(f"efftrain.methods: only one method may take several passes over a batch, found {names}")
    return repeating[0].passes if repeating else 1
