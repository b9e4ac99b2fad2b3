"""The method protocol: every hook is optional and does nothing by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from .batch import Batch
from .context import Context
from .strict import StrictModel
from .timeline import PlanSpec, Schedule, Stage, Timeline

PHASES = ("data", "model", "loss", "gradient", "weight")


class Method:
    """Base class of every training method (EfficientTrain, AutoProg, SViTE, ElasticViT, or your own).

    A method is constructed with its validated configuration. Hooks are called in the order of `core.events.Event`;
    methods run in the order of their `phase`, and `on_eval` exits in reverse.

    Class attributes:
        name: key under ``"efftrain": {"methods": {...}}``.
        Config: strict model of that key's value.
        phase: one of `PHASES`; decides the order between methods.
        changes_parameters: may ask for a rebuild (refused by `wrap`).
        changes_inputs: acts on the batch.
        owns_loss: replaces the loss (at most one method of a run may).
        conflicts_with: names of methods that cannot run beside this one.
        needs: names of methods that must run beside this one.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[StrictModel]] = StrictModel
    phase: ClassVar[str] = "model"
    changes_parameters: ClassVar[bool] = False
    changes_inputs: ClassVar[bool] = False
    owns_loss: ClassVar[bool] = False
    conflicts_with: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any):
        self.config = config

    def plan(self, spec: PlanSpec) -> Timeline:
        """Stages this method asks for. Pure: no device, shard or weight is touched.

        Raises:
            PlanError: the method cannot run under `spec`.
        """
        from .timeline import Segment

        return Timeline((Segment(0.0, 1.0),))

    def alternatives(self, spec: PlanSpec) -> dict[str, Timeline]:
        """Other timelines that may run instead of `plan`'s, by name; empty where the plan is certain.

        A method that chooses its stages during the run returns the bounds of what it can choose, e.g.
        ``{"cheapest": ..., "dearest": ...}``; the plan's price is then shown with that range. Pure, like `plan`.

        Raises:
            PlanError: the method cannot run under `spec`.
        """
        return {}

    def check(self, schedule: Schedule) -> None:
        """Refuse what the plans of all methods make together. Pure, like `plan`.

        Raises:
            PlanError: a stage has settings of another method that this one cannot run with.
        """

    def cost_factor(self, spec: PlanSpec, stage: Stage) -> float:
        """Cost of a training step of `stage` over that of a step in which every layer trains.

        For what the settings "resolution", "bandwidth" and "depth" do not say, e.g. frozen layers. Pure, like `plan`.
        """
        return 1.0

    @property
    def needs_average(self) -> bool:
        """True where the method reads the average of the weights, so that ``efftrain.model.ema`` must be set."""
        return False

    @property
    def clips_gradients(self) -> str:
        """Key with which the method itself clips gradients, so that ``gradient_clipping`` must be 0; "" for none."""
        return ""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Change or check the module before ``deepspeed.initialize``; returns the module to train.

        Raises:
            ModelError: the method cannot take this model.
        """
        return model

    def architecture(self) -> dict[str, Any]:
        """Plain values that say how this method has changed the module so far (e.g. ``{"depth": 8}``).

        Kept in checkpoints; `shape_model` takes them on a resume.
        """
        return {}

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Rebuild the module into an architecture, before a checkpoint of that architecture is loaded.

        Args:
            model: the module as it was before `prepare_model`; may be changed in place.
            architecture: what `architecture` returned when the checkpoint was made.

        Raises:
            ModelError: the model cannot take this architecture.
        """
        return model

    def on_stage_enter(self, ctx: Context, stage: Stage) -> Any | None:
        """Called at an optimizer boundary when a stage begins (also after a resume).

        The only place where parameter shapes may change, by returning a rebuild request.
        """
        return None

    def on_rebuilt(self, ctx: Context) -> None:
        """Called after a rebuild, when the module, the optimizer and the average are the new ones.

        Also after one that failed and was rolled back (they are new then, too), and perhaps twice in a row.
        """

    def on_step_start(self, ctx: Context) -> None:
        """Called before the first micro-batch of an optimizer step."""

    @property
    def passes(self) -> int:
        """Forward and backward passes over each micro-batch, e.g. one for each of several sub-networks.

        Constant for a run; at most one method may have more than one. The gradient of a step is the sum over the passes
        (and the mean over micro-batches and ranks, as ever).
        """
        return 1

    def on_pass(self, ctx: Context, index: int) -> None:
        """Called before each forward pass of training, `index` counting the passes over a micro-batch from 0."""

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Change inputs or targets, on the device."""
        return batch

    def loss(self, ctx: Context, outputs: Any, batch: Batch) -> Tensor | None:
        """The loss of one micro-batch; only called when `owns_loss`."""
        return None

    def loss_term(self, ctx: Context, outputs: Any, batch: Batch) -> Tensor | None:
        """A term to add to the loss, or None."""
        return None

    def on_boundary(self, ctx: Context) -> None:
        """Called when the gradients of a step are complete, before ``engine.step()`` applies them.

        Not called for a step that is refused because a loss or gradient is not finite (`on_step_end` is).
        """

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Called after the step; `applied` is False when the optimizer skipped it (overflow)."""

    @property
    def variants(self) -> tuple[str, ...]:
        """What is evaluated beside the main one, e.g. further sub-networks; `on_eval` finds it in the context."""
        return ()

    @contextmanager
    def on_eval(self, ctx: Context) -> Iterator[None]:
        """Entered around an evaluation, with the weights that are evaluated in place (see also `Context.variant`)."""
        yield

    def evaluate(self, ctx: Context, batch: Batch) -> dict[str, Tensor] | None:
        """Measure a held-out batch: a value [N] of every sample by name, whose means are the evaluation's results.

        Only called when `owns_loss`, for each batch, inside `on_eval` and without gradients; runs the model itself by
        ``ctx.engine(batch.images)``. Names ending in "loss" are the better the smaller. None, always, leaves it at
        top-1, top-5 and cross-entropy of the labels.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types that a resume needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def decision(self, ctx: Context) -> str | None:
        """What this method has decided for the current step, in a few words; must be equal on all ranks.

        Asked at the boundary of every step where ``efftrain.guard.decisions`` is on, after the methods' other hooks of
        that step but `on_boundary` and `on_step_end`. Ranks that differ end the run with both texts, before they train
        different models. For large state (masks) return a digest that is made when the state changes.
        """
        return None

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Values for the log, by TensorBoard tag."""
        return {}

    def pictures(self, ctx: Context) -> dict[str, Tensor]:
        """Pictures of the method's state for TensorBoard and the run's folder, uint8 [3, H, W] by TensorBoard tag.

        Asked of rank 0 alone, after the steps that ``efftrain.observe.images_every`` names: nothing here may be
        collective. Where it raises, the run goes on without the picture.
        """
        return {}

    def describe(self, stage: Stage) -> str:
        """A few words on `stage` for the screen, e.g. ``"B128"``."""
        return ""
