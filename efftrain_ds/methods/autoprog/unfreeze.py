"""AutoProg-Zero for vision transformers: blocks are unfrozen and the resolution grows in stages, by ramps or a search.

From AutoProg-Zero (arXiv 2410.00350), whose released code fine-tunes diffusion transformers; what belongs to diffusion
(time steps, prompts, stage embeddings) is left out. A parameter that is not trained has no master weight and no
optimizer state, so every stage that unfreezes blocks asks for a rebuild: what trained already keeps its state.

Shape legend: N images, C channels, H x W pixels, K stages.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.batch import Batch
from ...core.context import Context
from ...core.errors import ConfigError, ModelError, PlanError
from ...core.method import Method
from ...core.registry import register_method
from ...core.text import align
from ...core.timeline import PlanSpec, Segment, Stage, Timeline
from ...data.augment.chain import normalize
from ...models.adapters import accepts_sizes
from ...zero import access
from ...zero.blueprint import materialise
from ...zero.rebuild import agree
from ...zero.request import RebuildRequest
from .candidates import Candidate, unfreezing_candidates
from .config import AutoProgZeroConfig, UnfreezeSearchConfig
from .levels import trained_blocks
from .schedules import levels, resolution_step, stage_epochs
from .scores import Vote, score_module, vote

_KEY = "efftrain.methods.autoprog_zero"
_EPS = 1e-9
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre")
"""What a ViT has before its blocks (names of timm)."""
_WARM_UP = 2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For probe images whose batch does not say (ImageNet's)."""


