"""Functions run on the ranks by the trainer and engine tests."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import unregister_method
from efftrain_ds.core.strict import StrictModel
from efftrain_ds.core.timeline import Segment, Timeline
from efftrain_ds.trainer import Trainer
from efftrain_ds.zero import access


def run_config(output: str, stage: int = 1, **changes) -> dict:
    """A tiny run on the bundled images; `changes` are dotted paths with "/" for the dots."""
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 24 // dist.get_world_size() // 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "efftrain": {
            "run": {"steps": 20, "output": output},
            "model": {
                "name": "vit_tiny_patch16_224",
                "drop_path": 0.1,
                "kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
                "ema": {"decay": 0.9},
            },
            "data": {
                "train": "bundled:fashion_mnist/train",
                "resolution": 28,
                "workers": 0,
                "mean": [0.3] * 3,
                "std": [0.3] * 3,
            },
            "methods": {"efficienttrain": {"schedule": "et++"}},
            "checkpoint": {"every": "1st", "keep": 100},
            "observe": {"tensorboard": False, "images_every": None, "log_every": 4},
        },
    }
    for path, value in changes.items():
        node = config
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        if value is ...:
            node.pop(last, None)
        else:
            node[last] = value
    return config


class Stop(Exception):
    """Ends a run in the middle, as a crash would."""


class Recording(Trainer):
    """Keeps every loss and the sample ids; stops after a given step."""

    def __init__(self, config, stop: int | None = None, **kwargs):
        super().__init__(config, **kwargs)
        self.stop, self.losses, self.sides = stop, [], []
        self._of_engine = None

    def _train_step(self, batches):
        if not self._of_engine:  # the loss may be a method's own
            self._of_engine = self.engine.loss
            self.engine.loss = self._recorded
        super()._train_step(batches)

    def _recorded(self, logits, batch, default):
        loss = self._of_engine(logits, batch, default)
        self.losses.append((self.engine.step_index, float(loss.detach()), batch.ids.tolist()))
        self.sides.append((self.engine.step_index, batch.images.shape[-1], len(batch)))
        return loss

    def _after_step(self, done, stage):
        super()._after_step(done, stage)
        if done == self.stop:
            raise Stop


def go(config: dict, stop: int | None = None) -> tuple[Recording, str]:
    """Run quietly; returns the trainer and what the screen showed."""
    screen = io.StringIO()
    trainer = Recording(load_config(config, world=dist.get_world_size()), stop)
    trainer.console._stream = screen
    with contextlib.suppress(Stop):
        trainer.run()
    return trainer, screen.getvalue()


def final_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = dict(trainer.engine.module.named_parameters())
    with access.gather_full(list(named.values())):
        return {n: p.detach().float().clone() for n, p in named.items()}


def average_of(trainer: Trainer) -> list[torch.Tensor]:
    """This rank's parts of the average; what ZeRO-3 pads parameters with is left out, it is never set."""
    engine = trainer.engine
    parts = access.layout_of(engine.deepspeed_engine).fragments
    return [engine.ema.shadow[p.flat][p.offset : p.offset + p.length].clone() for p in parts]


def resume_run(folder: str, stage: int, stops: list[int], changes: dict | None = None) -> dict:
    """Uninterrupted run against runs stopped at each of `stops` and resumed."""
    changes = changes or {}
    whole, screen = go(run_config(f"{folder}/whole", stage, **changes))
    expected, reference = whole.losses, final_weights(whole)
    averages = average_of(whole)
    problems = []
    for stop in stops:
        config = run_config(f"{folder}/stop{stop}", stage, **changes)
        first, _ = go(config, stop)
        second, text = go(config)
        if first.losses + second.losses != expected:
            problems.append(f"stop {stop}: losses or samples differ")
        weights = final_weights(second)
        problems += [f"stop {stop}: {n} differs" for n in reference if not torch.equal(weights[n], reference[n])]
        if not all(torch.equal(a, b) for a, b in zip(average_of(second), averages, strict=True)):
            problems.append(f"stop {stop}: average differs")
        if dist.get_rank() == 0 and f"resumed from step-{stop:08d}" not in text:
            problems.append(f"stop {stop}: the screen does not say it was resumed")
        for trainer in (first, second):
            trainer.engine.destroy()
    whole.engine.destroy()
    assert expected
    return {"problems": problems, "steps": len({s for s, *_ in expected}), "sides": whole.sides, "screen": screen}


