"""Weights that a run starts from: the trunk by name, another image size, and the head as it is, by class or new."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.weights import classifier_names, read_file, read_timm, start_from


def vit(classes: int, size: int = 16, seed: int = 0, name: str = "vit_tiny_patch16_224") -> nn.Module:
    torch.manual_seed(seed)
    small = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": size, "num_classes": classes}
    model = timm.create_model(name, **small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # heads and positions start at zero
    return model


def convnext(classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=classes)


@pytest.mark.parametrize("make", [lambda c, s: vit(c, seed=s), convnext])
def test_rows_of_the_head_are_those_of_the_classes(make):
    old, model = make(7, 1), make(4, 2)
    fresh = copy.deepcopy(model)
    found = start_from(model, old.state_dict(), source="old", head="map", rows=[6, -1, 0, 3])
    (name,) = classifier_names(model)
    ours, theirs, first = (dict(m.named_modules())[name] for m in (model, old, fresh))
    assert torch.equal(ours.weight[[0, 2, 3]], theirs.weight[[6, 0, 3]])
    assert torch.equal(ours.bias[[0, 2, 3]], theirs.bias[[6, 0, 3]])
    assert torch.equal(ours.weight[1], first.weight[1])
    assert (found.rows, found.new_rows) == (3, 1)
    for key, value in old.state_dict().items():
        if not key.startswith(f"{name}."):
            assert torch.equal(model.state_dict()[key], value), key
    images = torch.randn(2, 3, 16, 16) if name == "head" else torch.randn(2, 3, 32, 32)
    logits = model.eval()(images)
    assert torch.allclose(logits[:, [0, 2, 3]], old.eval()(images)[:, [6, 0, 3]], atol=1e-6)


def test_a_new_head_can_be_made_small():
    old, model = convnext(7, 1), convnext(4, 2)
    first = model.head.fc.weight.detach().clone()
    found = start_from(model, old.state_dict(), source="old", head="new", head_scale=0.001)
    assert torch.equal(model.head.fc.weight, first * 0.001)
    assert torch.equal(model.stem[0].weight, old.stem[0].weight)
    assert (found.head, found.rows, found.new_rows) == ("new", 0, 4)


def test_positions_are_resampled_to_another_image_size():
    old, model = vit(5), vit(5, size=24, seed=3)
    found = start_from(model, old.state_dict(), source="old")
    assert found.resampled == ("pos_embed",)
    assert torch.equal(model.pos_embed[:, 0], old.pos_embed[:, 0])  # the class token's stays
    expected = timm.layers.resample_abs_pos_embed(old.pos_embed, new_size=[6, 6], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, expected)
    assert torch.equal(model.head.weight, old.head.weight)
    swin = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 3}
    small = timm.create_model("swin_tiny_patch4_window7_224", **swin, window_size=4)
    large = timm.create_model("swin_tiny_patch4_window7_224", **swin | {"img_size": 64}, window_size=8)
    found = start_from(large, small.state_dict(), source="small")
    assert len(found.resampled) >= 2
    assert all(name.endswith("relative_position_bias_table") for name in found.resampled)


def test_what_does_not_fit_is_said():
    model = vit(4)
    with pytest.raises(ModelError, match=r'head\.bias of old is \[7\], the model has \[4\]; .* "map" or "new"'):
        start_from(model, vit(7).state_dict(), source="old")
    with pytest.raises(ModelError, match="the map asks for rows up to 9"):
        start_from(model, vit(7).state_dict(), source="old", head="map", rows=[0, 1, 2, 9])
    less = {k: v for k, v in vit(4).state_dict().items() if not k.startswith("blocks.1.")}
    with pytest.raises(ModelError, match=r"old does not fit: no values of blocks\.1\..* and 9 more"):
        start_from(model, less, source="old")
    with pytest.raises(ModelError, match="does not fit"):
        start_from(model, convnext(4, 0).state_dict(), source="old")
    headless = {k: v for k, v in vit(4).state_dict().items() if not k.startswith("head.")}
    with pytest.raises(ModelError, match=r'has no head\.bias; "new" starts with a new head'):
        start_from(model, headless, source="old")
    start_from(model, headless, source="old", head="new")


def test_a_distilled_model_has_two_heads():
    old = vit(7, seed=1, name="deit_tiny_distilled_patch16_224")
    model = vit(3, seed=2, name="deit_tiny_distilled_patch16_224")
    assert classifier_names(model) == ("head", "head_dist")
    start_from(model, old.state_dict(), source="old", head="map", rows=[1, 2, 5])
    assert torch.equal(model.head_dist.weight, old.head_dist.weight[[1, 2, 5]])


def test_files(tmp_path, monkeypatch):
    model = vit(4)
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    assert set(read_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_file(tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="no such file"):
        read_file(tmp_path / "nothing")
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append((name, pretrained)) or model)
    assert torch.equal(read_timm("vit_base_patch16_224.augreg_in21k")["head.weight"], model.head.weight)
    assert asked == [("vit_base_patch16_224.augreg_in21k", True)]
