"""Masked autoencoders: positions, masks, the way of the tokens, and the encoder's way into a classifier."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.adapters import accepts_sizes, create_model, model_stride
from efftrain_ds.models.layer_decay import layer_decay_groups
from efftrain_ds.models.mae import (
    MaskedAutoencoder,
    masked_patches,
    patchify,
    random_order,
    unpatchify,
    visible_patches,
)
from efftrain_ds.models.mae_weights import encoder_weights, is_masked_autoencoder
from efftrain_ds.models.sincos import coordinates, sincos_positions
from efftrain_ds.models.weights import start_from

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def autoencoder(side: int = 28, **kwargs) -> MaskedAutoencoder:
    torch.manual_seed(1)
    model = create_model("mae_vit_tiny_patch16", resolution=side, num_classes=10, **{**SMALL, **DECODER, **kwargs})
    assert isinstance(model, MaskedAutoencoder)
    return model


def classifier(side: int = 28, **kwargs) -> nn.Module:
    torch.manual_seed(2)
    return create_model("vit_tiny_patch16_224", resolution=side, num_classes=10, **{**SMALL, **kwargs})


# -- positions -------------------------------------------------------------------------------------------------


def test_positions_at_full_size_are_the_published_ones():
    codes = sincos_positions((3, 4), (3, 4), 8)
    assert codes.shape == (12, 8)
    for token, code in enumerate(codes.tolist()):
        row, column = divmod(token, 4)
        waves = [f(place / 10000 ** (i / 2)) for place in (column, row) for f in (math.sin, math.cos) for i in (0, 1)]
        assert code == pytest.approx(waves, abs=1e-6)


def test_positions_of_a_smaller_grid_lie_where_its_patches_do():
    assert coordinates(14, 14).tolist() == list(range(14))
    assert coordinates(7, 14).tolist() == [0.5 + 2 * i for i in range(7)]  # between the two patches that it covers
    for count in (6, 10, 12):
        places = coordinates(count, 14)
        assert places.mean() == pytest.approx(6.5)
        assert places == pytest.approx(13 - places[::-1])
    half = sincos_positions((2, 2), (4, 4), 4)
    assert half[:, 0].tolist() == pytest.approx([math.sin(x) for x in (0.5, 2.5, 0.5, 2.5)])


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "patch", "ratio", "visible"),
    [(224, 16, 0.75, 49), (192, 16, 0.75, 36), (160, 16, 0.75, 25), (96, 16, 0.75, 9), (28, 4, 0.75, 12)]
    + [(20, 4, 0.75, 6), (160, 16, 0.9, 10), (160, 16, 0.7, 30)],  # 100 * (1 - 0.9) and 100 * (1 - 0.7) round down
)
def test_count_of_visible_patches(side: int, patch: int, ratio: float, visible: int):
    patches = (side // patch) ** 2
    assert visible_patches(patches, ratio) == visible
    order = random_order(5, patches, torch.Generator().manual_seed(0))
    hidden = masked_patches(order, visible)
    assert hidden.sum(dim=1).tolist() == [patches - visible] * 5
    assert not hidden.gather(1, order[:, :visible]).any()
    assert (order.sort(dim=1).values == torch.arange(patches)).all()
    assert len({tuple(row.tolist()) for row in order}) == 5


@pytest.mark.parametrize(("patches", "ratio"), [(4, 0.9), (49, 0.99), (1, 0.5)])
def test_something_must_be_visible_and_something_hidden(patches: int, ratio: float):
    with pytest.raises(ModelError, match=rf"mask ratio of {ratio:g} leaves \d+ of {patches} patches"):
        visible_patches(patches, ratio)


def test_patches_hold_their_pixels_channels_last():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    corner = images[1, :, 4:8, 8:12]  # row 1, column 2 of the patches
    assert torch.equal(patches[1, 5], corner.permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


# -- tokens ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_visible_tokens_keep_the_order_they_are_given_in():
    model = autoencoder()
    images, order = torch.randn(3, 3, 20, 20), random_order(3, 25)
    model.blocks, model.norm = nn.Sequential(), nn.Identity()
    tokens = model.encode(images, order[:, :6])
    embedded = model.patch_embed(images).flatten(1, 2) + sincos_positions((5, 5), (7, 7), 32)
    assert tokens.shape == (3, 7, 32)
    assert torch.equal(tokens[:, 0], model.cls_token[0].expand(3, -1))
    for image in range(3):
        assert torch.equal(tokens[image, 1:], embedded[image, order[image, :6]])


@torch.no_grad()
def test_the_decoder_puts_every_token_back_in_its_place():
    model = autoencoder(decoder_embed_dim=32)
    model.decoder_embed = model.decoder_norm = model.decoder_pred = nn.Identity()
    model.decoder_blocks = nn.Sequential()
    order, tokens = random_order(2, 25), torch.randn(2, 7, 32)
    found = model.decode(tokens, order, (5, 5)) - sincos_positions((5, 5), (7, 7), 32)
    for image in range(2):
        assert torch.allclose(found[image, order[image, :6]], tokens[image, 1:], atol=1e-6)
        assert torch.allclose(found[image, order[image, 6:]], model.mask_token[0].expand(19, -1), atol=1e-6)


@torch.no_grad()
def test_hidden_pixels_are_not_seen_and_the_order_of_visible_ones_does_not_matter():
    model = autoencoder().eval()
    images, order = torch.randn(2, 3, 28, 28), random_order(2, 49)
    expected = model(images, order)
    hidden = masked_patches(order, 12)
    noise = torch.where(hidden[..., None], torch.randn(2, 49, 48), 0.0)
    assert torch.equal(model(images + unpatchify(noise, 4, (7, 7)), order), expected)
    seen = torch.where(hidden[..., None], 0.0, torch.randn(2, 49, 48))
    assert not torch.allclose(model(images + unpatchify(seen, 4, (7, 7)), order), expected, atol=1e-3)
    turned = torch.cat((order[:, :12].flip(1), order[:, 12:].flip(1)), dim=1)
    assert torch.allclose(model(images, turned), expected, atol=1e-5)
    model.order = order
    assert torch.equal(model(images), expected)


def test_every_parameter_trains_at_every_size_and_stays_the_same_tensor():
    model = autoencoder()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for side in (20, 24, 28, 20):
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model(torch.randn(4, 3, side, side)).square().mean().backward()
        optimizer.step()
        assert all(not torch.equal(start[name], parameter) for name, parameter in model.named_parameters())
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
        optimizer.zero_grad()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert accepts_sizes(model)[0]
    assert model_stride(model) == 4


def test_gradients_with_recomputed_blocks_are_the_same():
    model = autoencoder()
    images, order = torch.randn(2, 3, 20, 20), random_order(2, 25)
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(images, order).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


# -- the encoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_the_encoder_is_that_of_timm(size: str):
    with torch.device("meta"):
        ours = create_model(f"mae_vit_{size}_patch16", resolution=224, num_classes=1000)
        timms = timm.create_model(f"vit_{size}_patch16_224", num_classes=0)
    own = {name: p.shape for name, p in ours.named_parameters() if not name.startswith(("decoder_", "mask_token"))}
    expected = {name: p.shape for name, p in timms.named_parameters() if name != "pos_embed"}
    assert own == expected
    decoder = sum(p.numel() for name, p in ours.named_parameters() if name.startswith("decoder_"))
    width = ours.embed_dim
    assert decoder == width * 512 + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 513 * 768
    assert len(ours.decoder_blocks) == 8
    assert ours.decoder_blocks[0].attn.num_heads == 16


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}])
def test_a_classifier_starts_from_the_encoder(kwargs):
    pretrained, model = autoencoder(), classifier(**kwargs)
    fresh = copy.deepcopy(model)
    weights = pretrained.state_dict()
    assert is_masked_autoencoder(weights)
    assert not is_masked_autoencoder(model.state_dict())
    found = start_from(model, encoder_weights(weights, model), source="mae", head="new", head_scale=0.001)
    assert (found.rows, found.new_rows, found.resampled) == (0, 10, ())
    for name, value in model.state_dict().items():
        if name.startswith("head."):
            assert torch.equal(value, fresh.state_dict()[name] * 0.001)
        elif name.startswith("fc_norm."):
            assert torch.equal(value, fresh.state_dict()[name])
        elif name == "pos_embed":
            codes = sincos_positions((7, 7), (7, 7), 32)
            assert torch.equal(value[0, -49:], codes)
            assert not value[0, :-49].any()
        else:
            assert torch.equal(value, weights[name]), name
    if not kwargs:  # the same network, then: what it sees are all patches
        images = torch.randn(2, 3, 28, 28)
        assert torch.equal(model.eval().forward_features(images), pretrained.eval().forward_features(images))


@torch.no_grad()
def test_positions_of_a_classifier_for_other_sizes_are_computed():
    pretrained, model = autoencoder(), classifier(side=40)
    start_from(model, encoder_weights(pretrained.state_dict(), model), source="mae", head="new")
    assert torch.equal(model.pos_embed[0, 1:], sincos_positions((10, 10), (7, 7), 32))


@torch.no_grad()
def test_weights_of_the_released_form_bring_their_own_positions():
    released = autoencoder().state_dict()
    del released["position_grid"]
    released |= {"pos_embed": torch.randn(1, 50, 32), "decoder_pos_embed": torch.randn(1, 50, 16)}
    for kwargs, rows in (({}, slice(None)), ({"global_pool": "avg", "class_token": False}, slice(1, None))):
        model = classifier(**kwargs)
        start_from(model, encoder_weights(released, model), source="released", head="new")
        assert torch.equal(model.pos_embed, released["pos_embed"][:, rows])


@torch.no_grad()
def test_an_autoencoder_starts_from_another_one():
    first, second = autoencoder(), autoencoder(side=32)
    weights = {name: torch.randn_like(p) for name, p in first.named_parameters()} | dict(first.named_buffers())
    found = start_from(second, encoder_weights(weights, second), source="mae")
    assert (found.rows, found.new_rows) == (0, 0)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in second.named_parameters())
    assert second.position_grid.tolist() == [8, 8]


def test_weights_of_other_heads_are_refused():
    weights = autoencoder().state_dict()
    assert weights["attention_heads"].tolist() == [2, 2]
    words = "efftrain.model.kwargs.{}num_heads: the weights were trained with 2 heads, the model has 4"
    for model, key in (
        (classifier(num_heads=4), ""),
        (autoencoder(num_heads=4), ""),
        (autoencoder(decoder_num_heads=4), "decoder_"),
    ):
        with pytest.raises(ModelError, match=f"^{words.format(key)}$"):
            encoder_weights(weights, model)
        released = {name: value for name, value in weights.items() if name != "attention_heads"}
        assert "attention_heads" not in encoder_weights(released, model)  # these do not say
    assert autoencoder(num_heads=4).bfloat16().attention_heads.tolist() == [4, 2]


@torch.no_grad()
def test_what_does_not_fit_another_autoencoder_is_named(caplog):
    first, model = autoencoder(), autoencoder(side=32)
    weights = first.state_dict() | {"decoder_extra.weight": torch.zeros(3)}
    start_from(model, encoder_weights(weights, model), source="mae")
    assert "1 tensors are not of this model and are left out: decoder_extra.weight" in caplog.text
    assert torch.equal(model.mask_token, first.mask_token)
    other = autoencoder(decoder_embed_dim=24)
    with pytest.raises(
        ModelError, match=r"does not fit: decoder_blocks\.0\.attn\.proj\.bias is \[16\], the model has \[24"
    ):
        start_from(other, encoder_weights(weights, other), source="mae")


def test_layers_of_the_classifier_take_the_published_rates():
    model = classifier(global_pool="avg")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, lr=1.0, decay=0.65)
    rates = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    stem = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for name, rate in rates.items():  # two blocks: the stem is layer 0 of 3, the head with its norm layer 3
        layer = 0 if name in stem else int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 3
        assert rate == pytest.approx(0.65 ** (3 - layer)), name


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"embed_dim": 30, "num_heads": 2}, "embed_dim: 30 is not a multiple of 4"),
        ({"decoder_embed_dim": 18}, "decoder_embed_dim: 18 is not"),
        ({"global_pool": "avg"}, "global_pool: cannot be chosen"),
        ({"pre_norm": True}, "pre_norm: cannot be chosen"),
        ({"pos_drop_rate": 0.1, "embed_dim": 16}, "pos_drop_rate: cannot"),
        ({"drop_rate": 0.1}, "kwargs.drop_rate: cannot"),
        ({"fix_init": True}, "fix_init: cannot"),
        ({"no_embed_class": True}, "no_embed_class: cannot"),
        ({"pool_include_prefix": True}, "pool_include_prefix: cannot"),
        ({"fc_norm": True}, "fc_norm: cannot"),
        ({"pretrained": True}, "efftrain.model.pretrained"),
        ({"decoder_widht": 3}, "decoder_widht"),
    ],
)
def test_arguments_that_make_no_autoencoder(kwargs, words):
    with pytest.raises(ModelError, match=words):
        autoencoder(**kwargs)


def test_inputs_that_do_not_fit():
    model = autoencoder()
    with pytest.raises(ModelError, match="22 x 22 pixels do not divide into patches of 4"):
        model(torch.randn(1, 3, 22, 22))
    with pytest.raises(ModelError, match=r"order of the patches is \[1, 25\], the images need \[2, 49\]"):
        model(torch.randn(2, 3, 28, 28), random_order(1, 25))