def loss_of_run(folder: str, stage: int, changes: dict) -> dict:
    trainer, screen = go(run_config(folder, stage, **changes))
    result = {
        "losses": [loss for _, loss, _ in trainer.losses],
        "results": trainer.results,
        "screen": screen,
        "bad": trainer.run_parts.loader.bad_samples,
        "ids": [i for *_, ids in trainer.losses for i in ids],
    }
    trainer.engine.destroy()
    return result


def measured_run(folder: str) -> dict:
    """Time a few steps of every kind of stage, then plan and run with the profile."""
    config = load_config(run_config(folder), world=dist.get_world_size())
    measuring = Trainer(config, measure_steps=3)
    measuring.console._stream = io.StringIO()
    measuring.run()
    stages = len(measuring.schedule.stages)
    trainer, screen = go(run_config(folder))
    for one in (measuring, trainer):
        one.engine.destroy()
    return {
        "stages": stages,
        "steps": measuring.schedule.total_steps,
        "predicted": trainer.plan.seconds,
        "screen": screen,
    }


def error_of_run(folder: str, changes: dict) -> tuple[str, str, int]:
    """(class, text, exit code) of the error that a run ends with."""
    try:
        trainer, _ = go(run_config(folder, 1, **changes))
        trainer.engine.destroy()
    except EffTrainError as error:
        return type(error).__name__, str(error), error.exit_code
    return "", "", 0


def run_example(script: str, config: dict, steps: int) -> list[float]:
    """Run an example script in this process; returns the losses it printed on rank 0."""
    path = Path(f"/tmp/efftrain-example-{dist.get_rank()}-{id(config)}.json")
    path.write_text(json.dumps(config))
    argv, sys.argv = sys.argv, [script, "--deepspeed_config", str(path), "--steps", str(steps)]
    screen = io.StringIO()
    try:
        with contextlib.redirect_stdout(screen):
            space = runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = argv
        path.unlink()
    engine = space["engine"]
    schedule = getattr(engine, "schedule", None)
    engine.destroy()
    lines = [line.split() for line in screen.getvalue().splitlines() if line.startswith("step ")]
    return [float(words[3]) for words in lines], schedule.total_steps if schedule is not None else None


class ProbeConfig(StrictModel):
    """Configuration of the probe."""

    shift: float = 0.0


class Probe(Method):
    """A method from outside the package: logs every event and has two stages."""

    name = "probe"
    Config = ProbeConfig
    phase = "weight"
    changes_inputs = True
    log: list = []

    def plan(self, spec):
        return Timeline((Segment(0.0, 0.5, {"probe": 1}), Segment(0.5, 1.0, {"probe": 2})))

    def prepare_model(self, model):
        self.log.append("prepare")
        return model

    def on_stage_enter(self, ctx, stage):
        self.log.append(f"stage {stage.settings['probe']}")

    def on_step_start(self, ctx):
        self.log.append(f"start {ctx.step}")

    def on_batch(self, ctx, batch):
        self.log.append("batch")
        batch.images = batch.images + self.config.shift
        return batch

    def loss_term(self, ctx, outputs, batch):
        return outputs.sum() * 0 + 1.0

    def on_boundary(self, ctx):
        self.log.append("boundary")

    def on_step_end(self, ctx, applied):
        self.log.append(f"end {applied}")

    @contextlib.contextmanager
    def on_eval(self, ctx):
        self.log.append("eval in")
        yield
        self.log.append("eval out")

    def state_dict(self):
        return {"count": len(self.log), "t": torch.ones(2)}

    def load_state_dict(self, state):
        self.log.append(f"loaded {state['count']} {state['t'].tolist()}")


def _embedded(methods: dict, steps: int = 4, **extra):
    config = {
        "train_batch_size": 8 * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "efftrain": {"run": {"steps": steps}, "data": {"stride": 1}, "methods": methods},
        **extra,
    }
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config)


