"""Densities from a file: what is read, what is refused, and what the masks become."""

import json
import math

import pytest
import torch

from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.core.timeline import PlanSpec
from efftrain_ds.methods.svite.config import SViTEConfig
from efftrain_ds.methods.svite.custom import check_counts, custom_shares, read_densities
from efftrain_ds.methods.svite.method import SViTE
from efftrain_ds.models import masked
from efftrain_ds.models.adapters import create_model

SPEC = PlanSpec(seed=5, epochs=0, samples=0, batch=16, micro_batch=8, world=2, resolution=32, stride=8, steps=1000)
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def vit():
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return create_model("vit_tiny_patch16_224", resolution=32, num_classes=10, **sizes)


def prepared(path, **config):
    method = SViTE(SViTEConfig(distribution="custom", densities=str(path), **config))
    method.plan(SPEC)
    return method, method.prepare_model(vit())


def written(tmp_path, densities):
    path = tmp_path / "densities.json"
    path.write_text(densities if isinstance(densities, str) else json.dumps(densities))
    return path


def encoder(density):
    return {f"blocks.{i}.{layer}": density for i in range(2) for layer in LAYERS}


def test_every_layer_has_its_own_density(tmp_path):
    given = {"patch_embed.proj.weight": 0.25, "head": 1, **encoder(0.5), "blocks.1.attn.qkv": 0.1}
    method, model = prepared(written(tmp_path, given))
    masks = masked.masks_of(model)
    assert "head.weight" not in masks
    for name, mask in masks.items():
        density = given.get(name, given.get(name.removesuffix(".weight")))
        assert int(mask.sum()) == math.floor(density * mask.numel() + 0.5), name
    assert len(masks) == 9
    assert method.describe(None) == "density custom"


def test_blocks_count_blocks(tmp_path):
    _, model = prepared(written(tmp_path, encoder(0.25)), form="block", block=16)
    mask = masked.masks_of(model)["blocks.0.mlp.fc1.weight"]
    assert mask[::16, ::16].shape == (16, 4)
    assert int(mask.sum()) == 16 * 16 * 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"blocks.7.attn.qkv": 0.5}, ["blocks.7.attn.qkv.weight", "no layer", "there are patch_embed.proj.weight"]),
        (encoder(0.5), ["no density for patch_embed.proj.weight, head.weight"]),
        (encoder(0), ["blocks.0.attn.qkv is 0", "above 0, at most 1"]),
        ({"head": 1.5}, ["head is 1.5"]),
        ({"head": True}, ["head is true"]),
        ({"head": "0.5"}, ['head is "0.5"']),
        ({"head": {"a": 1}}, ['head is {"a": 1}']),
        ('{"head": NaN}', ["head is NaN"]),
        ('{"head": 0.5, "head.weight": 0.5}', ["head.weight stands there twice"]),
        ("[0.5]", ["allowed: an object"]),
        ("{}", ["allowed: an object"]),
        ('{"head": 0.5,\n}', ["line 2, column 1"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        prepared(path)
    for text in ["efftrain.methods.svite.densities", str(path), *words]:
        assert text in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"svite\.densities: .*none\.json: cannot be read: No such file"):
        prepared(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_densities(tmp_path, "key")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"distribution": "custom"}, "belong together"),
        ({"densities": "x.json"}, "belong together"),
        ({"distribution": "custom", "densities": "x.json", "density": 0.5}, 'leave "density" out'),
        ({"distribution": "custom", "densities": "x.json", "rule": "granet"}, "granet"),
        ({"distribution": "custom", "densities": "x.json", "form": "nm"}, "distribution"),
    ],
)
def test_keys_that_do_not_go_together(config, words):
    document = {"train_batch_size": 4, "efftrain": {"methods": {"svite": config}}}
    with pytest.raises(ConfigError, match=words):
        load_config(document)


def test_a_run_keeps_its_densities():
    check_counts({"a": 3}, {"a": 3, "b": 1}, "key: file")
    with pytest.raises(ConfigError, match="key: file: a has 3 .* the file asks for 4"):
        check_counts({"a": 3}, {"a": 4}, "key: file")


def test_layers_that_are_dense_by_their_form_need_no_density():
    shapes = {"a.weight": (4, 4), "b.weight": (2, 2)}
    assert custom_shares({"a.weight": 0.5}, shapes, "", dense=["b.weight"]) == {"a.weight": 0.5, "b.weight": 1.0}
