import pytest
import timm
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.adapters import accepts_sizes, create_model, model_stride, no_weight_decay_groups

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4}


def tiny_vit(**more):
    return create_model("vit_tiny_patch16_224", resolution=32, num_classes=7, **{**TINY, **more})


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "kwargs", "stride"),
    [
        ("vit_tiny_patch16_224", {}, 16),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 2}, 4),
        ("deit3_small_patch16_224", {"drop_path_rate": 0.1}, 16),
        ("eva02_tiny_patch14_224", {}, 14),
        ("swin_tiny_patch4_window7_224", {}, 32),
        ("convnext_tiny", {"drop_path_rate": 0.1}, 32),
        ("resnet18", {}, 32),
        ("pvt_v2_b0", {}, 32),
        ("caformer_s18", {}, 32),
    ],
)
def test_stride_of_names(name, kwargs, stride):
    state = torch.random.get_rng_state()
    assert model_stride(name, kwargs) == stride
    assert torch.equal(torch.random.get_rng_state(), state)  # planning draws nothing


def test_stride_of_modules():
    assert model_stride(tiny_vit()) == 4
    plain = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="total_stride"):
        model_stride(plain)
    plain.total_stride = 8
    assert model_stride(plain) == 8


@pytest.mark.parametrize("side", [16, 24, 32])
def test_dynamic_vit_runs_at_several_sizes_with_the_same_parameters(side):
    model = tiny_vit(dynamic=True, drop_path=0.1)
    assert accepts_sizes(model)[0]
    assert model.pos_embed.shape[1] == 64 + 1  # the master embedding is that of the full resolution
    before = [id(p) for p in model.parameters()]
    out = model(torch.randn(2, 3, side, side))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert [id(p) for p in model.parameters()] == before
    assert all(p.grad is not None for p in model.parameters())
    assert (model.pos_embed.grad.abs().sum(-1) > 0).all()  # every entry of the full grid learns


def test_create_model_arguments():
    model = create_model("deit_tiny_patch16_224", resolution=64, num_classes=5, dynamic=True, depth=1)
    assert model.patch_embed.img_size == (64, 64)
    assert model.dynamic_img_size
    assert model.head.out_features == 5
    # a key of the user wins, and a convnet gets no img_size
    assert not tiny_vit(dynamic=True, dynamic_img_size=False).dynamic_img_size
    net = create_model("resnet18", resolution=64, num_classes=5, dynamic=True)
    assert net.fc.out_features == 5


def test_errors_name_the_model():
    with pytest.raises(ModelError, match=r"no model \"deit_smal_patch16_224\".*deit_small_patch16_224"):
        create_model("deit_smal_patch16_224", resolution=224, num_classes=2)
    with pytest.raises(ModelError, match="efftrain.model.name"):
        model_stride("no_such_backbone_at_all")
    with pytest.raises(ModelError, match=r"resnet18.*windows"):
        create_model("resnet18", resolution=64, num_classes=2, windows=3)


@pytest.mark.parametrize(
    ("name", "kwargs", "accepted"),
    [
        ("convnext_tiny", {}, True),
        ("resnet18", {}, True),
        ("pvt_v2_b0", {}, True),
        ("caformer_s18", {}, True),
        ("deit3_small_patch16_224", {"dynamic_img_size": True}, True),
        ("deit3_small_patch16_224", {}, False),
        ("swin_tiny_patch4_window7_224", {}, False),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, True),
        ("swinv2_tiny_window8_256", {}, False),
        ("beit_base_patch16_224", {}, False),
        ("maxvit_tiny_tf_224", {}, False),
        ("cait_xxs24_224", {}, False),
        ("pit_ti_224", {}, False),
        ("hiera_tiny_224", {}, False),
        ("mixer_s16_224", {}, False),
        ("vit_relpos_small_patch16_224", {}, False),
    ],
)
def test_accepts_sizes_agrees_with_the_model(name, kwargs, accepted):
    model = on_meta(name, **kwargs)
    found, reason = accepts_sizes(model)
    assert found is accepted
    assert type(model).__name__ in reason
    try:
        with torch.no_grad():
            model(torch.empty(1, 3, 160, 160, device="meta"))
        runs = True
    except (AssertionError, RuntimeError):
        runs = False
    assert runs is accepted


def test_accepts_sizes_looks_inside_wrappers():
    wrapped = nn.Sequential(nn.Identity(), tiny_vit(dynamic=False))
    accepted, reason = accepts_sizes(wrapped)
    assert not accepted
    assert "dynamic_img_size=True" in reason
    assert accepts_sizes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)))[0]


def test_no_weight_decay_groups():
    model = tiny_vit()
    model.head.weight.requires_grad_(False)
    groups = {g["name"]: g for g in no_weight_decay_groups(model, 0.05)}
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)] for p in groups["decay"]["params"]}
    rest = {names[id(p)] for p in groups["no_decay"]["params"]}
    assert decay == {n for n in names.values() if n.endswith("weight") and "norm" not in n} - {"head.weight"}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= rest
    assert decay | rest == set(names.values()) - {"head.weight"}
    assert groups["decay"]["weight_decay"] == 0.05
    assert groups["no_decay"]["weight_decay"] == 0
    assert [g["name"] for g in no_weight_decay_groups(nn.Linear(2, 2, bias=False), 0.1)] == ["decay"]
    torch.optim.AdamW(no_weight_decay_groups(model, 0.05), lr=1e-3)
