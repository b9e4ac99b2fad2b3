import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from efftrain_ds.cli.main import main
from efftrain_ds.config.loader import LoadedConfig, load_config
from efftrain_ds.core.errors import ConfigError, ModelError, PlanError
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method, unregister_method
from efftrain_ds.core.strict import StrictModel
from efftrain_ds.core.timeline import PlanSpec, Segment, Stage, Timeline
from efftrain_ds.cost.macs import vit_macs
from efftrain_ds.cost.throughput import Measured, Throughput, load_throughput
from efftrain_ds.data.manifest import Manifest, Shard
from efftrain_ds.observe.meters import StepMeter
from efftrain_ds.planning import data_facts, make_plan, measured_throughput, outcomes, plan_spec, time_left


class HalfConfig(StrictModel):
    """Side of the first half."""

    side: int = 16


class HalfSize(Method):
    """Half of the budget at a smaller side."""

    name: ClassVar[str] = "half_size"
    Config: ClassVar[type[StrictModel]] = HalfConfig
    phase: ClassVar[str] = "data"

    def plan(self, spec: PlanSpec) -> Timeline:
        """Two segments."""
        if self.config.side % spec.stride:
            raise PlanError(f"efftrain.methods.half_size.side: {self.config.side} is not a multiple of {spec.stride}")
        pace = (self.config.side / spec.resolution) ** 2
        low = Segment(0.0, 0.5, {"bandwidth": self.config.side}, pace=pace, micro_scale=1 / pace)
        return Timeline((low, Segment(0.5, 1.0, {"bandwidth": spec.resolution})), "compute")

    def describe(self, stage: Stage) -> str:
        """Side of the stage."""
        return f"B{stage.settings['bandwidth']}"


@pytest.fixture(autouse=True)
def _half_size() -> Any:
    register_method(HalfSize)
    yield
    unregister_method("half_size")


SMALL_VIT = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}


def document(**efftrain: Any) -> dict[str, Any]:
    section = {
        "schema": 1,
        "run": {"epochs": 2},
        "model": {"name": "vit_tiny_patch16_224", "kwargs": SMALL_VIT},
        "data": {"train": "bundled:fashion_mnist/train", "resolution": 32},
        "methods": {"half_size": {}},
    }
    return {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "efftrain": {**section, **efftrain},
    }


def load(**efftrain: Any) -> LoadedConfig:
    return load_config(document(**efftrain))


def test_plan_of_a_file() -> None:
    plan = make_plan(load(), world=2)
    small, full = (vit_macs(b, patch=4, dim=64, depth=2, num_classes=10) for b in (16, 32))
    assert [s.macs for s in plan.stages] == [small, full]
    assert plan.full_macs == full
    assert plan.schedule.spec.stride == 4
    assert plan.schedule.spec.samples == 6000
    assert [s.stage.steps for s in plan.stages] == [375, 94]  # 0.5 x 2 x 6000 / 64 at a pace of 1/4 and 1
    assert [(s.stage.micro_batch, s.stage.accumulation) for s in plan.stages] == [(32, 1), (8, 4)]
    assert plan.relative == pytest.approx((375 * small + 94 * full) * 64 / (2 * 6000 * full), rel=1e-12)
    assert plan.methods == (("half_size", "B16 -> B32 in 2 stages"),)
    assert (plan.precision, plan.zero_stage) == ("fp32", 1)
    assert plan.stages[0].memory.activations > 0


def test_the_plan_of_a_built_model_is_that_of_the_closed_form() -> None:
    kwargs = {**SMALL_VIT, "qkv_bias": True}  # not in the closed form, so the model is built on the meta device
    built = make_plan(load(model={"name": "vit_tiny_patch16_224", "kwargs": kwargs}), world=2)
    closed = make_plan(load(), world=2)
    assert [s.macs for s in built.stages] == [s.macs for s in closed.stages]
    assert built.params == closed.params
    assert built.relative == closed.relative


def test_conv_net_and_a_model_of_one_size() -> None:
    data = {"train": "bundled:fashion_mnist/train", "resolution": 64}
    methods = {"half_size": {"side": 32}}
    plan = make_plan(load(model={"name": "resnet18"}, data=data, methods=methods), world=1)
    assert plan.stages[0].macs / plan.full_macs == pytest.approx(0.25, rel=0.01)
    with pytest.raises(ModelError, match=r"efftrain\.model\.name: .*one size|efftrain\.model\.name: .*one image size"):
        make_plan(load(model={"name": "swinv2_tiny_window8_256"}, data=data, methods=methods), world=1)


def write_manifest(folder: Path, samples: int) -> None:
    folder.mkdir()
    Manifest(folder, "train", ("a", "b", "c"), (Shard("0.tar", 1, "0" * 64, samples),), samples, "0").write()