@register_method
class AutoProgZero(Method):
    """Staged unfreezing and growing resolution for fine-tuning a vision transformer."""

    name: ClassVar[str] = "autoprog_zero"
    Config: ClassVar[type[AutoProgZeroConfig]] = AutoProgZeroConfig
    phase: ClassVar[str] = "model"
    changes_parameters: ClassVar[bool] = True
    changes_inputs: ClassVar[bool] = True
    conflicts_with: ClassVar[tuple[str, ...]] = ("autoprog",)

    config: AutoProgZeroConfig

    def __init__(self, config: AutoProgZeroConfig):
        super().__init__(config)
        self._level = 1
        self._resolution: int | None = None
        self._decided: dict[int, Candidate] = {}
        self._always_frozen: frozenset[str] = frozenset()

    # -- plan --------------------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Timeline:
        """K equal stages with "resolution" and "unfrozen" (level 1..K).

        With a search, stages but the last have "search" too, and their values are the ramp's, or the chosen ones once
        there are any.

        Raises:
            PlanError: more stages than epochs or blocks, or resolutions that do not fit the model.
        """
        chosen, last = [], (0, 0)
        for stage, nominal in enumerate(self._ramp(spec)):
            found = self._decided.get(stage, (max(nominal[0], last[0]), max(nominal[1], last[1])))
            chosen.append(found)
            last = found
        return self._timeline(spec, chosen)

    def alternatives(self, spec: PlanSpec) -> dict[str, Timeline]:
        """What a search can choose at the least and at the most; empty without one.

        Raises:
            PlanError: as `plan`.
        """
        if self.config.search is None:
            return {}
        count, sizes = self.config.stages, sorted(set(self._resolutions(spec)))
        full = (count, spec.resolution)
        dearest = [(min(k + 2, count), sizes[min(k + 1, len(sizes) - 1)]) for k in range(count - 1)]
        return {
            "cheapest": self._timeline(spec, [(1, sizes[0])] * (count - 1) + [full]),
            "dearest": self._timeline(spec, [*dearest, full]),
        }

    def _resolutions(self, spec: PlanSpec) -> tuple[int, ...]:
        config = self.config
        if config.resolution_start is None:
            return (spec.resolution,) * config.stages
        if spec.resolution % spec.stride:
            raise PlanError(
                f"efftrain.data.resolution: {spec.resolution} is not a multiple of the model's stride {spec.stride}"
            )
        step = resolution_step(spec.resolution, spec.stride, config.resolution_step, key=f"{_KEY}.resolution_step")
        return levels(config.resolution_start, spec.resolution, step, config.stages)

    def _ramp(self, spec: PlanSpec) -> list[Candidate]:
        return list(zip(range(1, self.config.stages + 1), self._resolutions(spec), strict=True))

    def _edges(self, spec: PlanSpec) -> list[float]:
        """Progress at which each stage starts.

        Raises:
            PlanError: there are more stages than epochs.
        """
        count = self.config.stages
        if spec.steps is None and spec.epochs:
            return [float(start) / spec.epochs for start in stage_epochs(spec.epochs, count)]
        return [k / count for k in range(count)]

    def _timeline(self, spec: PlanSpec, chosen: Sequence[Candidate]) -> Timeline:
        count = self.config.stages
        if spec.depth and count > spec.depth:
            raise PlanError(f"{_KEY}.stages: {count} levels for {spec.depth} blocks; allowed: 1 to {spec.depth}")
        segments = []
        edges = [*self._edges(spec), 1.0]
        for k, (level, resolution) in enumerate(chosen):
            settings: dict[str, Any] = {"unfrozen": level}
            if self.config.resolution_start is not None:
                settings["resolution"] = resolution
            if self.config.search is not None and k < count - 1:
                settings["search"] = True
            segments.append(Segment(edges[k], edges[k + 1], settings))
        return Timeline(tuple(segments))

    # -- model -------------------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Freeze what the first level does not train. Parameters that arrive frozen stay so in every stage.

        Raises:
            ModelError: the model has no list of blocks, fewer of them than levels, or takes one size only.
        """
        if self.config.resolution_start not in (None, 1.0):
            accepted, reason = accepts_sizes(model)
            if not accepted:
                raise ModelError(
                    f"{_KEY}.resolution_start: {reason}; or set it to null to keep the resolution as it is"
                )
        self._check_blocks(model)
        self._always_frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        return self._set_level(model, 1)

    def architecture(self) -> dict[str, Any]:
        """The level that trains now."""
        return {"level": self._level}

    def shape_model(self, model: nn.Module, architecture: dict[str, Any]) -> nn.Module:
        """Freeze what the level of a checkpoint does not train.

        Raises:
            ModelError: as `prepare_model`, or the level is not one of this configuration.
        """
        level = int(architecture["level"])
        if not 1 <= level <= self.config.stages:
            raise ModelError(f"{_KEY}.stages: the checkpoint is at level {level}; allowed: 1 to {self.config.stages}")
        self._check_blocks(model)
        return self._set_level(model, level)

    def _check_blocks(self, model: nn.Module) -> None:
        blocks, kind = getattr(model, "blocks", None), type(model).__name__
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
            raise ModelError(
                f"{_KEY}: {kind} has no list of blocks to unfreeze; allowed: models of the ViT family, with an "
                "nn.Sequential or nn.ModuleList named blocks (ViT, DeiT, EVA, BEiT, ...)"
            )
        if self.config.stages > len(blocks):
            raise ModelError(
                f"{_KEY}.stages: {self.config.stages} levels for the {len(blocks)} blocks of {kind}; allowed: 1 to "
                f"{len(blocks)}"
            )

    def trained(self, model: nn.Module, level: int) -> frozenset[str]:
        """Names of the parameters that train at an unfreezing level."""
        config = self.config
        slots = {name: i for i, (name, _) in enumerate(model.blocks.named_children())}
        on = trained_blocks(len(slots), level, config.stages, config.order)
        off = _EMBEDDINGS if config.freeze_embeddings and level < config.stages else ()
        found = set()
        for name, _ in model.named_parameters():
            head, _, rest = name.partition(".")
            # the whole name of the block is compared: a prefix would take block 10 for block 1
            frozen = slots[rest.split(".")[0]] not in on if head == "blocks" else head in off
            if not frozen and name not in self._always_frozen:
                found.add(name)
        return frozenset(found)

    def _set_level(self, model: nn.Module, level: int) -> nn.Module:
        names = self.trained(model, level)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return model

    # -- run ---------------------------------------------------------------------------------------------------

    def on_stage_enter(self, ctx: Context, stage: Stage) -> RebuildRequest | None:
        """Choose level and resolution; asks for a rebuild where the trained parameters differ from those of now.

        Raises:
            ConfigError: a search without samples to measure on.
            RebuildError: measuring failed on some rank.
        """
        if "unfrozen" not in stage.settings:
            return None
        level, resolution = stage.settings["unfrozen"], stage.settings.get("resolution")
        if stage.settings.get("search"):
            level, resolution = self._decide(ctx, stage)
        before, self._level = self._level, level
        self._resolution = None if self.config.resolution_start is None else resolution
        blueprint = ctx.engine.blueprint
        if self.trained(blueprint, level) == {n for n, p in blueprint.named_parameters() if p.requires_grad}:
            return None
        reason = f"unfreezing level {before} -> {level} of {self.config.stages}"
        return RebuildRequest(surgery=lambda model: self._set_level(model, level), reason=reason)

    def _decide(self, ctx: Context, stage: Stage) -> Candidate:
        """The choice of a searched stage: made once, then kept (also over a resume)."""
        assert ctx.schedule is not None and self.config.search is not None
        spec = ctx.schedule.spec
        # stages of the run may be cut finer than ours by other methods
        index = bisect_right(self._edges(spec), stage.p_start + _EPS) - 1
        if index in self._decided:
            return self._decided[index]
        earlier = [k for k in self._decided if k < index]
        current = self._decided[max(earlier)] if earlier else None
        found = unfreezing_candidates(current, range(1, self.config.stages + 1), self._resolutions(spec))
        chosen = found[0]
        if len(found) > 1:
            start = time.perf_counter()
            measured = measure(ctx, found, self.trained, self.config.search)
            result = _agreed_vote(ctx, measured)
            chosen = found[result.index]
            _report(ctx, index, found, measured, result, time.perf_counter() - start)
        self._decided[index] = chosen
        return chosen

    def on_batch(self, ctx: Context, batch: Batch) -> Batch:
        """Shrink the images to the resolution of the stage; smaller ones stay as they are.

        uint8 images leave as normalised fp32, floating-point images keep their dtype.

        Raises:
            PlanError: the images are not square.
            ConfigError: uint8 images without mean and std.
        """
        side, (height, width) = self._resolution, batch.images.shape[-2:]
        if side is None or max(height, width) <= side:
            return batch
        if height != width:
            raise PlanError(f"{_KEY}: images of {height} x {width} pixels arrived, square ones are needed")
        dtype = batch.images.dtype
        images = shrink(batch.images, side)
        if dtype == torch.uint8:
            if batch.mean is None or batch.std is None:
                raise ConfigError("efftrain.data: uint8 images arrived without mean and std (Batch.mean, Batch.std)")
            batch.images = normalize(images, batch.mean, batch.std, torch.float32)
        else:
            batch.images = images.to(dtype)
        return batch

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Level and resolution of now, and what the searches have chosen, as [stage, level, resolution]."""
        decided = [[k, *chosen] for k, chosen in sorted(self._decided.items())]
        return {"level": self._level, "resolution": self._resolution, "decided": decided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._level, self._resolution = state["level"], state["resolution"]
        self._decided = {k: (level, resolution) for k, level, resolution in state["decided"]}

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Unfreezing level and resolution in pixels of the current stage."""
        found = {"stage/unfrozen": float(self._level)}
        if self._resolution is not None:
            found["stage/resolution"] = float(self._resolution)
        return found

    def describe(self, stage: Stage) -> str:
        """For example ``"u2 R64"``."""
        settings = stage.settings
        words = [f"u{settings['unfrozen']}"] if "unfrozen" in settings else []
        return " ".join([*words, *([f"R{settings['resolution']}"] if "resolution" in settings else [])])


def shrink(images: Tensor, side: int) -> Tensor:
    """Images [N, C, H, W] of any dtype as fp32 [N, C, side, side]: bilinear, pixel centres aligned, not normalised."""
    return F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False)


# -- measuring candidates --------------------------------------------------------------------------------------------

Measured = list[tuple[float, float, float]]
"""For each candidate (seconds of forward and backward, NTK score, ZiCo score), equal on all ranks."""


def measure(
    ctx: Context,
    candidates: Sequence[Candidate],
    trained: Callable[[nn.Module, int], frozenset[str]],
    search: UnfreezeSearchConfig,
) -> Measured:
    """Score candidates (level, resolution) on a copy of the running model. Collective; the run is not changed.

    The copy has the whole weights on every rank; the scores are computed in fp32, the time in the training dtype.
    Scores are averaged over ranks, of times the longest counts.

    Args:
        ctx: of the run.
        candidates: what to compare.
        trained: names of the parameters that a module trains at a level.
        search: numbers of samples and batches.

    Raises:
        ConfigError: there are no samples to measure on.
        RebuildError: measuring failed on some rank; on all ranks.
    """
    if ctx.probe_batches is None:
        raise ConfigError(
            f"{_KEY}.search: measures candidates on fixed samples, and this loop has none; use launch/train.py, pass "
            'probe_batches= to efftrain_ds.initialize, or set "search" to null'
        )
    device = ctx.device
    engine = ctx.engine
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float16 if engine.fp16_enabled() else torch.float32
    local: list[tuple[float, float, float]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        what = f"{_KEY}.search"
        with _Shared(what) as shared:
            batches = _probe(ctx, search)
            module = materialise(engine.blueprint, dtype=torch.float32, device=device)
        shared.check()
        _copy_weights(engine.module, module)
        with _Shared(what) as shared:
            scored = search.ntk_batches + search.zico_batches
            scores = [
                score_module(
                    module,
                    [(_sized(images, resolution), labels) for images, labels in batches[:scored]],
                    trained(module, level),
                    ntk_batches=search.ntk_batches,
                    zico_batches=search.zico_batches,
                )
                for level, resolution in candidates
            ]
            module.to(dtype)
            for (level, resolution), (ntk, zico) in zip(candidates, scores, strict=True):
                names = trained(module, level)
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(name in names)
                sized = [(_sized(images, resolution).to(dtype), labels) for images, labels in batches[scored:]]
                local.append((_seconds(module, sized, device), ntk, zico))
        shared.check()
    return _reduced(ctx, local)


class _Shared:
    """Keeps an exception of this rank until all ranks can hear of it (`check`)."""

    def __init__(self, what: str):
        self.what, self.problem = what, None

    def __enter__(self) -> _Shared:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.problem = f"{type(error).__name__}: {error}"
        return isinstance(error, Exception)

    def check(self) -> None:
        """Raise on all ranks where any has a problem. Collective."""
        agree(self.problem, self.what)


def _probe(ctx: Context, search: UnfreezeSearchConfig) -> list[tuple[Tensor, Tensor]]:
    """Normalised batches on the device: those for the scores first, then those for the time."""
    assert ctx.probe_batches is not None
    count = search.ntk_batches + search.zico_batches + search.time_batches
    size = max(2, -(-search.samples // ctx.world))  # one sample has no tangent kernel to speak of
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in ctx.probe_batches(size * ctx.world * count):
        if batch.labels is None:
            raise ConfigError("the probe batches have no labels")
        keep = batch.labels >= 0 if batch.valid is None else batch.valid & (batch.labels >= 0)
        rows += zip(_floating(batch)[keep], batch.labels[keep], strict=True)
    if not rows:
        raise ConfigError("none of the samples to measure on is valid")
    # taken in strides, so that a sorted data set gives mixed batches; few samples are used again
    chunks = [[rows[(k + i * count) % len(rows)] for i in range(size)] for k in range(count)]
    return [
        (torch.stack([x for x, _ in chunk]).to(ctx.device), torch.stack([y for _, y in chunk]).to(ctx.device))
        for chunk in chunks
    ]


def _floating(batch: Batch) -> Tensor:
    if batch.normalized:
        return batch.images.float()
    known = batch.mean is not None and batch.std is not None
    mean, std = (batch.mean, batch.std) if known else (_MEAN, _STD)
    channels = batch.images.shape[1]
    if len(mean) not in (1, channels):
        raise ConfigError(f"the probe images have {channels} channels and no mean and std (Batch.mean, Batch.std)")
    return normalize(batch.images, mean, std, torch.float32)


def _sized(images: Tensor, side: int) -> Tensor:
    return shrink(images, side) if images.shape[-1] > side else images


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Whole weights of a running module, one at a time. Collective."""
    parameters, buffers = dict(target.named_parameters()), dict(target.named_buffers())
    for name, parameter in source.named_parameters():
        with access.gather_full([parameter]):
            parameters[name].copy_(parameter)
    for name, buffer in source.named_buffers():
        buffers[name].copy_(buffer)


def _seconds(module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Median time of forward and backward over the batches, after a warm-up."""
    module.train()
    laps = []
    for images, labels in [*[batches[0]] * _WARM_UP, *batches]:
        _synchronise(device)
        start = time.perf_counter()
        F.cross_entropy(module(images).float(), labels).backward()
        _synchronise(device)
        laps.append(time.perf_counter() - start)
        module.zero_grad(set_to_none=True)
    return median(laps[_WARM_UP:])


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _reduced(ctx: Context, local: Measured) -> Measured:
    times = torch.tensor([row[0] for row in local], dtype=torch.float64, device=ctx.device)
    scores = torch.tensor([row[1:] for row in local], dtype=torch.float64, device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        dist.all_reduce(scores)
    return [(t, *row) for t, row in zip(times.tolist(), (scores / ctx.world).tolist(), strict=True)]


def _agreed_vote(ctx: Context, measured: Measured) -> Vote:
    """Rank 0 votes, all ranks hear."""
    result: list[Vote | None] = [None]
    if ctx.rank == 0:
        times, ntk, zico = zip(*measured, strict=True)
        result = [vote(times, ntk, zico)]
    if ctx.world > 1:
        dist.broadcast_object_list(result, src=0)
    assert result[0] is not None
    return result[0]


def _report(
    ctx: Context, stage: int, candidates: Iterable[Candidate], measured: Measured, result: Vote, seconds: float
) -> None:
    """The table of a search, for journal and screen."""
    table, rows = [], [["level", "resolution", "ms", "NTK", "ZiCo", "votes", ""]]
    for i, ((level, resolution), (t, ntk, zico)) in enumerate(zip(candidates, measured, strict=True)):
        chosen, votes = i == result.index, result.votes[i]
        values = {"seconds": t, "ntk": ntk, "zico": zico, "votes": votes}
        table.append({"level": level, "resolution": resolution, **values, "chosen": chosen})
        cells = [str(level), str(resolution), f"{1000 * t:.1f}", f"{ntk:.3g}", f"{zico:.1f}", f"{votes:g}"]
        rows.append([*cells, "<- chosen" if chosen else ""])
    ctx.record("unfreeze_search", stage=stage, table=table, seconds=seconds)
    ctx.say([f"unfreezing search of stage {stage + 1} ({seconds:.1f} s)", *align(rows, left=(6,))])
