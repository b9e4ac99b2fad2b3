"""What the blocks of a masked attention are worth: the mass that live ones carry, and the gradient of every block.

For scores s = scale q k^T, P = exp(s - lse) with the log-sum-exp over the live keys only, dP = dO V^T and
D = sum(dO * O), a block of queries x keys has

- *mass*: the sum of P over the block, 0 where it is not live;
- *slope*: the sum of ``|P (dP - D)|``. With a factor g on exp(s) inside the softmax (1 in live blocks, 0 in the others)
  that is the sum of ``|dL/dg|``: what the loss says about the block, also where it is not live, from P as it would be
  if the block were let in now.

Both are sums over the images. They leave the backward pass through a side channel, a stand-in of zero size
(an expanded scalar) whose ``.grad`` collects them, only while `capture_scores` is on. So gradient checkpointing counts
each micro-batch once, accumulation adds up, and compiled code has one more opaque operator. The output of the
attention keeps its bits.

Shape legend: B images, H heads, Nq queries, Nk keys, D head dim, nQ x nK blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.ranks import world_size

CHUNK = 2**22
"""Elements of one chunk of scores: 16 MiB in fp32. With intermediate results about seven times as much is in use at a
time (108 MiB measured on a CPU with 577 tokens), whatever B and H are."""

LARGEST = 60.0
"""Cap of s - lse. A key outside of the mask may score far above those inside; its P must not become infinite."""


class BlockScores(NamedTuple):
    """Of one layer, float64 [H, nQ, nK] on the layer's device.

    Attributes:
        mass: share of a head's attention that goes through the block, mean over images and queries (sums to 1 a head).
        slope: of the mean loss of the global batch.
    """

    mass: Tensor
    slope: Tensor


@torch.no_grad()
def block_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    keep: Tensor,
    block: int,
    scale: float,
    chunk: int = CHUNK,
) -> Tensor:
    """Mass and slope of all blocks, summed over the images, by plain torch in chunks.

    Products are in fp32 (float64 for float64 inputs), block sums in float64. Of [B, H, Nq, Nk] never more than about
    `chunk` elements exist, times about seven for intermediate results; at least one image and one row of blocks.

    Args:
        q: [B, Nq, H, D], any strides.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        out: [B, Nq, H, D], output of the masked attention.
        dout: [B, Nq, H, D], its gradient.
        keep: bool [1 or H, nQ, nK].
        block: tokens of a block.
        scale: factor of the products.
        chunk: elements of a chunk of scores.

    Returns:
        float64 [2, H, nQ, nK]: mass, slope.
    """
    batch, n_q, heads, _ = q.shape
    n_k, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    keep = keep.expand(heads, -1, -1)
    found = torch.zeros(2, *keep.shape, dtype=torch.float64, device=q.device)
    images = min(batch, max(1, chunk // (block * n_k)))
    rows = max(1, chunk // (images * block * n_k))  # of blocks
    for head in range(heads):
        for first in range(0, batch, images):
            some = slice(first, first + images)
            keys, values = (x[some, :, head].to(wide).transpose(1, 2) for x in (k, v))
            for row in range(0, keep.shape[1], rows):
                tokens = slice(row * block, min((row + rows) * block, n_q))
                queries, result, gradient = (x[some, tokens, head].to(wide) for x in (q, out, dout))
                kept = keep[head, row : row + rows]
                live = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[: queries.shape[1], :n_k]
                weights = (queries * scale) @ keys
                total = weights.masked_fill(~live, -math.inf).logsumexp(-1, keepdim=True)
                total.masked_fill_(total == -math.inf, math.inf)  # a query without keys: all its P are 0
                weights.sub_(total).clamp_(max=LARGEST).exp_()
                slope = (gradient @ values).sub_((gradient * result).sum(-1, keepdim=True)).mul_(weights).abs_()
                found[0, head, row : row + rows] += _by_block(weights, block) * kept
                found[1, head, row : row + rows] += _by_block(slope, block)
    return found


def _by_block(values: Tensor, block: int) -> Tensor:
    """[B, q, Nk] to sums over images and blocks, float64 [ceil(q / block), ceil(Nk / block)]."""
    summed = values.sum(0, dtype=torch.float64)
    rows, columns = summed.shape
    summed = F.pad(summed, (0, -columns % block, 0, -rows % block))
    return summed.view(-(-rows // block), block, -(-columns // block), block).sum((1, 3))


@torch.library.custom_op("efftrain_ds::attention_block_scores", mutates_args=())
def _scores(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, keep: Tensor, block: int, scale: float
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return block_scores(q, k, v, out, dout, keep, block, scale)


@_scores.register_fake
def _scores_fake(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, keep: Tensor, block: int, scale: float
) -> Tensor:
    return q.new_empty((2, q.shape[2], keep.shape[1], keep.shape[2]), dtype=torch.float64)


class _Observe(torch.autograd.Function):
    """The output as it is; in the backward pass the scores become the gradient of the stand-in."""

    @staticmethod
    def forward(
        out: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, probe: Tensor, block: int, scale: float
    ) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        out, q, k, v, keep, _, block, scale = inputs
        ctx.save_for_backward(q, k, v, out, keep)
        ctx.options = (block, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, out, keep = ctx.saved_tensors
        scores = None
        if ctx.needs_input_grad[5]:
            scores = torch.ops.efftrain_ds.attention_block_scores(q, k, v, out, grad, keep, *ctx.options)
        return grad, None, None, None, None, scores, None, None


def observed(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, probe: Tensor, block: int, scale: float
) -> Tensor:
    """`out` with its bits; the backward pass adds the scores to ``probe.grad``. Arguments as in `block_scores`."""
    return _Observe.apply(out, q, k, v, keep, probe, block, scale)


def capture_scores(layers: Mapping[str, nn.Module], on: bool) -> None:
    """Begin (with empty sums) or end the collection in layers that have a ``block_mask``.

    Turn it on before the first micro-batch of a step and off when the scores were read; compiled code is compiled once
    for each of the two.
    """
    for module in layers.values():
        keep = module.block_mask.keep
        shape = (2, module.num_heads, *keep.shape[1:])
        zero = torch.zeros((), dtype=torch.float64, device=keep.device)
        module.score_probe = zero.expand(shape).requires_grad_() if on else None


@torch.no_grad()
def collect_scores(layers: Mapping[str, nn.Module], scale: float = 1.0) -> dict[str, BlockScores]:
    """Scores since `capture_scores`, over all micro-batches and ranks. Collective: one all-reduce for all layers.

    Call after the last backward pass of a step and before ``engine.step()``. The engine has divided the loss by the
    accumulation count already. Slopes may be inf or NaN where the loss scale was too high.

    Args:
        layers: with capture on; the same on all ranks.
        scale: factor on the loss in the backward pass (`zero.skip.loss_scale`).

    Returns:
        By name; zeros for a layer that took no part.

    Raises:
        ModelError: capture is off.
    """
    sums = []
    for name, module in layers.items():
        if module.score_probe is None:
            raise ModelError(f"{name}: its scores are not collected; call capture_scores(layers, True) before the step")
        grad = module.score_probe.grad
        sums.append(torch.zeros_like(module.score_probe) if grad is None else grad)
    if not sums:
        return {}
    flat = torch.cat([s.flatten() for s in sums])
    if world_size() > 1:
        dist.all_reduce(flat)
    found = {}
    for name, part, shape in zip(layers, flat.split([s.numel() for s in sums]), (s.shape for s in sums), strict=True):
        mass, slope = part.view(shape)
        total = mass.sum((1, 2), keepdim=True)
        found[name] = BlockScores(mass / total.where(total != 0, 1.0), slope / (scale * world_size()))
    return found
