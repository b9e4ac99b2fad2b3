"""`Guard`: what the engine asks before and after every optimizer step. ``engine.guard``."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.errors import DivergenceError
from ..core.method import Method
from ..core.ranks import gather
from ..zero.skip import scale_is_exhausted, scales_loss, skipped_step, sum_is_finite, unchecked_gradients
from .buffers import BufferKeeper
from .nonfinite import Finding, Watch
from .replay import write_replay
from .vote import compare, digest_of, vote
from .watchdog import Watchdog

logger = logging.getLogger(__name__)


class Guard:
    """Refuses non-finite steps, notices ranks that decide differently, and carries the request to stop.

    Its one collective a step is an all-reduce of four integers just before DeepSpeed's step.

    Args:
        nonfinite: apply a step with a non-finite loss or gradient on no rank.
        gradients: look at each rank's gradients (False: only at the loss, and at what DeepSpeed itself skips).
        max_nonfinite: consecutive such steps that end the run.
        decisions: compare the ranks' decisions.
        stall_s: of `watch`.
        faults: folder for replay files; None = none are written.

    Attributes:
        count: non-finite steps since the process started.
        consecutive: non-finite steps in a row, up to now.
        stop_agreed: some rank was asked to stop; equal on all ranks.
        watchdog: see `watch`.
        on_nonfinite: called on every rank with the findings of all ranks after a refused step, or None.
        sample_names: turns sample ids into names for messages, or None.
    """

    def __init__(
        self,
        *,
        nonfinite: bool = True,
        gradients: bool = True,
        max_nonfinite: int = 5,
        decisions: bool = True,
        stall_s: float | None = 600.0,
        faults: str | Path | None = None,
    ):
        self.nonfinite, self.gradients = nonfinite, gradients
        self.max_nonfinite, self.decisions, self.stall_s = max_nonfinite, decisions, stall_s
        self.faults = Path(faults) if faults is not None else None
        self.count = self.consecutive = 0
        self.stop_agreed = False
        self.watchdog: Watchdog | None = None
        self.on_nonfinite: Callable[[list[Finding]], None] | None = None
        self.sample_names: Callable[[list[int]], list[str]] | None = None
        self._stop = False
        self._watch: Watch | None = None
        self._buffers: BufferKeeper | None = None
        self._module: Callable[[], Any] = lambda: None
        self._refused = self._saved = False
        self._fresh = True
        self._step = 0
        self._last = ""
        self._texts: dict[str, tuple[Any, str]] = {}

    def bind(self, engine: Any) -> None:
        """Called by the engine that this guard belongs to."""
        self._engine, self._context = engine, engine.context
        self._deciding = [m for m in engine.methods if type(m).decision is not Method.decision]

    # -- stopping ----------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask all ranks to stop; safe in a signal handler. Seen by all at the next step or `poll`."""
        self._stop = True

    def poll(self) -> bool:
        """True where some rank was asked to stop. Collective: every rank must call it equally often."""
        if not self.stop_agreed:
            self.stop_agreed = vote(self._context.device, stop=self._stop).stop
        return self.stop_agreed

    def watch(self, folder: str | Path, **options: Any) -> Watchdog | None:
        """Start the stall watchdog of this rank, with ``stall_s``; None where that is null.

        Args:
            folder: shared by all ranks.
            **options: further arguments of `Watchdog`.
        """
        if self.stall_s is not None:
            ctx = self._context
            self.watchdog = Watchdog(folder, rank=ctx.rank, world=ctx.world, stall_s=self.stall_s, **options)
            self.watchdog.start()
        return self.watchdog

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Tell the watchdog, where one is on, that the code inside is of another phase ("evaluation", "checkpoint")."""
        return self.watchdog.during(name) if self.watchdog is not None else nullcontext()

    def expect_compilation(self) -> None:
        """The next step may take as long as a first one (another input size, another depth)."""
        self._fresh = True

    def close(self) -> None:
        """Stop the watchdog and take the hooks off."""
        if self.watchdog is not None:
            self.watchdog.stop()
            self.watchdog = None
        if self._watch is not None:
            self._watch.close()
        self._watch, self._buffers, self._module = None, None, lambda: None

    # -- one micro-batch ---------------------------------------------------------------------------------------

    def forward(self, images: Any, training: bool) -> None:
        """Before the engine's forward pass."""
        if self.watchdog is not None:
            phase = ("first step" if self._fresh else "train") if training else "evaluation"
            self.watchdog.beat(phase, self._context.step)
        if not training:
            return
        watch = self._ready()
        if watch is None:
            return
        if not self._saved and self._buffers is not None:
            self._buffers.save()
            self._saved = True
        tensors = watch.micro.tensors
        if isinstance(images, Tensor):
            tensors["images"] = images.detach()
        tensors["rng"] = torch.get_rng_state()
        if self._context.device.type == "cuda":
            tensors["rng_device"] = torch.cuda.get_rng_state(self._context.device)

    def note(self, batch: Any) -> None:
        """Remember whose samples the current micro-batch holds, for messages and replay files.

        Args:
            batch: a `Batch`; or sample ids, as a tensor or a sequence of integers, from a loop of your own.
        """
        watch = self._ready()
        if watch is None or not self._engine.deepspeed_engine.module.training:
            return
        if isinstance(batch, Batch):
            watch.micro.note(batch)
        elif isinstance(batch, Tensor) or (isinstance(batch, Sequence) and all(isinstance(i, int) for i in batch)):
            watch.micro.tensors["ids"] = torch.as_tensor(batch)

    def after_backward(self, loss: Tensor | None) -> None:
        """After the engine's backward pass of one micro-batch."""
        watch = self._ready()
        if watch is not None:
            watch.advance(loss)

    def _ready(self) -> Watch | None:
        """The flags of the current module, where non-finite steps are refused; made anew for each module."""
        engine = self._engine.deepspeed_engine
        if self._module() is not engine.module:  # also after a change of parameters
            self._module, self._fresh = weakref.ref(engine.module), True
            if self._watch is not None:
                self._watch.close()
            if self.nonfinite:
                # gradients that overflow are the loss scaler's ordinary business
                self._watch = Watch(engine.module, self._context.device, self.gradients and not scales_loss(engine))
                self._buffers = BufferKeeper(engine.module)
        return self._watch

    # -- one step ----------------------------------------------------------------------------------------------

    def before_step(self, boundary: bool) -> bool:
        """Before the engine's step. Collective at the boundary.

        Returns:
            True where the step must be skipped (equal on all ranks).

        Raises:
            DesyncError: the ranks' decisions differ.
        """
        watch = self._watch
        if watch is not None and watch.pending:  # the loop called loss.backward() itself
            watch.advance()
        if not boundary:
            return False
        engine, ctx = self._engine.deepspeed_engine, self._context
        if self.watchdog is not None:  # who waits for the others below has got further than they
            self.watchdog.beat("first step" if self._fresh else "train", ctx.step)
        flag = watch.flag() if watch is not None else None
        if self.nonfinite:
            grads = [] if scales_loss(engine) else unchecked_gradients(engine)
            if grads:
                bad = ~sum_is_finite(grads)
                flag = bad if flag is None else flag | bad
        mine = self._decisions() if self.decisions else {}
        ballot = vote(ctx.device, nonfinite=flag, stop=self._stop, digest=digest_of("\n".join(mine.values())))
        self.stop_agreed = self.stop_agreed or ballot.stop
        if not ballot.agreed:
            compare(mine, ctx.step)
        self._step, self._refused = ctx.step, ballot.nonfinite
        return self._refused

    def skip(self) -> AbstractContextManager[None]:
        """Context for a step that `before_step` refused: DeepSpeed skips it."""
        return skipped_step(self._engine.deepspeed_engine)

    def after_step(self, applied: bool) -> None:
        """After the engine's step and all that follows from it. Collective where the step was refused.

        Raises:
            DivergenceError: too many non-finite steps in a row; on all ranks.
        """
        watch, ctx = self._watch, self._context
        self._saved = self._fresh = False
        if self.watchdog is not None:
            self.watchdog.beat("train", ctx.step)
        if self.nonfinite:
            engine = self._engine.deepspeed_engine
            skipped_by_deepspeed = not applied and (not scales_loss(engine) or scale_is_exhausted(engine))
            if self._refused or skipped_by_deepspeed:
                self._tell()
            elif applied:
                self.consecutive = 0
        self._refused = False
        if watch is not None:
            watch.clear()
        if self.consecutive >= self.max_nonfinite:
            raise DivergenceError(
                f"{self.consecutive} consecutive steps were not finite (efftrain.guard.max_nonfinite "
                f"{self.max_nonfinite}); the last: {self._last}"
            )

    def _tell(self) -> None:
        ctx, watch = self._context, self._watch
        if self._buffers is not None:
            self._buffers.restore()
        self.count, self.consecutive = self.count + 1, self.consecutive + 1
        own, rows = watch.finding(ctx.rank) if watch is not None else (Finding(ctx.rank), [])
        if own.what and self.faults is not None and watch is not None:
            micros = [(row, watch.micros[row]) for row in rows if row < len(watch.micros)]
            info = {"found": own.what, "value": own.value, "losses": [_text(v) for v in own.losses], "seed": ctx.seed}
            if ctx.stage is not None:
                info |= {"stage": ctx.stage.index, "settings": dict(ctx.stage.settings)}
            path = write_replay(self.faults, self._step, ctx.rank, micros, info)
            own.replay = str(path) if path is not None else ""
        findings = [found for found in gather(own) if found.what]
        self._last = self._describe(findings)
        if ctx.rank == 0:
            logger.warning("%s (%d in a row, %d end the run)", self._last, self.consecutive, self.max_nonfinite)
        ctx.record("nonfinite", step=self._step, consecutive=self.consecutive, findings=[asdict(f) for f in findings])
        if self.on_nonfinite is not None:
            self.on_nonfinite(findings)

    def _describe(self, findings: list[Finding]) -> str:
        parts = []
        for found in findings[:8]:
            names = [str(i) for i in found.ids]
            if self.sample_names is not None and found.ids:
                names = self.sample_names(found.ids)
            samples = f", samples {', '.join(names[:16])}" + (" ..." if len(names) > 16 else "") if names else ""
            replay = f", replay {found.replay}" if found.replay else ""
            parts.append(f"rank {found.rank}: {found.what} is {found.value}{samples}{replay}")
        more = f"; and {len(findings) - 8} more ranks" if len(findings) > 8 else ""
        found_text = "; ".join(parts) + more if parts else "the norm of the reduced gradients is not finite"
        return f"step {self._step} was not applied: {found_text}"

    # -- what the ranks must have in common ---------------------------------------------------------------------

    def _decisions(self) -> dict[str, str]:
        engine, ctx = self._engine.deepspeed_engine, self._context
        proxy = self._engine
        batch = f"{engine.train_micro_batch_size_per_gpu()} x {engine.gradient_accumulation_steps()}"
        found = {
            "step": f"{ctx.step}, {engine.global_steps} of DeepSpeed, {engine.skipped_steps} skipped",
            "batch": batch,
            "learning rate": repr(engine.get_lr()),
            "plan": self._once("plan", ctx.schedule, repr),
            "stage": self._once("stage", ctx.stage, repr),
            "changes of parameters": self._once("changes", len(proxy.rebuilds), lambda _: self._architecture()),
        }
        for method in self._deciding:
            text = method.decision(ctx)
            if text is not None:
                found[method.name] = text
        return found

    def _architecture(self) -> str:
        proxy = self._engine
        rows = [[r.get("step"), r.get("reason"), r.get("child")] for r in proxy.rebuilds]
        return json.dumps([rows, {m.name: m.architecture() for m in proxy.methods}], sort_keys=True, default=str)

    def _once(self, name: str, thing: Any, text: Callable[[Any], str]) -> str:
        """`text` of something that seldom changes, made anew only where another object stands there."""
        kept = self._texts.get(name)
        if kept is None or kept[0] is not thing:
            found = text(thing)
            if len(found) > 1000:  # a plan is long, and is hashed in every step
                found = hashlib.sha256(found.encode()).hexdigest()
            kept = self._texts[name] = (thing, found)
        return kept[1]


def _text(value: float) -> float | str:
    """JSON has no nan."""
    return value if math.isfinite(value) else str(value)
