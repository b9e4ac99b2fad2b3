"""Token selection as a method: configuration, plan, price, preparation, stages and words, without an engine."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from efftrain_ds.config.loader import load_config
from efftrain_ds.core.compose import compose
from efftrain_ds.core.context import Context
from efftrain_ds.core.errors import ConfigError, ModelError, NoEffectWarning, PlanError
from efftrain_ds.core.timeline import PlanSpec, merge_timelines
from efftrain_ds.cost.macs import module_macs
from efftrain_ds.methods.svite.accounting import grid_of, live_counts, live_facts, live_macs, selected_tokens
from efftrain_ds.methods.svite.config import SViTEConfig
from efftrain_ds.methods.svite.densities import exact_counts, layer_densities, mask_rng, maskable, random_mask
from efftrain_ds.methods.svite.method import SViTE
from efftrain_ds.methods.svite.s2vite import S2ViTE
from efftrain_ds.methods.svite.s2vite_config import S2ViTEConfig
from efftrain_ds.methods.svite.tokens import SViTETokens
from efftrain_ds.methods.svite.tokens_config import SViTETokensConfig
from efftrain_ds.models import masked
from efftrain_ds.models.adapters import no_weight_decay_groups
from efftrain_ds.models.tokens import insert_selector, selector_of
from efftrain_ds.planning import make_plan
from efftrain_ds.zero.blueprint import copy_blueprint, digest, make_blueprint

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
RAMP = {"keep": 0.7, "ramp": {"start": 1.0, "levels": 4, "until": 0.6}}


def vit(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, **changes})


def spec(**kwargs):
    values = {"seed": 5, "epochs": 0, "samples": 0, "batch": 16, "micro_batch": 8, "world": 2, "resolution": 32}
    return PlanSpec(**{**values, "stride": 8, "steps": 1000, "width": 64, "depth": 2, **kwargs})


def method(config=None, **plan):
    made = SViTETokens(SViTETokensConfig.model_validate(config or {}))
    return made, merge_timelines([made.plan(spec(**plan))], spec(**plan))


def context(model, schedule, step=0):
    records = []
    ctx = Context(SimpleNamespace(module=model), schedule, 5, step)
    ctx.stage = schedule.stage_at(step) if schedule is not None else None
    ctx.record = lambda event, **data: records.append((event, data))
    return ctx, records


# -- configuration and plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"keep": 0.0}, ["keep", "0"]),
        ({"keep": 1.5}, ["keep", "1.5"]),
        ({"keep": "0.7"}, ["keep"]),
        ({"select": "random"}, ["select", "gather", "mask"]),
        ({"keep": 1.0, "ramp": {}}, ["ramp.start", "keep", "1"]),
        ({"ramp": {"levels": 1}}, ["levels", "1"]),
        ({"ramp": {"until": 1.0}}, ["until", "1"]),
        ({"tau": {"end": 0.0}}, ["tau", "end"]),
        ({"kept": 0.5}, ["kept"]),
    ],
)
def test_a_wrong_value_is_one_clear_error(config, words):
    with pytest.raises(ConfigError) as found:
        load_config({"train_batch_size": 8, "efftrain": {"run": {"steps": 10}, "methods": {"svite_tokens": config}}})
    text = str(found.value)
    assert "efftrain.methods.svite_tokens" in text
    assert "1 error" in text
    assert all(word in text for word in words), text


def test_stages_of_the_ramp():
    _, schedule = method(RAMP)
    assert [(s.start_step, s.settings["keep_ratio"]) for s in schedule.stages] == [
        (0, 1.0),
        (200, 0.9),
        (400, 0.8),
        (600, 0.7),
    ]
    plain, schedule = method({"keep": 0.95})
    assert [s.settings for s in schedule.stages] == [{"keep_ratio": 0.95}]
    assert plain.describe(schedule.stages[0]) == "keep 0.95"
    rising = SViTETokensConfig.model_validate({"keep": 1.0, "ramp": {"start": 0.5, "levels": 2}})
    assert (rising.keeps, rising.edges) == ((0.5, 1.0), (0.0, 0.5))


def test_temperature_falls_or_rises_linearly():
    config = SViTETokensConfig()
    assert [config.tau_at(step, 100) for step in (0, 50, 100, 120)] == pytest.approx([10, 5.05, 0.1, 0.1])
    old = SViTETokensConfig.model_validate({"tau": {"start": 0.1, "end": 10.0}})
    assert [old.tau_at(step, 100) for step in (0, 50, 100)] == pytest.approx([0.1, 5.05, 10])


def test_partners():
    tokens, svite = method()[0], SViTE(SViTEConfig())
    assert [m.name for m in compose([svite, tokens])] == ["svite_tokens", "svite"]
    with pytest.raises(ConfigError, match="autoprog_zero"):
        compose([tokens, type("Other", (SViTE,), {"name": "autoprog_zero"})(SViTEConfig())])


# -- price ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("keep", [0.95, 0.9, 0.5])
def test_cost_factor_is_the_ratio_of_macs(keep, changes):
    model = vit(num_classes=0, **changes)
    made, schedule = method({"keep": keep}, prefix=model.num_prefix_tokens)
    factor = made.cost_factor(schedule.spec, schedule.stages[0])
    insert_selector(model, keep)
    kept = selected_tokens(model, 32)
    assert kept == selector_of(model).kept(16 + model.num_prefix_tokens)
    assert factor == pytest.approx(live_macs(model, 32, kept=kept) / live_macs(model, 32))


def test_cost_factor_of_other_cases():
    made, schedule = method({"keep": 0.5}, width=0)
    assert made.cost_factor(schedule.spec, schedule.stages[0]) == pytest.approx(9 / 17)
    masks, schedule = method({"keep": 0.5, "select": "mask"})
    assert masks.cost_factor(schedule.spec, schedule.stages[0]) == 1
    assert masks.describe(schedule.stages[0]) == "keep 0.5 masked"
    made, schedule = method(RAMP)
    factors = [made.cost_factor(schedule.spec, stage) for stage in schedule.stages]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)


def test_published_savings_of_deit_small_at_half_the_weights():
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=384, num_heads=6)
    insert_selector(model, 1.0)
    shapes = maskable(model)
    counts = exact_counts(shapes, layer_densities(shapes, 0.5))
    masks = {n: (torch.arange(torch.Size(s).numel()) < counts[n]).view(s) for n, s in shapes.items()}
    live, dense = live_counts(model, masks), live_macs(model, 224)
    assert dense == 4_598_882_304
    for keep, kept, saved in ((1.0, 197, 46.15), (0.95, 187, 49.24), (0.9, 177, 52.30), (0.7, 138, 63.83)):
        model.patch_drop.keep = keep
        assert selected_tokens(model, 224) == kept
        assert round(100 * (1 - live.macs(196, 1, kept) / dense), 2) == saved
    facts = live_facts(model, 224, shapes, masks, {})
    assert (facts["macs"], facts["dense_macs"]) == (live.macs(196, 1, 138), dense)


def test_zeroed_tokens_cost_what_they_did():
    model = insert_selector(vit(), 0.5, "mask")
    assert selected_tokens(model, 32) is None
    assert selected_tokens(vit(), 32) is None
    assert module_macs(model, 32) == 1_942_400


def test_the_plan_has_a_lower_price():
    section = {
        "run": {"epochs": 10},
        "model": {"name": "deit_small_patch16_224", "num_classes": 1000},
        "data": {"samples": 100_000, "resolution": 224},
        "methods": {"svite_tokens": {"keep": 0.7}},
    }
    loaded = load_config({"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64, "efftrain": section})
    plan = make_plan(loaded, world=8)
    (stage,) = plan.stages
    patch, few, all_ = 196 * 768 * 384, *(12 * (12 * k * 384**2 + 2 * k * k * 384) for k in (138, 197))
    assert stage.factor == pytest.approx((patch + few) / (patch + all_))
    assert stage.work == round(stage.macs * stage.factor)


# -- model ---------------------------------------------------------------------------------------------------------


def test_the_scorer_is_dense_and_decays_like_other_matrices():
    plain = maskable(vit())
    made, _ = method({"keep": 0.5})
    model = made.prepare_model(vit())
    assert maskable(model) == plain
    assert maskable(model, "encoder") == maskable(vit(), "encoder")
    groups = {g["name"]: g["params"] for g in no_weight_decay_groups(model, 0.05)}
    scorer = model.patch_drop.scorer
    assert any(p is scorer.weight for p in groups["decay"])
    assert any(p is scorer.bias for p in groups["no_decay"])
    svite = SViTE(SViTEConfig())
    svite.plan(spec())
    svite.prepare_model(model)
    assert len(masked.masks_of(model)) == 9
    assert type(scorer) is torch.nn.Linear


def test_seeds():
    def weight(config, **plan):
        return method(config, **plan)[0].prepare_model(vit()).patch_drop.scorer.weight

    assert torch.equal(weight({}), weight({"seed": 5}))
    assert not torch.equal(weight({}), weight({}, seed=6))
    assert not torch.equal(weight({}), weight({"seed": 6}))


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        ({}, lambda: torch.nn.Sequential(vit()), ["svite_tokens: Sequential"]),
        ({}, lambda: vit(patch_drop_rate=0.1), ["patch_drop_rate 0"]),
        ({"keep": 0.05}, vit, ["0.05 of 17 tokens"]),
        ({"keep": 0.05, "ramp": {}}, vit, ["0.05 of 17 tokens"]),
    ],
)
def test_models_and_shares_that_do_not_fit(config, model, words):
    with pytest.raises(ModelError) as found:
        method(config)[0].prepare_model(model())
    assert all(word in str(found.value) for word in ["efftrain.methods.svite_tokens", *words]), found.value


def test_all_tokens_for_the_whole_run_is_warned_of():
    with pytest.warns(NoEffectWarning, match="keeps all tokens"):
        method({"keep": 1.0})[0].prepare_model(vit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(RAMP)[0].prepare_model(vit())


def test_a_checkpoints_model_is_built_again():
    made, schedule = method(RAMP)
    original = make_blueprint(vit())
    model = made.prepare_model(vit())
    made.on_stage_enter(context(model, schedule, 700)[0], schedule.stages[-1])
    saved = made.architecture()
    assert saved == {"keep": 0.7, "select": "gather"}
    again, _ = method(RAMP)
    shaped = again.shape_model(copy_blueprint(original), saved)
    assert digest(shaped) == digest(make_blueprint(model))
    rebuilt = insert_selector(vit(), **saved)
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt.eval()(images), model.eval()(images))


# -- run -----------------------------------------------------------------------------------------------------------


def test_stages_set_the_share_and_steps_the_temperature():
    made, schedule = method(RAMP)
    model = made.prepare_model(vit())
    seen = []
    for step in (0, 200, 600, 999):
        ctx, records = context(model, schedule, step)
        made.on_stage_enter(ctx, ctx.stage)
        made.on_step_start(ctx)
        selector = selector_of(model)
        seen.append((selector.keep, round(float(selector.tau), 4), selector.kept(17)))
        ((event, data),) = records
        assert event == "token_selection"
        assert (data["keep"], data["kept"], data["tokens"]) == (selector.keep, selector.kept(17), 17)
        assert data["macs"] == live_macs(model, 32, kept=data["kept"])
        assert (
            made.decision(ctx) == f"keep {selector.keep:g} tau {10 - 9.9 * step / 1000:.9g} noise {1 - step / 1000:.9g}"
        )
    assert seen == [(1.0, 10.0, 17), (0.9, 8.02, 15), (0.7, 4.06, 12), (0.7, 0.1099, 12)]
    assert set(made.scalars(ctx)) == {"tokens/keep", "tokens/tau", "tokens/noise", "tokens/entropy"}


def test_share_after_a_load_a_rebuild_and_in_an_evaluation():
    made, schedule = method(RAMP)
    model = made.prepare_model(vit())
    ctx, _ = context(model, schedule, 700)
    made.on_stage_enter(ctx, ctx.stage)
    state = made.state_dict()
    fresh, _ = method(RAMP)
    other = fresh.prepare_model(vit())
    fresh.load_state_dict(state)
    ctx, _ = context(other, schedule, 700)
    assert selector_of(other).keep == 1.0
    with fresh.on_eval(ctx):
        assert selector_of(other).keep == 0.7
    selector_of(other).keep = 1.0
    fresh.on_rebuilt(ctx)
    assert selector_of(other).keep == 0.7


def test_the_journal_counts_smaller_inputs_and_live_weights():
    made, schedule = method({"keep": 0.5})
    model = made.prepare_model(vit(dynamic_img_size=True))
    shapes = maskable(model)
    counts = exact_counts(shapes, layer_densities(shapes, 0.5))
    masks = {n: random_mask(s, counts[n], mask_rng(0, n)) for n, s in shapes.items()}
    masked.mask_layers(model, masks)
    ctx, records = context(model, schedule)
    ctx.stage = SimpleNamespace(settings={"keep_ratio": 0.5, "bandwidth": 16})
    made.on_stage_enter(ctx, ctx.stage)
    data = records[0][1]
    assert (data["tokens"], data["kept"]) == (5, 3)
    assert data["macs"] == live_macs(model, 16, masks, kept=3) < live_macs(model, 16, masks)
    assert data["dense_macs"] == live_macs(vit(), 16)


def test_a_model_of_one_size_has_its_own_grid():
    made, schedule = method({"keep": 0.5}, resolution=224)  # a user's loop need not say how large its images are
    model = made.prepare_model(vit(img_size=(32, 48)))
    ctx, records = context(model, schedule)
    made.on_stage_enter(ctx, ctx.stage)
    data = records[0][1]
    assert (data["tokens"], data["kept"]) == (25, 13)
    assert data["macs"] == live_macs(model, (4, 6), kept=13) < data["dense_macs"] == live_macs(model, (4, 6))
    shapes = maskable(model)
    facts = live_facts(model, 224, shapes, {}, {})
    assert (facts["macs"], facts["dense_macs"]) == (data["macs"], data["dense_macs"])
    assert grid_of(vit(dynamic_img_size=True), 64) == (8, 8)
    with pytest.raises(ModelError, match="Linear does not say how many patches"):
        grid_of(torch.nn.Linear(2, 2), 64)


def test_dense_macs_are_those_of_the_model_with_all_heads_and_neurons():
    made, schedule = method({"keep": 0.5})
    units = S2ViTE(S2ViTEConfig(heads=0.5, neurons=0.5))
    units.plan(spec())
    model = units.prepare_model(made.prepare_model(vit()))
    ctx, records = context(model, schedule)
    made.on_stage_enter(ctx, ctx.stage)
    data = records[0][1]
    assert data["dense_macs"] == 1_942_400
    assert data["macs"] == live_macs(model, 32, kept=9) < live_macs(model, 32) < 1_942_400
    assert units._facts(ctx)["macs"] == data["macs"]
    assert units._dense_macs == 1_942_400


def test_macs_of_other_methods_follow_the_ramp():
    one, partners = spec(), [SViTE(SViTEConfig()), S2ViTE(S2ViTEConfig(heads=0.5, neurons=0.5))]
    for partner in partners:
        made, schedule = method(RAMP)
        partner.plan(one)
        model = partner.prepare_model(made.prepare_model(vit()))
        seen = []
        for stage in schedule.stages:
            ctx, _ = context(model, schedule, stage.start_step)
            for each in (made, partner):
                each.on_stage_enter(ctx, stage)
            seen.append(partner._facts(ctx)["macs"])
        assert seen == sorted(set(seen), reverse=True), partner.name


def test_without_the_length_of_the_run():
    made, _ = method({})
    model = made.prepare_model(vit())
    with pytest.raises(PlanError, match=r"efftrain\.run\.steps"):
        made.on_step_start(context(model, None)[0])
    constant, _ = method({"tau": {"start": 1.0, "end": 1.0}, "noise": {"end": 1.0}})
    constant.prepare_model(model := vit())
    constant.on_step_start(context(model, None)[0])
    assert float(selector_of(model).tau) == 1


def test_noise_falls_over_the_run():
    config = SViTETokensConfig.model_validate({})
    assert [config.noise_at(step, 100) for step in (0, 50, 100)] == [1.0, 0.5, 0.0]
    reference = SViTETokensConfig.model_validate({"noise": {"end": 1.0}})
    assert reference.noise_at(77, 100) == 1.0
