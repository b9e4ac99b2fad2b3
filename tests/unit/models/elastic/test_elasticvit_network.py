"""ElasticViT's supernet: sub-networks in place against extracted ones, gradients, MACs, files, ONNX."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.adapters import accepts_sizes, model_stride, no_weight_decay_groups
from efftrain_ds.models.elastic import elasticvit_space, load_extracted, released_subnets, save_extracted
from efftrain_ds.models.elastic.hybrid import ElasticViT, HybridNet
from efftrain_ds.models.elastic.layers import Elastic

SPACE = elasticvit_space(divisor=4, num_classes=10, resolutions=(32, 40, 44, 48), head_width=32)
"""A quarter of the widths; sides 40 and 44 are halved to odd ones."""


def trained_like(net, seed=0):
    """Values as after training: no zero gain, running statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.1, generator=generator)
    return net


@pytest.fixture(scope="module")
def supernet():
    torch.manual_seed(0)
    return trained_like(SPACE.supernet())


def draws(count, seed=0):
    rng = np.random.default_rng(seed)
    found = [SPACE.sample(rng) for _ in range(count)]
    if count > 3:
        found[0] = dataclasses.replace(found[0], resolution=44)  # odd sides
    return found


def images(count=2, side=48, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("compat", "norm"), [(False, "ln"), (True, "gn1")])
def test_a_sub_network_equals_the_extracted_one(compat, norm):
    torch.manual_seed(0)
    net = trained_like(SPACE.supernet(compat=compat, norm=norm))
    for number, config in enumerate(draws(4, seed=0)):
        sub = SPACE.extract(net, config)
        assert type(sub) is HybridNet
        assert not any(isinstance(module, Elastic) for module in sub.modules())
        assert sum(p.numel() for p in sub.parameters()) == SPACE.params(config)
        assert not {id(p) for p in sub.parameters()} & {id(p) for p in net.parameters()}
        for training in (False, True):
            net.train(training)
            sub.train(training)
            a, b = images().requires_grad_(), images().requires_grad_()
            y, z = net(a, config), sub(b)
            torch.testing.assert_close(y, z, atol=1e-6, rtol=0)
            y.square().sum().backward()
            z.square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)
        if number == 0:
            assert y.std() > 1e-3


def test_macs_equal_what_runs(supernet):
    net = copy.deepcopy(supernet).eval()
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # fused attention on the CPU counts as nothing
    for config in draws(5, seed=3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images(1, config.resolution), config)
        assert counter.get_total_flops() == 2 * SPACE.macs(config)


def test_explicit_and_fused_attention_agree(supernet):
    net = copy.deepcopy(supernet).eval()
    config = draws(1)[0]
    with torch.no_grad():
        fused = net(images(), config)
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        torch.testing.assert_close(net(images(), config), fused, atol=1e-5, rtol=1e-5)


def test_gradient_stays_inside_the_slice(supernet):
    net = copy.deepcopy(supernet).train()
    config = SPACE.make(44, (4, 6, 8, 16, 20, 40, 44), (1, 3, 2, 2, 1, 3, 1), kernel=(3, 5, 3), mlp=(2, 3, 2, 4))
    net(images(8), config).square().sum().backward()
    for parameter in net.parameters():  # where the gradient is not zero, as weights: the slices take all of it
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else (parameter.grad != 0).float()
    sub = SPACE.extract(net, config)
    for name, parameter in sub.named_parameters():
        assert parameter.sum() == net.get_parameter(name).sum(), name
        # relu may shut units of squeeze-and-excitation off; the last map is one pixel: no whole kernel, no choice
        if "stages.6" not in name:
            assert parameter.mean() > (0 if ".se." in name else 0.95), name
    inactive = set(dict(net.named_parameters())) - set(dict(sub.named_parameters()))
    unused = [name for name in inactive if "shortcut" not in name]
    assert "stages.5.layers.3.fc1.weight" in unused
    assert all(net.get_parameter(name).grad is None for name in inactive)


