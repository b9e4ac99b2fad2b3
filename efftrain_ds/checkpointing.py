"""The part of the engine that saves and loads: architecture first, then tensors, then the methods' state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .checkpoint import native, store
from .checkpoint.background import BackgroundSave
from .core.context import Context
from .core.errors import CheckpointError
from .core.method import Method
from .core.ranks import agree, text_of
from .zero.blueprint import copy_blueprint, digest
from .zero.ema import ShardedEma
from .zero.groups import BIRTH
from .zero.rebuild import Rebuilder

logger = logging.getLogger(__name__)


class Checkpointing:
    """Saving and loading of an `engine.EfficientEngine`, which has these attributes."""

    deepspeed_engine: Any
    context: Context
    methods: list[Method]
    ema: ShardedEma | None
    guard: Any
    rebuilder: Rebuilder | None
    rebuilds: list[dict[str, Any]]
    _original: nn.Module | None
    _saving: BackgroundSave | None
    _buffers: dict[str, Tensor]
    _compile: tuple[tuple, dict] | None
    _in_flight: bool
    _begun: bool

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
            blueprint = self._shaped(saved, path)
            groups = self.rebuilder.groups.with_members(saved["groups"])
            try:
                self.rebuilder.recreate(self, blueprint, groups)
            except Exception as error:
                raise CheckpointError(f"{path}: {error}; the engine is gone, start anew") from error
            if self._compile is not None:
                self.deepspeed_engine.compile(*self._compile[0], **self._compile[1])
        self.rebuilds[:] = saved["history"]

    def _saved_architecture(self, path: Path) -> dict[str, Any] | None:
        """The architecture of a checkpoint, read and tried out on every rank before anything is touched. Collective.

        Raises:
            CheckpointError: on all ranks, where one of them cannot read it or it does not fit.
        """
        found, problem = None, None
        try:
            extra = store.read_extra(path)
            self._check_state(extra)
            found = extra["efftrain"].get("architecture")
            if found is not None:
                self._shaped(found, path)
        except Exception as error:
            problem = text_of(error)
        agree(problem, CheckpointError)
        return found

    def _shaped(self, saved: dict[str, Any], path: Path) -> nn.Module:
        """The blueprint of a checkpoint's architecture; nothing is touched yet.

        Raises:
            CheckpointError: the model cannot become it, or the parameter groups are others.
        """
        assert self.rebuilder is not None
        if saved["digest"] == digest(self.rebuilder.blueprint):  # the user's loop has brought it here; groups differ
            blueprint = copy_blueprint(self.rebuilder.blueprint)
        else:
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
        trainable = {name for name, p in blueprint.named_parameters() if p.requires_grad}
        named = {name for _, members in saved["groups"] for name in members}
        parents = {str(label).split(BIRTH)[0] for label, _ in saved["groups"]}
        if named != trainable or not parents <= set(self.rebuilder.groups.hypers):
            raise CheckpointError(
                f"{path}: the checkpoint has other parameter groups ({', '.join(sorted(parents))}) than this run "
                f"({', '.join(self.rebuilder.groups.hypers)})"
            )
        return blueprint

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
        background: bool | Literal["sync"] = False,
        form: str = "efftrain",
    ) -> bool:
        """Save the whole state in the checkpoint store (plain tensors, any ZeRO stage and world size on load).

        Same arguments as DeepSpeed's; `client_state` holds plain types and tensors. Collective.

        Args:
            save_dir: folder of all checkpoints of the run.
            tag: folder name; None names it after the step.
            client_state: the caller's own state.
            save_latest: point ``latest`` at it.
            exclude_frozen_parameters: only False is supported.
            keep: newest checkpoints to keep; None keeps all.
            background: True copies the state in host memory and goes on while threads write it; "sync" writes it and
                goes on while threads wait for the disk (no copy). `finish_saving`, the next save or the next load tells
                how it went.
            form: "efftrain", or "deepspeed" for DeepSpeed's own files, for interchange only: they are pickles, nothing
                checks them on load, and they fit one world size and ZeRO stage. Not together with `keep` or
                `background`.

        Raises:
            CheckpointError: on all ranks: writing failed on some of them, or accumulation is in flight; or the save
                before, in the background, had failed: this one is then written (or begun) all the same.
        """
        if exclude_frozen_parameters:
            raise CheckpointError("save_checkpoint: exclude_frozen_parameters=True is not supported")
        _check_form(form)
        given = {"keep": keep is not None, "background": bool(background)}
        if form == "deepspeed" and any(given.values()):
            raise CheckpointError(
                f"save_checkpoint: found {' and '.join(k for k, v in given.items() if v)} together with "
                'form="deepspeed", which neither deletes older checkpoints nor writes in the background; allowed: '
                "keep=None, background=False"
            )
        if self._in_flight:
            raise CheckpointError("a checkpoint can be saved only between optimizer steps (accumulation is in flight)")
        with self._checkpoint_phase():
            self._save(save_dir, tag, client_state, save_latest, keep, background, form)
        return True

    def _save(
        self,
        save_dir: str | Path,
        tag: str | None,
        client_state: dict[str, Any] | None,
        save_latest: bool,
        keep: int | None,
        background: bool | Literal["sync"],
        form: str,
    ) -> None:
        problem = self._finished()
        extra = {"efftrain": self.efftrain_state(), "client": client_state or {}}
        if form == "deepspeed":
            native.save(self.deepspeed_engine, save_dir, tag, extra, latest=save_latest)
            if problem is not None:
                raise problem
            return
        self._saving = store.save(
            self.deepspeed_engine,
            save_dir,
            step=self.context.step,
            tag=tag,
            ema=self.ema,
            keep=keep,
            latest=save_latest,
            extra=extra,
            background=background,
            buffers=self._buffers,
        )
        if problem is not None:
            raise problem

    def _finished(self) -> CheckpointError | None:
        """Wait for a save in the background; what went wrong with it."""
        try:
            self.finish_saving()
        except CheckpointError as error:
            return error
        return None

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is written in the background, if there is one. Collective.

        To be called at the end of a loop, where the last save was one in the background: only then is it said whether
        that has succeeded. A process that ends without it waits, too, but for ranks that are gone not for long.

        Raises:
            CheckpointError: on all ranks, where writing it failed on some; earlier checkpoints are untouched.
        """
        saving = self._saving
        if saving is None:
            return
        try:
            with self._checkpoint_phase():
                store.finish(saving)
        except CheckpointError:
            self._saving = None
            raise
        self._saving = None  # not where the connection to another rank was lost: `leave_saving` sees to it then

    def leave_saving(self) -> None:
        """Before this process ends by an error: complete a checkpoint that is written in the background.

        Not collective, and it raises nothing: other ranks may be gone, and are not waited for longer than this rank's
        own part has taken (5 s at least). What goes wrong is logged.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._checkpoint_phase():
                saving.leave()

    def _checkpoint_phase(self) -> AbstractContextManager[None]:
        return self.guard.phase("checkpoint") if self.guard is not None else nullcontext()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable | None = None,
        *,
        form: str = "efftrain",
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint made by `save_checkpoint`; returns (path, client_state) or (None, None). Collective.

        Args:
            load_dir: folder of all checkpoints of the run.
            tag: folder name; None takes the newest one that verifies.
            load_module_strict: only True is supported.
            load_optimizer_states: load moments, counters and the methods' state too.
            load_lr_scheduler_states: load the scheduler.
            load_module_only: load the weights only.
            custom_load_fn: only None is supported.
            form: "efftrain", or "deepspeed" for DeepSpeed's own files. Loading those runs whatever code is in their
                pickles, so do it with your own files only.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        if custom_load_fn is not None or not load_module_strict:
            raise CheckpointError("load_checkpoint: only strict loading without custom_load_fn is supported")
        _check_form(form)
        problem = self._finished()
        if problem is not None:
            logger.warning("the save before this load had failed: %s", problem)
        if form == "deepspeed":
            return self._load_native(load_dir, tag, load_optimizer_states and not load_module_only)
        path = store.find(load_dir, tag)
        if path is None:
            return None, None
        full = load_optimizer_states and not load_module_only
        scheduler = load_lr_scheduler_states and not load_module_only
        return str(path), self.load_verified(path, full=full, scheduler=scheduler)

    def load_verified(self, path: Path, *, full: bool = True, scheduler: bool = True) -> dict[str, Any]:
        """Load a checkpoint folder whose hashes were checked just now (`store.find`); its client state. Collective.

        Args:
            path: the folder.
            full: load moments, counters and the methods' state too.
            scheduler: load the scheduler.

        Raises:
            CheckpointError: of another model.
        """
        if full and self.rebuilder is not None:
            self._adopt_architecture(self._saved_architecture(path), path)
        loaded = store.load(
            self.deepspeed_engine,
            path,
            ema=self.ema,
            optimizer_state=full,
            check=self._check_state if full else None,
            scheduler_state=scheduler,
        )
        if full:
            self.load_efftrain_state(loaded.extra["efftrain"])
            self._in_flight = False
            if self.rebuilder is not None:
                for method in self.methods:
                    method.on_rebuilt(self.context)
        return loaded.extra["client"]

    def _load_native(self, load_dir: str | Path, tag: str | None, full: bool) -> tuple[str | None, dict | None]:
        path, extra = native.load(self.deepspeed_engine, load_dir, tag, full=full)
        if path is None or extra is None:
            return path, extra
        if full:
            self._check_state(extra)
            self.load_efftrain_state(extra["efftrain"])
            self._in_flight = False
        if self.ema is not None:
            self.ema.restart()  # this form has no average
        return path, extra["client"]


def _check_form(form: str) -> None:
    if form not in ("efftrain", "deepspeed"):
        raise CheckpointError(f'form: found {form!r}, allowed: "efftrain", "deepspeed"')
