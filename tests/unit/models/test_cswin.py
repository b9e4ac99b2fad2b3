"""CSWin against the numbers of the authors' code, and against attention written out naively."""

import pytest
import timm
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.cost.macs import counted_macs, parameter_count
from efftrain_ds.models.adapters import accepts_sizes, create_model, model_stride, no_weight_decay_groups
from efftrain_ds.models.cswin import CSWin, CSWinBlock, StripeAttention, join_windows, split_windows
from tests.unit.models.tiny_backbones import tiny

# counted on the authors' released code (github.com/microsoft/CSWin-Transformer, models/cswin.py) with the same counter
REFERENCE = {
    "cswin_tiny_224": (22_320_552, 4_324_203_008, 418),
    "cswin_small_224": (34_643_304, 6_800_714_752, 656),
    "cswin_base_224": (77_382_184, 14_955_348_480, 656),
    "cswin_large_224": (173_262_664, 33_130_144_512, 656),
    "cswin_base_384": (77_382_184, 46_963_660_800, 656),
    "cswin_large_384": (173_262_664, 101_881_930_752, 656),
}
SHAPES = {  # some of the names and shapes of the released checkpoint of CSWin-T
    "stage1_conv_embed.0.weight": (64, 3, 7, 7),
    "stage1_conv_embed.2.weight": (64,),
    "stage1.0.norm1.weight": (64,),
    "stage1.0.qkv.weight": (192, 64),
    "stage1.0.qkv.bias": (192,),
    "stage1.0.attns.0.get_v.weight": (32, 1, 3, 3),
    "stage1.0.attns.1.get_v.bias": (32,),
    "stage1.0.proj.weight": (64, 64),
    "stage1.0.mlp.fc1.weight": (256, 64),
    "merge1.conv.weight": (128, 64, 3, 3),
    "merge1.norm.bias": (128,),
    "stage3.20.norm2.weight": (256,),
    "merge3.conv.bias": (512,),
    "stage4.0.attns.0.get_v.weight": (512, 1, 3, 3),
    "norm.weight": (512,),
    "head.weight": (1000, 512),
}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(
    "name",
    [
        "cswin_tiny_224",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(REFERENCE)[1:]),
    ],
)
def test_counts_are_those_of_the_authors_code(name):
    params, macs, tensors = REFERENCE[name]
    model = on_meta(name)
    assert parameter_count(model) == params
    assert len(list(model.parameters())) == tensors
    assert counted_macs(model, int(name[-3:])) == macs


def test_names_are_those_of_the_released_weights():
    model = on_meta("cswin_tiny_224")
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert SHAPES.items() <= found.items()
    assert {n.split(".")[0] for n in found} == {n.split(".")[0] for n in SHAPES} | {"stage2", "merge2"}
    assert not list(model.named_buffers())


def test_registry():
    names = timm.list_models("cswin*")
    assert names == sorted(f"cswin_{size}_{side}" for size in ("tiny", "small", "base", "large") for side in (224, 384))
    assert all(timm.model_entrypoint(n).__module__ == "efftrain_ds.models.cswin" for n in names)  # no name of timm's
    assert timm.get_pretrained_cfg("cswin_base_384").input_size == (3, 384, 384)
    assert model_stride("cswin_tiny_224") == 32
    model = create_model("cswin_tiny_224", resolution=224, num_classes=3, drop_path=0.2, depths=(1, 1, 1, 1))
    assert model.head.out_features == 3
    assert model.stage4[0].drop_path1.drop_prob == pytest.approx(0.2)
    assert isinstance(model.stage1[0].drop_path1, nn.Identity)
    assert accepts_sizes(model)[0]
    with pytest.raises(ModelError, match="windows"):
        create_model("cswin_tiny_224", resolution=224, num_classes=3, windows=3)


def test_windows_are_cut_and_joined():
    x = torch.arange(2 * 4 * 6 * 1.0).reshape(2, 4, 6, 1)
    cut = split_windows(x, (4, 2))
    assert cut.shape == (6, 4, 2, 1)
    assert torch.equal(cut[1], x[0, :, 2:4])
    assert torch.equal(split_windows(x, (2, 6))[3], x[1, 2:])
    for window in ((4, 2), (2, 6), (1, 1), (4, 6)):
        assert torch.equal(join_windows(split_windows(x, window), (4, 6)), x)


@pytest.mark.parametrize("fused", [True, False])
def test_stripe_attention_position_by_position(fused):
    torch.manual_seed(0)
    attend = StripeAttention(4, 2).double()
    attend.fused_attn = fused
    q, k, v = torch.randn(3, 1, 4, 6, 4, dtype=torch.float64)
    out = attend(q, k, v, (4, 2))
    for y, x in ((0, 0), (3, 3), (2, 4)):
        left = x - x % 2
        for head in (0, 1):
            c = slice(2 * head, 2 * head + 2)
            keys, values = k[0, :, left : left + 2, c].reshape(8, 2), v[0, :, left : left + 2, c].reshape(8, 2)
            weights = (keys @ q[0, y, x, c] / 2**0.5).softmax(0)
            position = attend.get_v.bias[c].clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):  # zeros beyond the edge of the stripe
                    if 0 <= y + dy < 4 and left <= x + dx < left + 2:
                        position += attend.get_v.weight[c, 0, dy + 1, dx + 1] * v[0, y + dy, x + dx, c]
            assert torch.allclose(out[0, y, x, c], weights @ values + position)


