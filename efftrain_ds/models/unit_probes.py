"""Scores of live and dead units from one update step, without a change of its loss or gradients.

Dead units have no parameters. For one step each of them is given drawn weights beside the model, a *shadow*: a dead
head the columns of the projection, a dead neuron a row of fc1 with zero bias, and zeros elsewhere, so that nothing is
added to what the model computes. What the gradient at the zeros would be is a product of tensors that the backward
pass has in hand.

With A [B, S, H, d_h] what enters ``attn.proj``, Gamma = dL/dA, and Z the gradient at the output of ``mlp.fc2``:

- head prune: ``mean_b |sum_{s,c} A * Gamma|`` (first-order Taylor of L, by image),
- head grow: ``mean_b sum_{s,c} |Gamma|``, for dead heads with ``Gamma = dL/d(proj output) W_shadow``,
- neuron grow: ``|| Z^T act(x W1^T) ||_1``, the L1 norm of the gradient of the fc2 column.

Source: S2ViTE (Chen et al., NeurIPS 2021, arXiv 2106.04533) for the scores; the shadows are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.errors import ModelError
from ..core.ranks import world_size
from .units import BlockUnits, parts_of, units_of

CHUNK_ELEMENTS = 1 << 24
"""Elements of the largest fp32 copy that a score makes (64 MiB), unless one image needs more."""


@dataclass(frozen=True)
class Candidates:
    """Shadow weights of the dead units of a block; None where there are none (or none are to be scored).

    Attributes:
        head_draws: columns of attn.proj [n, d, d_h] of n dead heads.
        neuron_rows: rows of mlp.fc1 [k, d] of k dead neurons.
    """

    head_draws: Tensor | None = None
    neuron_rows: Tensor | None = None


@dataclass(frozen=True)
class UnitScores:
    """Scores of a block's units, on the device of the model; fp32 (fp64 for a model in fp64).

    Attributes:
        head_prune: [H'] by slot; the lowest go.
        head_grow_live: [H'] by slot.
        head_grow_dead: [n] by candidate; comparable with `head_grow_live`.
        neuron_grow_live: [m'] by slot.
        neuron_grow_dead: [k] by candidate; comparable with `neuron_grow_live`.
        images: images that took part, over all ranks.
    """

    head_prune: Tensor
    head_grow_live: Tensor
    head_grow_dead: Tensor
    neuron_grow_live: Tensor
    neuron_grow_dead: Tensor
    images: int


class UnitProbe:
    """Collects the sums of the scores over the micro-batches of one optimizer step.

    `start` before the first forward pass of the step and `stop` after its last backward pass: in between hooks lie on
    the model, and code compiled by torch runs eagerly. Right with gradient checkpointing (each image counts once),
    accumulation, autocast, a loss scale and all ZeRO stages; forward passes without gradients do not count. The sums
    take one fp32 number for each entry of fc2 at full width. Shadow neurons have no dropout.

    Args:
        model: the module that runs (``engine.module``).
        candidates: shadow units by block name; a block that is not named has only live units scored.

    Raises:
        ModelError: a model that `units_of` refuses, an unknown block, or draws of another shape.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[str, Candidates] | None = None):
        self._units = units_of(model)
        self._parts = parts_of(model)
        self._candidates = {name: (candidates or {}).get(name, Candidates()) for name in self._units}
        for name, given in (candidates or {}).items():
            _check_candidates(name, given, self._units)
        self._handles: list[Any] = []
        self._stance: Any = None
        self._sums: Sums | None = None
        self._found: dict[str, UnitScores] | None = None

    def start(self) -> None:
        """Begin with empty sums."""
        self.stop()
        self._found = None
        self._sums = Sums(self._units, self._candidates)
        # compiled code has no guards on hooks: it would run on without them
        self._stance = torch.compiler.set_stance("force_eager")
        for name, (attn, mlp) in self._parts.items():
            part = _Part(self._sums, name, mlp.act)
            self._handles += [
                attn.proj.register_forward_pre_hook(part.before_proj),
                attn.proj.register_forward_hook(part.after_proj),
                mlp.fc1.register_forward_pre_hook(part.before_fc1),
                mlp.fc2.register_forward_hook(part.after_fc2),
            ]

    def stop(self) -> None:
        """Take the hooks away and let compiled code run again; the sums stay for `scores`. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def scores(self, scale: float = 1.0, reduce: bool = True) -> dict[str, UnitScores]:
        """Scores of all blocks, of the mean loss of the global batch.

        Args:
            scale: factor on the loss in the backward pass (`zero.skip.loss_scale`).
            reduce: over all ranks (collective: one all-reduce of everything); False takes this rank's batch alone.

        Returns:
            By block name. They may hold inf or NaN where the loss scale was too high. The sums are used up: a second
            call returns what the first returned.

        Raises:
            ModelError: no backward pass went through the model since `start`.
        """
        if self._found is None:
            if self._sums is None or self._sums.flat is None:
                raise ModelError("unit scores: no backward pass went through the blocks since the probe was started")
            ranks = world_size() if reduce else 1
            if ranks > 1:
                dist.all_reduce(self._sums.flat)
            # a rank's loss is the mean of its own images, the loss of the global batch the mean over ranks
            self._found = {name: self._sums.scores(name, 1.0 / (scale * ranks)) for name in self._units}
            self._sums = None
        return self._found


class Sums:
    """What is added up over micro-batches, all in one tensor, made at the first contribution.

    Args:
        units: of the model.
        candidates: of every block.
    """

    def __init__(self, units: Mapping[str, BlockUnits], candidates: Mapping[str, Candidates]):
        self.flat: Tensor | None = None
        self._candidates = dict(candidates)
        self._views: dict[str, dict[str, Tensor]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, unit in units.items():
            given = self._candidates[name]
            n = 0 if given.head_draws is None else given.head_draws.shape[0]
            k = 0 if given.neuron_rows is None else given.neuron_rows.shape[0]
            self._shapes[name] = {
                "images": (1,),
                "prune": (unit.heads,),
                "live": (unit.heads,),
                "dead": (n,),
                "fc2": (unit.width, unit.neurons),
                "shadow": (unit.width, k),
            }

    def of(self, name: str, like: Tensor) -> dict[str, Tensor]:
        """The sums of a block, with the compute type and device of a gradient of the model."""
        if self.flat is None:
            sizes = [torch.Size(shape).numel() for shapes in self._shapes.values() for shape in shapes.values()]
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
            parts = iter(self.flat.split(sizes))
            self._views = {
                block: {key: next(parts).view(shape) for key, shape in shapes.items()}
                for block, shapes in self._shapes.items()
            }
            self._candidates = {
                block: Candidates(
                    *(None if t is None else t.to(self.flat) for t in (given.head_draws, given.neuron_rows))
                )
                for block, given in self._candidates.items()
            }
        return self._views[name]

    @torch.no_grad()
    def add_heads(self, name: str, a: Tensor, gamma: Tensor) -> None:
        """Scores of live heads from A and Gamma [B, ..., H d_h]."""
        sums = self.of(name, gamma)
        heads = sums["prune"].shape[0]
        sums["images"] += a.shape[0]
        for values, gradient in _chunks(a, gamma, dtype=sums["prune"].dtype):
            shape = (values.shape[0], -1, heads, values.shape[-1] // heads)
            values, gradient = values.reshape(shape), gradient.reshape(shape)
            sums["live"] += gradient.abs().sum((0, 1, 3))
            sums["prune"] += (values * gradient).sum((1, 3)).abs().sum(0)

    @torch.no_grad()
    def add_dead_heads(self, name: str, gradient: Tensor) -> None:
        """Scores of dead heads from the gradient at the output of proj [B, ..., d]."""
        sums = self.of(name, gradient)
        draws = self._candidates[name].head_draws
        assert draws is not None
        columns = draws.permute(1, 0, 2).reshape(draws.shape[1], -1)  # [d, n d_h]
        for (part,) in _chunks(gradient, dtype=columns.dtype, width=columns.shape[1]):
            found = part.reshape(-1, part.shape[-1]) @ columns
            sums["dead"] += found.abs_().sum(0).view(draws.shape[0], -1).sum(1)

    @torch.no_grad()
    def add_neurons(self, name: str, x: Tensor | None, hidden: Tensor, gradient: Tensor, act: nn.Module) -> None:
        """Gradients of the columns of fc2 from its inputs [B, ..., m] and the gradient at its output [B, ..., d].

        Args:
            name: of the block.
            x: what entered fc1 [B, ..., d]; None without dead neurons.
            hidden: what entered fc2.
            gradient: at the output of fc2.
            act: activation between them.
        """
        sums = self.of(name, gradient)
        rows = self._candidates[name].neuron_rows
        dtype = sums["fc2"].dtype
        for values, part in _chunks(hidden, gradient, dtype=dtype):
            sums["fc2"].addmm_(part.reshape(-1, part.shape[-1]).t(), values.reshape(-1, values.shape[-1]))
        if x is None or rows is None:
            return
        for values, part in _chunks(x, gradient, dtype=dtype, width=rows.shape[0]):
            # the function without the module's hooks: ZeRO-3 follows the order in which modules are called
            values = act.forward(values.reshape(-1, values.shape[-1]) @ rows.t())
            sums["shadow"].addmm_(part.reshape(-1, part.shape[-1]).t(), values)

    def scores(self, name: str, factor: float) -> UnitScores:
        """Scores of a block; `factor` is on the gradients."""
        assert self.flat is not None
        sums = self._views[name]
        images = sums["images"]
        mean = factor / images.clamp(min=1)
        return UnitScores(
            head_prune=sums["prune"] * mean,
            head_grow_live=sums["live"] * mean,
            head_grow_dead=sums["dead"] * mean,
            neuron_grow_live=sums["fc2"].abs().sum(0) * factor,
            neuron_grow_dead=sums["shadow"].abs().sum(0) * factor,
            images=int(images),
        )


class _Part:
    """Hooks of one block. They do nothing where no gradient will come."""

    def __init__(self, sums: Sums, name: str, act: nn.Module):
        given = sums._candidates[name]
        self.sums, self.name, self.act = sums, name, act
        self.dead_heads, self.dead_neurons = (
            t is not None and t.shape[0] > 0 for t in (given.head_draws, given.neuron_rows)
        )
        self.x: Tensor | None = None

    def before_proj(self, module: nn.Module, args: tuple) -> tuple | None:
        if not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        return (_SeeHeads.apply(args[0], self), *args[1:])

    def after_proj(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.dead_heads or not output.requires_grad:
            return None
        return _SeeProj.apply(output, self)

    def before_fc1(self, module: nn.Module, args: tuple) -> None:
        self.x = args[0].detach() if self.dead_neurons and torch.is_grad_enabled() else None

    def after_fc2(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        x, self.x = self.x, None
        if not output.requires_grad:
            return None
        return _SeeMlp.apply(output, args[0].detach(), x, self)


class _SeeHeads(torch.autograd.Function):
    """Identity on what enters proj."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, part: _Part) -> Tensor:
        ctx.save_for_backward(a)
        ctx.part = part
        return a.view_as(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gamma: Tensor) -> tuple:
        (a,) = ctx.saved_tensors
        with torch.autocast(gamma.device.type, enabled=False):
            ctx.part.sums.add_heads(ctx.part.name, a, gamma)
        return gamma, None


class _SeeProj(torch.autograd.Function):
    """Identity on what leaves proj."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, part: _Part) -> Tensor:
        ctx.part = part
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.part.sums.add_dead_heads(ctx.part.name, gradient)
        return gradient, None


class _SeeMlp(torch.autograd.Function):
    """Identity on what leaves fc2."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden: Tensor, x: Tensor | None, part: _Part) -> Tensor:
        ctx.save_for_backward(hidden, x)
        ctx.part = part
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        hidden, x = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.part.sums.add_neurons(ctx.part.name, x, hidden, gradient, ctx.part.act)
        return gradient, None, None, None


def _chunks(*tensors: Tensor, dtype: torch.dtype, width: int = 0) -> Iterator[list[Tensor]]:
    """The same images of several tensors [B, ...] in the compute type, few enough at once.

    Args:
        *tensors: they share B and all dimensions but the last.
        dtype: of the results.
        width: of what the caller makes of them, in the last dimension.
    """
    widest = max(width, *(t.shape[-1] for t in tensors))
    one = tensors[0][0].numel() // tensors[0].shape[-1] * widest
    size = max(1, CHUNK_ELEMENTS // max(1, one))
    for parts in zip(*(t.split(size) for t in tensors), strict=True):
        yield [part.to(dtype) for part in parts]


def _check_candidates(name: str, given: Candidates, units: Mapping[str, BlockUnits]) -> None:
    """Refuse draws that do not fit the block.

    Raises:
        ModelError: naming the block.
    """
    if name not in units:
        raise ModelError(f'candidates: "{name}" is no block of the model; its blocks: {", ".join(units)}')
    unit = units[name]
    for what, draws, want in (
        ("head_draws", given.head_draws, (unit.width, unit.head_dim)),
        ("neuron_rows", given.neuron_rows, (unit.width,)),
    ):
        if draws is not None and tuple(draws.shape[1:]) != want:
            shape = ", ".join(map(str, ("n", *want)))
            raise ModelError(f"{name}: {what} has shape {list(draws.shape)}; allowed: [{shape}]")
