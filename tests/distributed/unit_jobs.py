"""Functions run on the ranks by the tests of unit scores under ZeRO."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy

from efftrain_ds.models.unit_probes import Candidates, UnitProbe, UnitScores
from efftrain_ds.models.units import compact_, units_of
from efftrain_ds.zero.skip import loss_scale
from tests.distributed.mask_jobs import GAS, MICRO, make
from tests.distributed.zero_jobs import dtype_of

KEEP = {"blocks.0": ([3, 1], [*range(30, 0, -2)]), "blocks.1": ([2, 0, 1], [*range(20)])}


def compact_vit() -> nn.Module:
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=20, depth=2, num_heads=4, mlp_ratio=2.0, num_classes=5, init_values=0.5
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return compact_(model, KEEP)


def shadows(model: nn.Module) -> dict[str, Candidates]:
    generator = torch.Generator().manual_seed(8)
    return {
        name: Candidates(
            torch.randn(2, unit.width, unit.head_dim, generator=generator),
            torch.randn(7, unit.width, generator=generator) * 0.2,
        )
        for name, unit in units_of(model).items()
    }


def batch(micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(10 * micro + rank)
    return torch.randn(MICRO, 3, 16, 16, generator=rng), torch.randint(0, 5, (MICRO,), generator=rng)


def step(engine) -> list[float]:
    """All micro-batches of a step but its end; the losses."""
    losses = []
    for micro in range(GAS):
        x, y = batch(micro, dist.get_rank())
        loss = cross_entropy(engine(x.to(dtype_of(engine))).float(), y)
        losses.append(float(loss.detach()))
        engine.backward(loss)
        if micro < GAS - 1:
            engine.step()
    return losses


def tensors(scores: UnitScores) -> dict[str, torch.Tensor]:
    return {key: value for key, value in vars(scores).items() if torch.is_tensor(value)}


def scores_job(stage: int, dtype: str, extra: dict) -> dict:
    """Scores of the global batch on an engine against those of one process with the concatenated batch in fp32."""
    model = compact_vit()
    plain, candidates = copy.deepcopy(model), shadows(model)
    pieces = [batch(m, r) for m in range(GAS) for r in range(dist.get_world_size())]
    x, y = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    reference = UnitProbe(plain, candidates)
    reference.start()
    cross_entropy(plain(x), y).backward()
    reference.stop()
    want = reference.scores(reduce=False)

    engine = make(stage, dtype, model, **extra)
    probe = UnitProbe(engine.module, candidates)
    probe.start()
    losses = step(engine)
    collectives = []
    original = dist.all_reduce
    dist.all_reduce = lambda *a, **k: collectives.append(1) or original(*a, **k)
    try:
        got = probe.scores(loss_scale(engine))
    finally:
        dist.all_reduce = original
    probe.stop()
    engine.step()
    with torch.no_grad():
        weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}

    other = make(stage, dtype, compact_vit(), **extra)  # the same step without the probe
    plain_losses = step(other)
    other.step()
    changed = [n for n, p in other.module.named_parameters() if not torch.equal(p.detach(), weights[n])]
    worst = 0.0
    for name, scores in want.items():
        for key, value in tensors(scores).items():
            found = tensors(got[name])[key]
            worst = max(worst, float((found - value).abs().max() / value.abs().max()))
    return {
        "worst": worst,
        "losses": losses == plain_losses,
        "changed": changed,
        "collectives": len(collectives),
        "images": {scores.images for scores in got.values()},
        "sums": [float(t.double().sum()) for scores in got.values() for t in tensors(scores).values()],
    }