def event_order(folder: str) -> dict:
    """Events of a method registered from outside, in embedded use with accumulation 2."""
    Probe.log = []
    efftrain_ds.register_method(Probe)
    try:
        engine, *_ = _embedded({"probe": {"shift": 1.0}}, steps=4)
        x = torch.zeros(4, 3)
        seen = []
        handle = engine.module.register_forward_pre_hook(lambda m, inputs: seen.append(float(inputs[0].mean())))
        for _ in range(3):
            for _ in range(2):
                engine.backward(engine(x).square().mean())
                engine.step()
        with engine.evaluating():
            engine(x)
        images, labels = engine.prepare_batch(x, torch.ones(4))
        out = engine(images)
        loss = engine.loss(out, labels, default=lambda o, t: o.mean() * 0)
        engine.backward(loss)
        engine.step()
        engine.backward(engine(x).square().mean())
        engine.step()
        log = list(Probe.log)
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        handle.remove()
        result = {
            "log": log,
            "seen": seen,
            "loss": float(loss),
            "loaded": Probe.log[len(log) :],
            "steps": engine.step_index,
            "order": engine.methods[0].phase,
            "labels": labels.tolist(),
        }
        engine.destroy()
        return result
    finally:
        unregister_method("probe")


def proxy_behaviour() -> dict:
    """Forwarding of attributes, calls and settings to the DeepSpeed engine."""
    engine, optimizer, loader, scheduler = _embedded({})
    engine.my_note = 5
    result = {
        "micro": engine.train_micro_batch_size_per_gpu(),
        "note": engine.deepspeed_engine.my_note,
        "optimizer": optimizer is engine.optimizer,
        "nothing": (loader, scheduler),
        "plain": engine._plain,
        "module": type(engine.module).__name__,
        "steps": [],
    }
    for _ in range(4):
        engine.backward(engine(torch.ones(4, 3)).mean())
        engine.step()
        result["steps"].append((engine.step_index, engine.global_steps))
    try:
        getattr(engine, "no_such_thing")  # noqa: B009
    except AttributeError as error:
        result["missing"] = str(error)
    engine.destroy()
    return result


def wrap_job() -> dict:
    import deepspeed

    class Grower(Probe):
        name = "grower"
        changes_parameters = True

    model = nn.Linear(3, 2)
    config = {
        "train_batch_size": 4 * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    plain = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    efftrain_ds.register_method(Probe)
    efftrain_ds.register_method(Grower)
    Probe.log = []
    try:
        section = {"run": {"steps": 2}, "data": {"stride": 1}}
        engine = efftrain_ds.wrap(plain, {"efftrain": {**section, "methods": {"probe": {"shift": 2.0}}}})
        engine.backward(engine(torch.zeros(4, 3)).mean())
        engine.step()
        refused = ""
        try:
            efftrain_ds.wrap(plain, {"efftrain": {**section, "methods": {"grower": {}}}})
        except EffTrainError as error:
            refused = str(error)
        return {"log": list(Probe.log), "refused": refused, "same": engine.deepspeed_engine is plain}
    finally:
        unregister_method("probe")
        unregister_method("grower")
        plain.destroy()


def crop_in_forward() -> dict:
    """Depth 1: an unchanged loop sees the low-frequency crop in training and full images in evaluation."""
    import timm

    config = {
        "train_batch_size": 2 * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "efftrain": {
            "run": {"steps": 10},
            "data": {"resolution": 32},
            "methods": {"efficienttrain": {"schedule": "et++"}},
        },
    }
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_classes=3,
        dynamic_img_size=True,
    )
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    sides = []
    handle = engine.module.register_forward_pre_hook(lambda m, inputs: sides.append(inputs[0].shape[-1]))
    for _ in range(10):
        engine.backward(engine(torch.randn(2, 3, 32, 32)).mean())
        engine.step()
    engine.eval()
    engine(torch.randn(2, 3, 32, 32))
    handle.remove()
    engine.destroy()
    return {"sides": sides}
