"""Parameter groups by name through changes of the model, and schedulers that keep a list per group."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.zero import request as rq
from efftrain_ds.zero.bundle import regrouped, restore_buffers
from efftrain_ds.zero.groups import GroupPlan


def _model(blocks: int = 2) -> nn.Module:
    model = nn.Module()
    model.embed = nn.Linear(3, 4)
    model.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(blocks)])
    return model


def _plan(model: nn.Module) -> GroupPlan:
    rows = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    given = [
        {"params": rows, "name": "decay", "weight_decay": 0.1},
        {"params": rest, "name": "plain", "weight_decay": 0.0},
    ]
    return GroupPlan.of(model, given).first(model)


def test_first_groups_are_the_users():
    model = _model()
    plan = _plan(model)
    assert list(plan.members) == ["decay", "plain"]
    assert plan.members["decay"] == ("embed.weight", "blocks.0.weight", "blocks.1.weight")
    groups = plan.for_optimizer(model)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [("decay", 0.1, 3), ("plain", 0.0, 3)]


def test_newcomers_get_groups_of_their_own():
    plan = _plan(_model())
    grown = plan.changed(_model(3), {"blocks.2.weight": None, "blocks.2.bias": None}, {"blocks.2.weight": True}, step=7)
    assert grown.members["decay@7"] == ("blocks.2.weight",)
    assert grown.members["plain@7"] == ("blocks.2.bias",)  # by the names of its kind, though nothing is said of it
    assert list(grown.members) == ["decay", "plain", "decay@7", "plain@7"]
    assert grown.parents()["plain@7"] == "plain"
    assert [g["weight_decay"] for g in grown.for_optimizer(_model(3))] == [0.1, 0.0, 0.1, 0.0]
    moved = grown.changed(
        _model(3), {"blocks.0.weight": "blocks.2.weight", "blocks.2.weight": "blocks.0.weight"}, {}, step=9
    )
    assert moved.members["decay@7"] == ("blocks.0.weight",)
    assert "blocks.2.weight" in moved.members["decay"]


def test_a_clone_with_its_history_joins_its_source():
    plan = _plan(_model())
    sources = {"blocks.2.weight": "blocks.1.weight", "blocks.2.bias": "blocks.1.bias"}
    grown = plan.changed(_model(3), sources, {}, step=7)
    assert list(grown.members) == ["decay", "plain"]
    assert "blocks.2.weight" in grown.members["decay"]


def test_unfreezing_and_step_zero():
    model = _model()
    plan = _plan(model)
    model.embed.weight.requires_grad_(False)
    frozen = plan.changed(model, {}, {}, step=3)
    assert "embed.weight" not in frozen.members["decay"]
    model.embed.weight.requires_grad_(True)
    assert frozen.changed(model, {}, {}, step=5).members["decay@5"] == ("embed.weight",)
    assert frozen.changed(model, {}, {}, step=0).members["decay"][0] == "embed.weight"


def test_plain_form_goes_round():
    plan = _plan(_model())
    grown = plan.changed(_model(3), {}, {"blocks.2.weight": True, "blocks.2.bias": True}, step=7)
    assert plan.with_members(grown.to_plain()).members == grown.members


def test_wrong_groups():
    model = _model()
    two = [{"params": [model.embed.weight], "name": "a"}, {"params": [model.embed.bias], "name": "a"}]
    with pytest.raises(ModelError, match='two groups have the name "a"'):
        GroupPlan.of(model, two)
    with pytest.raises(ModelError, match='must not contain "@"'):
        GroupPlan.of(model, [{"params": [model.embed.weight], "name": "a@3"}])
    with pytest.raises(ModelError, match="not in the model"):
        GroupPlan.of(model, [{"params": [nn.Parameter(torch.zeros(1))]}])


def _scheduler(groups: int):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(parameters)])
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])


@pytest.mark.parametrize(("old", "rows"), [(1, [0, 0]), (2, [0, 1, 1]), (2, [1])])
def test_schedulers_with_lists_per_group(old, rows):
    optimizer, scheduler = _scheduler(old)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    lr = scheduler.get_last_lr()
    _, fresh = _scheduler(len(rows))
    state = regrouped(copy.deepcopy(scheduler.state_dict()), fresh.state_dict(), old, rows)
    assert state["_milestones"] == [4]
    fresh.load_state_dict(state)
    assert fresh.get_last_lr() == [lr[row] for row in rows]
    assert [s.base_lrs for s in fresh._schedulers] == [[0.1 * (row + 1) for row in rows]] * 2


def test_buffers_follow_their_maps():
    module = nn.Module()
    for name in ("same", "moved", "wide", "own"):
        module.register_buffer(name, torch.full((3,), -1.0))
    module.register_buffer("count", torch.tensor(0))
    old = {
        "same": torch.tensor([1.0, 2.0, 3.0]),
        "other": torch.tensor([4.0, 5.0, 6.0]),
        "wide": torch.tensor([7.0, 8.0]),
        "count": torch.tensor(2**40),
    }
    maps = {"moved": rq.copy("other"), "wide": rq.gather("wide", {0: [1, 0, 1]}), "own": rq.zeros()}
    restore_buffers(module, old, maps)
    assert module.same.tolist() == [1, 2, 3]
    assert module.moved.tolist() == [4, 5, 6]
    assert module.wide.tolist() == [8, 7, 8]
    assert module.own.tolist() == [-1, -1, -1]  # what the surgery made
    assert module.count.item() == 2**40
