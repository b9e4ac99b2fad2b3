"""Learning rates by layer: the layers, their rates, and what the schedule makes of them."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.core.timeline import PlanSpec, merge_timelines
from efftrain_ds.lr_schedule import ProgressLR
from efftrain_ds.models.layer_decay import layer_decay_groups, layer_numbers


def vit(**kwargs) -> nn.Module:
    small = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "img_size": 16, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **small, **kwargs)


def rates(groups: list[dict], model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_every_layer_has_its_share_of_the_one_above():
    model = vit()
    groups = layer_decay_groups(model, 0.05, lr=1e-3, decay=0.5)
    found = rates(groups, model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["head.weight"] == 1e-3
    assert [found[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [1e-3 / 16, 1e-3 / 8, 1e-3 / 4, 1e-3 / 2]
    assert found["patch_embed.proj.weight"] == found["pos_embed"] == found["cls_token"] == 1e-3 / 32
    assert groups[0]["lr"] == 1e-3  # the rate that is shown is the head's
    assert [group["lr_scale"] for group in groups] == sorted((g["lr_scale"] for g in groups), reverse=True)
    by_decay = {group["name"].split("_", 1)[1]: group["weight_decay"] for group in groups}
    assert by_decay == {"decay": 0.05, "no_decay": 0.0}
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_shares_equal_those_of_timm(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    names = {id(p): n for n, p in model.named_parameters()}
    theirs = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, 0.05, no_weight_decay_list=skip, layer_decay=0.8)
        for p in group["params"]
    }
    ours = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in layer_decay_groups(model, 0.05, lr=1.0, decay=0.8)
        for p in group["params"]
    }
    assert ours == theirs


def test_blocks_are_merged_into_groups_of_equal_length():
    with torch.device("meta"):
        model = timm.create_model("convnext_base")
    numbers = layer_numbers(model, 12)
    blocks = [numbers[f"stages.{s}.blocks.{b}.mlp.fc1.weight"] for s, n in enumerate((3, 3, 27, 3)) for b in range(n)]
    assert blocks == [1 + i // 3 for i in range(36)]
    assert numbers["stem.0.weight"] == 0
    assert numbers["head.fc.weight"] == 13
    assert numbers["stages.1.downsample.1.weight"] == 2  # with the block that follows it
    with pytest.raises(ModelError, match="37, but ConvNeXt has 36 layers"):
        layer_numbers(model, 37)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="layers of Sequential are not known"):
        layer_decay_groups(nn.Sequential(nn.Linear(2, 2)), 0.0, lr=1.0, decay=0.5)


def test_the_schedule_keeps_the_ratio_of_the_rates():
    model = vit()
    optimizer = torch.optim.AdamW(layer_decay_groups(model, 0.05, lr=1e-3, decay=0.5), lr=1e-3)
    spec = PlanSpec(0, 0.0, 0, 4, 4, 1, 16, 4, steps=40)
    schedule = merge_timelines([], spec)
    rate = ProgressLR(optimizer, schedule, warmup=0.25, min_lr=1e-5, shape="cosine")
    for step in (0, 5, 10, 25, 39):
        rate.set_step(step)
        top = optimizer.param_groups[0]["lr"]
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(top * group["lr_scale"])
    assert top == pytest.approx(1e-5, rel=0.6)
