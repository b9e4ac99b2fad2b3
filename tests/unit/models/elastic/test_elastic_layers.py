"""Every elastic layer against the plain layer of the same slices, written out by index."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.elastic.layers import ElasticConv2d, ElasticLinear, ElasticPos, ElasticQKV, leading
from efftrain_ds.models.elastic.norms import (
    ElasticBatchNorm1d,
    ElasticBatchNorm2d,
    ElasticLayerNorm,
    ElasticTokenGroupNorm,
    token_norm,
)

TRIALS = 50


def same(elastic, plain, x, *sizes):
    """Outputs and input gradients of both are equal."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = elastic(a, *sizes), plain(b)
    assert y.shape == z.shape
    torch.testing.assert_close(y, z, atol=1e-6, rtol=0)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0)
    return plain


def inside_only(parameter, index):
    """The gradient is zero outside the slice and not zero inside. `index`: one list of places for each axis."""
    grad = parameter.grad
    chosen = torch.zeros_like(grad, dtype=torch.bool)
    chosen[np.ix_(*index)] = True
    assert (grad[chosen] != 0).all()
    assert (grad[~chosen] == 0).all()


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
    return module


def test_leading():
    value = torch.arange(24).view(6, 4)
    assert leading(value, 0, 6) is value
    assert torch.equal(leading(value, 1, 2), value[:, :2])
    assert torch.equal(leading(value, 0, (2, 1), (2, 3)), value[[0, 3]])
    for part, whole in [(7, None), (0, None), ((3, 1), (2, 3)), ((2,), (2, 3))]:
        with pytest.raises(ModelError, match="no leading part"):
            leading(value, 0, part, whole)


def test_linear():
    layer, rng = randomised(ElasticLinear(12, 10)), np.random.default_rng(0)
    for _ in range(TRIALS):
        i, o = rng.integers(1, 13), rng.integers(1, 11)
        x = torch.randn(3, 2, i)
        plain = nn.Linear(i, o)
        plain.load_state_dict({"weight": layer.weight[:o, :i], "bias": layer.bias[:o]})
        same(layer, plain, x, o)
        extracted = same(layer, layer.extract(i, o), x, o)
        assert type(extracted) is nn.Linear
        assert (extracted.in_features, extracted.out_features) == (i, o)
    layer.zero_grad()
    layer(torch.randn(4, 5), 3).square().sum().backward()
    inside_only(layer.weight, [range(3), range(5)])
    inside_only(layer.bias, [range(3)])
    with pytest.raises(ModelError):
        layer(torch.randn(2, 12), 11)


def test_linear_with_a_nested_input_axis():
    layer, rng = randomised(ElasticLinear(12, 10, in_axes=(3, 4))), np.random.default_rng(1)
    for _ in range(TRIALS):
        h, d, o = rng.integers(1, 4), rng.integers(1, 5), int(rng.integers(1, 11))
        axes = (int(h), int(d))
        columns = [head * 4 + entry for head in range(h) for entry in range(d)]
        plain = nn.Linear(h * d, o)
        plain.load_state_dict({"weight": layer.weight[:o][:, columns], "bias": layer.bias[:o]})
        x = torch.randn(3, h * d)
        same(layer, plain, x, o, axes)
        same(layer, layer.extract(h * d, o, axes), x, o, axes)
    layer.zero_grad()
    layer(torch.randn(4, 4), 10, (2, 2)).square().sum().backward()
    inside_only(layer.weight, [range(10), [0, 1, 4, 5]])


def role_rows(heads, most, head_dim, v_dim, v_most):
    """Rows in use of a weight stored as [Q | K | V] by heads."""
    q = [h * head_dim + j for h in range(heads) for j in range(head_dim)]
    k = [most * head_dim + row for row in q]
    v = [2 * most * head_dim + h * v_most + j for h in range(heads) for j in range(v_dim)]
    return q + k + v


@pytest.mark.parametrize("bias", [True, False])
def test_qkv_rows_keep_their_role_and_head(bias):
    layer, rng = randomised(ElasticQKV(10, 3, 2, 4, bias=bias)), np.random.default_rng(2)
    for _ in range(TRIALS):
        i, h, v = (int(rng.integers(1, most + 1)) for most in (10, 3, 4))
        rows = role_rows(h, 3, 2, v, 4)
        plain = nn.Linear(i, len(rows), bias=bias)
        plain.load_state_dict(
            {name: p[rows][..., :i] if p.ndim > 1 else p[rows] for name, p in layer.named_parameters()}
        )
        x = torch.randn(2, 5, i)
        same(layer, plain, x, h, v)
        same(layer, layer.extract(i, h, v), x, h, v)
    layer.zero_grad()
    layer(torch.randn(4, 6), 2, 3).square().sum().backward()
    inside_only(layer.weight, [role_rows(2, 3, 2, 3, 4), range(6)])
    with pytest.raises(ModelError, match="4 heads of 4 values"):
        layer(torch.randn(2, 10), 4)