def test_published_layout_of_attention():
    """The formula of the published code, written out: join, view by heads, split inside each head."""
    torch.manual_seed(0)
    net = trained_like(SPACE.supernet(compat=True)).eval()
    attention = net.stages[3].layers[0].attn
    width, v, side, d = 16, 3, 3, 4
    heads, most = width // d, attention.heads * d
    x = torch.randn(2, side * side, width)
    stored = attention.qkv.weight
    rows = torch.cat([stored[:width], stored[most : most + width], stored[2 * most : 2 * most + v * width]])
    q, k, value = (x @ rows[:, :width].T).view(2, side * side, heads, 2 * d + v * d).split([d, d, v * d], -1)
    value = value.flatten(2).transpose(1, 2).reshape(2, -1, side, side)
    value = F.conv2d(value, attention.local.weight[: v * width], padding=1, groups=v * width)
    value = value.view(2, heads, v * d, side * side).transpose(2, 3)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * d**-0.5 + attention.position(side, heads)
    y = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    y = F.linear(F.hardswish(y), attention.proj.weight[:width, : v * width], attention.proj.bias[:width])
    torch.testing.assert_close(attention(x, side, v), y, atol=1e-5, rtol=1e-5)
    clean = trained_like(SPACE.supernet()).stages[3].layers[0].attn
    clean.load_state_dict(attention.state_dict())  # the same parameters, read another way
    assert not torch.allclose(clean(x, side, v), y, atol=1e-3)


def test_side_and_shortcut_of_every_resolution(supernet):
    net = copy.deepcopy(supernet).eval()
    for resolution in SPACE.resolutions:
        x = net.first(images(1, resolution))
        sides = []
        for place, stage in enumerate(net.stages):
            x = stage(x)
            sides.append(x.shape[-1])
            assert SPACE.side(resolution, place) == x.shape[-1] == x.shape[-2]
        if resolution == 44:
            assert sides == [22, 11, 6, 3, 3, 2, 1]
    published = elasticvit_space()
    assert [published.side(176, place) for place in range(-1, 7)] == [88, 88, 44, 22, 11, 11, 6, 3]


def test_set_config_and_default(supernet):
    net, config = copy.deepcopy(supernet).eval(), draws(1)[0]
    with torch.no_grad():
        largest, small = net(images()), net(images(), config)
        assert torch.equal(largest, net(images(), SPACE.max()))
        net.set_config(config)
        assert torch.equal(net(images()), small)
        assert torch.equal(net(images(), SPACE.max()), largest)
        net.set_config(None)
        assert torch.equal(net(images()), largest)
    with pytest.raises(ModelError, match="is no sub-network"):
        net.set_config(elasticvit_space().max().stages[0])
    with pytest.raises(ModelError, match="resolution is 224"):
        net.set_config(elasticvit_space().make(224, (16, 16, 16, 48, 80, 144, 160), (1, 2, 2, 1, 1, 1, 1)))
    with pytest.raises(ModelError, match="not dict"):
        net(images(), {})
    with pytest.raises(ModelError, match="no leading part"):
        net(images(), released_subnets()["L3"])


def gradients(net, *configs, checkpointing, change=None):
    net.zero_grad()
    net.set_grad_checkpointing(checkpointing)
    outputs = []
    for config in configs:
        net.set_config(config)
        outputs.append(net(images()).square().sum())
    if change is not None:
        net.set_config(change)
        net(images(seed=5), change)
    for output in outputs:
        output.backward()
    net.set_grad_checkpointing(False)
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_recomputation_sees_the_sub_network_of_its_own_call(supernet):
    net = copy.deepcopy(supernet).train()
    first, second, other = draws(3, seed=9)
    wanted = {name: g.clone() for name, g in gradients(net, first, second, checkpointing=False).items()}
    found = gradients(net, first, second, checkpointing=True, change=other)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], msg=name, atol=1e-5, rtol=1e-5)


def test_weight_decay_groups(supernet):
    names = supernet.no_weight_decay()
    assert "first.conv.weight" in names
    assert "stages.3.first.depthwise.conv.weight" in names
    assert "stages.2.blocks.0.se.reduce.weight" in names
    assert "stages.3.layers.0.attn.position.weight" in names
    assert "stages.3.layers.0.attn.local.weight" not in names
    assert "head.classifier.weight" not in names
    assert names <= {name for name, _ in supernet.named_parameters()}
    groups = {group["name"]: group["params"] for group in no_weight_decay_groups(supernet, 0.05)}
    decayed = {id(p) for p in groups["decay"]}
    assert all(id(supernet.get_parameter(name)) not in decayed for name in names)
    assert id(supernet.head.classifier.weight) in decayed