@pytest.mark.parametrize(
    ("side", "widths"), [(32, (1, 2, 1)), (96, (1, 2, 3)), (160, (1, 2, 5)), (224, (1, 2, 7)), (384, (1, 2, 12))]
)
def test_stripes_follow_the_image(side, widths):
    model = on_meta("cswin_tiny_224", depths=(1, 1, 1, 1))
    for stage, width in enumerate(widths):
        grid = side // 4 // 2**stage
        block = model.get_submodule(f"stage{stage + 1}")[0]
        assert block.windows((grid, grid)) == [(grid, width), (width, grid)]
    assert model.stage4[0].windows((7, 7)) == [(7, 7)]
    with torch.no_grad():
        assert model(torch.empty(2, 3, side, side, device="meta")).shape == (2, 1000)


def test_halves_of_the_channels_see_crossing_stripes():
    torch.manual_seed(0)
    block = CSWinBlock(8, 2, 1, whole=False).double()
    with torch.no_grad():
        block.proj.weight.copy_(torch.eye(8))
        block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1, 2] += torch.randn(8, dtype=torch.float64)
    moved = ((block(changed) - block(x)).abs() > 1e-12)[0]
    own = torch.zeros(4, 4, dtype=torch.bool)
    own[1, 2] = True
    column, row = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    column[:, 2], row[1] = True, True
    assert torch.equal(moved[..., :4].any(-1), column)
    assert torch.equal(moved[..., 4:].any(-1), row)


def test_every_size_trains_the_same_parameters():
    torch.manual_seed(0)
    model = tiny("cswin", 224)
    ids = [id(p) for p in model.parameters()]
    for side in (96, 128, 160, 192, 224):
        model.zero_grad()
        out = model(torch.randn(2, 3, side, side))
        assert out.shape == (2, 5)
        out.square().sum().backward()
        assert [id(p) for p in model.parameters()] == ids
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    wide = model(torch.randn(1, 3, 64, 96))
    assert wide.shape == (1, 5)
    assert model.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, 2, 3, 64)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model, images = tiny("cswin", 64), torch.randn(2, 3, 64, 64)
    plain = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    kept = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_errors():
    model = tiny("cswin", 64)
    with pytest.raises(ModelError, match="48 x 64 pixels.*multiples of 32"):
        model(torch.randn(1, 3, 48, 64))
    fixed = CSWin(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), stripes=(1, 2, 7, 7))
    assert fixed(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    with pytest.raises(ModelError, match="stripes of 7 columns and 7 rows do not divide a map of 10 x 10"):
        fixed(torch.randn(1, 3, 160, 160))
    with pytest.raises(ModelError, match="4 stages"):
        CSWin(depths=(1, 2))
    with pytest.raises(ModelError, match="heads do not divide"):
        CSWin(num_heads=(1, 2, 4, 8))
    with pytest.raises(ModelError, match="global_pool"):
        CSWin(global_pool="token")


def test_features_head_and_groups():
    torch.manual_seed(0)
    model, images = tiny("cswin", 64).eval(), torch.randn(1, 3, 64, 64)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((1, 2)))
    last, maps = model.forward_intermediates(images, norm=True)
    assert [tuple(m.shape) for m in maps] == [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]
    assert torch.equal(maps[-1].permute(0, 2, 3, 1), features)
    assert torch.equal(last, features)
    assert len(model.forward_intermediates(images, indices=2, intermediates_only=True)) == 2
    early = timm.create_model("cswin_tiny_224", features_only=True, out_indices=(0, 2), depths=(1, 1, 1, 1))
    assert [m.shape[1] for m in early(images)] == [64, 256] == early.feature_info.channels()
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, 64)
    groups = {g["name"]: len(g["params"]) for g in no_weight_decay_groups(model, 0.05)}
    assert sum(groups.values()) == len(list(model.parameters()))
    assert groups["decay"] == sum(p.ndim > 1 for p in model.parameters())


def test_layers_for_layer_decay():
    from timm.models import group_parameters

    model = tiny("cswin", 64)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["stage1_conv_embed.0.weight"] == 0
    assert layers["stage1.0.qkv.weight"] == 1
    assert layers["merge1.conv.weight"] == layers["stage2.0.qkv.weight"] == 2
    assert layers["stage3.1.qkv.weight"] == layers["stage3.0.qkv.weight"] + 1
    assert layers["norm.weight"] == layers["stage4.0.proj.weight"]
    assert layers["head.weight"] == max(layers.values()) == 6
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) == 5
