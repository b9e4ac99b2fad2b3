"""ElasticViT as a method: several sub-networks of one level in every step, their gradients summed.

Source: ElasticViT (Tang et al., ICCV 2023, arXiv 2303.09730) and its published code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, ModelError, PlanError
from ...core.method import Method
from ...core.ranks import from_first
from ...core.registry import register_method
from ...core.rng import numpy_rng
from ...core.timeline import PlanSpec, Segment, Stage, Timeline
from ...models.elastic import Space
from .calibrate import batch_norms, calibrate, kept_statistics
from .config import KEY, ElasticViTConfig, bank_of, exploit_of, levels_of, smallest_of
from .levels import Walk, macs_text
from .memory import Memory
from .preference import Drawn, Sampler
from .price import step_cost
from .scoring import Probes
from .tables import Table, build_tables, read_tables, save_tables
from .targets import Targets
from .teacher import Teacher, make_teachers
from .update import Update

logger = logging.getLogger(__name__)

_CHECKSUM_EVERY = 50
"""Steps between two comparisons of the whole banks of all ranks."""


@register_method
class ElasticVit(Method):
    """Train a supernet: in each step a few sub-networks of similar cost, and the smallest one of their level."""

    name: ClassVar[str] = "elasticvit"
    Config: ClassVar[type[ElasticViTConfig]] = ElasticViTConfig
    phase: ClassVar[str] = "model"
    owns_loss: ClassVar[bool] = True
    conflicts_with: ClassVar[tuple[str, ...]] = (
        *("autoprog", "autoprog_zero", "svite", "s2vite", "svite_tokens", "svite_attention"),
    )

    config: ElasticViTConfig

    def __init__(self, config: ElasticViTConfig):
        super().__init__(config)
        self.space: Space[Any] | None = None
        self.teachers: list[Teacher] = []
        self.drawn: list[Drawn] = []
        """Sub-networks of the step, in the order of the modes."""
        self._run_seed = 0
        self._level = 0
        self._index = 0
        self._update: Update | None = None
        self._memory: Memory | None = None
        self._probes = Probes(KEY)
        self._tables: list[Table] = []
        self._counts = {"explored": 0, "drawn": 0}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._checksum = ""
        self._told = False

    # -- before the run ----------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """One stage; checks levels and smallest sub-networks against the space.

        Raises:
            PlanError: the model is no supernet.
            ConfigError: levels, smallest sub-networks or bank do not fit the space.
        """
        self._run_seed = spec.seed
        if spec.space is None:
            raise PlanError(
                f'{KEY}: the model is no supernet; allowed for efftrain.model.name: "elasticvit", "elastic_vit", '
                '"elastic_autoformer_tiny", "elastic_autoformer_small", "elastic_autoformer_base"'
            )
        self._set_space(spec.space)
        return Timeline((Segment(0.0, 1.0),))

    def _set_space(self, space: Space[Any]) -> None:
        if self.space == space:
            return
        self.space = space
        self.levels = levels_of(self.config, space)
        self.smallest = smallest_of(self.config, space, self.levels)
        self.walk = Walk(len(self.levels), self.config.walk)
        self.bank = bank_of(self.config, space, self.levels)
        self._memory = None
        if self.bank is not None and self.config.bank is not None:
            self._memory = Memory(self.bank, self.config.bank, self._probes)

    @property
    def _seed(self) -> int:
        return self._run_seed if self.config.seed is None else self.config.seed

    @property
    def passes(self) -> int:
        """One for each sub-network of a step."""
        return len(self.config.modes)

    def cost_factor(self, spec: PlanSpec, stage: Stage) -> float:
        """Mean MACs of all passes of a step over those of one pass of the largest sub-network; see `step_cost`."""
        assert self.space is not None
        return step_cost(self.config, self.space, self.levels, self.smallest, self.bank, spec)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Take the space of the model, make the tables and the teachers.

        Raises:
            ModelError: the model is no supernet, or a teacher does not fit.
            ConfigError: tables that do not fit, or levels that cannot be filled.
        """
        space = getattr(model, "space", None)
        if not isinstance(space, Space) or not hasattr(model, "set_config"):
            raise ModelError(f"{KEY}: {type(model).__name__} is no supernet (see docs/models.md)")
        self._set_space(space)
        self._tables = self._make_tables()
        try:
            self.sampler = Sampler(
                *(space, self.levels, self._tables, self.bank),
                exploit=exploit_of(self.config),
                preference=self.config.preference,
                candidates=self.config.candidates,
                draw=self.config.bank.draw if self.config.bank is not None else "softmax",
            )
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from error
        self.teachers = make_teachers(self.config.teachers, space.num_classes)
        self.targets = Targets(self.config, self.teachers, space.num_classes)
        names = [name for name, _ in model.named_parameters()]
        self._update = Update(space, names, self.config.agc, self.config.decay_unused)
        return model

    def _make_tables(self) -> list[Table]:
        """Read the tables that are there and make the others, on rank 0 for all.

        Raises:
            ConfigError: a folder that cannot be read or written or has tables of another run, or levels that cannot be
                filled.
        """
        folder, rows, seed = self.config.tables, self.config.rows, self._seed
        assert self.space is not None
        space = self.space

        def make() -> list[Table]:
            found: dict[int, Table] = {}
            if folder is not None:
                try:
                    found = read_tables(folder, space, self.levels, self.smallest, rows=rows, seed=seed)
                except ConfigError as error:
                    raise ConfigError(f"{KEY}.tables: {error}") from error
            missing = [index for index in range(len(self.levels)) if index not in found]
            made = build_tables(space, self.levels, self.smallest, rows=rows, seed=seed, only=missing)
            if folder is not None:
                try:
                    save_tables(folder, made)
                except OSError as error:
                    raise ConfigError(f"{KEY}.tables: cannot write {folder}: {error}") from error
            found.update(zip(missing, made, strict=True))
            return [found[index] for index in range(len(self.levels))]

        return from_first(make)

    # -- a step ------------------------------------------------------------------------------------------------

    @property
    def clips_gradients(self) -> str:
        """Where there is adaptive clipping, DeepSpeed must not clip."""
        return f"{KEY}.agc" if self.config.agc is not None else ""

    def on_rebuilt(self, ctx: Context) -> None:
        """Go on with the new optimizer."""
        if self._update is not None and self._told:
            self._update.attach(ctx.engine.deepspeed_engine)

    def on_step_start(self, ctx: Context) -> None:
        """Choose the sub-networks of the step: a function of seed, step, walk and bank, which all ranks share."""
        if not self._told:
            self._tell(ctx)
        rng = numpy_rng(self._seed, "subnet", ctx.step)
        self.drawn, levels, self._levels_drawn = [], [], []
        assert self.space is not None
        self._level = self.walk.next(rng)
        level = self._level
        for mode in self.config.modes:
            if mode == "random":
                if self.config.walk == "random" and levels:  # one for each sub-network, as in the published code
                    level = self.walk.next(rng)
                levels.append(level)
                self.drawn.append(self.sampler.sample(level, rng, ctx.progress))
            elif mode == "largest":
                self.drawn.append(Drawn(self.space.max(), False))
            else:
                self.drawn.append(Drawn(self.smallest.of(min(levels, default=level)), False))
            self._levels_drawn.append(level)
        self._counts["drawn"] += len(levels)
        self._counts["explored"] += sum(drawn.explored for drawn in self.drawn)
        if self._memory is not None:
            self._memory.begin()

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Keep the images before they are mixed, for the memory bank."""
        if self._memory is not None:
            self._memory.keep(batch)
        return batch

    def on_pass(self, ctx: Context, index: int) -> None:
        """Set the sub-network of the pass."""
        self._index = index
        ctx.engine.module.config = self.drawn[index].config  # set_config would check once more that the space has it

    def loss(self, ctx: Context, outputs: Any, batch: Any) -> Tensor:
        """Loss of one sub-network; the smallest learns from those before it.

        Raises:
            ConfigError: something else than a `Batch`, or labels, in a loop without the trainer.
        """
        if not isinstance(batch, Batch):
            if not isinstance(batch, Tensor) or self.teachers:
                raise ConfigError(f"{KEY}: engine.loss needs a Batch with images and labels here")
            batch = Batch(images=outputs, labels=batch)  # without a teacher the images are not read
        mode = self.config.modes[self._index]
        if self._index == 0:
            self.targets.begin(batch)
        loss = self.targets.loss(mode, outputs)
        total, count = self._sums.get(mode, (0.0, 0))
        self._sums[mode] = (total + loss.detach(), count + 1)
        return loss

    def on_boundary(self, ctx: Context) -> None:
        """Keep the blocks that took no part as they are."""
        assert self._update is not None
        self._update.before(ctx.engine.deepspeed_engine, [drawn.config for drawn in self.drawn])

    def on_step_end(self, ctx: Context, applied: bool) -> None:
        """Tell the memory bank how well the new sub-networks do."""
        assert self._update is not None
        self._update.after()
        self.targets.end()
        ctx.engine.module.set_config(None)
        if self._memory is None or not applied:
            return
        self._memory.offer(ctx, self.drawn, self._levels_drawn)
        self._memory.refresh(ctx, self._level)
        ctx.engine.module.set_config(None)
        if ctx.step % _CHECKSUM_EVERY == 0:
            self._checksum = self._memory.bank.checksum()

    # -- evaluation --------------------------------------------------------------------------------------------

    @property
    def variants(self) -> tuple[str, ...]:
        """Sub-networks that are evaluated beside the main one."""
        return tuple(_variant(one) for one in self.config.evaluate[1:])

    def evaluated(self, variant: str | None = None) -> Any:
        """The sub-network that an evaluation is of."""
        assert self.space is not None
        chosen = self.config.evaluate[0]
        if variant is not None:
            chosen = next(one for one in self.config.evaluate if _variant(one) == variant)
        if chosen == "smallest":
            return self.space.min()
        if chosen == "largest":
            return self.space.max()
        best = self.bank.best(int(chosen)) if self.bank is not None else None
        return best.config if best is not None else self.smallest.of(int(chosen))

    @contextmanager
    def on_eval(self, ctx: Context) -> Iterator[None]:
        """Evaluate one sub-network, with batch normalisation of its own."""
        module = ctx.engine.module
        before = module.config
        known = ctx.variant if ctx.variant in self.variants else None
        with kept_statistics(module):
            module.set_config(self.evaluated(known))
            try:
                self._calibrate(ctx)
                yield
            finally:
                module.set_config(before)

    def _calibrate(self, ctx: Context) -> None:
        module, engine = ctx.engine.module, ctx.engine.deepspeed_engine
        if not self.config.calibrate or not batch_norms(module):
            return
        batches = self._probes.of(ctx, self.config.calibrate)
        if batches:
            ready = (one.on(ctx) for one in batches)
            calibrate(module, engine, ((images, len(labels)) for images, labels in ready))

    # -- state and words ---------------------------------------------------------------------------------------

    def _tell(self, ctx: Context) -> None:
        """What is trained, in the journal; once."""
        self._told = True
        device, module = ctx.device, ctx.engine.module
        kind = next(module.parameters()).dtype
        for teacher in self.teachers:
            teacher.to(device, kind)
        assert self.space is not None
        assert self._update is not None
        self._update.attach(ctx.engine.deepspeed_engine)
        ctx.record(
            "supernet",
            space=self.space.hash,
            levels=self.levels.to_dict(),
            smallest=self.smallest.to_list(),
            tables=[len(table) for table in self._tables],
            modes=list(self.config.modes),
            teachers=[one.model for one in self.config.teachers],
        )

    def state_dict(self) -> dict[str, Any]:
        """The walk and the memory bank."""
        bank = json.dumps(self.bank.state_dict()) if self.bank is not None else None
        return {"walk": self.walk.state_dict(), "bank": bank, "counts": dict(self._counts), "checksum": self._checksum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CheckpointError: another space or other levels.
        """
        self.walk.load_state_dict(state["walk"])
        if self.bank is not None and state["bank"] is not None:
            self.bank.load_state_dict(json.loads(state["bank"]))
        self._counts = {key: int(value) for key, value in state["counts"].items()}
        self._checksum = str(state["checksum"])

    def decision(self, ctx: Context) -> str:
        """Level and sub-networks of the step, and now and then the whole bank."""
        text = json.dumps([drawn.config.to_dict() for drawn in self.drawn], sort_keys=True)
        return f"level {self._level} {hashlib.sha256(text.encode()).hexdigest()[:12]} bank {self._checksum}"

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Level of the step, mean losses since the last log by kind, share of new sub-networks, fill of the bank."""
        found = {"supernet/level_macs": float(self.levels.macs[self._level])}
        for mode, (total, count) in self._sums.items():
            found[f"supernet/loss_{mode}"] = float(total) / count
        self._sums = {}
        if self._counts["drawn"]:
            found["supernet/explored"] = self._counts["explored"] / self._counts["drawn"]
        if self.bank is not None:
            found["supernet/bank"] = len(self.bank) / sum(self.bank.capacity)
        return found

    def describe(self, stage: Stage) -> str:
        """For example ``"4 x 100 M-1.2 G MACs"``."""
        low, high = self.levels.macs[0], self.levels.macs[-1]
        return f"{self.passes} x {macs_text(low)}-{macs_text(high)}"


def _variant(one: str | int) -> str:
    return one if isinstance(one, str) else f"level{one}"
