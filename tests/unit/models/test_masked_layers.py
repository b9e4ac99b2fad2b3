"""Masked layers: forward, gradients, the dense side channel, copies, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models import masked
from efftrain_ds.zero.blueprint import copy_blueprint, make_blueprint, materialise


class Odd(nn.Linear):
    """A derived class that keeps the forward."""


class Net(nn.Module):
    def __init__(self, kind: type[nn.Linear] = nn.Linear):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect", groups=3)
        self.one = kind(25, 7)
        self.two = nn.Linear(7, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.two(torch.tanh(self.one(self.conv(x).flatten(2)))))


NAMES = ["conv.weight", "one.weight", "two.weight"]


def pair(gradient: str = "masked", kind: type[nn.Linear] = nn.Linear) -> tuple[nn.Module, nn.Module, dict]:
    """A masked net and a plain one with the same, dense, weights; the masks."""
    torch.manual_seed(0)
    net = Net(kind)
    plain = copy.deepcopy(net)
    named = dict(net.named_parameters())
    masks = {name: torch.rand(named[name].shape) < 0.5 for name in NAMES}
    assert masked.mask_layers(net, masks, gradient) == NAMES
    return net, plain, masks


def with_zeros(plain: nn.Module, masks: dict) -> nn.Module:
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_parameter(name).mul_(mask)
    return plain


def backward(net: nn.Module, seed: int = 1) -> torch.Tensor:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    net(x).square().mean().backward()
    return x.grad


@pytest.mark.parametrize("gradient", masked.GRADIENTS)
def test_forward_and_gradients(gradient):
    net, plain, masks = pair(gradient)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in net.named_parameters()] == names
    assert isinstance(net.one, nn.Linear)
    zeroed = with_zeros(plain, masks)
    torch.testing.assert_close(backward(net), backward(zeroed), rtol=0, atol=1e-7)
    for name in names:
        want = zeroed.get_parameter(name).grad
        if gradient == "masked" and name in masks:
            assert net.get_parameter(name).grad[~masks[name]].count_nonzero() == 0
            want = want * masks[name]
        torch.testing.assert_close(net.get_parameter(name).grad, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", masked.GRADIENTS)
def test_the_side_channel_holds_the_dense_gradient_of_all_micro_batches(gradient):
    net, plain, masks = pair(gradient)
    zeroed = with_zeros(plain, masks)
    backward(net, seed=9)  # before the capture: not in the sum
    masked.capture(net, True)
    for seed in (1, 2):
        backward(net, seed), backward(zeroed, seed)
    dense = masked.dense_gradients(net, scale=8.0)
    assert list(dense) == NAMES
    for name, mask in masks.items():
        assert dense[name].dtype == torch.float32
        assert dense[name][~mask].count_nonzero() > 0
        torch.testing.assert_close(dense[name] * 8, zeroed.get_parameter(name).grad, rtol=1e-6, atol=1e-8)
    assert dense["one.weight"].data_ptr() != net.one.weight.grad.data_ptr()
    masked.capture(net, True)
    assert masked.dense_gradients(net)["one.weight"].count_nonzero() == 0
    masked.capture(net, False)
    with pytest.raises(ModelError, match="conv.weight is not captured"):
        masked.dense_gradients(net)


def test_an_overflow_outside_of_the_mask_does_not_reach_the_gradient():
    layer = nn.Linear(2, 1, bias=False)
    masked.mask_layers(layer, {"weight": torch.tensor([[True, False]])})
    masked.capture(layer, True)
    layer(torch.tensor([[1.0, torch.inf]]).requires_grad_()).nan_to_num(0.0).sum().backward()
    x = torch.tensor([[1.0, 3e38]])
    layer.weight.grad = None
    (layer(x) * 10).sum().backward()
    assert layer.weight.grad.tolist() == [[10.0, 0.0]]
    assert not torch.isfinite(masked.dense_gradients(layer)["weight"]).all()


def test_capture_in_bf16_and_autocast():
    for form in ("bf16", "autocast"):
        net, plain, masks = pair()
        zeroed = with_zeros(plain, masks)
        masked.capture(net, True)
        x = torch.randn(4, 3, 5, 5)
        if form == "bf16":
            net, zeroed, x = net.bfloat16(), zeroed.bfloat16(), x.bfloat16()
            assert net.one.weight_mask.dtype == torch.bool
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            outputs = [module(x) for module in (net, zeroed)]
        assert outputs[0].dtype == torch.bfloat16
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-2)
        for out in outputs:
            out.float().square().mean().backward()
        for name, value in masked.dense_gradients(net).items():
            want = zeroed.get_parameter(name).grad
            assert net.get_parameter(name).grad.dtype == want.dtype
            assert value.dtype == torch.float32
            assert float((value - want).abs().max() / want.abs().max()) < 2e-2


def test_capture_does_not_disturb_training():
    """Gradients with and without capture are equal to the bit, and the stand-in takes no memory."""
    found = []
    for on in (False, True):
        net, _, _ = pair()
        masked.capture(net, on)
        backward(net)
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert net.one.probe.untyped_storage().nbytes() == 4
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in Net().named_parameters()]


@pytest.mark.parametrize("kind", [nn.Linear, Odd])
def test_copies_and_blueprints(kind):
    net, _, masks = pair("dense", kind)
    blueprint = copy_blueprint(make_blueprint(net))
    assert all(p.device.type == "meta" for p in blueprint.parameters())
    again = materialise(blueprint)
    again.load_state_dict(net.state_dict())
    copies = [again, copy.deepcopy(net)]
    if kind is nn.Linear:
        copies.append(pickle.loads(pickle.dumps(net)))
    for other in copies:
        assert isinstance(other.one, kind)
        assert {n: m.tolist() for n, m in masked.masks_of(other).items()} == {n: m.tolist() for n, m in masks.items()}
        assert other.one.weight_mask is not net.one.weight_mask
        masked.capture(other, True)
        net.zero_grad()
        other.zero_grad()
        assert torch.equal(backward(net), backward(other))
        assert torch.equal(net.one.weight.grad, other.one.weight.grad)
        assert torch.equal(masked.dense_gradients(other)["one.weight"], net.one.weight.grad)
    fresh = make_blueprint(Net(kind))
    masked.mask_layers(fresh, masks)  # on parameters without values, as a surgery does
    assert set(materialise(fresh).state_dict()) == set(net.state_dict())


def test_masks_are_in_the_state_dict_and_change_in_place():
    net, _, masks = pair()
    state = net.state_dict()
    assert {f"{n}_mask" for n in NAMES} <= set(state)
    assert state["one.weight_mask"].dtype == torch.bool
    before = net.one.weight_mask
    new = {"one.weight": ~masks["one.weight"]}
    masked.set_masks(net, new)
    assert net.one.weight_mask is before
    assert torch.equal(before, new["one.weight"])
    assert torch.equal(net.two.weight_mask, masks["two.weight"])
    masks["two.weight"].fill_(False)
    assert net.two.weight_mask.any(), "the caller's tensor was kept"
    assert masked.mask_layers(net, new, "dense") == NAMES
    assert net.one.mask_gradient == "dense"
    with pytest.raises(ModelError, match="head.weight"):
        masked.set_masks(net, {"head.weight": torch.ones(2, 3, dtype=torch.bool)})


@pytest.mark.parametrize("kind", [nn.Linear, Odd])
def test_unmask(kind):
    net, plain, _ = pair(kind=kind)
    assert masked.unmask_layers(net) == NAMES
    assert type(net.one) is kind
    assert set(net.state_dict()) == set(plain.state_dict())
    assert set(net.one.__dict__) == set(plain.one.__dict__)
    assert torch.equal(backward(net), backward(plain))


def test_without_gradient_it_is_plain_operators():
    net, plain, masks = pair()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), with_zeros(plain, masks)(x), rtol=0, atol=1e-7)
        exported = torch.export.export(net.eval(), (x,))
    assert "autograd_function" not in str(exported.graph)
    net.requires_grad_(False)
    assert not net(x).requires_grad


def test_compiled_code_is_kept_when_masks_change():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    net, _, masks = pair()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    other = {n: torch.rand(m.shape) < 0.3 for n, m in masks.items()}
    for new in (masks, other, masks):
        masked.set_masks(net, new)
        results = []
        for module in (net, compiled):
            net.zero_grad()
            masked.capture(net, True)
            backward(module, 1), backward(module, 2)
            results.append([*masked.dense_gradients(net).values(), *(p.grad for p in net.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert counter.frame_count == 1
    for on in (False, True, False):
        masked.capture(net, on)
        backward(compiled)
    assert counter.frame_count == 2


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


class _Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "name", "shape", "text"),
    [
        (Net(), "three.weight", (1,), 'Net has no parameter "three.weight"'),
        (Net(), "one.bias", (7,), "one.bias belongs to Linear, which cannot be masked"),
        (Net(), "one.weight", (25, 7), r"one.weight has shape \[7, 25\], its mask \[25, 7\]"),
        (nn.Sequential(nn.LayerNorm(4)), "0.weight", (4,), "0.weight belongs to LayerNorm"),
        (nn.Sequential(_Own(4, 4)), "0.weight", (4, 4), "0.weight belongs to _Own"),
        (nn.ModuleDict({"m": nn.MultiheadAttention(4, 2)}), "m.out_proj.weight", (4, 4), "m.out_proj.weight belongs"),
        (_Tied(), "a.weight", (3, 3), "a.weight is shared by a.weight, b.weight"),
    ],
)
def test_refusals_name_the_layer_and_change_nothing(model, name, shape, text):
    first = next((n for n, m in model.named_modules() if type(m) is nn.Linear and n != name.rpartition(".")[0]), None)
    masks = {f"{first}.weight": torch.ones(model.get_parameter(f"{first}.weight").shape).bool()} if first else {}
    if isinstance(model, _Tied):
        masks = {}
    with pytest.raises(ModelError, match=text):
        masked.mask_layers(model, {**masks, name: torch.ones(shape, dtype=torch.bool)})
    assert masked.masked_layers(model) == {}


def test_unknown_gradient_mode():
    with pytest.raises(ValueError, match="masked, dense"):
        masked.mask_layers(Net(), {}, "warm")
