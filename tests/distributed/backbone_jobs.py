"""Functions run on the ranks by the tests of the backbones under a curriculum of image sizes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import efftrain_ds
from efftrain_ds.zero import access
from tests.unit.models.tiny_backbones import STRIDES, tiny

STEPS = 2  # a scale that starts at 0 (zero-initialised norms) lets a gradient through from the second step on


def _whole(engine) -> dict[str, torch.Tensor]:
    """The fp32 master of every parameter, by name."""
    layout = access.layout_of(engine.deepspeed_engine)
    tensors, found = layout.tensors("fp32"), {}
    for name, shape in layout.shapes.items():
        whole = torch.zeros(shape.numel())
        for fragment in layout.fragments:
            if fragment.name == name and not (layout.replicated and dist.get_rank() > 0):
                whole[fragment.start : fragment.start + fragment.length] = layout.values(fragment, tensors)
        dist.all_reduce(whole)
        found[name] = whole
    return found


def curriculum(family: str, resolution: int, bandwidths: list[int], stage: int = 1) -> dict:
    """A few steps at every bandwidth; which parameters stood still, and whether the optimizer still has the model's."""
    world, count = dist.get_world_size(), len(bandwidths)
    schedule = [{"until": (i + 1) / count, "bandwidth": b} for i, b in enumerate(bandwidths[:-1])]
    config = {
        "train_batch_size": 2 * world,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-30, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "efftrain": {
            "run": {"steps": STEPS * count},
            "data": {"resolution": resolution, "stride": STRIDES.get(family, 32)},
            "methods": {
                "efficienttrain": {
                    "schedule": [*schedule, {"until": 1.0, "bandwidth": bandwidths[-1]}],
                    "pacing": "samples",
                }
            },
            "model": {"ema": {"decay": 0.5}},
        },
    }
    torch.manual_seed(0)
    model = tiny(family, resolution)
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    ids = {name: id(p) for name, p in engine.module.named_parameters()}
    sides: list[int] = []
    handle = engine.module.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[-1]))
    generator = torch.Generator().manual_seed(dist.get_rank())
    still, losses, before = {}, [], _whole(engine)
    for step in range(STEPS * count):
        images = torch.randn(2, 3, resolution, resolution, generator=generator)
        labels = torch.randint(0, 5, (2,), generator=generator)
        loss = nn.functional.cross_entropy(engine(images).float(), labels)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        if step % STEPS == STEPS - 1:
            after = _whole(engine)
            still[sides[-1]] = sorted(n for n in after if torch.equal(after[n], before[n]))
            before = after
    engine.eval()
    with torch.no_grad():
        out = engine(torch.randn(2, 3, resolution, resolution, generator=generator))
    handle.remove()
    optimizer = engine.optimizer
    groups = optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups  # as ZeRO partitioned them at the start
    held = {id(p) for group in groups for p in group}
    result = {
        "sides": sides,
        "still": still,
        "losses": losses,
        "shape": tuple(out.shape),
        "same_parameters": {name: id(p) for name, p in engine.module.named_parameters()} == ids,
        "same_in_optimizer": held == set(ids.values()),
        "names": len(before),
        "expected": len(ids),
    }
    engine.destroy()
    return result


def trapped(resolution: int, other: int) -> dict:
    """The trap itself: timm's own change of size leaves the optimizer with tensors that the model no longer uses."""
    from timm import create_model

    from tests.unit.models.tiny_backbones import TINY

    name, kwargs = TINY["swin"]
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, img_size=resolution, **{**kwargs, "window_size": resolution // 32})
    config = {
        "train_batch_size": 2 * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.module.set_input_size((other, other))
    held = {id(p) for group in engine.optimizer.bit16_groups for p in group}
    lost = [n for n, p in engine.module.named_parameters() if id(p) not in held]
    engine.destroy()
    return {"lost": lost}
