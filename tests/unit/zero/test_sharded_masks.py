"""Zeros in the state of one engine that is no more than a plain optimizer; ranks and stages are in distributed/."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from efftrain_ds.core.errors import EffTrainError
from efftrain_ds.zero import masks as masks_module
from efftrain_ds.zero.access import layout_of
from efftrain_ds.zero.ema import ShardedEma
from efftrain_ds.zero.masks import ShardedMasks
from efftrain_ds.zero.skip import loss_scale


def engine_of(optimizer: str = "AdamW", steps: int = 2) -> SimpleNamespace:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[1].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    made = getattr(torch.optim, optimizer)(trained, lr=0.1, **({"momentum": 0.9} if optimizer == "SGD" else {}))
    for _ in range(steps):
        made.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        made.step()
    return SimpleNamespace(module=model, optimizer=made, device="cpu", zero_optimization_stage=lambda: 0)


def everything(engine: SimpleNamespace, ema: ShardedEma | None = None) -> dict[str, torch.Tensor]:
    found = {f"weight/{n}": p.detach().clone() for n, p in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value.clone()
    if ema is not None:
        names = [f.name for f in ema.layout.fragments]
        found |= {f"ema/{n}": t.clone() for n, t in zip(names, ema.shadow, strict=True)}
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
def test_exactly_the_entries_are_written(optimizer):
    engine = engine_of(optimizer)
    ema = ShardedEma(layout_of(engine), 0.9)
    entries = {"0.weight": torch.rand(7, 5) < 0.5, "1.bias": torch.tensor([True, False, True])}
    before = everything(engine, ema)
    ShardedMasks(engine, ema).zero_(entries)
    after = everything(engine, ema)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for name, value in before.items():
        chosen = entries.get(name.split("/")[1])
        want = value.masked_fill(chosen, 0.0) if chosen is not None and value.shape == chosen.shape else value
        assert torch.equal(after[name], want), name
    assert "weight/1.bias" in changed, "a frozen parameter has only its working weight"
    assert {n.split("/")[0] for n in changed} >= {"weight", "ema"}
    assert len({n.split("/")[0] for n in changed}) > 2, "no optimizer state was written"


def test_nothing_is_created_before_the_first_step():
    engine = engine_of(steps=0)
    ShardedMasks(engine).apply({"0.weight": torch.zeros(7, 5, dtype=torch.bool)})
    assert engine.optimizer.state == {}
    assert engine.module[0].weight.count_nonzero() == 0


def test_apply_without_moments_and_strays():
    engine = engine_of()
    sharded, mask = ShardedMasks(engine), torch.rand(7, 5) < 0.5
    moments = engine.optimizer.state[engine.module[0].weight]["exp_avg"].clone()
    outside = int((~mask).sum())
    assert sharded.strays({"0.weight": mask}) == {"0.weight": 3 * outside}
    sharded.apply({"0.weight": mask}, moments=False)
    assert torch.equal(engine.optimizer.state[engine.module[0].weight]["exp_avg"], moments)
    assert sharded.strays({"0.weight": mask}) == {"0.weight": 2 * outside}
    assert sharded.strays({"0.weight": mask}, moments=False) == {}
    assert not mask.all()


def test_magnitudes_are_copies_in_several_buckets(monkeypatch):
    monkeypatch.setattr(masks_module, "BUCKET_ELEMENTS", 30)
    engine = engine_of()
    names = ["1.bias", "1.weight", "0.bias", "0.weight"]
    found = ShardedMasks(engine).magnitudes(names)
    assert list(found) == names
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, engine.module.get_parameter(name))
        value.zero_()
        assert engine.module.get_parameter(name).count_nonzero() > 0


def test_the_proxy_is_followed():
    first, second = engine_of(), engine_of()
    proxy = SimpleNamespace(deepspeed_engine=first, ema=None)
    sharded = ShardedMasks(proxy)
    proxy.deepspeed_engine, proxy.ema = second, ShardedEma(layout_of(second), 0.9)
    sharded.apply({"1.weight": torch.zeros(3, 7, dtype=torch.bool)})
    assert first.module[1].weight.count_nonzero() == 21
    assert second.module[1].weight.count_nonzero() == 0
    assert sum(int(t.count_nonzero()) for t in proxy.ema.shadow) == 5 * 7 + 7


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"2.weight": torch.ones(1, dtype=torch.bool)}, "no parameter 2.weight"),
        ({"0.weight": torch.ones(5, 7, dtype=torch.bool)}, r"0.weight has shape \[7, 5\]"),
        ({"0.weight": torch.ones(7, 5)}, "torch.float32"),
    ],
)
def test_refusals_write_nothing(entries, text):
    engine = engine_of()
    before = everything(engine)
    with pytest.raises(EffTrainError, match=text):
        ShardedMasks(engine).zero_({"0.bias": torch.ones(7, dtype=torch.bool), **entries})
    assert all(torch.equal(before[n], v) for n, v in everything(engine).items())
    with pytest.raises(EffTrainError, match="no parameter x"):
        ShardedMasks(engine).magnitudes(["x"])


def test_refused_while_the_average_is_swapped_in():
    engine = engine_of()
    ema = ShardedEma(layout_of(engine), 0.9)
    with ema.swap(), pytest.raises(EffTrainError, match="swapped in"):
        ShardedMasks(engine, ema).zero_({"0.bias": torch.ones(7, dtype=torch.bool)})


def test_loss_scale():
    def of(**optimizer):
        return loss_scale(SimpleNamespace(optimizer=SimpleNamespace(**optimizer)))

    assert of() == 1.0
    assert of(loss_scaler=SimpleNamespace(cur_scale=4.0), custom_loss_scaler=False) == 4.0
    assert of(loss_scaler=SimpleNamespace(cur_scale=4.0), custom_loss_scaler=True, external_loss_scale=2.0) == 2.0
    assert of(loss_scale_config=SimpleNamespace(cur_scale=4.0)) == 1.0  # stage 0 does not scale
    assert of(torch_autocast_gradscaler=SimpleNamespace(get_scale=lambda: 8.0)) == 8.0
    proxy = SimpleNamespace(deepspeed_engine=SimpleNamespace(optimizer=SimpleNamespace()))
    assert loss_scale(proxy) == 1.0


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("moments", [True, False])
def test_values_are_written_beside_zero_moments(optimizer, moments):
    engine = engine_of(optimizer)
    ema = ShardedEma(layout_of(engine), 0.9)
    entries = {
        "0.weight": (torch.rand(7, 5) < 0.5, torch.randn(7, 5)),
        "1.bias": (torch.tensor([True, False, True]), torch.randn(3)),
        "0.bias": (torch.rand(7) < 0.5, 0.25),
    }
    before = everything(engine, ema)
    ShardedMasks(engine, ema).write_(entries, moments)
    state = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    kinds = set()
    for full, value in everything(engine, ema).items():
        kind, name = full.split("/")
        want = before[full]
        if name in entries and value.shape == entries[name][0].shape:
            chosen, values = entries[name]
            if kind not in state:
                want = torch.where(chosen, values, want)
            elif moments:
                want = want.masked_fill(chosen, 0.0)
            kinds.add(kind)
        assert torch.equal(value, want), full
    assert kinds >= {"weight", "ema"}
    assert kinds & state


def test_values_of_another_shape_are_refused():
    engine = engine_of()
    before = everything(engine)
    chosen = torch.ones(7, 5, dtype=torch.bool)
    with pytest.raises(EffTrainError, match=r"0.weight has shape \[7, 5\]; values of shape \[5\]"):
        ShardedMasks(engine).write_({"0.bias": (chosen[:, 0], 1.0), "0.weight": (chosen, torch.ones(5))})
    assert all(torch.equal(before[n], v) for n, v in everything(engine).items())


def test_a_rank_with_nothing_but_padding_writes_nothing(monkeypatch):
    # 460 entries on 32 ranks of 15: the last rank would begin at 465
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_id = 0
    monkeypatch.setattr(masks_module.access, "partition", lambda p: (465, torch.zeros(0)))
    masks_module._write_working(parameter, torch.ones(460, dtype=torch.bool), torch.ones(460))
