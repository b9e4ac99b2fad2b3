"""Attention sparsity: what is refused before training, in a resumed run and at another length, and at what price."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import efftrain_ds
from efftrain_ds.config.loader import load_config
from efftrain_ds.core.context import Context
from efftrain_ds.core.errors import ConfigError, ModelError, PlanError
from efftrain_ds.core.timeline import PlanSpec, Segment, Timeline, merge_timelines
from efftrain_ds.kernels import runtime
from efftrain_ds.methods.svite.attention import SViTEAttention
from efftrain_ds.methods.svite.attention_config import AttentionConfig
from efftrain_ds.methods.svite.attention_masks import FixedMask, Layer
from efftrain_ds.models.attention import masked_attention
from efftrain_ds.planning import make_plan

KEY = "efftrain.methods.svite_attention"


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv(runtime.VARIABLE, "reference")


def spec(**kwargs) -> PlanSpec:
    values = {"seed": 5, "epochs": 0, "samples": 0, "batch": 16, "micro_batch": 8, "world": 2, "resolution": 64}
    return PlanSpec(**{**values, "stride": 4, "steps": 1000, "width": 32, "depth": 2, **kwargs})


def prepared(**config):
    """Method and model, 257 tokens."""
    method = SViTEAttention(AttentionConfig(**config))
    method.plan(spec())
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "depth": 2}
    return method, method.prepare_model(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes))


def halves(one: PlanSpec):
    """Stages with images of 48, 32 and the full size."""
    edges = ((0.0, 0.3, {"bandwidth": 48}), (0.3, 0.6, {"bandwidth": 32}), (0.6, 1.0, {}))
    return merge_timelines([Timeline(tuple(Segment(*edge) for edge in edges))], one)


def test_learned_masks_refuse_evaluations_of_another_size_before_training():
    method = SViTEAttention(AttentionConfig())
    with pytest.raises(
        PlanError, match=rf"efftrain\.data\.eval_resolution: .* 80 have 401 tokens.*257.*{KEY}\.pattern"
    ):
        method.plan(spec(eval_resolution=80))
    for side in (0, 64, 66):
        method.plan(spec(eval_resolution=side))
    SViTEAttention(AttentionConfig(pattern="window")).plan(spec(eval_resolution=80))
    with pytest.raises(PlanError, match=r"eval_resolution 96.*density 0\.1 "):
        SViTEAttention(AttentionConfig(pattern="random", density=0.1)).plan(spec(eval_resolution=96))


def test_the_plan_of_a_file_knows_the_size_of_evaluations_and_the_depth():
    section = {
        "run": {"epochs": 10},
        "model": {"name": "deit_small_patch16_224", "num_classes": 10},
        "data": {"samples": 1000, "resolution": 384, "eval_resolution": 448},
        "methods": {"svite_attention": {"pattern": "window", "exclude": ["blocks.0", "blocks.11.attn", "head"]}},
    }
    loaded = load_config({"train_batch_size": 8, "efftrain": section})
    plan = make_plan(loaded, world=1)
    assert (plan.schedule.spec.eval_resolution, plan.schedule.spec.depth) == (448, 12)
    del section["methods"]["svite_attention"]["exclude"]
    whole = make_plan(load_config({"train_batch_size": 8, "efftrain": section}), world=1)
    assert 1 - plan.stages[0].factor == pytest.approx((1 - whole.stages[0].factor) * 10 / 12)
    section["methods"] = {"svite_attention": {}}
    with pytest.raises(PlanError, match="eval_resolution"):
        make_plan(load_config({"train_batch_size": 8, "efftrain": section}), world=1)


def test_excluded_blocks_save_nothing():
    stage = merge_timelines([], spec()).stages[0]
    one, all_ = (SViTEAttention(AttentionConfig(density=0.6, exclude=e)) for e in (["blocks.1"], []))
    assert 1 - one.cost_factor(spec(), stage) == pytest.approx((1 - all_.cost_factor(spec(), stage)) / 2)
    assert one.cost_factor(spec(depth=0), stage) == 1.0
    assert all_.cost_factor(spec(depth=0), stage) == all_.cost_factor(spec(), stage) < 1


def test_another_length_names_the_method():
    _, model = prepared()
    with pytest.raises(ModelError, match=rf"made for 257 tokens, the input has 65.*{KEY}"):
        model(torch.randn(1, 3, 32, 32))


def test_patterns_that_do_not_fit_a_stage_are_refused_at_the_start():
    config = {"pattern": "random", "density": 0.4, "block": 32, "allow_short": True}
    method, model = prepared(**config)
    schedule = halves(spec())
    assert method.cost_factor(spec(), schedule.stages[2]) < 1
    wrong = rf"{KEY}: stage 1 \(\{{'bandwidth': 32\}}\): attention: density 0\.4 of 3 x 3"
    with pytest.raises(PlanError, match=wrong):
        method.cost_factor(spec(), schedule.stages[1])
    context = Context(engine=SimpleNamespace(module=model), schedule=schedule, seed=5, stage=schedule.stages[0])
    with pytest.raises(PlanError, match=wrong):
        method.on_stage_enter(context, schedule.stages[0])
    with pytest.raises(ModelError, match=rf"{KEY}: blocks\.0\.attn: density"):
        FixedMask(method.config, Layer("blocks.0.attn", 2, 1, 0))(65)


def resumed(saved: dict, now: dict) -> None:
    """First step of a run with `now` on masks of a run with `saved`."""
    (_, old), (method, model) = prepared(**saved), prepared(**now)
    for name, module in masked_attention(model).items():
        module.block_mask.update_(old.get_submodule(name).block_mask.keep.expand_as(module.block_mask.keep))
    one = spec()
    ctx = Context(SimpleNamespace(module=model), merge_timelines([method.plan(one)], one), 5)
    method.load_state_dict({**method.state_dict(), "union": {"x": [[1], torch.ones(1, dtype=torch.uint8)]}})
    method._start(ctx)


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        ({"density": 0.6}, {"density": 0.7}, r"density.*0\.7 is 18 live blocks.*has 15"),
        ({"pattern": "strided"}, {"density": 0.6}, r"\.pattern"),
        ({"pattern": "window", "window": 3}, {"density": 0.6}, r"\.pattern"),
        ({"pattern": "window", "window": 3}, {"pattern": "window", "window": 9}, r"\.pattern.*window 9"),
        ({"pattern": "strided"}, {"pattern": "strided", "stride": 2}, r"\.pattern.*stride 2 and local 1"),
        ({"density": 0.6, "protect": []}, {"density": 0.6}, r"protect: .*prefix"),
        ({"density": 0.6}, {"density": 0.6}, None),
        ({"density": 0.6}, {"density": 0.6, "protect": []}, None),
        ({"pattern": "window"}, {"pattern": "window"}, None),
        ({"pattern": "strided"}, {"pattern": "strided"}, None),
    ],
)
def test_a_resumed_run_has_the_masks_of_its_configuration(saved, now, words):
    if words is None:
        resumed(saved, now)
        return
    with pytest.raises(ConfigError, match=rf"{KEY}.*{words}"):
        resumed(saved, now)


def test_the_methods_import_no_timm():
    root = Path(efftrain_ds.__path__[0])
    names = ("attention", "attention_scores", "masked", "tokens", "unit_probes", "units")
    for path in [*(root / "methods" / "svite").glob("*.py"), *(root / "models" / f"{name}.py" for name in names)]:
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not [n for n in top if "timm" in ast.unparse(n)], path
