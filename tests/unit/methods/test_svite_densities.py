import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.methods.svite.densities import (
    clean_name,
    custom_densities,
    erk,
    exact_counts,
    exploration,
    grid_shapes,
    layer_densities,
    mask_digest,
    mask_rng,
    maskable,
    random_mask,
)

MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def tiny():
    with torch.device("meta"):
        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10, reg_tokens=2
        )


def deit(width, depth=12, classes=1000, patch=16):
    shapes = {"patch_embed.proj.weight": (width, 3, patch, patch)}
    for i in range(depth):
        sides = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        shapes |= {f"blocks.{i}.{name}.weight": side for name, side in zip(MATRICES, sides, strict=True)}
    return shapes | {"head.weight": (classes, width)}


def test_maskable_names_and_sizes(tiny):
    every, encoder = maskable(tiny), maskable(tiny, "encoder")
    assert sum(math.prod(s) for s in every.values()) == 111_232
    assert sum(math.prod(s) for s in encoder.values()) == 98_304
    assert list(encoder) == [f"blocks.{i}.{name}.weight" for i in range(2) for name in MATRICES]
    assert every.keys() - encoder.keys() == {"patch_embed.proj.weight", "head.weight"}
    assert every["patch_embed.proj.weight"] == (64, 3, 8, 8)
    assert maskable(tiny, exclude=("head", "blocks.0.mlp")).keys() == every.keys() - {
        "head.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    }


def test_names_do_not_depend_on_wrappers(tiny):
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = tiny
    assert maskable(wrapped) == maskable(tiny)
    assert maskable(wrapped, "encoder") == maskable(tiny, "encoder")
    assert clean_name("module.a.module.weight") == "a.module.weight"


@pytest.mark.parametrize(("width", "total"), [(192, 5_647_872), (384, 21_912_576), (768, 86_292_480)])
def test_maskable_entries_of_deit(width, total):
    assert sum(math.prod(s) for s in deit(width).values()) == total


def test_models_that_cannot_be_masked():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)
            self.mlp = nn.Linear(8, 8)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.qkv, self.mlp.fc1_g = nn.Linear(8, 24), nn.Linear(8, 32)

    for scope in ("all", "encoder"):
        with pytest.raises(ModelError, match="3.attn.in_proj_weight .*MultiheadAttention"):
            maskable(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.ReLU(), Fused()), scope)
    with pytest.raises(ModelError, match=r"0\.mlp\.fc1_g\.weight.*attn\.qkv"):
        maskable(nn.Sequential(Gated()), "encoder")
    assert len(maskable(nn.Sequential(Gated()))) == 2
    with pytest.raises(ModelError, match='no block with the parts "attn" and "mlp"'):
        maskable(nn.Linear(4, 4), "encoder")
    with pytest.raises(ModelError, match="no weight to mask"):
        maskable(nn.LayerNorm(4))
    with pytest.raises(ConfigError, match='scope is "head"'):
        maskable(nn.Linear(4, 4), "head")


def test_erk_of_the_tiny_model(tiny):
    shapes = maskable(tiny)
    half = erk(shapes, 0.5)
    assert half.epsilon == pytest.approx(25.798217, abs=5e-7)
    assert half.dense == {"head.weight"}
    expected = {"patch_embed.proj": 0.174256, "attn.qkv": 0.537463, "attn.proj": 0.806194, "mlp.fc": 0.503871}
    for name, density in half.density.items():
        wanted = next((v for k, v in expected.items() if k in name), 1.0)
        assert density == pytest.approx(wanted, abs=5e-7), name
    counts = exact_counts(shapes, half.density)
    assert list(counts.values()) == [2141, *[6604, 3302, 8255, 8255] * 2, 640]
    assert sum(counts.values()) == 55_613
    low = erk(shapes, 0.3)
    assert (round(low.epsilon, 6), low.dense) == (15.358799, {"head.weight"})
    wanted = [0.103742, *[0.319975, 0.479962, 0.299977, 0.299977] * 2, 1.0]
    assert list(low.density.values()) == pytest.approx(wanted, abs=5e-7)


def test_erk_of_the_encoder_alone(tiny):
    shapes = maskable(tiny, "encoder")
    assert list(layer_densities(shapes, 0.5).values()) == pytest.approx([0.5, 0.75, 0.46875, 0.46875] * 2, abs=1e-12)
    assert list(exact_counts(shapes, layer_densities(shapes, 0.5)).values()) == [6144, 3072, 7680, 7680] * 2
    # a grid of blocks gets the same densities
    grids = grid_shapes(shapes, 16)
    assert grids["blocks.0.attn.qkv.weight"] == (12, 4)
    assert list(layer_densities(grids, 0.5).values()) == pytest.approx([0.5, 0.75, 0.46875, 0.46875] * 2, abs=1e-12)


