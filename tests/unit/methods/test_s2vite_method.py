"""S2ViTE as a method: configuration, plan, cost, preparation of the model and words, on one process, no engine."""

import copy
import math

import pytest
import torch
from torch import nn

from efftrain_ds.config.loader import build_methods, load_config
from efftrain_ds.core.errors import ConfigError, ModelError, NoEffectWarning, PlanError
from efftrain_ds.core.timeline import PlanSpec, merge_timelines
from efftrain_ds.methods.svite.accounting import live_macs
from efftrain_ds.methods.svite.s2vite import S2ViTE
from efftrain_ds.methods.svite.s2vite_config import S2ViTEConfig
from efftrain_ds.methods.svite.s2vite_cost import mac_share
from efftrain_ds.methods.svite.s2vite_slots import head_draws, neuron_draws
from efftrain_ds.methods.svite.s2vite_values import new_values
from efftrain_ds.models import masked
from efftrain_ds.models.adapters import create_model
from efftrain_ds.models.units import units_of
from efftrain_ds.planning import make_plan
from efftrain_ds.train_setup import shortened
from efftrain_ds.zero.blueprint import digest, make_blueprint


def vit(**kwargs):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, **kwargs}
    return create_model("vit_tiny_patch16_224", resolution=32, num_classes=10, **sizes)


def spec(**kwargs):
    values = {"seed": 5, "epochs": 0, "samples": 0, "batch": 16, "micro_batch": 8, "world": 2, "resolution": 32}
    return PlanSpec(**{**values, "stride": 8, "steps": 1000, "depth": 2, **kwargs})


def prepared(model=None, seed=5, **config):
    method = S2ViTE(S2ViTEConfig(**config))
    method.plan(spec(seed=seed))
    model = vit() if model is None else model
    assert method.prepare_model(model) is model
    return method, model


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"heads": 0.0}, ["heads", "0"]),
        ({"neurons": 1.2}, ["neurons", "1.2"]),
        ({"update_every": "30min"}, ["update_every", "30min"]),
        ({"update_every": "0st"}, ["update_every", "0st"]),
        ({"end": 1.5}, ["end", "1.5"]),
        ({"alpha": "cosine"}, ["alpha", "paper"]),
        ({"ramp": {"start": 0.5}}, ["ramp.start", "0.5", '"heads" 0.6']),
        ({"ramp": {"start": 1.0, "levels": 1}}, ["levels", "1"]),
        ({"ramp": {"start": 1.0}, "revive": False}, ["ramp", "revive"]),
        ({"exclude_just_dropped": True, "revive": False}, ["exclude_just_dropped", "revive"]),
        ({"density": 0.5}, ["density"]),
    ],
)
def test_a_wrong_value_is_one_clear_error(config, words):
    with pytest.raises(ConfigError) as found:
        load_config({"train_batch_size": 8, "efftrain": {"run": {"steps": 10}, "methods": {"s2vite": config}}})
    text = str(found.value)
    assert "efftrain.methods.s2vite" in text
    assert "1 error" in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("other", ["svite", "autoprog", "autoprog_zero"])
def test_methods_that_change_the_same_weights_are_refused_beside_it(other):
    section = {"run": {"steps": 10}, "model": {"ema": {}}, "methods": {"s2vite": {}, other: {}}}
    with pytest.raises(ConfigError, match=rf"methods\.s2vite\s+cannot run together with {other}"):
        build_methods(load_config({"train_batch_size": 8, "efftrain": section}))


def test_defaults_are_the_papers():
    config = S2ViTEConfig()
    assert (config.update_every, config.end, config.alpha, config.initial) == ("1%", 0.8, "paper", 0.5)
    assert (config.revive, config.ramp, config.exclude_just_dropped) == (True, None, False)


