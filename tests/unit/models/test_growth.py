import copy

import pytest
import timm
import torch
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.core.rng import torch_rng
from efftrain_ds.models.growth import (
    NO_SOURCE,
    OPERATORS,
    grow_request,
    interpolation,
    new_blocks,
    random_init,
    select_request,
    stacking,
)
from efftrain_ds.models.stacks import depth_of, full_depth, prepare_growth, split_depth, stacks_of, truncate
from tests.unit.models.plain_rebuild import blueprint_of, perturb, rebuild, values_of


def vit(depth=6, keep=None, **more):
    torch.manual_seed(0)
    arguments = {"img_size": 96, "embed_dim": 48, "depth": depth, "num_heads": 3, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **arguments, dynamic_img_size=True, **more)
    model = prepare_growth(model)
    return perturb(truncate(model, keep) if keep else model).eval()


def volo(**more):
    torch.manual_seed(0)
    arguments = {"layers": [2, 2, 2, 2], "embed_dims": [24, 48, 48, 48], "num_heads": [2, 4, 4, 4]}
    model = timm.models.volo.VOLO(**{**arguments, **more}, img_size=64, num_classes=7)
    return perturb(prepare_growth(model)).eval()


def logits(model, side=96):
    with torch.no_grad():
        return model(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5)))


def block(values, name):
    return {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(name + ".")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- index maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "wanted", "added"),
    [
        (3, 4, (0, 1, 2, 2), (3,)),
        (3, 5, (0, 1, 1, 2, 2), (2, 4)),
        (3, 6, (0, 0, 1, 1, 2, 2), (1, 3, 5)),
        (4, 6, (0, 1, 2, 2, 3, 3), (3, 5)),
        (6, 8, (0, 1, 2, 3, 4, 4, 5, 5), (5, 7)),
        (8, 10, (0, 1, 2, 3, 4, 5, 6, 6, 7, 7), (7, 9)),
        (10, 12, (*range(8), 8, 8, 9, 9), (9, 11)),
        (6, 12, tuple(i // 2 for i in range(12)), (1, 3, 5, 7, 9, 11)),
        (5, 12, (0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4), (1, 3, 5, 7, 8, 10, 11)),
        (3, 7, (0, 0, 1, 1, 2, 2, 2), (1, 3, 5, 6)),
    ],
)
def test_interpolation_table(old, new, wanted, added):
    assert interpolation(old, new) == wanted
    assert new_blocks(wanted) == added


def test_interpolation_is_the_formula_of_the_reference():
    for old in range(1, 13):
        for new in range(old, 25):
            times, rest = divmod(new, old)
            formula = []
            for j in range(new):
                i = j * old // (times * old)
                formula.append(i if i < old - rest else (j + old - rest) * old // (times * old + old))
            found = interpolation(old, new)
            assert found == tuple(formula)
            assert new_blocks(found) == tuple(j for j in range(1, new) if found[j] == found[j - 1])
        assert interpolation(old, old) == tuple(range(old))


def test_other_index_maps():
    assert stacking(3, 5) == (0, 1, 2, 0, 1)
    assert new_blocks(stacking(3, 5)) == (3, 4)
    assert random_init(3, 5) == (0, 1, 2, NO_SOURCE, NO_SOURCE)
    assert new_blocks(random_init(3, 5)) == (3, 4)
    for rule in (interpolation, stacking, random_init):
        assert new_blocks(rule(4, 4)) == ()
        with pytest.raises(ModelError, match="4 -> 3"):
            rule(4, 3)
        with pytest.raises(ModelError, match="0 -> 3"):
            rule(0, 3)


# -- stacks --------------------------------------------------------------------------------------------------------


def test_preparing_changes_no_name_and_no_output():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=7)
    model.eval()
    names, out = list(model.state_dict()), logits(model, 32)
    assert prepare_growth(model) is model
    prepare_growth(model)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model, 32), out)
    (stack,) = stacks_of(copy.deepcopy(model))
    assert stack.slots == (("blocks", 0), ("blocks", 1))
    assert stack.names == ("blocks.0", "blocks.1")