def test_where_samples_and_classes_come_from(tmp_path: Path) -> None:
    write_manifest(tmp_path / "shards", 500)
    there = {"train": str(tmp_path / "shards"), "resolution": 32}
    away = {"train": str(tmp_path / "none"), "resolution": 32}
    facts = data_facts(load(data=there))
    assert (facts.samples, facts.num_classes) == (500, 3)
    assert data_facts(load(data=there), samples=77).samples == 77
    assert data_facts(load(data={**away, "samples": 900})).samples == 900
    assert data_facts(load()).num_classes == 10
    with pytest.raises(PlanError, match=r"efftrain\.data\.samples: not given"):
        data_facts(load(data=away))
    with pytest.raises(PlanError, match=r"efftrain\.data\.samples is 900, but .* holds 500"):
        data_facts(load(data={**there, "samples": 900}))
    assert data_facts(load(data=away, run={"steps": 10})).samples == 0
    with pytest.raises(PlanError, match=r"efftrain\.model\.num_classes"):
        make_plan(load(data={**away, "samples": 900}), world=1)


def test_refusals_name_the_key() -> None:
    with pytest.raises(PlanError, match='efftrain.run: give "epochs" or "steps"'):
        make_plan(load(run={}), world=2)
    with pytest.raises(PlanError, match=r"efftrain\.model\.name"):
        make_plan(load(model={"num_classes": 10}), world=2)
    with pytest.raises(PlanError, match=r"half_size\.side: 18"):
        make_plan(load(methods={"half_size": {"side": 18}}), world=2)
    with pytest.raises(ConfigError, match="train_batch_size"):
        make_plan(load(), world=7)


def test_what_the_methods_may_know() -> None:
    spec = plan_spec(load(run={"steps": 100}, model={}, data={"resolution": 32}), world=2, samples=0, stride=4)
    assert (spec.steps, spec.samples, spec.batch, spec.micro_batch, spec.world) == (100, 0, 64, 8, 2)
    assert (spec.resolution, spec.stride, spec.model) == (32, 4, "")
    assert plan_spec(load(), world=2, samples=6000).stride == 4


def test_precision_ema_and_offload() -> None:
    raw = document(model={"name": "vit_tiny_patch16_224", "kwargs": SMALL_VIT, "ema": {}})
    raw |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    plan = make_plan(load_config(raw), world=2)
    memory = plan.stages[0].memory
    assert (plan.precision, plan.zero_stage) == ("bf16", 2)
    assert memory.parameters == 2 * plan.params
    assert (memory.master, memory.moments) == (0, 0)
    assert memory.ema == 4 * ((plan.params + 1) // 2)


def test_time_left_and_outcomes_from_a_meter() -> None:
    plan = make_plan(load(), world=2)
    now = [0.0]
    meter = StepMeter(clock=lambda: now[0])
    assert time_left(plan, 0, meter) is None

    def steps(stage: int, count: int, seconds: float) -> None:
        for _ in range(count):
            meter.begin()
            now[0] += seconds
            meter.end(stage, 32)

    steps(0, 100, 0.5)
    small, full = plan.stages
    per_cost = 0.5 / (small.share / 375)
    assert time_left(plan, 100, meter) == pytest.approx((small.share * 275 / 375 + full.share) * per_cost)
    steps(0, 275, 0.5)
    assert time_left(plan, 375, meter) == pytest.approx(full.share * per_cost)  # nothing timed at the new side yet
    steps(1, 4, 3.0)
    assert time_left(plan, 379, meter) == pytest.approx(90 * 3.0)
    rows = outcomes(plan, meter)
    assert [(r.steps, r.seconds) for r in rows] == [(375, pytest.approx(187.5)), (4, pytest.approx(12.0))]
    profile = measured_throughput(plan, meter)
    assert [(e.bandwidth, e.micro_batch, e.accumulation, e.seconds, e.n) for e in profile.entries] == [
        (16, 32, 1, pytest.approx(0.5), 256),
        (32, 8, 4, pytest.approx(3.0), 4),
    ]
    again = make_plan(load(), world=2, throughput=profile)
    assert again.seconds == pytest.approx(375 * 0.5 + 94 * 3.0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(document()))
    profile = Throughput(
        "CPU", "2", 2, "vit_tiny_patch16_224 fp32 zero1", "2026-01-02", (Measured(16, 32, 1, 9, 1.0, 5),)
    )
    profile.save(tmp_path / "profile.json")
    assert load_throughput(tmp_path / "profile.json") == profile
    arguments = ["plan", str(path), "--world", "2"]
    assert main([*arguments, "--png", str(tmp_path / "plan.png"), "--throughput", str(tmp_path / "profile.json")]) == 0
    out = capsys.readouterr().out
    assert "B16" in out
    assert "measured 2026-01-02 on CPU, 2 ranks" in out
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert main([*arguments, "--json", "--set", "efftrain.run.epochs=4"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == 4
    assert main([*arguments, "--set", "efftrain.methods.half_size.side=18"]) == 3
    assert "half_size.side" in capsys.readouterr().err
    assert main(["plan", str(path), "--world", "7"]) == 2