def test_qkv_of_the_published_code_mixes_roles():
    """C = 64 with values twice as wide: head 0 is made of Q rows only, head 1 of K rows, heads 2 and 3 of V rows."""
    layer = ElasticQKV(320, 20, 16, 64, bias=False, mixed=True)
    stored = torch.arange(6 * 320.0)
    layer.weight.data.copy_(stored[:, None].expand_as(layer.weight))
    sizes = [16, 16, 32]
    q, k, v = (part.view(4, -1) for part in layer.extract(64, 4, 32).weight[:, 0].split([64, 64, 128]))
    heads = torch.cat([q, k, v], 1)
    wanted = [*range(64), *range(320, 384), *range(640, 768)]
    assert heads.flatten().tolist() == wanted
    role = [sorted({int(row) // 320 if row < 640 else 2 for row in head}) for head in heads]
    assert role == [[0], [1], [2], [2]]
    assert [part.shape[1] for part in (q, k, v)] == sizes
    x = torch.randn(2, 3, 64)
    layer.weight.data.normal_(0, 0.1)
    same(layer, layer.extract(64, 4, 32), x, 4, 32)
    whole = layer(torch.randn(2, 320))
    assert whole.shape == (2, 6 * 320)


@pytest.mark.parametrize("mixed", [False, True])
def test_role_consistency_over_sizes(mixed):
    """A stored Q row feeds a Q of the same head for every width and value scale; not so in the published code."""
    layer = ElasticQKV(64, 4, 16, 64, bias=False, mixed=mixed)
    layer.weight.data.copy_(torch.arange(6 * 64.0)[:, None].expand_as(layer.weight))
    seen: dict[int, set] = {}
    for heads in (1, 2, 3, 4):
        for v in (2, 3, 4):
            rows = layer.extract(64, heads, 16 * v).weight[:, 0].long().tolist()
            roles = [("q", j // 16) for j in range(16 * heads)] + [("k", j // 16) for j in range(16 * heads)]
            roles += [("v", j // (16 * v)) for j in range(16 * v * heads)]
            for row, role in zip(rows, roles, strict=True):
                seen.setdefault(row, set()).add(role)
    assert all(len(roles) == 1 for roles in seen.values()) == (not mixed)
    if not mixed:
        assert all(seen[row] == {("q", row // 16)} for row in range(64))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depthwise", [False, True])
def test_conv(stride, depthwise):
    out_most = 7 if depthwise else 6
    layer = randomised(ElasticConv2d(7, out_most, 5, stride, depthwise=depthwise, bias=True))
    rng = np.random.default_rng(3)
    for _ in range(TRIALS):
        i, k = int(rng.integers(1, 8)), int(rng.choice([1, 3, 5]))
        o = i if depthwise else int(rng.integers(1, 7))
        edge = (5 - k) // 2
        weight = layer.weight[:o, : 1 if depthwise else i, edge : 5 - edge, edge : 5 - edge]
        plain = nn.Conv2d(i, o, k, stride, (k - 1) // 2, groups=i if depthwise else 1)
        plain.load_state_dict({"weight": weight, "bias": layer.bias[:o]})
        x = torch.randn(2, i, 7, 6)
        same(layer, plain, x, o, k)
        extracted = same(layer, layer.extract(i, o, k), x, o, k)
        assert type(extracted) is nn.Conv2d
        assert repr(extracted) == repr(plain)
    layer.zero_grad()
    layer(torch.randn(2, 4, 9, 9), 4, 3).square().sum().backward()
    inside_only(layer.weight, [range(4), range(1) if depthwise else range(4), range(1, 4), range(1, 4)])
    with pytest.raises(ModelError, match="no 4 x 4 kernel"):
        layer(torch.randn(2, 4, 9, 9), 4, 4)
    with pytest.raises(ModelError, match="no 7 x 7 kernel"):
        layer(torch.randn(2, 4, 9, 9), 4, 7)


def test_depthwise_conv_with_a_nested_channel_axis():
    layer = randomised(ElasticConv2d(12, 12, 3, depthwise=True, axes=(3, 4)))
    for h in (1, 2, 3):
        for d in (1, 3, 4):
            rows = [head * 4 + entry for head in range(h) for entry in range(d)]
            plain = nn.Conv2d(h * d, h * d, 3, 1, 1, groups=h * d, bias=False)
            plain.load_state_dict({"weight": layer.weight[rows]})
            x = torch.randn(2, h * d, 5, 5)
            same(layer, plain, x, (h, d))
            same(layer, layer.extract(h * d, (h, d)), x, (h, d))


def test_grouped_conv_is_refused():
    layer = ElasticConv2d(4, 4, 3)
    layer.groups = 2
    with pytest.raises(ModelError, match="2 groups"):
        layer(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm(momentum):
    rng = np.random.default_rng(4)
    for elastic, kind in ((ElasticBatchNorm2d, nn.BatchNorm2d), (ElasticBatchNorm1d, nn.BatchNorm1d)):
        layer = randomised(elastic(9, momentum=momentum))
        for trial in range(TRIALS):
            c = int(rng.integers(1, 10))
            plain = kind(c, momentum=momentum)
            state = {n: v[:c] if v.ndim else v for n, v in layer.state_dict().items()}
            plain.load_state_dict(state)
            extracted = layer.extract(c)
            assert type(extracted) is kind
            for module in (layer, plain, extracted):
                module.train(trial % 2 == 0)
            outside = layer.running_mean[c:].clone()
            x = torch.randn(4, c, 3, 3) if kind is nn.BatchNorm2d else torch.randn(12, c)
            same(layer, plain, x)
            for name, value in plain.state_dict().items():
                mine = layer.state_dict()[name]
                torch.testing.assert_close(mine[:c] if mine.ndim else mine, value)
            assert torch.equal(layer.running_mean[c:], outside)
            extracted(x)
            torch.testing.assert_close(extracted.running_var, plain.running_var)
        with pytest.raises(ModelError, match="10 channels"):
            layer(torch.randn(2, 10, 3, 3))


def test_token_norms():
    rng = np.random.default_rng(5)
    for kind, plain_of in (("ln", nn.LayerNorm), ("gn1", lambda c: nn.GroupNorm(1, c))):
        layer = randomised(token_norm(kind, 9))
        assert isinstance(layer, ElasticLayerNorm if kind == "ln" else ElasticTokenGroupNorm)
        for _ in range(TRIALS):
            c = int(rng.integers(2, 10))
            plain = plain_of(c)
            plain.load_state_dict({"weight": layer.weight[:c], "bias": layer.bias[:c]})
            x = torch.randn(2, 5, c)
            run = plain if kind == "ln" else (lambda y, plain=plain: plain(y.transpose(1, 2)).transpose(1, 2))
            same(layer, run, x)
            same(layer, layer.extract(c), x)
        layer.zero_grad()
        layer(torch.randn(2, 5, 4)).square().sum().backward()
        inside_only(layer.weight, [range(4)])
    with pytest.raises(ModelError, match="allowed: ln, gn1"):
        token_norm("bn", 4)


def test_position_bias():
    table = ElasticPos(5, 6)
    for side in (1, 2, 4, 5):
        for heads in (1, 6):
            bias = table(side, heads)
            assert bias.shape == (1, heads, side * side, side * side)
            for a in range(side * side):
                for b in range(side * side):
                    dy, dx = a // side - b // side, a % side - b % side
                    assert torch.equal(bias[0, :, a, b], table.weight[(dy + 4) * 9 + dx + 4, :heads])
            small = table.extract(side, heads)
            assert small.weight.shape == ((2 * side - 1) ** 2, heads)
            assert torch.equal(small(), bias)
    table(3, 2).sum().backward()
    offsets = [(dy + 4) * 9 + dx + 4 for dy in range(-2, 3) for dx in range(-2, 3)]
    inside_only(table.weight, [offsets, range(2)])
    with pytest.raises(ModelError, match="a map of 6 x 6 tokens"):
        table(6)
    with torch.device("meta"):  # what a model without weights is built on; the places are real
        assert ElasticPos(3, 2).index.device.type == "cpu"


def test_several_sub_networks_before_one_backward_pass():
    """Nothing is kept between calls: the sum of losses and separate backward passes give the same gradients."""
    layer = randomised(ElasticLinear(8, 8))
    x = torch.randn(3, 8)
    first = layer(x[:, :4], 5)
    second = layer(x, 7)
    (first.square().sum() + second.square().sum()).backward()
    together = layer.weight.grad.clone()
    layer.zero_grad()
    for inputs, out in ((x[:, :4], 5), (x, 7)):
        layer(inputs, out).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, together)
    assert F.linear(x, layer.weight).shape == (3, 8)
