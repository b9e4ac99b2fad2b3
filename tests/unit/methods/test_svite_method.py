"""SViTE as a method: configuration, preparation of the model, schedules and words, on one process without an engine."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from efftrain_ds.config.loader import build_methods, load_config
from efftrain_ds.core.context import Context
from efftrain_ds.core.errors import ConfigError, ModelError, NoEffectWarning, PlanError
from efftrain_ds.core.timeline import PlanSpec, merge_timelines
from efftrain_ds.methods.svite.block import BlockRule
from efftrain_ds.methods.svite.config import SViTEConfig, preset_of
from efftrain_ds.methods.svite.densities import maskable
from efftrain_ds.methods.svite.method import SViTE
from efftrain_ds.methods.svite.nm import NMRule, violation
from efftrain_ds.methods.svite.rules import ElementRule
from efftrain_ds.models import masked
from efftrain_ds.models.adapters import create_model
from efftrain_ds.zero.blueprint import make_blueprint

CONFIGS = Path(__file__).parents[3] / "ds_configs"


def vit(**kwargs):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, **kwargs}
    return create_model("vit_tiny_patch16_224", resolution=32, num_classes=10, **sizes)


def spec(**kwargs):
    values = {"seed": 5, "epochs": 0, "samples": 0, "batch": 16, "micro_batch": 8, "world": 2, "resolution": 32}
    return PlanSpec(**{**values, "stride": 8, "steps": 1000, **kwargs})


def prepared(config=None, model=None, **plan):
    method = SViTE(SViTEConfig(**(config or {})))
    method.plan(spec(**plan))
    model = vit() if model is None else model
    assert method.prepare_model(model) is model
    return method, model


def counts(model):
    return {name: int(mask.sum()) for name, mask in masked.masks_of(model).items()}


# -- configuration -------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = SViTEConfig()
    preset = preset_of(config)
    assert (config.target, config.masked_scope, config.distribution) == (0.5, "all", "erk")
    assert preset.rule == ElementRule()
    assert (preset.initial, preset.alpha, preset.end_share, preset.moments) == (0.5, "paper", 0.8, "reset")
    reference = preset_of(SViTEConfig(rule="svite_reference"))
    assert (reference.alpha, reference.moments) == ("reference", "dense")


def test_keys_replace_what_the_rule_brings():
    given = {"end": 0.6, "alpha": "constant", "initial": 0.2, "moments": "dense"}
    preset = preset_of(SViTEConfig(rule="rigl", growth="mixed", random_share=0.25, **given))
    assert (preset.end_share, preset.alpha, preset.initial, preset.moments) == (0.6, "constant", 0.2, "dense")
    assert preset.rule == ElementRule(noise=1e-5, grow="mixed", random_share=0.25)
    block = preset_of(SViTEConfig(form="block", block=32, exclude_just_dropped=True)).rule
    assert block == BlockRule(32, exclude_just_dropped=True)
    assert preset_of(SViTEConfig(form="block", rule="set")).rule.grow == "random"
    nm = SViTEConfig(form="nm", n=1, m=8, growth="random")
    assert preset_of(nm).rule == NMRule(1, 8, grow="random")
    assert (nm.target, nm.masked_scope) == (0.125, "encoder")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"density": 0.0}, ["density", "0"]),
        ({"density": 1.2}, ["density", "1.2"]),
        ({"form": "blocks"}, ["form", "element"]),
        ({"form": "block", "block": 48}, ["block", "48"]),
        ({"block": 32}, ["block", 'form "block"', "element"]),
        ({"n": 1}, ['"n"', 'form "nm"']),
        ({"form": "nm", "n": 4}, ["4:4"]),
        ({"form": "nm", "density": 0.4}, ["2:4", "0.4"]),
        ({"form": "nm", "two_way": True, "n": 1}, ["two_way", "1:4"]),
        ({"form": "nm", "rule": "granet"}, ["granet"]),
        ({"form": "nm", "distribution": "uniform"}, ["distribution", "uniform"]),
        ({"form": "block", "rule": "srigl"}, ["srigl", "block", "rigl"]),
        ({"update_every": "30min"}, ["update_every", "30min"]),
        ({"update_every": "0st"}, ["update_every", "0st"]),
        ({"update_every": 100}, ["update_every", "100"]),
        ({"end": 1.5}, ["end", "1.5"]),
        ({"alpha": "cosine"}, ["alpha", "paper"]),
        ({"moments": "keep"}, ["moments", "reset"]),
        ({"growth": "magnitude"}, ["growth", "gradient"]),
        ({"random_share": 0.3}, ["random_share", "mixed"]),
        ({"rule": "granet", "start_density": 0.4}, ["0.5", "0.4"]),
        ({"start_density": 0.9}, ["start_density", "granet"]),
        ({"rule": "topkast", "growth": "random"}, ["growth", "topkast"]),
        ({"rule": "topkast", "moments": "reset"}, ["moments", "topkast"]),
        ({"sparsity": 0.5}, ["sparsity"]),
    ],
)
def test_a_wrong_value_is_one_clear_error(config, words):
    with pytest.raises(ConfigError) as found:
        load_config({"train_batch_size": 8, "efftrain": {"run": {"steps": 10}, "methods": {"svite": config}}})
    text = str(found.value)
    assert "efftrain.methods.svite" in text
    assert "1 error" in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("other", ["autoprog", "autoprog_zero"])
def test_methods_that_change_parameters_are_refused_beside_it(other):
    section = {"run": {"steps": 10}, "model": {"ema": {}}, "methods": {"svite": {}, other: {}}}
    with pytest.raises(ConfigError, match=f"methods.svite   cannot run together with {other}"):
        build_methods(load_config({"train_batch_size": 8, "efftrain": section}))


@pytest.mark.parametrize(
    ("size", "density", "updates", "steps"),
    [("tiny", 0.7, 60, 1501368), ("small", 0.5, 80, 1501368), ("base", 0.5, 85, 750684)],
)
def test_shipped_configurations_have_the_papers_number_of_updates(size, density, updates, steps):
    loaded = load_config(CONFIGS / f"svite_deit_{size}_in1k.json")
    (method,) = build_methods(loaded)
    assert method.config.target == density
    batch = loaded.deepspeed["train_batch_size"]
    one = spec(steps=None, epochs=600.0, samples=1281167, batch=batch, micro_batch=64, world=8)
    ctx = started(method, one, None)
    assert ctx.schedule.total_steps == steps
    assert len(method.schedule.steps) == updates
    lr = loaded.deepspeed["optimizer"]["params"]["lr"]
    assert lr == pytest.approx(5e-4 * batch / 512)


# -- schedule ------------------------------------------------------------------------------------------------------


class Engine:
    """As much of the engine as the schedule needs: a module without masks."""

    module = nn.Linear(2, 2)


def started(method, one, module):
    """Context of a first step; the module has no masks, so nothing is written."""
    ctx = Context(engine=Engine(), schedule=merge_timelines([method.plan(one)], one), seed=one.seed)
    method._union = {"x": torch.ones(1, dtype=torch.bool)}  # as after a resume
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        method._start(ctx)
    return ctx


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"update_every": "100st"}, [100, 200, 300, 400, 500, 600, 700]),
        ({"update_every": "10%", "end": 0.35}, [100, 200, 300]),
        ({}, list(range(10, 800, 10))),
        ({"rule": "rigl"}, [100, 200, 300, 400, 500, 600, 700]),
        ({"rule": "itop", "update_every": "400st"}, [400, 800]),
    ],
)
def test_update_steps(config, steps):
    method = SViTE(SViTEConfig(**config))
    started(method, spec(), None)
    assert list(method.schedule.steps) == steps


def test_intervals_in_epochs_follow_the_batch():
    method = SViTE(SViTEConfig(rule="set"))
    one = spec(steps=None, epochs=10.0, samples=1600, batch=16)
    started(method, one, None)
    assert list(method.schedule.steps) == list(range(100, 1000, 100))
    method = SViTE(SViTEConfig(update_every="2ep"))
    started(method, one, None)
    assert list(method.schedule.steps) == [200, 400, 600]


def test_a_falling_density_ends_at_the_last_update():
    method = SViTE(SViTEConfig(rule="granet", density=0.2, start_density=0.9, update_every="150st"))
    started(method, spec(), None)
    assert list(method.schedule.steps) == [150, 300, 450, 600, 750]
    assert method._density.at(0) == pytest.approx(0.9)
    assert method._density.at(750) == pytest.approx(0.2)
    assert method._density.at(600) > 0.2


def test_an_interval_longer_than_the_run_is_refused():
    with pytest.raises(PlanError, match="update_every: 20000st is 20000 steps, but the run has 1000"):
        SViTE(SViTEConfig(update_every="20000st")).plan(spec())


def test_masks_claim_no_time():
    method = SViTE(SViTEConfig(density=0.1))
    one = spec()
    (stage,) = merge_timelines([method.plan(one)], one).stages
    assert (stage.pace, dict(stage.settings), method.cost_factor(one, stage)) == (1.0, {}, 1.0)
    assert not method.changes_parameters


# -- model ---------------------------------------------------------------------------------------------------------


def test_counts_of_the_small_model():
    method, model = prepared()
    block = {"attn.qkv": 6604, "attn.proj": 3302, "mlp.fc1": 8255, "mlp.fc2": 8255}
    want = {"patch_embed.proj.weight": 2141}
    want |= {f"blocks.{i}.{name}.weight": n for i in range(2) for name, n in block.items()}
    assert counts(model) == want  # the head stays dense and is not masked
    assert not isinstance(model.head, masked.MaskedLinear)
    named = dict(model.named_parameters())
    for name, mask in masked.masks_of(model).items():
        assert not named[name][~mask].count_nonzero()
        assert named[name][mask].count_nonzero() > 0.99 * mask.sum()
    _, model = prepared({"scope": "encoder"})
    assert list(counts(model).values()) == [6144, 3072, 7680, 7680] * 2


def test_first_masks_depend_on_the_seed_alone():
    _, one = prepared()
    torch.manual_seed(77)
    _, two = prepared()
    _, other = prepared(seed=6)
    _, own = prepared({"seed": 5}, seed=6)
    masks = [masked.masks_of(m) for m in (one, two, other, own)]
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    assert all(torch.equal(masks[0][n], masks[3][n]) for n in masks[0])
    assert not any(torch.equal(masks[0][n], masks[2][n]) for n in masks[0])


def test_weights_inside_the_masks_are_the_models_own_or_rescaled():
    before = dict(vit().named_parameters())
    _, model = prepared()
    _, scaled = prepared({"rescale_init": True, "distribution": "uniform", "density": 0.25})
    for name, mask in masked.masks_of(model).items():
        assert torch.equal(dict(model.named_parameters())[name][mask], before[name][mask])
    for name, mask in masked.masks_of(scaled).items():
        ratio = dict(scaled.named_parameters())[name][mask] / before[name][mask]
        assert ratio[before[name][mask] != 0].tolist() == pytest.approx([2.0] * int(mask.sum()), rel=1e-2)


def test_forms():
    _, model = prepared({"form": "block", "block": 16, "density": 0.6})
    masks = masked.masks_of(model)
    assert sorted({n.split(".", 2)[2] for n in masks}) == ["attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    for mask in masks.values():
        tiles = mask.reshape(mask.shape[0] // 16, 16, mask.shape[1] // 16, 16).float().mean((1, 3))
        assert set(tiles.flatten().tolist()) == {0.0, 1.0}
    _, model = prepared({"form": "nm"})
    masks = masked.masks_of(model)
    assert len(masks) == 8
    assert all(violation(mask) is None for mask in masks.values())


def test_top_kast_keeps_dead_weights():
    before = dict(vit().named_parameters())
    _, model = prepared({"rule": "topkast"})
    layers = masked.masked_layers(model)
    assert layers
    for name, module in layers.items():
        assert torch.equal(dict(model.named_parameters())[name], before[name])
        assert module.weight_backward.all()
        assert module.mask_gradient == "dense"


def test_a_blueprint_takes_the_same_buffers():
    method, model = prepared()
    blueprint = make_blueprint(vit())
    shaped = method.shape_model(blueprint, method.architecture())
    assert {n: b.shape for n, b in shaped.named_buffers()} == {n: b.shape for n, b in model.named_buffers()}
    assert all(p.is_meta for p in shaped.parameters())
    again = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        ({"form": "block", "block": 16}, {"embed_dim": 60}, ["blocks.0.attn.qkv.weight", "[180, 60]", "16 x 16"]),
        ({"form": "nm", "scope": "all"}, {}, ["patch_embed.proj.weight", "2:4"]),
        ({"form": "block", "scope": "all", "block": 16}, {}, ["patch_embed.proj.weight"]),
        ({"form": "block"}, {}, ["no layer", "stay dense", "blocks.0.attn.qkv.weight"]),
        ({"form": "block", "block": 16, "density": 0.1}, {}, ["blocks.0.attn.qkv.weight", "12 x 4", "at least 12"]),
        ({"density": 1e-7}, {}, ["leaves none"]),
        ({"exclude": ["stem"]}, {}, ["exclude", '"stem"']),
    ],
)
def test_a_model_that_does_not_fit_is_one_clear_error(config, model, words):
    with pytest.raises(ModelError) as found:
        prepared(config, vit(**model))
    for word in ("efftrain.methods.svite", *words):
        assert word in str(found.value), found.value


def test_a_model_without_attention_blocks():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(ModelError, match='scope "encoder" found no block'):
        prepared({"scope": "encoder"}, net)
    _, net = prepared({"density": 0.25}, net)
    assert counts(net) == {"1.weight": 12}
    with pytest.raises(ModelError, match="Bilinear|no weight to mask"):
        prepared({}, nn.Sequential(nn.Bilinear(3, 3, 2)))


def test_density_one_masks_nothing():
    with pytest.warns(NoEffectWarning, match="density 1"):
        _, model = prepared({"density": 1.0})
    assert counts(model) == {}


def test_excluded_layers_stay_dense():
    _, model = prepared({"exclude": ["patch_embed", "blocks.0.mlp.fc1", "head.weight"]})
    names = set(counts(model))
    assert names == set(maskable(vit(), "encoder")) - {"blocks.0.mlp.fc1.weight"}


# -- state and words -----------------------------------------------------------------------------------------------


def test_state_is_plain_and_comes_back():
    method = SViTE(SViTEConfig())
    union = {"a": torch.rand(7, 9) > 0.5, "b": torch.rand(3, 2, 5, 5) > 0.2}
    method._union, method.last, method.updates = union, 30, 3
    method._last_facts = {"alpha": 0.25, "regrown": 0.125}
    state = method.state_dict()
    assert max(bits.numel() for _, bits in state["union"].values()) < 20
    again = SViTE(SViTEConfig())
    again.load_state_dict(copy.deepcopy(state))
    assert (again.last, again.updates, again._last_facts) == (30, 3, method._last_facts)
    assert all(torch.equal(again._union[n], u) and again._union[n].dtype == torch.bool for n, u in union.items())
    json.dumps({k: v for k, v in state.items() if k != "union"})


def test_words():
    one = spec()
    (stage,) = merge_timelines([SViTE(SViTEConfig()).plan(one)], one).stages
    found = [
        SViTE(SViTEConfig(**config)).describe(stage)
        for config in ({"density": 0.4}, {"form": "block"}, {"form": "nm", "n": 1})
    ]
    assert found == ["density 0.4", "density 0.5 b64", "1:4"]
