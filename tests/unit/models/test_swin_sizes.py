"""Swin at several image sizes: the same parameters, timm's own windows, gradients of all entries."""

import copy

import pytest
import timm
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.cost.macs import counted_macs, model_macs
from efftrain_ds.models.adapters import accept_sizes, accepts_sizes, create_model, no_weight_decay_groups
from efftrain_ds.models.swin import accept_sizes as adapt
from efftrain_ds.models.swin import bilinear_matrix, resampled_table, scaled_window
from tests.unit.models.tiny_backbones import TINY, tiny


def fixed(side=224, window=7, **more):
    torch.manual_seed(0)
    name, kwargs = TINY["swin"]
    model = timm.create_model(name, img_size=side, num_classes=5, **{**kwargs, "window_size": window, **more}).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)  # tables and biases that matter
    return model


def tables(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("relative_position_bias_table")}


@pytest.mark.parametrize(("source", "target"), [(13, 9), (13, 5), (13, 1), (5, 13), (3, 1), (13, 11), (1, 3), (7, 7)])
def test_resampling_is_antialiased_bilinear(source, target):
    x = torch.randn(1, 2, source, source, dtype=torch.float64)
    wanted = nn.functional.interpolate(x, size=(target, target), mode="bilinear", antialias=True)
    matrix = bilinear_matrix(source, target)
    assert torch.allclose(matrix @ x @ matrix.T, wanted)
    assert torch.allclose(matrix.flip(0, 1), matrix)  # left and right alike
    assert (matrix.sum(0) > 0).all()  # every entry of the source has a share


def test_resampled_table():
    table = torch.randn(169, 3)
    assert resampled_table(table, (7, 7), (7, 7)) is table
    grid = table.T.reshape(1, 3, 13, 13)
    wanted = nn.functional.interpolate(grid, size=(9, 5), mode="bilinear", antialias=True).reshape(3, -1).T
    assert torch.allclose(resampled_table(table, (7, 7), (5, 3)), wanted, atol=1e-6)
    half = resampled_table(table.bfloat16(), (7, 7), (5, 3))
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), wanted, atol=0.03)
    assert scaled_window((7, 7), (24, 48), (56, 56)) == (3, 6)
    assert scaled_window((7, 7), (1, 1), (56, 56)) == (1, 1)


def test_the_full_size_is_unchanged():
    plain = fixed()
    dynamic = adapt(copy.deepcopy(plain))
    assert list(plain.state_dict()) == list(dynamic.state_dict())
    assert [tuple(b.shape) for b in plain.buffers()] == [tuple(b.shape) for b in dynamic.buffers()]
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(plain(images), dynamic(images))


@pytest.mark.parametrize("side", [32, 96, 160, 192, 256])
def test_other_sizes_are_timms_with_a_resampled_table(side):
    plain = fixed()
    dynamic = adapt(copy.deepcopy(plain))
    plain.set_input_size((side, side))
    full = tables(dynamic)
    for name, module in plain.named_modules():
        if hasattr(module, "relative_position_bias_table"):
            table = full[f"{name}.relative_position_bias_table"]
            module.relative_position_bias_table.data = resampled_table(table.data, (7, 7), module.window_size)
            assert module.window_size == (side // 32, side // 32)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(plain(images), dynamic(images))
    assert dynamic.forward_features(images).shape == (2, side // 32, side // 32, 64)


@pytest.mark.parametrize("side", [64, 128])
def test_padded_windows_are_timms(side):
    """A window that does not divide the map: timm pads it, and so does the adapter."""
    plain = fixed(side=side, window=7)
    dynamic = adapt(copy.deepcopy(plain))
    plain.set_input_size((side * 2, side * 2))
    full = tables(dynamic)
    for name, module in plain.named_modules():
        if hasattr(module, "relative_position_bias_table"):
            table, window = full[f"{name}.relative_position_bias_table"], dynamic.get_submodule(name).window_size
            assert scaled_window(window, (2, 2), (1, 1)) == module.window_size
            module.relative_position_bias_table.data = resampled_table(table.data, window, module.window_size)
    images = torch.randn(1, 3, side * 2, side * 2)
    with torch.no_grad():
        assert torch.equal(plain(images), dynamic(images))


def test_every_size_trains_every_entry_of_the_same_parameters():
    torch.manual_seed(0)
    model = tiny("swin", 224)
    ids = {n: id(p) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    for side in (96, 128, 160, 192, 224, 96):
        model.zero_grad()
        model(torch.randn(2, 3, side, side)).square().sum().backward()
        assert {n: id(p) for n, p in model.named_parameters()} == ids
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        for name, table in tables(model).items():
            assert table.shape == (169, table.shape[1])
            assert (table.grad.abs().sum(-1) > 0).all(), (side, name)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_copies_checkpointing_modes_and_half_precision():
    torch.manual_seed(0)
    model, images = tiny("swin", 64), torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.inference_mode():
        quiet = model(images)
    model.train()
    out = model(images)  # after inference mode made the constants
    assert torch.allclose(out, quiet)
    plain = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    kept = torch.autograd.grad(twin(images).square().sum(), list(twin.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert twin.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_adapters_know_it():
    name, kwargs = TINY["swin"]
    built = create_model(name, resolution=64, num_classes=3, dynamic=True, **kwargs, window_size=2)
    assert accepts_sizes(built) == (True, "SwinTransformer takes any multiple of its stride")
    assert set(tables(built)) <= built.no_weight_decay()
    rest = {id(p) for g in no_weight_decay_groups(built, 0.1) if g["name"] == "no_decay" for p in g["params"]}
    assert {id(p) for p in tables(built).values()} <= rest
    # with timm's own padding the user chose the other way, and it stays
    padded = create_model(name, resolution=64, num_classes=3, dynamic=True, **kwargs, strict_img_size=False)
    assert type(padded.layers[0].blocks[0]).__name__ == "SwinTransformerBlock"
    rates = [m.drop_prob for m in built.modules() if type(m).__name__ == "DropPath"]
    assert not rates  # timm's default is not 0
    own = fixed(64, 2)
    accepted, reason = accepts_sizes(own)
    assert not accepted
    assert "accept_sizes(model)" in reason
    kinds = [type(m) for m in accept_sizes(own).modules()]
    assert accepts_sizes(own)[0]
    assert [type(m) for m in adapt(own).modules()] == kinds  # a second call changes nothing
    with pytest.raises(ModelError, match="Linear is not timm's SwinTransformer"):
        adapt(nn.Linear(2, 2))


def test_costs_are_those_of_windows_that_follow():
    name, kwargs = TINY["swin"]
    with torch.device("meta"):
        model = create_model(name, resolution=224, num_classes=1000, dynamic=True, **kwargs)
    for side in (96, 224):
        wanted = model_macs(name, side, kwargs={k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()})
        resampled = sum((2 * (side // 32) - 1) ** 2 * 169 * h * 2 for h in kwargs["num_heads"]) if side < 224 else 0
        assert counted_macs(model, side) == wanted + resampled
