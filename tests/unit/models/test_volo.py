import copy

import pytest
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.adapters import accepts_sizes, create_model, model_stride
from efftrain_ds.models.growth import grow_request
from efftrain_ds.models.stacks import depth_of, prepare_growth, truncate
from efftrain_ds.models.volo import accept_sizes
from tests.unit.models.plain_rebuild import blueprint_of, rebuild
from tests.unit.models.test_growth import logits, volo

TINY = {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4), "stem_hidden_dim": 16}


@pytest.mark.parametrize("side", [128, 160, 192, 224])
def test_sizes(side):
    model = create_volo(224)
    before = model.pos_embed.detach().clone()
    images = torch.randn(1, 3, side, side)
    out = model(images)
    assert out.shape == (1, 7)
    out.square().sum().backward()
    assert torch.equal(model.pos_embed, before)
    assert model.pos_embed.shape == (1, 14, 14, 48)
    assert all(p.grad is not None for p in model.parameters())
    assert (model.pos_embed.grad.abs().sum(-1) > 0).all()  # every entry of the full grid learns
    assert model.forward_features(images).shape == (1, (side // 16) ** 2 + 1, 48)


def create_volo(resolution, dynamic=True):
    torch.manual_seed(0)
    # timm's own entry point fixes the layers, so the tiny one is made from its class
    from timm.models.volo import VOLO

    model = VOLO(**TINY, img_size=resolution, num_classes=7)
    return accept_sizes(model) if dynamic else model


def test_the_full_size_is_unchanged():
    plain, dynamic = create_volo(64, dynamic=False).eval(), create_volo(64).eval()
    assert list(plain.state_dict()) == list(dynamic.state_dict())
    assert torch.equal(logits(plain, 64), logits(dynamic, 64))
    plain.train(), dynamic.train()
    plain.set_grad_checkpointing(True), dynamic.set_grad_checkpointing(True)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(plain(images)[0], dynamic(images)[0])
    with pytest.raises(RuntimeError):
        plain(torch.randn(1, 3, 128, 128))


def test_resampling_is_bicubic_with_antialias():
    model = create_volo(64).eval()
    wanted = nn.functional.interpolate(
        model.pos_embed.permute(0, 3, 1, 2), size=(2, 2), mode="bicubic", antialias=True
    ).permute(0, 2, 3, 1)
    small = copy.deepcopy(model)
    small.pos_embed = nn.Parameter(wanted.detach().clone())
    assert torch.equal(logits(model, 32), logits(small, 32))


def test_adapters_know_it():
    model = create_model("volo_d1_224", resolution=64, num_classes=3, dynamic=True)
    assert accepts_sizes(model) == (True, "DynamicVOLO takes any multiple of its stride")
    assert model_stride(model) == 16
    assert model.pos_embed.shape == (1, 4, 4, 384)
    fixed = create_volo(64, dynamic=False)
    accepted, reason = accepts_sizes(fixed)
    assert not accepted
    assert "dynamic=True" in reason
    kind = type(accept_sizes(fixed))
    assert type(accept_sizes(fixed)) is kind  # a second call changes nothing
    with pytest.raises(ModelError, match="Linear is not timm's VOLO"):
        accept_sizes(nn.Linear(2, 2))


def test_growth_and_sizes_together():
    model = truncate(accept_sizes(volo()), 5)
    model, _ = rebuild(model, grow_request(blueprint_of(model), 8, "interpolation", seed=0))
    assert depth_of(model) == 8
    assert logits(model, 32).shape == (2, 7)
    assert accepts_sizes(model)[0]
    assert accepts_sizes(prepare_growth(create_volo(64)))[0]
    assert accepts_sizes(copy.deepcopy(model))[0]