def test_the_plan():
    one = spec()
    (stage,) = merge_timelines([S2ViTE(S2ViTEConfig()).plan(one)], one).stages
    assert (dict(stage.settings), stage.pace) == ({}, 1.0)
    method = S2ViTE(S2ViTEConfig(heads=0.4, neurons=0.6, ramp={"start": 1.0, "levels": 4, "until": 0.6}))
    stages = merge_timelines([method.plan(one)], one).stages
    assert [(s.start_step, s.settings["unit_level"]) for s in stages] == [(0, 0), (200, 1), (400, 2), (600, 3)]
    words = [method.describe(s) for s in stages]
    assert words == [
        "heads 1 neurons 1",
        "heads 0.8 neurons 0.866667",
        "heads 0.6 neurons 0.733333",
        "heads 0.4 neurons 0.6",
    ]
    costs = [method.cost_factor(one, s) for s in stages]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 1.0
    assert costs[-1] == pytest.approx((0.4 + 2 * 0.6) / 3)
    with pytest.raises(PlanError, match="update_every: 2000st is 2000 steps, but the run has 1000"):
        S2ViTE(S2ViTEConfig(update_every="2000st")).plan(one)


def test_falling_counts_are_measured_in_one_pass():
    ramp = {"start": 1.0, "levels": 4}
    small = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    section = {
        "run": {"steps": 1000},
        "model": {"name": "vit_tiny_patch16_224", "num_classes": 10, "kwargs": small},
        "data": {"resolution": 32, "samples": 1000},
        "methods": {"s2vite": {"heads": 0.5, "neurons": 0.5, "ramp": ramp}},
    }
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    short = shortened(make_plan(load_config({**sizes, "efftrain": {"schema": 1, **section}}), world=1), 4)
    rows = [(s.stage.settings["unit_level"], s.stage.steps) for s in short.stages]
    assert rows == [(level, steps) for level in range(4) for steps in (2, 4)]
    method = prepared(heads=0.5, neurons=0.5, ramp=ramp)[0]
    method.on_stage_enter(None, short.stages[0].stage)
    method.units.draw(method.units.counts_at((0.5, 0.5), []), 0)
    with pytest.raises(PlanError, match=r"^efftrain\.methods\.s2vite\.ramp: blocks\.0 has .* counts only fall"):
        method.on_stage_enter(None, short.stages[0].stage)


def test_cost_is_that_of_the_model():
    one = spec(resolution=224, stride=16, depth=12, width=384, model="deit_small_patch16_224")
    # 4 of 6 heads, 60 % of the neurons: 36.98 % of all MACs saved, the classifier included
    dense = 4_598_882_304
    assert (1 - mac_share(0.7, 0.6, one)) * (dense - 384_000) / dense == pytest.approx(0.3698, abs=1e-4)
    full, method, model = vit(), *prepared(heads=0.5, neurons=0.5)
    macs = [live_macs(m, 32) - 640 for m in (model, full)]
    assert macs[1] == 1_942_400 - 640
    assert mac_share(0.5, 0.5, spec(width=64)) == pytest.approx(macs[0] / macs[1])
    assert mac_share(0.5, 0.5, spec(), excluded=1) == pytest.approx(0.75)
    (stage,) = merge_timelines([method.plan(spec())], spec()).stages
    assert S2ViTE(S2ViTEConfig(revive=False)).cost_factor(spec(), stage) == 1.0


def test_a_compact_model_keeps_the_drawn_units():
    full = dict(vit().named_parameters())
    method, model = prepared(heads=0.5, neurons=0.6)
    assert {(u.heads, u.neurons) for u in units_of(model).values()} == {(2, 153)}
    for block, of in method.units.slots.items():
        rows = [h * 16 + i for h in of["heads"] for i in range(16)]
        proj = model.get_parameter(f"{block}.attn.proj.weight")
        assert torch.equal(proj, full[f"{block}.attn.proj.weight"][:, rows])
        fc1 = model.get_parameter(f"{block}.mlp.fc1.weight")
        assert torch.equal(fc1, full[f"{block}.mlp.fc1.weight"][list(of["neurons"])])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    slots = method.units.slots
    assert slots["blocks.0"] != slots["blocks.1"]
    assert prepared(heads=0.5, neurons=0.6)[0].units.slots == slots
    assert prepared(heads=0.5, neurons=0.6, seed=6)[0].units.slots != slots
    own = S2ViTE(S2ViTEConfig(heads=0.5, neurons=0.6, seed=5))
    own.plan(spec(seed=6))
    own.prepare_model(vit())
    assert own.units.slots == slots