@pytest.mark.parametrize(
    ("width", "density", "epsilon", "rounded"),  # patch, qkv, proj, fc1 and fc2, head
    [
        (192, 0.7, 104.2656, (0.1605, 0.7241, 1, 0.6788, 0.6473)),
        (192, 0.6, 88.5177, (0.1363, 0.6147, 0.9221, 0.5763, 0.5495)),
        (192, 0.5, 73.7648, (0.1136, 0.5123, 0.7684, 0.4802, 0.4580)),
        (384, 0.5, 145.0568, (0.2061, 0.5037, 0.7555, 0.4722, 0.5228)),
        (384, 0.4, 116.0455, (0.1649, 0.4029, 0.6044, 0.3778, 0.4182)),
        (384, 0.3, 87.0341, (0.1237, 0.3022, 0.4533, 0.2833, 0.3137)),
        (768, 0.5, 287.5898, (0.3915, 0.4993, 0.7489, 0.4681, 0.6621)),
        (768, 0.4, 230.0719, (0.3132, 0.3994, 0.5991, 0.3745, 0.5296)),
    ],
)
def test_erk_of_deit(width, density, epsilon, rounded):
    shapes = deit(width)
    found = erk(shapes, density)
    patch, qkv, proj, fc, head = rounded
    assert round(found.epsilon, 4) == epsilon
    values = [round(v, 4) for v in found.density.values()]
    assert values == [patch, *[qkv, proj, fc, fc] * 12, head]
    assert len(found.dense) == (12 if proj == 1 else 0)
    counts = exact_counts(shapes, found.density)
    assert abs(sum(counts.values()) - density * sum(math.prod(s) for s in shapes.values())) < len(shapes)


def test_erk_pays_for_dense_layers_and_never_passes_one():
    shapes = deit(192)
    for density in (0.1, 0.5, 0.9, 0.97, 1.0):
        shares = layer_densities(shapes, density, dense=("head.weight",))
        assert shares["head.weight"] == 1
        assert max(shares.values()) <= 1
        mean = sum(shares[n] * math.prod(s) for n, s in shapes.items()) / sum(math.prod(s) for s in shapes.values())
        assert mean == pytest.approx(density)
    assert list(layer_densities(shapes, 0.4, power=0.0).values()) == pytest.approx([0.4] * len(shapes))
    with pytest.raises(ModelError, match="density 0.02 leaves nothing for patch_embed.*head.weight"):
        layer_densities(shapes, 0.02, dense=("head.weight",))


def test_uniform_er_and_custom():
    shapes = {"a": (10, 10), "b": (100, 200), "c": (8, 4, 3, 3)}
    assert layer_densities(shapes, 0.25, "uniform", dense=("a",)) == {"a": 1.0, "b": 0.25, "c": 0.25}
    er = exact_counts(shapes, layer_densities(shapes, 0.01, "er"))
    epsilon = 0.01 * (100 + 20_000 + 288) / (20 + 300 + 18)
    assert er == {"a": math.floor(20 * epsilon + 0.5), "b": math.floor(300 * epsilon + 0.5), "c": round(18 * epsilon)}
    cut = layer_densities(shapes, 0.3, "er")  # a layer that would pass 1 is cut, and nothing pays for it
    assert cut["a"] == 1.0
    assert cut["b"] == pytest.approx(0.3 * 20_388 / 338 * 300 / 20_000)
    counts = {"a": 5, "b": 1234, "c": 288}
    assert exact_counts(shapes, custom_densities(shapes, counts)) == counts
    for wrong, text in (
        ({"a": 5, "b": 1}, "missing layer c"),
        (counts | {"d": 1}, "unknown layer d"),
        (counts | {"c": 289}, r"c has 289 live entries, allowed 1\.\.288"),
        (counts | {"a": 0}, "a has 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            custom_densities(shapes, wrong)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
@pytest.mark.parametrize("rule", ["erk", "er", "uniform"])
def test_density_out_of_range(rule, density):
    with pytest.raises(ConfigError, match="density is .*allowed: above 0, at most 1"):
        layer_densities({"a": (4, 4)}, density, rule)


def test_errors_name_rule_and_layer():
    with pytest.raises(ConfigError, match='"erg" is unknown, allowed: erk, er, uniform'):
        layer_densities({"a": (4, 4)}, 0.5, "erg")
    with pytest.raises(ModelError, match="blocks.3.x: density 1.00e-03 leaves none of 16 entries"):
        exact_counts({"blocks.3.x": (4, 4)}, {"blocks.3.x": 0.001})
    with pytest.raises(ModelError, match=r"blocks.1.y \[48, 40\]: blocks of 16 x 16"):
        grid_shapes({"blocks.1.y": (48, 40)}, 16)
    with pytest.raises(ModelError, match="patch"):
        grid_shapes({"patch": (64, 3, 8, 8)}, 8)


def test_random_masks_are_exact_and_a_function_of_seed_and_name():
    def draw(seed, name):
        return random_mask((37, 5, 2), 123, mask_rng(seed, name))

    first = draw(3, "blocks.0.attn.qkv.weight")
    assert first.dtype == torch.bool
    assert int(first.sum()) == 123
    assert first.shape == (37, 5, 2)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(first, draw(3, "blocks.0.attn.qkv.weight"))
    assert not torch.equal(first, draw(4, "blocks.0.attn.qkv.weight"))
    assert not torch.equal(first, draw(3, "blocks.1.attn.qkv.weight"))
    mean = torch.stack([random_mask((8, 8), 16, mask_rng(s, "x")) for s in range(2000)]).float().mean(0)
    assert (mean - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2000)


def test_digest_and_exploration():
    masks = {"a": torch.tensor([[True, False], [False, True]]), "b": torch.ones(3, dtype=torch.bool)}
    assert mask_digest(masks) == mask_digest(dict(reversed(masks.items())))
    for name in masks:
        changed = {n: m.clone() for n, m in masks.items()}
        changed[name].view(-1)[0] ^= True
        assert mask_digest(changed) != mask_digest(masks)
    assert mask_digest({"a": torch.ones(2, 3).bool()}) != mask_digest({"a": torch.ones(3, 2).bool()})
    assert exploration(masks) == pytest.approx(5 / 7)
