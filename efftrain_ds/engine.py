"""`EfficientEngine`: a proxy that owns the current DeepSpeedEngine, fires the events and never goes stale.

Three depths of use: (1) `initialize` with DeepSpeed's signature and an unchanged loop; (2) the same plus
`prepare_batch` and `loss`; (3) our trainer. `wrap` serves an engine that exists already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import store
from .core.batch import Batch
from .core.context import Context
from .core.errors import CheckpointError, ConfigError, NoEffectWarning, RebuildError
from .core.method import Method
from .core.timeline import Schedule, Stage
from .zero import access
from .zero.blueprint import copy_blueprint, digest
from .zero.bundle import rng_state, set_rng_state
from .zero.ema import ShardedEma
from .zero.rebuild import Rebuilder, Report
from .zero.request import RebuildRequest, compose_requests

_HOOKS = ("on_stage_enter", "on_step_start", "on_batch", "on_boundary", "on_step_end", "loss_term")


class EfficientEngine:
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
    ):
        own = self.__dict__
        own["deepspeed_engine"] = engine
        own["rebuilder"] = rebuilder
        own["rebuilds"] = []
        own["_original"] = original
        own["_pending"] = None
        own["_compile"] = None
        own["methods"] = list(methods)
        own["schedule"] = schedule
        own["ema"] = ema
        own["context"] = Context(
            engine=self,
            schedule=schedule,
            seed=seed,
            rank=dist.get_rank() if dist.is_initialized() else 0,
            world=dist.get_world_size() if dist.is_initialized() else 1,
            device=torch.device(engine.device),
        )
        if record is not None:
            self.context.record = record
        own["_owns_batch"] = owns_batch
        own["_begun"] = False
        own["_prepared"] = False
        own["_hooks"] = {
            hook: [m for m in methods if getattr(type(m), hook) is not getattr(Method, hook)] for hook in _HOOKS
        }
        own["_loss_owner"] = next((m for m in methods if m.owns_loss), None)
        own["_plain"] = not methods and schedule is None and ema is None

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
            if self._hooks["on_batch"] and not self._prepared:
                if not inputs or not isinstance(inputs[0], Tensor):
                    self._warn_no_images()
                    return self.deepspeed_engine(*inputs, **kwargs)
                inputs = (self._run_on_batch(Batch(images=inputs[0])).images, *inputs[1:])
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
        return self.deepspeed_engine.backward(loss, *args, **kwargs)

    # -- the loop ----------------------------------------------------------------------------------------------

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
        if self.schedule is not None:
            stage = self.schedule.stage_at(ctx.step)
            if stage is not ctx.stage:
                self._enter_stage(stage)
        for method in self._hooks["on_step_start"]:
            method.on_step_start(ctx)

    def _enter_stage(self, stage: Stage) -> None:
        ctx = self.context
        ctx.stage = stage
        self._run_requests(method.on_stage_enter(ctx, stage) for method in self._hooks["on_stage_enter"])
        if self._owns_batch:
            access.set_batch(self.deepspeed_engine, stage.micro_batch, stage.accumulation)
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
            RebuildError: the request does not fit (nothing was touched), or carrying it out failed (the state before
                is restored).
        """
        assert self.blueprint is not None
        assert self.rebuilder is not None
        step = self.context.step
        plan = self.rebuilder.plan(self.deepspeed_engine, request, step=step, ema=self.ema)
        parent = digest(self.rebuilder.blueprint)
        report = self.rebuilder.execute(self, plan)
        if self._compile is not None:
            self.deepspeed_engine.compile(*self._compile[0], **self._compile[1])
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

    def _run_requests(self, requests: Iterator[RebuildRequest | None]) -> None:
        """Several requests of one boundary become one rebuild; each sees the module with those before it applied."""
        combined: RebuildRequest | None = None
        random = rng_state()  # trying a surgery out must not move the run's random numbers
        try:
            for request in requests:
                if request is None:
                    continue
                combined = request if combined is None else compose_requests(combined, request)
                self._pending = request.surgery(copy_blueprint(self.blueprint))
                set_rng_state(random)
        finally:
            self._pending = None
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
        self._prepared = True
        return batch if isinstance(images, Batch) else (batch.images, batch.labels)

    def loss(self, outputs: Any, batch: Any, default: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """The loss of the method that owns it, else ``default(outputs, batch)``, plus the other methods' terms.

        Raises:
            ConfigError: no method owns the loss and there is no default.
        """
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
        return total

    def step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's step; at the boundary the methods act before and after it."""
        engine = self.deepspeed_engine
        if self._plain:
            if engine.is_gradient_accumulation_boundary():
                self.context.step += 1
            engine.step(*args, **kwargs)
            return
        boundary = engine.is_gradient_accumulation_boundary()
        ctx = self.context
        if boundary:
            for method in self._hooks["on_boundary"]:
                method.on_boundary(ctx)
        engine.step(*args, **kwargs)
        if boundary:
            applied = engine.was_step_applied()
            for method in self._hooks["on_step_end"]:
                method.on_step_end(ctx, applied)
            if applied and self.ema is not None:  # after the methods: they may correct the step (masks, skipped blocks)
                self.ema.update()
            ctx.step += 1
            self._begun = False

    @contextmanager
    def evaluating(self, ema: bool = False) -> Iterator[None]:
        """Evaluation mode; the methods' `on_eval` is entered in run order and left in reverse.

        Args:
            ema: compute with the average of the weights (collective).

        Raises:
            ConfigError: `ema` is asked for and there is none.
        """
        if ema and self.ema is None:
            raise ConfigError("no average is kept; set efftrain.model.ema")
        module = self.deepspeed_engine.module
        was_training = module.training
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.on_eval(self.context))
            if ema:
                stack.enter_context(self.ema.swap())
            self.deepspeed_engine.eval()
            try:
                yield
            finally:
                self.deepspeed_engine.train(was_training)

    # -- state -------------------------------------------------------------------------------------------------

    def efftrain_state(self) -> dict[str, Any]:
        """Step, architecture and methods' state: tensors and plain types."""
        return {
            "step": self.context.step,
            "methods": {m.name: m.state_dict() for m in self.methods},
            "architecture": self._architecture(),
        }

    def _architecture(self) -> dict[str, Any] | None:
        """What a resume must build before it can load: the methods' changes, groups, history."""
        if self.rebuilder is None:
            return None
        return {
            "methods": {m.name: m.architecture() for m in self.methods},
            "groups": self.rebuilder.groups.to_plain(),
            "digest": digest(self.rebuilder.blueprint),
            "history": list(self.rebuilds),
        }

    def _adopt_architecture(self, saved: dict[str, Any] | None, path: Path) -> None:
        """Bring the module into the architecture of a checkpoint. Collective.

        Raises:
            CheckpointError: it belongs to another model.
        """
        if saved is None or self.rebuilder is None:
            return
        if saved["digest"] != digest(self.rebuilder.blueprint) or saved["groups"] != self.rebuilder.groups.to_plain():
            if self._original is None:
                raise CheckpointError(f"{path}: the checkpoint has another architecture and no blueprint is kept")
            blueprint = copy_blueprint(self._original)
            for method in self.methods:
                blueprint = method.shape_model(blueprint, saved["methods"][method.name])
            if digest(blueprint) != saved["digest"]:
                raise CheckpointError(
                    f"{path}: the checkpoint belongs to another model (architecture {saved['digest']}, "
                    f"this one becomes {digest(blueprint)})"
                )
            groups = self.rebuilder.groups.with_members(saved["groups"])
            self.rebuilder.recreate(self, blueprint, groups)
            if self._compile is not None:
                self.deepspeed_engine.compile(*self._compile[0], **self._compile[1])
        self.rebuilds[:] = saved["history"]

    def load_efftrain_state(self, state: dict[str, Any]) -> None:
        """Restore what `efftrain_state` returned; the next step enters its stage anew."""
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
        self.context.step = state["step"]
        self.context.stage = None
        self._begun = False

    def _check_state(self, extra: dict[str, Any]) -> None:
        """Refuse the state of other methods, before anything is loaded."""
        state = extra.get("efftrain")
        if state is None:
            raise CheckpointError("the checkpoint was not made by save_checkpoint of this package")
        saved, active = sorted(state["methods"]), sorted(m.name for m in self.methods)
        if saved != active:
            raise CheckpointError(f"the checkpoint was made with methods {saved}, this run has {active}")

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        keep: int | None = None,
    ) -> bool:
        """Save the whole state in the checkpoint store (plain tensors, any ZeRO stage and world size on load).

        Same arguments as DeepSpeed's; `client_state` holds plain types and tensors. Collective.

        Raises:
            CheckpointError: writing failed, or accumulation is in flight.
        """
        if exclude_frozen_parameters:
            raise CheckpointError("save_checkpoint: exclude_frozen_parameters=True is not supported")
        store.save(
            self.deepspeed_engine,
            save_dir,
            step=self.context.step,
            tag=tag,
            ema=self.ema,
            keep=keep,
            latest=save_latest,
            extra={"efftrain": self.efftrain_state(), "client": client_state or {}},
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint made by `save_checkpoint`; returns (path, client_state) or (None, None). Collective.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        if custom_load_fn is not None or not load_module_strict:
            raise CheckpointError("load_checkpoint: only strict loading without custom_load_fn is supported")
        path = store.find(load_dir, tag)
        if path is None:
            return None, None
        full = load_optimizer_states and not load_module_only
        state = store.read_extra(path).get("efftrain") if self.rebuilder is not None else None
        if state is not None:
            self._check_state({"efftrain": state})
            self._adopt_architecture(state.get("architecture"), path)
        loaded = store.load(
            self.deepspeed_engine,
            path,
            ema=self.ema,
            optimizer_state=full,
            check=self._check_state if full else None,
            scheduler_state=load_lr_scheduler_states and not load_module_only,
        )
        if full:
            self.load_efftrain_state(loaded.extra["efftrain"])
            if self.rebuilder is not None:
                for method in self.methods:
                    method.on_rebuilt(self.context)
        return str(path), loaded.extra["client"]