def test_a_blueprint_takes_the_shape_of_a_checkpoint():
    method, model = prepared(heads=0.5, neurons=0.6, exclude=["blocks.1"])
    architecture = method.architecture()
    assert architecture == {"units": {"blocks.0": [2, 153], "blocks.1": [4, 256]}}
    again = S2ViTE(method.config)
    shaped = again.shape_model(make_blueprint(vit()), copy.deepcopy(architecture))
    assert digest(shaped) == digest(make_blueprint(model))
    again.load_state_dict(method.state_dict())
    assert again.units.slots == method.units.slots
    with pytest.raises(ModelError, match=r"the checkpoint has the blocks blocks\.0, not blocks\.0, blocks\.1"):
        again.shape_model(make_blueprint(vit()), {"units": {"blocks.0": [2, 153]}})


def test_the_published_way_masks_full_weights():
    method, model = prepared(heads=0.5, neurons=0.5, revive=False)
    masks = masked.masks_of(model)
    assert {n.split(".", 2)[2]: int(m.sum()) for n, m in masks.items()} == {
        "attn.qkv.weight": 3 * 32 * 64,
        "mlp.fc1.weight": 128 * 64,
        "mlp.fc2.weight": 128 * 64,
    }
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].count_nonzero()
    for block, of in method.units.slots.items():
        rows = masks[f"{block}.attn.qkv.weight"].view(3, 4, 16, 64)[:, :, 0, 0]
        assert torch.equal(rows, torch.stack([torch.tensor([h in of["heads"] for h in range(4)])] * 3))
        columns = masks[f"{block}.mlp.fc2.weight"][0].nonzero().flatten().tolist()
        assert tuple(columns) == of["neurons"]


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        ({"exclude": ["blocks.7"]}, vit, ["exclude", '"blocks.7"', "blocks.0"]),
        ({}, lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), ["Sequential"]),
    ],
)
def test_a_model_that_does_not_fit_is_one_clear_error(config, model, words):
    with pytest.raises(ModelError) as found:
        prepared(model(), **config)
    for word in ("efftrain.methods.s2vite", *words):
        assert word in str(found.value), found.value


def test_all_units_kept_has_no_effect():
    with pytest.warns(NoEffectWarning, match="all heads and neurons are kept"):
        prepared(heads=1.0, neurons=1.0)


@pytest.mark.parametrize("bias", [True, False])
def test_values_of_new_units(bias):
    _, model = prepared(vit(qkv_bias=bias), heads=0.5, neurons=0.5)
    heads, neurons = head_draws(4, 16, 64, 1, 2, "blocks.1"), neuron_draws(256, 64, 1, 2, "blocks.1")
    found = new_values(model, "blocks.1", ((1,), heads, (3,)), ((0, 5), neurons, (200, 7)))
    biases = {"blocks.1.attn.qkv.bias"} if bias else set()
    weights = {f"blocks.1.{n}" for n in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias")}
    assert set(found) == weights | {"blocks.1.mlp.fc2.weight"} | biases
    chosen, values = found["blocks.1.attn.qkv.weight"]
    assert chosen.view(3, 2, 16 * 64).all(2).tolist() == [[False, True]] * 3
    assert torch.equal(values.view(3, 2, 16, 64)[:2, 1], heads.query_key[3])
    assert not values.view(3, 2, 16, 64)[2].count_nonzero()
    chosen, values = found["blocks.1.attn.proj.weight"]
    assert torch.equal(values[:, 16:], heads.proj[3])
    assert not chosen[:, :16].any()
    chosen, values = found["blocks.1.mlp.fc1.weight"]
    assert torch.equal(values[[0, 5]], neurons[[200, 7]])
    assert chosen.all(1).nonzero().flatten().tolist() == [0, 5]
    chosen, values = found["blocks.1.mlp.fc2.weight"]
    assert chosen.all(0).nonzero().flatten().tolist() == [0, 5]
    assert not values.count_nonzero()


def test_state_is_plain():
    method, _ = prepared(heads=0.5, neurons=0.5)
    method.units.explore()
    method._edge_scores = {"blocks.0": torch.tensor([1.0, math.pi])}
    state = copy.deepcopy(method.state_dict())
    again = S2ViTE(method.config)
    again.load_state_dict(state)
    assert again.state_dict().keys() == state.keys()
    assert torch.equal(again._edge_scores["blocks.0"], method._edge_scores["blocks.0"])
    assert again.units.union["blocks.0"]["neurons"].sum() == 128
