import logging
import math

import pytest
import torch
from torch.nn import functional as F

from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.methods.svite.block import (
    SMALLEST_GRID,
    BlockIndex,
    BlockRule,
    block_scores,
    connected,
    droppable,
    expand,
    small_grids,
    to_bsr,
)
from efftrain_ds.methods.svite.densities import exact_counts, grid_shapes, layer_densities, mask_rng
from efftrain_ds.methods.svite.rules import ElementRule, initial_masks, layer_counts
from efftrain_ds.methods.svite.schedule import UpdateSchedule

NAME = "blocks.0.mlp.fc1.weight"
RULES = {
    "gradient": BlockRule(8),
    "random": BlockRule(8, grow="random"),
    "mixed": BlockRule(8, grow="mixed", drop="frobenius"),
    "sensitivity": BlockRule(8, drop="sensitivity", gradient_score="mean_abs"),
    "excluding": BlockRule(8, exclude_just_dropped=True),
    "random drop": BlockRule(8, drop="random"),
    "free": BlockRule(8, connected=False),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(step, shape):
    """Weights and gradients; their kind goes round: ordinary, equal, all zero, not finite, gradient in one column."""
    g = generator(step)
    weight, gradient = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    kind = step % 5
    if kind == 1:
        weight = torch.full(shape, 0.25)
    elif kind == 2:
        weight, gradient = torch.zeros(shape), torch.zeros(shape)
    elif kind == 3:
        weight[::3] = math.nan
        gradient[:, ::2] = math.inf
        gradient[::5] = math.nan
    elif kind == 4:
        gradient[:, 8:] = 0
    return weight, gradient


def test_scores():
    x = torch.arange(32.0).view(4, 8) - 16
    tile = x[2:4, 4:6]
    assert block_scores(x, 2, "mean_abs")[1, 2] == tile.abs().mean()
    assert block_scores(x, 2, "frobenius")[1, 2] == pytest.approx(tile.norm().item())
    assert block_scores(x, 2, "sum")[1, 2] == tile.sum().abs()
    assert block_scores(x, 2, "sum").shape == (2, 4)


@pytest.mark.parametrize("name", RULES)
def test_50_updates_keep_blocks_count_and_connection(name):
    rule, shape = RULES[name], (96, 48)
    mask = rule.initial(NAME, shape, 27, seed=1)
    index = BlockIndex.of(mask)
    pointers = [t.data_ptr() for t in vars(index).values()]
    schedule = UpdateSchedule(1000, 15, 765)
    weight = torch.randn(shape, generator=generator(7)) * rule.expand(mask, shape)
    moved = 0
    for step in schedule.steps:
        w, g = tensors(step // 15, shape)
        w = w * rule.expand(mask, shape)
        update = rule.update(w, g, mask, rule.swaps(schedule.fraction(step), mask), mask_rng(0, NAME, step))
        assert int(update.mask.sum()) == 27
        assert torch.equal(update.zero, update.mask ^ mask)
        assert connected({NAME: update.mask}) is None or not rule.connected
        if rule.connected:  # also the blocks that stay, before anything is grown
            kept = mask & ~update.dropped
            assert bool(kept.any(0).all() and kept.any(1).all())
        before = weight.clone()
        weight[rule.expand(update.zero, shape)] = 0
        live = rule.expand(update.mask, shape)
        assert not bool(weight[~live].any())
        same = rule.expand(update.mask & mask, shape)
        assert torch.equal(weight[same], before[same])
        # every block is all on or all off
        tiles = live.view(12, 8, 6, 8).transpose(1, 2).reshape(72, 64).sum(1)
        assert set(tiles.tolist()) <= {0, 64}
        moved += int(update.zero.sum())
        mask = update.mask
        index.update_(mask)
        assert [t.data_ptr() for t in vars(index).values()] == pointers
    assert moved > 0


def test_blocks_of_one_agree_with_entries():
    weight, gradient = torch.randn(12, 10, generator=generator(1)), torch.randn(12, 10, generator=generator(2))
    mask = ElementRule().initial(NAME, (12, 10), 70, seed=2)
    blocks = BlockRule(1, connected=False).update(weight, gradient, mask, 20)
    assert torch.equal(blocks.mask, ElementRule().update(weight, gradient, mask, 20).mask)


def test_connection_floor():
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    importance = torch.tensor([[0.0, 9, 9], [5, 4, 9], [9, 6, 1]])
    # (0, 0) is the only block of its row and (2, 2) of its column, so the order goes (1, 1), then nothing of its row
    assert droppable(importance, mask, 1).nonzero().tolist() == [[1, 1]]
    assert droppable(importance, mask, 2).nonzero().tolist() == [[1, 1]]
    diagonal = torch.eye(3).bool()
    assert not bool(droppable(importance, diagonal, 3).any())
    rule = BlockRule(2)
    update = rule.update(torch.randn(6, 6), torch.randn(6, 6), diagonal, 2)
    assert torch.equal(update.mask, diagonal)
    tie = droppable(torch.ones(3, 4), torch.ones(3, 4).bool(), 3)
    assert tie.nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    nan = torch.tensor([[math.nan, 1.0], [2.0, 3.0]])
    assert droppable(nan, torch.ones(2, 2).bool(), 1).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize(("shape", "count"), [((96, 48), 12), ((96, 48), 30), ((48, 96), 12), ((64, 64), 64)])
def test_first_mask(shape, count):
    rule = BlockRule(8)
    mask = rule.initial(NAME, shape, count, seed=3)
    assert tuple(mask.shape) == (shape[0] // 8, shape[1] // 8)
    assert int(mask.sum()) == count
    assert connected({NAME: mask}) is None
    assert torch.equal(mask, rule.initial(NAME, shape, count, seed=3))
    if count < mask.numel():
        assert not torch.equal(mask, rule.initial(NAME, shape, count, seed=4))
        assert not torch.equal(mask, rule.initial("other", shape, count, seed=3))


def test_first_mask_without_enough_blocks():
    with pytest.raises(ModelError, match=r"mlp\.fc1\.weight: 11 live blocks of 8 .* 12 x 6, at least 12"):
        BlockRule(8).initial(NAME, (96, 48), 11, seed=0)
    assert int(BlockRule(8, connected=False).initial(NAME, (96, 48), 11, seed=0).sum()) == 11


def test_small_grids_stay_dense(caplog):
    d = 192
    shapes = {"qkv": (3 * d, d), "proj": (d, d), "fc1": (4 * d, d), "fc2": (d, 4 * d)}
    with caplog.at_level(logging.WARNING):
        dense = small_grids(shapes, 64)
    assert dense == ["qkv", "proj"]
    assert "proj [192, 192] stays dense" in caplog.text
    assert small_grids(shapes, 32) == []
    grids = grid_shapes(shapes, 64)
    assert grids["fc2"] == (3, 12)
    assert min(math.prod(grids[n]) for n in shapes if n not in dense) >= SMALLEST_GRID
    densities = layer_densities(grids, 0.6, dense=dense)
    assert (densities["qkv"], densities["proj"]) == (1.0, 1.0)
    counts = exact_counts(grids, densities)
    assert counts == {"qkv": 27, "proj": 9, "fc1": 14, "fc2": 14}  # 64 of 108 blocks
    with pytest.raises(ModelError, match="leaves nothing for fc1"):
        layer_densities(grids, 0.3, dense=dense)


def test_counts_and_masks_of_a_model():
    shapes = {"a": (96, 48), "b": (48, 96), "tiny": (48, 24)}
    rule = BlockRule(8)
    counts = layer_counts(rule, shapes, 0.5)
    assert counts.keys() == {"a", "b"}
    assert sum(counts.values()) == (72 + 72 + 18) // 2 - 18 + 1  # the dense grid is paid for; two halves round up
    masks = initial_masks(rule, shapes, counts, seed=2)
    assert {n: int(m.sum()) for n, m in masks.items()} == counts
    assert connected(masks) is None
    assert layer_counts(rule, shapes, 0.5, "uniform") == {"a": 36, "b": 36}


def test_at_least_one_block_moves_while_the_fraction_is_large():
    rule = BlockRule(8)
    mask = rule.initial(NAME, (48, 48), 12, seed=0)
    assert [rule.swaps(a, mask) for a in (0.5, 0.06, 0.05, 0.01)] == [6, 1, 0, 0]
    assert rule.swaps(0.5, torch.ones(6, 6).bool()) == 0


def test_index():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]).bool()
    index = BlockIndex.of(mask)
    assert all(t.dtype == torch.int32 for t in vars(index).values())
    assert index.crow.tolist() == [0, 2, 3, 5]
    assert index.col.tolist() == [1, 2, 3, 0, 1]
    assert index.ccol.tolist() == [0, 1, 3, 4, 5]
    assert index.row.tolist() == [2, 0, 2, 0, 1]
    rows = torch.repeat_interleave(torch.arange(3), index.crow.diff().long())
    assert rows[index.order.long()].tolist() == index.row.tolist()
    columns = torch.repeat_interleave(torch.arange(4), index.ccol.diff().long())
    assert index.col[index.order.long()].tolist() == columns.tolist()
    with pytest.raises(ValueError, match="index of 5 blocks cannot take a mask of 4"):
        index.update_(mask & (torch.arange(12).view(3, 4) != 8))


def test_masked_products_skip_dead_blocks():
    """Forward, input and weight gradients from the index alone equal those of the masked dense layer."""
    b, shape = 8, (48, 32)
    mask = BlockRule(b).initial(NAME, shape, 13, seed=0)
    index = BlockIndex.of(mask)
    g = generator(5)
    weight, x, dy = torch.randn(shape, generator=g), torch.randn(5, 32, generator=g), torch.randn(5, 48, generator=g)
    w, xx = weight.clone().requires_grad_(), x.clone().requires_grad_()
    y = F.linear(xx, w * expand(mask, b))
    y.backward(dy)
    values = weight.view(6, b, 4, b).transpose(1, 2)[mask]  # [n, b, b] in the order of the index
    out, dx, dw = torch.zeros_like(y), torch.zeros_like(x), torch.zeros_like(weight)
    for r in range(6):
        for e in range(index.crow[r], index.crow[r + 1]):
            c = int(index.col[e])
            out[:, r * b : (r + 1) * b] += x[:, c * b : (c + 1) * b] @ values[e].T
            dw[r * b : (r + 1) * b, c * b : (c + 1) * b] = dy[:, r * b : (r + 1) * b].T @ x[:, c * b : (c + 1) * b]
    for c in range(4):
        for e in range(index.ccol[c], index.ccol[c + 1]):
            r = int(index.row[e])
            dx[:, c * b : (c + 1) * b] += dy[:, r * b : (r + 1) * b] @ values[int(index.order[e])]
    assert torch.allclose(out, y, atol=1e-5)
    assert torch.allclose(dx, xx.grad, atol=1e-5)
    assert torch.allclose(dw, w.grad, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support:UserWarning")
def test_bsr_keeps_live_blocks_of_zeros():
    weight = torch.randn(48, 32, generator=generator(1))
    mask = BlockRule(8).initial(NAME, (48, 32), 13, seed=0)
    live = mask.nonzero()[0].tolist()
    weight[live[0] * 8 : live[0] * 8 + 8, live[1] * 8 : live[1] * 8 + 8] = 0
    sparse = to_bsr(weight, mask, 8)
    assert sparse.layout == torch.sparse_bsr
    assert tuple(sparse.values().shape) == (13, 8, 8)
    assert torch.equal(sparse.to_dense(), weight * expand(mask, 8))
    full = to_bsr(weight, torch.ones_like(mask), 8)
    assert torch.equal(full.to_dense(), weight)
    with pytest.raises(ModelError, match=r"head: a mask \[6, 3\] does not fit its grid \[6, 4\]"):
        to_bsr(weight, mask[:, :3], 8, name="head")
    with pytest.raises(ModelError, match="head.*blocks of 5 x 5"):
        to_bsr(weight, mask, 5, name="head")


def test_errors():
    mask = torch.ones(6, 6).bool()
    for arguments, text in (
        ({"drop": "magnitude"}, "mean_abs, frobenius, sensitivity, random"),
        ({"gradient_score": "max"}, "frobenius, mean_abs"),
        ({"grow": "all"}, "gradient, random, mixed"),
    ):
        with pytest.raises(ConfigError, match=text):
            BlockRule(8, **arguments)
    with pytest.raises(ValueError, match="needs the dense gradient"):
        BlockRule(8).update(torch.ones(48, 48), None, mask, 1)
    with pytest.raises(ValueError, match="cannot drop 37 of 36"):
        BlockRule(8).update(torch.ones(48, 48), torch.ones(48, 48), mask, 37)
    with pytest.raises(ModelError, match=r"mlp.fc1.weight \[100, 48\]: blocks of 8"):
        BlockRule(8).unit_shape(NAME, (100, 48))
    assert not BlockRule(8, grow="random").needs_gradient
    assert BlockRule(8, grow="random", drop="sensitivity").needs_gradient