def test_truncate_keeps_the_first_blocks():
    model = vit()
    before = values_of(model)
    assert truncate(model, 4) is model
    assert (depth_of(model), full_depth(model)) == (4, 6)
    assert stacks_of(model)[0].names == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    after = values_of(model)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert set(before) - set(after) == {n for n in before if n.startswith(("blocks.4.", "blocks.5."))}
    with pytest.raises(ModelError, match=r"depth 5 .*\[5\].*\[4\]"):
        truncate(model, 5)
    with pytest.raises(ModelError, match="depth 7.*1 to 6"):
        split_depth(model, 7)
    with pytest.raises(ModelError, match="depth 0"):
        truncate(model, 0)


def test_division_of_volo():
    with torch.device("meta"):
        model = prepare_growth(timm.create_model("volo_d1_224"))
    assert [split_depth(model, total) for total in (9, 12, 15, 18)] == [(2, 7), (4, 8), (4, 11), (4, 14)]
    outlookers, transformers = stacks_of(model)
    assert outlookers.names == tuple(f"network.0.{i}" for i in range(4))
    assert transformers.names == (
        *(f"network.2.{i}" for i in range(4)),
        *(f"network.3.{i}" for i in range(8)),
        *(f"network.4.{i}" for i in range(2)),
    )
    truncate(model, 9)
    assert [s.depth for s in stacks_of(model)] == [2, 7]
    assert [len(model.network[i]) for i in (0, 2, 3, 4)] == [2, 4, 3, 0]
    # at full depth the model's own division holds, and no part exceeds it
    assert split_depth(volo(layers=[1, 2, 2, 2]), 7) == (1, 6)
    assert split_depth(volo(layers=[4, 1, 1, 1]), 6) == (3, 3)
    with pytest.raises(ModelError, match="depth 2.*3 to 8"):
        split_depth(volo(), 2)


def test_models_that_cannot_grow():
    with pytest.raises(ModelError, match="ResNet.*VisionTransformer.*VOLO"):
        prepare_growth(timm.create_model("resnet18"))
    with pytest.raises(ModelError, match="prepare_growth"):
        stacks_of(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"network\.3\.0 is not like network\.2\.0"):
        volo(embed_dims=[24, 48, 96, 96], downsamples=[True, False, False, False])
    with pytest.raises(ModelError, match="network.4.0 is not like"):
        volo(num_heads=[2, 4, 4, 2])
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=3, num_heads=3)
    model.blocks[1] = nn.Identity()
    with pytest.raises(ModelError, match="blocks.1 is not like blocks.0"):
        prepare_growth(model)