def test_as_a_model_of_the_trainer(supernet):
    assert model_stride(supernet) == 1
    assert accepts_sizes(supernet)[0]
    assert supernet.get_classifier() is supernet.head.classifier
    assert supernet(images(2, 37)).shape == (2, 10)  # any size is resized
    for block in (supernet.stages[0].blocks[0], supernet.stages[4].layers[0]):
        assert sum(p.numel() for p in block.parameters()) > 0
    fresh = SPACE.supernet()
    assert (fresh.stages[1].blocks[0].project.norm.weight == 1).all()  # stride 2
    assert (fresh.stages[1].blocks[1].project.norm.weight == 0).all()
    assert (fresh.stages[4].first.project.norm.weight == 0).all()


def test_files(tmp_path, supernet):
    for norm in ("ln", "gn1"):
        net = trained_like(SPACE.supernet(norm=norm)) if norm == "gn1" else supernet
        config = draws(1, seed=4)[0]
        sub = SPACE.extract(net, config).eval()
        save_extracted(tmp_path / "a.safetensors", sub, SPACE, config)
        again, space, found = load_extracted(tmp_path / "a.safetensors")
        assert (space, found) == (SPACE, config)
        assert torch.equal(again(images()), sub(images()))
        assert not again.training
        buffer = io.BytesIO()
        torch.save(again.state_dict(), buffer)
    with pytest.raises(ModelError, match="parameters; the sub-network has"):
        save_extracted(tmp_path / "b", sub, SPACE, SPACE.max())
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(ModelError, match="holds no sub-network"):
        load_extracted(tmp_path / "c")
    with pytest.raises(ModelError, match="cannot be read"):
        load_extracted(tmp_path / "missing")


def test_extraction_refuses_what_does_not_fit(supernet):
    with pytest.raises(ModelError, match="no supernet of this space"):
        elasticvit_space().extract(supernet, elasticvit_space().min())
    with pytest.raises(ModelError, match="resolution is 224"):
        SPACE.extract(supernet, released_subnets()["S2"])
    with pytest.raises(ModelError, match="HybridNet is no supernet"):
        SPACE.extract(SPACE.extract(supernet, SPACE.min()), SPACE.min())
    assert isinstance(supernet, ElasticViT)


def onnx_difference(net, side, path):
    onnxruntime = pytest.importorskip("onnxruntime")
    x = images(1, side)
    torch.onnx.export(net, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = net(x).numpy()
    assert expected.std() > 1e-3
    return np.abs(found - expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T1", "L2"])
def test_released_sub_networks_whole(tmp_path, name):
    """At full size: extraction, parameters, MACs and ONNX."""
    space = elasticvit_space()
    torch.manual_seed(0)
    net = trained_like(space.supernet(fused_attn=False)).eval()
    assert sum(p.numel() for p in net.parameters()) == 37_566_334
    config = released_subnets()[name]
    sub = space.extract(net, config)
    x = images(1, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(x, config), sub(x), atol=1e-6, rtol=1e-5)
        with FlopCounterMode(display=False) as counter:
            sub(x)
    assert counter.get_total_flops() == 2 * space.macs(config)
    assert onnx_difference(sub, config.resolution, tmp_path / "a.onnx") <= 1e-4


@pytest.mark.slow
def test_twenty_sub_networks_at_full_size():
    space = elasticvit_space(num_classes=10)
    torch.manual_seed(0)
    net = trained_like(space.supernet(fused_attn=False))
    rng = np.random.default_rng(0)
    configs = [space.sample(rng) for _ in range(17)]
    for resolution in (160, 176, 224):
        configs.append(space.make(resolution, (16, 24, 40, 64, 96, 192, 272), (1, 3, 3, 2, 2, 2, 2)))
    for config in configs:
        sub = space.extract(net, config)
        for training in (False, True):
            net.train(training)
            sub.train(training)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                y = net(images(2, 224), config)
            assert counter.get_total_flops() == 4 * space.macs(config)
            with torch.no_grad():
                torch.testing.assert_close(y, sub(images(2, 224)), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_small_sub_network(tmp_path, supernet):
    config = SPACE.make(44, (4, 4, 6, 12, 20, 36, 44), (1, 2, 2, 1, 1, 1, 1))
    assert onnx_difference(SPACE.extract(supernet, config).eval(), 44, tmp_path / "a.onnx") <= 1e-4
