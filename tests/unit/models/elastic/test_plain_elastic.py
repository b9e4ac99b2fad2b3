"""Plain vision transformers made elastic: timm's names and weights, sub-networks that are timm's own models."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.models.elastic import (
    PlainSpace,
    autoformer_space,
    load_extracted,
    path_of,
    read_space,
    save_extracted,
    set_paths,
)
from efftrain_ds.models.elastic.layers import Elastic
from efftrain_ds.models.elastic.plain import make_elastic
from efftrain_ds.models.stacks import prepare_growth

SPACE = PlainSpace(
    widths=(24, 36, 48),
    depths=(2, 3, 5),
    heads=(1, 2, 3),
    mlp=(1.5, 2.0, 4.0),
    head_dim=8,
    resolutions=(32, 48),
    patch=8,
    num_classes=7,
)
VARIANTS = {
    "plain": SPACE,
    "grown, scaled, normed": PlainSpace(
        **{f: getattr(SPACE, f) for f in ("widths", "depths", "heads", "mlp", "head_dim", "resolutions", "patch")},
        num_classes=7,
        base=2,
        layer_scale=True,
        qk_norm=True,
    ),
    "mean of tokens": PlainSpace(
        **{f: getattr(SPACE, f) for f in ("widths", "depths", "heads", "mlp", "head_dim", "resolutions", "patch")},
        num_classes=7,
        class_token=False,
        qkv_bias=False,
    ),
}


def trained_like(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return net


def images(count=2, side=48, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def at(x, side):
    if x.shape[-1] == side:
        return x
    return nn.functional.interpolate(x, (side, side), mode="bicubic", align_corners=False)


def explicit(net):
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return net


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sub_network_is_timms_own_model(variant):
    space = VARIANTS[variant]
    net, rng = trained_like(space.supernet()), np.random.default_rng(0)
    for _ in range(12):
        config = space.sample(rng)
        sub = space.extract(net, config)
        assert type(sub) is VisionTransformer
        assert not any(isinstance(module, Elastic) for module in sub.modules())
        assert all(type(m).__module__.startswith(("timm.", "torch.")) for m in sub.modules())
        assert sum(p.numel() for p in sub.parameters()) == space.params(config)
        a, b = images().requires_grad_(), images().requires_grad_()
        y, z = net(a, config), sub(at(b, config.resolution))
        torch.testing.assert_close(y, z, atol=1e-6, rtol=1e-5)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            explicit(sub)(images(1, config.resolution))
        assert counter.get_total_flops() == 2 * space.macs(config) == 2 * space.macs(config, "reference")
        tables = sub.pos_embed.numel()
        assert space.params(config, position=False) == space.params(config) - tables


def test_equal_sub_network_as_a_timm_model_built_by_name():
    """Weights written by index into a model that timm built: heads of 64, so that no block needs replacing."""
    space = PlainSpace(widths=(64, 192), depths=(1, 2), heads=(1, 3), mlp=(2.0, 4.0), resolutions=(32,), num_classes=5)
    net = trained_like(space.supernet())
    config = space.make(64, 1, 1, 2.0)
    plain = VisionTransformer(32, 16, 3, 5, embed_dim=64, depth=1, num_heads=1, mlp_ratio=2)
    own = net.state_dict()
    qkv = [*range(64), *range(192, 256), *range(384, 448)]
    state = {}
    for name, value in plain.state_dict().items():
        full = own[name]
        if ".qkv." in name:
            full = full[qkv]
        state[name] = full[tuple(slice(0, size) for size in value.shape)]
    plain.load_state_dict(state)
    torch.testing.assert_close(net(images(2, 32), config), plain(images(2, 32)), atol=1e-6, rtol=1e-5)
    extracted = space.extract(net, config)
    assert all(torch.equal(value, state[name]) for name, value in extracted.state_dict().items())
    assert repr(extracted.blocks[0]) == repr(plain.blocks[0])
    assert (extracted.embed_dim, extracted.patch_embed.img_size) == (64, (32, 32))


def test_weights_of_timm_models_by_name():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4).eval()
    wanted, names = model(images(2, 32)), list(model.state_dict())
    space = PlainSpace(
        widths=(96, 192), depths=(2, 3), heads=(2, 3), mlp=(2.0, 4.0), resolutions=(32, 48), num_classes=4
    )
    with pytest.raises(ModelError, match="patch is 16; the space has 8"):
        make_elastic(copy.deepcopy(model), VARIANTS["mean of tokens"])
    net = make_elastic(model, space)
    assert net is model
    assert list(net.state_dict()) == names
    assert isinstance(net, VisionTransformer)
    assert net.no_weight_decay() >= {"pos_embed", "cls_token"}
    torch.testing.assert_close(net(images(2, 32), space.make(192, 3, 3, 4.0, 32)), wanted, atol=1e-6, rtol=1e-5)
    sub = space.extract(net, space.make(96, 2, (2, 3), (2.0, 4.0), 48))
    assert sub.pretrained_cfg["input_size"] == (3, 48, 48)
    assert sub(images()).shape == (2, 4)
    prepare_growth(net)  # the containers of both uses are the same
    assert net(images(2, 32), space.min()).shape == (2, 4)


def test_gradient_stays_inside_the_slice():
    net = trained_like(SPACE.supernet())
    config = SPACE.make(36, 3, (1, 3, 2), (2.0, 1.5, 4.0), 48)
    net(images(4), config).square().sum().backward()
    sub = SPACE.extract(net, config)
    for name, parameter in sub.named_parameters():
        grad = net.get_parameter(name).grad
        assert (grad != 0).sum() <= parameter.numel(), name
        # what softmax does not see, the bias of the keys, has rounding errors as its gradient
        assert (grad != 0).sum() >= (0.6 if name.endswith("qkv.bias") else 1) * parameter.numel(), name
    inactive = set(dict(net.named_parameters())) - set(dict(sub.named_parameters()))
    assert {name.split(".")[1] for name in inactive} == {"3", "4"}
    assert all(net.get_parameter(name).grad is None for name in inactive)


def test_layer_sets_of_growth_are_paths_of_the_depth_supernet():
    """One depth supernet, twice: by configuration, and by the active blocks that AutoProg sets."""
    space = PlainSpace(
        widths=(24,), depths=(9, 10, 11, 12, 13, 14), heads=(3,), mlp=(2.0,), head_dim=8, resolutions=(16,), patch=8,
        num_classes=3, base=9,
    )  # fmt: skip
    net = trained_like(space.supernet()).eval()
    assert set(space.layers_of(14)) - set(space.layers_of(9)) == {5, 7, 9, 11, 13}
    assert set(space.layers_of(11)) - set(space.layers_of(9)) == {11, 13}
    assert space.count() == 6
    plain = VisionTransformer(16, 8, 3, 3, embed_dim=24, depth=14, num_heads=3, mlp_ratio=2).eval()
    plain.load_state_dict(net.state_dict())
    prepare_growth(plain)
    for depth in (9, 11, 13, 14):
        config = space.make(24, depth, 3, 2.0)
        assert config.layers == tuple(path_of(9, 14, depth))
        set_paths(plain, [config.layers])
        torch.testing.assert_close(net(images(2, 16), config), plain(images(2, 16)), atol=1e-6, rtol=1e-5)


def test_recomputation_sees_the_sub_network_of_its_own_call():
    net, rng = trained_like(SPACE.supernet()), np.random.default_rng(5)
    first, second = SPACE.sample(rng), SPACE.sample(rng)
    results = []
    for checkpointing in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(checkpointing)
        output = net(images(), first).square().sum()
        net.set_config(second)
        net(images())
        output.backward()
        net.set_config(None)
        results.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, msg=name)


def test_codes_json_and_groups():
    for space in VARIANTS.values():
        rng = np.random.default_rng(2)
        codes = space.sample_codes(rng, 3000)
        assert space.legal(codes).all()
        assert len(np.unique(codes[:, 2])) == 3
        lower = space.make(36, 3, (1, 2, 2), 2.0, 32)
        bounded = space.sample_codes(rng, 500, lower)
        assert space.legal(bounded).all()
        assert space.at_least(bounded, lower).all()
        for row in codes[:50]:
            config = space.config(row)
            assert (space.codes(config) == row).all()
            assert space.parse(json.loads(json.dumps(config.to_dict()))) == config
        assert read_space(json.loads(json.dumps(space.to_dict()))) == space
        assert space.contains(space.min())
        assert space.contains(space.max())
        # the values of heads and MLP of as many layers as there are; 2 resolutions, 3 widths
        assert space.count() == 6 * (9**2 + 9**3 + 9**5)
        anchor = space.min()
        for group in ("widths", "depths"):
            swapped = space.with_group(codes, group, anchor)
            assert space.legal(swapped).all()
            assert (space.macs_of(swapped) <= space.macs_of(codes)).all()
        deeper = space.with_group(space.codes(lower)[None], "depths", space.max())[0]
        assert space.config(deeper).depth == 5
        assert space.legal(deeper[None]).all()
    assert len({space.hash for space in VARIANTS.values()}) == 3


@pytest.mark.parametrize(("change", "message"), [
    ({"width": 30}, "width is 30; allowed: 24, 36, 48"),
    ({"heads": [1, 4]}, "blocks.1.heads is 4; allowed: 1, 2, 3"),
    ({"heads": [1, "2"]}, r"subnet.heads\[1\] is .2.; an integer"),
    ({"mlp": [2.0]}, "as many heads and mlp entries as layers"),
    ({"mlp": [2.0, 3.0]}, "blocks.1.mlp is 3.0; allowed: 1.5, 2, 4"),
    ({"layers": [0, 2]}, r"layers \[0, 2\] are not those of a depth"),
    ({"depth": 2}, 'unknown entry "depth"'),
    ({"heads": 2}, "subnet.heads: a list"),
])  # fmt: skip
def test_errors_in_a_configuration(change, message):
    with pytest.raises(ConfigError, match=message):
        SPACE.parse({**SPACE.make(24, 2, 1, 2.0).to_dict(), **change})


@pytest.mark.parametrize(("arguments", "message"), [
    ({"reg_tokens": 2}, "register tokens"),
    ({"dynamic_img_size": True}, "dynamic_img_size"),
    ({"pre_norm": True}, "norm before the blocks"),
    ({"init_values": 0.1}, "layer_scale is True; the space has False"),
    ({"qk_norm": True}, "qk_norm is True; the space has False"),
    ({"global_pool": "map", "class_token": False}, "attention pooling"),
    ({"act_layer": nn.ReLU}, "activation than GELU"),
    ({"num_classes": 3}, "num_classes is 3; the space has 7"),
    ({"embed_dim": 32, "num_heads": 4}, "blocks.0 has 4 heads and 128 hidden"),
    ({"num_heads": 4}, "head_dim is 12; the space has 8"),
    ({"depth": 4}, "blocks is 4; the space has 5"),
])  # fmt: skip
def test_models_that_cannot_be_made_elastic(arguments, message):
    given = {"img_size": 48, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 5, "num_heads": 6}
    model = VisionTransformer(**{**given, **arguments})
    with pytest.raises(ModelError, match=message):
        make_elastic(model, SPACE)
    assert not any(isinstance(module, Elastic) for module in model.modules())


def test_other_errors():
    with pytest.raises(ModelError, match="Linear cannot be made elastic"):
        make_elastic(nn.Linear(2, 2), SPACE)
    with pytest.raises(ModelError, match="resolution 40 is no multiple of the patch 16"):
        autoformer_space("tiny", resolutions=(40,))
    with pytest.raises(ModelError, match='no AutoFormer space "huge"; allowed: tiny, small, base'):
        autoformer_space("huge")
    with pytest.raises(ModelError, match="depth 6; allowed: 1 to 5"):
        PlainSpace(widths=(8,), depths=(2, 5), heads=(1,), mlp=(2.0,), base=6).dimensions  # noqa: B018
    with pytest.raises(ConfigError, match='unknown entry "width"'):
        read_space(SPACE.to_dict() | {"width": [8]})
    for change, message in (
        ({"widths": 8}, "space.widths is 8; a list of positive integers is needed"),
        ({"depths": [0, 1]}, r"space.depths is \[0, 1\]; a list of positive integers is needed"),
        ({"depths": []}, r"space: depths is \[\]; at least one"),
        ({"mlp": ["a"]}, r'space.mlp is \["a"\]; a list of positive numbers is needed'),
        ({"mlp": [float("nan")]}, "space.mlp is .NaN.; a list of positive numbers"),
        ({"patch": 0}, "space.patch is 0; a positive integer is needed"),
        ({"base": 0}, "space.base is 0; a positive integer or null is needed"),
        ({"qkv_bias": "no"}, 'space.qkv_bias is "no"; true or false is needed'),
    ):
        with pytest.raises(ConfigError, match=message):
            read_space(SPACE.to_dict() | change)
    with pytest.raises(ModelError, match="takes other arguments"):
        SPACE.supernet(stem="conv")


def test_autoformer_spaces():
    sizes = {"tiny": (5_273_896, 10_409_752), "small": (12_965_160, 34_682_920), "base": (41_580_376, 76_759_384)}
    for name, (least, most) in sizes.items():
        space = autoformer_space(name)
        assert (space.params(space.min()), space.params(space.max())) == (least, most)
        assert space.head_dim == 64
    space = autoformer_space("tiny")
    n, c, inner, hidden = 197, 216, 256, 756
    config = space.make(216, 12, 4, 3.5)
    layer = 3 * n * c * inner + 2 * n * n * inner + n * inner * c + 2 * n * c * hidden
    assert space.macs(config) == 196 * 768 * c + 12 * layer + c * 1000
    assert space.count() == 3 * (4**12 + 4**13 + 4**14)


def test_files(tmp_path):
    for variant, space in VARIANTS.items():
        config = space.sample(np.random.default_rng(7))
        sub = space.extract(trained_like(space.supernet(norm_eps=1e-4)), config).eval()
        save_extracted(tmp_path / "a", sub, space, config)
        again, found_space, found = load_extracted(tmp_path / "a")
        assert (found_space, found) == (space, config)
        assert type(again) is VisionTransformer
        x = images(2, config.resolution)
        assert torch.equal(again(x), sub(x)), variant


@pytest.mark.slow
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    config = SPACE.make(36, 3, (1, 3, 2), (2.0, 1.5, 4.0), 32)
    sub = SPACE.extract(trained_like(SPACE.supernet()), config).eval()
    x = images(1, 32)
    torch.onnx.export(sub, (x,), str(tmp_path / "a.onnx"), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(found - sub(x).detach().numpy()).max() <= 1e-4