# -- growth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [4, 5, 6])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_identity_keeps_the_function(total, scale):
    model = vit(keep=3, init_values=scale)
    new, _ = rebuild(model, grow_request(blueprint_of(model), total, "identity", seed=0))
    assert depth_of(new) == total
    assert torch.equal(logits(new), logits(model))
    # the first backward reaches the silenced tensors only
    new(torch.randn(2, 3, 96, 96)).square().sum().backward()
    added = f"blocks.{new_blocks(interpolation(3, total))[0]}."
    moved = {n[len(added) :] for n, p in new.named_parameters() if n.startswith(added) and p.grad.abs().sum() > 0}
    layers = {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    assert moved == (layers if scale is None else {"ls1.gamma", "ls2.gamma"})


def test_the_other_operators_change_the_function():
    model = vit(keep=3)
    for operator in ("interpolation", "stacking", "random"):
        new, _ = rebuild(model, grow_request(blueprint_of(model), 6, operator, seed=0))
        assert (logits(new) - logits(model)).abs().max() > 1e-3, operator


@pytest.mark.parametrize(("operator", "rule"), [("interpolation", interpolation), ("stacking", stacking)])
def test_copied_blocks(operator, rule):
    model = vit(keep=4, init_values=0.1)
    request = grow_request(blueprint_of(model), 6, operator, seed=0)
    new, _ = rebuild(model, request)
    old_values, new_values = values_of(model), values_of(new)
    for j, i in enumerate(rule(4, 6)):
        assert same(block(new_values, f"blocks.{j}"), block(old_values, f"blocks.{i}"))
    assert all(torch.equal(v, new_values[n]) for n, v in old_values.items() if not n.startswith("blocks."))
    assert len({id(p) for p in new.parameters()}) == len(list(new.named_parameters(remove_duplicate=False)))
    # every tensor of a moved block is in the map, no other, and the copies keep the optimizer state
    moved = [j for j, i in enumerate(rule(4, 6)) if i != j]
    assert set(request.maps) == {n for n in new_values if any(n.startswith(f"blocks.{j}.") for j in moved)}
    assert all(target.moments for target in request.maps.values())
    assert not request.drops
    assert (request.values, request.reset) == ("online", False)
    assert request.reason == f"depth 4 -> 6, {operator}"
    # the blueprint was not touched
    assert depth_of(model) == 4


def test_momentum_growth_takes_everything_from_the_average():
    model = vit(keep=4)
    average = values_of(perturb(copy.deepcopy(model), seed=9))
    request = grow_request(blueprint_of(model), 6, "interpolation", seed=0, values="ema", reset=True)
    assert request.reset
    new, new_average = rebuild(model, request, average)
    online, values = values_of(model), values_of(new)
    for name, value in values.items():
        piece = request.maps[name].pieces[0].source if name in request.maps else name
        if not name.startswith("blocks."):
            assert piece == name
        else:
            j = int(name.split(".")[1])
            assert piece == name.replace(f"blocks.{j}.", f"blocks.{interpolation(4, 6)[j]}.")
        assert torch.equal(value, average[piece])
        assert not torch.equal(value, online[piece])
        assert torch.equal(new_average[name], average[piece])


@pytest.mark.parametrize("make", [vit, volo])
def test_random_values_are_those_of_the_model(make):
    full = make(**({"init_values": 0.3} if make is vit else {}))
    total = depth_of(full)
    model = truncate(full, total - 2)
    request = grow_request(blueprint_of(model), total, "random", seed=3)
    state = torch.random.get_rng_state()
    new, _ = rebuild(model, request)
    assert torch.equal(torch.random.get_rng_state(), state)
    old_values, values = values_of(model), values_of(new)
    assert all(torch.equal(values[name], value) for name, value in old_values.items())
    torch.manual_seed(17)
    again, _ = rebuild(model, request)
    assert same(values, values_of(again))
    other, _ = rebuild(model, grow_request(blueprint_of(model), total, "random", seed=4))
    added = [name for name in values if name not in old_values]
    assert set(request.maps) == set(added)
    assert not any(request.maps[name].moments for name in added)
    weights = []
    for name in added:
        value = values[name]
        if name.endswith("gamma"):
            assert torch.all(value == 0.3)
        elif value.dim() == 1:
            assert torch.all(value == float("norm" in name and name.endswith("weight"))), name
        else:
            assert not torch.equal(value, values_of(other)[name])
            assert 0.9 * 0.02 < value.std() < 1.1 * 0.02
            weights.append(value)
    # no two tensors are drawn alike
    assert len({tuple(w.flatten()[:8].tolist()) for w in weights}) == len(weights) > 6


def test_random_follows_the_scheme_of_the_model():
    model = vit(keep=4, weight_init="jax")
    new, _ = rebuild(model, grow_request(blueprint_of(model), 5, "random", seed=0))
    added = new.blocks[4]
    assert added.mlp.fc1.weight.std().item() == pytest.approx((2 / (48 + 192)) ** 0.5, rel=0.05)
    assert 0 < added.mlp.fc1.bias.abs().max() < 1e-5
    assert added.attn.proj.bias.abs().max() == 0
    with pytest.raises(ModelError, match='weight_init "moco"'):
        grow_request(blueprint_of(vit(keep=4, weight_init="moco")), 5, "random", seed=0)


def test_a_map_draws_from_its_generator():
    request = grow_request(blueprint_of(vit(keep=4)), 5, "random", seed=0)
    init = request.maps["blocks.4.mlp.fc1.weight"].init
    shape = torch.Size([192, 48])
    assert torch.equal(init(shape, torch_rng("cpu", 1)), init(shape, torch_rng("cpu", 1)))
    assert not torch.equal(init(shape, torch_rng("cpu", 1)), init(shape, torch_rng("cpu", 2)))


def test_errors_of_growth():
    plan = blueprint_of(vit(keep=4))
    with pytest.raises(ModelError, match='"clone".*random, stacking, interpolation, identity'):
        grow_request(plan, 6, "clone", seed=0)
    with pytest.raises(ModelError, match="from depth 4 to 3; allowed: 4 to 6"):
        grow_request(plan, 3, "interpolation", seed=0)
    with pytest.raises(ModelError, match="from depth 4 to 7; allowed: 4 to 6"):
        grow_request(plan, 7, "interpolation", seed=0)
    for operator in OPERATORS:
        request = grow_request(plan, 4, operator, seed=0)
        assert (request.maps, request.drops) == ({}, frozenset())
    request = grow_request(plan, 6, "interpolation", seed=0)
    with pytest.raises(ModelError, match=r"blocks, found \[6\]"):
        request.surgery(request.surgery(blueprint_of(plan)))
    norm_last = timm.create_model("vit_relpos_small_patch16_224", embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(ModelError, match="cannot change"):
        prepare_growth(norm_last)
    parallel = timm.create_model("vit_small_patch16_224", embed_dim=24, depth=3, num_heads=3, class_token=True)
    parallel.blocks = nn.Sequential(*(timm.models.vision_transformer.ParallelScalingBlock(24, 3) for _ in range(3)))
    parallel = truncate(prepare_growth(parallel), 2)
    with pytest.raises(ModelError, match=r"blocks\.2 \(ParallelScalingBlock\).*stacking, interpolation"):
        grow_request(parallel, 3, "identity", seed=0)
    grow_request(parallel, 3, "interpolation", seed=0)


def test_volo_never_shrinks_a_stack():
    with torch.device("meta"):
        model = truncate(prepare_growth(timm.create_model("volo_d1_224")), 9)
    with pytest.raises(ModelError, match=r"depth 10 needs stacks of \[4, 6\] blocks, present are \[2, 7\]"):
        grow_request(model, 10, "interpolation", seed=0)


@pytest.mark.parametrize("total", [6, 7, 8])
def test_growth_of_volo(total):
    model = truncate(volo(), 5)
    assert [len(m) for i, m in enumerate(model.network) if i != 1] == [2, 2, 1, 0]
    out = logits(model, 64)
    new, _ = rebuild(model, grow_request(blueprint_of(model), total, "interpolation", seed=0))
    outlookers, transformers = stacks_of(new)
    assert (outlookers.depth, transformers.depth) == split_depth(model, total)
    old_names = stacks_of(model)[1].names
    old_values, values = values_of(model), values_of(new)
    for j, i in enumerate(interpolation(3, transformers.depth)):
        assert same(block(values, transformers.names[j]), block(old_values, old_names[i]))
    assert (logits(new, 64) - out).abs().max() > 1e-3
    silent, _ = rebuild(model, grow_request(blueprint_of(model), total, "identity", seed=0))
    assert torch.equal(logits(silent, 64), out)
    if total == 8:
        assert list(new.state_dict()) == list(volo().state_dict())


def test_identity_growth_of_outlookers():
    model = truncate(volo(layers=[4, 2, 2, 1]), 5)
    assert [s.depth for s in stacks_of(model)] == [2, 3]
    new, _ = rebuild(model, grow_request(blueprint_of(model), 9, "identity", seed=0))
    assert [s.depth for s in stacks_of(new)] == [4, 5]
    assert torch.equal(logits(new, 64), logits(model, 64))


# -- tied tensors, buffers, selection ------------------------------------------------------------------------------


def tied_vit():
    """Block 1 shares a bias with the last norm, block 2 has one weight for both norms, all blocks share a table."""
    model = vit(keep=4)
    table = torch.arange(3.0)
    for i, one in enumerate(model.blocks):
        one.register_buffer("table", table)
        one.register_buffer("number", torch.tensor([float(i)]), persistent=False)
    model.blocks[2].norm2.weight = model.blocks[2].norm1.weight
    model.blocks[1].norm2.bias = model.norm.bias
    return model


def test_tied_tensors_and_buffers_follow():
    model = tied_vit()
    request = grow_request(blueprint_of(model), 6, "interpolation", seed=0)
    assert not any("norm2.weight" in n for n in request.maps if n.startswith(("blocks.2.", "blocks.3.")))
    new, _ = rebuild(model, request)
    index_map = interpolation(4, 6)  # 0 1 2 2 3 3
    assert [int(one.number) for one in new.blocks] == list(index_map)
    assert len({id(one.number) for one in new.blocks}) == 6
    assert len({id(one.table) for one in new.blocks}) == 1
    for j in (2, 3):
        assert new.blocks[j].norm2.weight is new.blocks[j].norm1.weight
    assert new.blocks[2].norm1.weight is not new.blocks[3].norm1.weight
    assert new.blocks[1].norm2.bias is new.norm.bias
    assert logits(new).isfinite().all()
    with_number, _ = rebuild(model, grow_request(blueprint_of(model), 6, "random", seed=0))
    assert [int(one.number) for one in with_number.blocks] == [0, 1, 2, 3, 3, 3]


def test_a_copy_shares_what_its_source_shares_with_the_model():
    model = tied_vit()
    kept, _ = rebuild(model, select_request(blueprint_of(model), [[1]]))
    assert kept.blocks[0].norm2.bias is kept.norm.bias
    grown, _ = rebuild(kept, grow_request(blueprint_of(kept), 3, "stacking", seed=0))
    assert all(one.norm2.bias is grown.norm.bias for one in grown.blocks)
    # zeros cannot be given to one name of a shared tensor only
    model = vit(keep=4)
    model.blocks[3].mlp.fc2.bias = model.blocks[0].norm1.bias
    with pytest.raises(ModelError, match=r"blocks\.5\.mlp\.fc2\.bias must become zero, but it is tied"):
        grow_request(blueprint_of(model), 6, "identity", seed=0)


def test_frozen_parameters_stay_frozen():
    model = vit(keep=4)
    model.blocks[3].requires_grad_(False)
    new, _ = rebuild(model, grow_request(blueprint_of(model), 6, "interpolation", seed=0))
    frozen = {n.split(".")[1] for n, p in new.named_parameters() if not p.requires_grad}
    assert frozen == {"4", "5"}


def test_selection():
    model = vit()
    request = select_request(blueprint_of(model), [[0, 2, 5]])
    new, _ = rebuild(model, request)
    old_values, values = values_of(model), values_of(new)
    for j, i in enumerate([0, 2, 5]):
        assert same(block(values, f"blocks.{j}"), block(old_values, f"blocks.{i}"))
    gone = {n for n in old_values if n.split(".")[1:2] and n.startswith(("blocks.1.", "blocks.3.", "blocks.4."))}
    assert request.drops == gone
    assert "blocks.0.norm1.weight" not in request.maps
    assert request.reason == "depth 6 -> 3, selected"
    for bad in ([[0, 0]], [[2, 1]], [[6]], [[-1]], [[]]):
        with pytest.raises(ModelError, match="stack 0.*from 0 to 5"):
            select_request(blueprint_of(model), bad)
    with pytest.raises(ModelError, match="has 1 stacks"):
        select_request(blueprint_of(model), [[0], [1]])


def test_growth_in_steps_from_3_to_6_with_real_steps():
    model = vit(keep=3).train()
    images = torch.randn(4, 3, 48, 48)
    for total in (4, 5, 6):
        model, _ = rebuild(model, grow_request(blueprint_of(model), total, "interpolation", seed=0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(images).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert depth_of(model) == 6
    assert list(model.state_dict()) == list(vit().state_dict())
