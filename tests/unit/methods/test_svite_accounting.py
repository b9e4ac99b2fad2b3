import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from efftrain_ds.core.errors import ModelError
from efftrain_ds.cost.macs import module_macs, vit_macs
from efftrain_ds.methods.svite.accounting import LiveCounts, live_counts, live_density, live_macs
from efftrain_ds.methods.svite.block import BlockRule
from efftrain_ds.methods.svite.densities import (
    exact_counts,
    grid_shapes,
    layer_densities,
    mask_rng,
    maskable,
    random_mask,
)
from efftrain_ds.methods.svite.rules import ElementRule

WIDTHS = {"T": (192, 3), "S": (384, 6), "B": (768, 12)}


def vit(**changes):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    with torch.device("meta"):
        return VisionTransformer(**(arguments | changes))


def masks_of(shapes, density):
    counts = exact_counts(shapes, layer_densities(shapes, density))
    return {n: random_mask(s, counts[n], mask_rng(0, n)) for n, s in shapes.items()}


def deit(size, density=1.0):
    d, heads = WIDTHS[size]
    shapes = {"patch": (d, 3, 16, 16), "head": (1000, d)}
    for i in range(12):
        shapes |= {f"{i}.qkv": (3 * d, d), f"{i}.proj": (d, d), f"{i}.fc1": (4 * d, d), f"{i}.fc2": (d, 4 * d)}
    n = exact_counts(shapes, layer_densities(shapes, density))
    blocks = tuple(sum(v for k, v in n.items() if k.startswith(f"{i}.")) for i in range(12))
    return LiveCounts(n["patch"], blocks, (heads * 64,) * 12, n["head"])


def test_dense_models():
    model = vit()
    assert live_macs(model, 32) == module_macs(model, 32) == 1_942_400
    assert live_macs(model, 16) == module_macs(model, 16)
    for changes in ({"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"mlp_ratio": 3.0}):
        other = vit(**changes)
        assert live_macs(other, 32) == module_macs(other, 32), changes


@pytest.mark.parametrize(("size", "total"), [("T", 1_253_683_200), ("S", 4_598_882_304), ("B", 17_563_828_224)])
def test_dense_deit(size, total):
    assert deit(size).macs(196) == total == vit_macs(224, dim=WIDTHS[size][0], depth=12)


def test_masks_of_the_encoder():
    model = vit()
    masks = masks_of(maskable(model, "encoder"), 0.5)
    assert live_macs(model, 32, masks) == 1_106_816
    assert live_density(masks) == 0.5
    assert round(100 * (1 - live_macs(model, 32, masks) / live_macs(model, 32)), 2) == 43.02


def test_what_the_masks_keep_is_counted():
    model = vit()
    masks = masks_of(maskable(model), 0.5)
    counts = live_counts(model, masks)
    assert counts.patch == 2141
    assert counts.head == 640
    assert counts.blocks == (26_416, 26_416)
    before = live_macs(model, 32, masks)
    for name, per_entry in (("patch_embed.proj.weight", 16), ("blocks.1.attn.proj.weight", 17)):
        place = masks[name].view(-1).nonzero()[0, 0]
        masks[name].view(-1)[place] = False
        after = live_macs(model, 32, masks)
        assert before - after == per_entry
        before = after
    rule, shapes = ElementRule(), maskable(model)
    weight = torch.randn(shapes["head.weight"])
    masks["head.weight"] = rule.update(weight, weight, masks["head.weight"], 0, None, 100).mask
    assert before - live_macs(model, 32, masks) == 540


def test_blocks_count_with_all_their_entries():
    model, rule = vit(), BlockRule(16)
    shapes = maskable(model, "encoder")
    grids = grid_shapes(shapes, 16)
    counts = exact_counts(grids, layer_densities(grids, 0.5))
    masks = {n: rule.expand(rule.initial(n, s, counts[n], 0), s) for n, s in shapes.items()}
    assert live_macs(model, 32, masks) == 1_106_816


@pytest.mark.parametrize(
    ("size", "density", "saved"),
    [("T", 0.7, 25.56), ("T", 0.6, 34.14), ("S", 0.5, 46.15), ("S", 0.4, 55.36), ("B", 0.5, 48.10), ("B", 0.4, 57.67)],
)
def test_savings_of_deit(size, density, saved):
    assert 100 * (1 - deit(size, density).macs(196) / deit(size).macs(196)) == pytest.approx(saved, abs=0.01)


@pytest.mark.parametrize(("kept", "saved"), [(197, 46.15), (187, 49.24), (177, 52.30), (138, 63.83)])
def test_savings_with_fewer_tokens(kept, saved):
    counts, dense = deit("S", 0.5), deit("S").macs(196)
    assert 100 * (1 - counts.macs(196, kept=kept) / dense) == pytest.approx(saved, abs=0.01)
    assert counts.macs(196, kept=[kept] * 12) == counts.macs(196, kept=kept)
    assert counts.macs(196, kept=[197] * 6 + [99] * 6) < counts.macs(196)


@pytest.mark.parametrize(
    ("size", "heads", "ratio", "square", "cut"),  # proj kept at d x d, and cut to the live heads
    [("T", 2, 2.8, 28.43, 30.75), ("S", 4, 2.4, 34.45, 36.98), ("B", 8, 2.4, 34.70, 37.35)],
)
def test_savings_with_fewer_heads_and_neurons(size, heads, ratio, square, cut):
    d, _ = WIDTHS[size]
    dense = deit(size)
    for columns, saved in ((d, square), (heads * 64, cut)):
        entries = 3 * heads * 64 * d + d * columns + 2 * d * math.floor(ratio * d)
        compact = LiveCounts(dense.patch, (entries,) * 12, (heads * 64,) * 12, dense.head)
        assert 100 * (1 - compact.macs(196) / dense.macs(196)) == pytest.approx(saved, abs=0.01)


def test_live_heads_of_a_model():
    model = vit()
    dense = live_macs(model, 32)
    assert dense - live_macs(model, 32, heads=[4, 3]) == 2 * 17 * 17 * 16


def test_errors_name_the_weight():
    model = vit()
    with pytest.raises(ModelError, match=r"head.weight \[10, 64\]: its mask has the shape \[64, 10\]"):
        live_macs(model, 32, {"head.weight": torch.ones(64, 10).bool()})
    with pytest.raises(ModelError, match="head.wait: a mask without a weight"):
        live_macs(model, 32, {"head.wait": torch.ones(10, 64).bool()})
    with pytest.raises(ModelError, match="Linear: MACs from masks need"):
        live_macs(torch.nn.Linear(4, 4), 32)
