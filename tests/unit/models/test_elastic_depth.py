import copy

import pytest
import torch

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.drop_path import ensure_drop_path, set_drop_path
from efftrain_ds.models.elastic import path_of, paths_for, set_paths, skipped_names, supernet_order
from efftrain_ds.models.growth import grow_request, interpolation, select_request
from efftrain_ds.models.stacks import depth_of, stacks_of, truncate
from tests.unit.models.plain_rebuild import blueprint_of, perturb, rebuild, values_of
from tests.unit.models.test_growth import logits, vit, volo


def supernet(base_model, top):
    request = grow_request(blueprint_of(base_model), top, "interpolation", seed=0, values="ema")
    average = values_of(perturb(copy.deepcopy(base_model), seed=11))
    return rebuild(base_model, request, average)[0], average


def with_values(model, values):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


# -- paths ---------------------------------------------------------------------------------------------------------


def test_paths_of_the_examples():
    assert [path_of(3, 6, depth) for depth in (3, 4, 5, 6)] == [[0, 2, 4], [0, 2, 4, 5], [0, 2, 3, 4, 5], [*range(6)]]
    assert path_of(6, 12, 8) == [0, 2, 4, 6, 8, 9, 10, 11]
    assert path_of(6, 12, 10) == [0, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert supernet_order(3, 7) == ([0, 2, 4], [5, 3, 1, 6])
    for bad in (2, 7):
        with pytest.raises(ModelError, match=f"from 3 to 6.*depth {bad}"):
            path_of(3, 6, bad)


def test_a_path_is_what_growth_to_its_depth_gives():
    for base in range(1, 9):
        for top in range(base, 4 * base + 1):
            index_map = interpolation(base, top)
            paths = [path_of(base, top, depth) for depth in range(base, top + 1)]
            for depth, path in enumerate(paths, base):
                assert tuple(index_map[j] for j in path) == interpolation(base, depth)
            assert all({*a} < {*b} for a, b in zip(paths, paths[1:], strict=False))
            if top <= 2 * base:
                new = sorted({*range(top)} - {*paths[0]})
                for depth, path in enumerate(paths, base):
                    assert {*path} - {*paths[0]} == {*new[len(new) - (depth - base) :]}


def test_the_smallest_path_is_the_average_before_growth():
    base = vit(keep=3)
    model, average = supernet(base, 6)
    set_paths(model, paths_for(model, 3, 3))
    assert torch.equal(logits(model), logits(with_values(base, average)))
    set_paths(model, None)
    assert not torch.equal(logits(model), logits(with_values(base, average)))


@pytest.mark.parametrize(("base", "depths"), [(3, (3, 4, 5, 6)), (4, (5, 6))])
def test_extraction_is_the_path(base, depths):
    model, _ = supernet(vit(keep=base), 6)
    if base == 4:  # a second search: its paths start from the depth that was grown, not from the lowest candidate
        assert paths_for(model, 4, 5) == [[0, 1, 2, 4, 5]]
    perturb(model, seed=21)
    seen = []
    for depth in depths:
        paths = paths_for(model, base, depth)
        set_paths(model, paths)
        wanted = logits(model)
        # the supernet keeps its path while the request is made from its blueprint
        alone, _ = rebuild(model, select_request(blueprint_of(model), paths))
        assert depth_of(alone) == depth
        assert alone.blocks.active is None
        assert torch.equal(logits(alone), wanted)
        seen.append(wanted)
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("total", [5, 6, 7, 8])
def test_volo_supernet_and_extraction(total):
    base = truncate(volo(), 5)
    model, average = supernet(base, 8)
    if total == 5:
        set_paths(model, paths_for(model, 5, 5))
        assert torch.equal(logits(model, 64), logits(with_values(base, average), 64))
    perturb(model, seed=21)
    paths = paths_for(model, 5, total)
    assert [len(p) for p in paths] == [2, total - 2]
    set_paths(model, paths)
    alone, _ = rebuild(model, select_request(blueprint_of(model), paths))
    assert torch.equal(logits(alone, 64), logits(model, 64))
    assert depth_of(alone) == total


def test_growth_from_a_searched_model_copies_no_path():
    model, _ = supernet(vit(keep=3), 5)
    set_paths(model, paths_for(model, 3, 4))
    grown, _ = rebuild(model, grow_request(blueprint_of(model), 6, "interpolation", seed=0))
    assert grown.blocks.active is None
    assert skipped_names(grown) == []


def test_skipped_names():
    model = vit()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight  # used by an active block too
    model.blocks[3].norm1.bias = model.norm.bias
    set_paths(model, [[0, 2, 4, 5]])
    skipped = skipped_names(model)
    model(torch.randn(1, 3, 48, 48)).square().sum().backward()
    assert skipped == [name for name, p in model.named_parameters() if p.grad is None]
    assert {name.split(".")[1] for name in skipped} == {"1", "3"}
    assert "blocks.3.norm1.bias" not in skipped
    set_paths(model, None)
    assert skipped_names(model) == []
    model = volo()
    set_paths(model, [[1], [0, 2, 5]])
    assert {name.rsplit(".", 3)[0][:11] for name in skipped_names(model)} >= {
        "network.0.0",
        "network.2.1",
        "network.4.0",
    }
    model(torch.randn(1, 3, 64, 64)).square().sum().backward()
    assert skipped_names(model) == [name for name, p in model.named_parameters() if p.grad is None]


def test_paths_survive_copies_and_are_checked():
    model = vit()
    set_paths(model, [[0, 3]])
    assert copy.deepcopy(model).blocks.active == (0, 3)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    for bad in ([[]], [[3, 0]], [[0, 6]], [[0], [1]]):
        with pytest.raises(ModelError, match="allowed|stacks"):
            set_paths(model, bad)
    assert model.blocks.active == (0, 3)
    set_paths(model, [[*range(6)]])
    assert model.blocks.active is None
    model.set_grad_checkpointing(True)
    with pytest.raises(ModelError, match="gradient checkpointing"):
        set_paths(model, [[0, 3]])
    set_paths(model, None)


# -- stochastic depth ----------------------------------------------------------------------------------------------


def rates(model):
    names = [name for stack in stacks_of(model) for name in stack.names]
    blocks = [model.get_submodule(name) for name in names]
    assert all(getattr(b.drop_path1, "drop_prob", None) == getattr(b.drop_path2, "drop_prob", None) for b in blocks)
    return [getattr(b.drop_path1, "drop_prob", None) for b in blocks]


def test_drop_path_after_growth():
    model = ensure_drop_path(vit(drop_path_rate=0.3))
    assert rates(model) == pytest.approx([0.3 * i / 5 for i in range(6)])
    model = truncate(model, 3)
    for total in (4, 5, 6):
        model, _ = rebuild(model, grow_request(blueprint_of(model), total, "interpolation", seed=0))
        before = values_of(model)
        set_drop_path(model, 0.2)
        assert rates(model) == pytest.approx([0.2 * i / (total - 1) for i in range(total)])
        after = values_of(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert before.keys() == after.keys()
    # each block has its own object, so that a rate is not shared with a copy
    assert len({id(b.drop_path1) for b in model.blocks}) == 6
    images = torch.randn(4, 3, 48, 48)
    model.train()
    assert not torch.equal(model(images), model(images))
    set_drop_path(model, 0.0)
    assert rates(model) == [0.0] * 6
    assert torch.equal(model(images), model(images))


def test_drop_path_along_a_path():
    model = ensure_drop_path(vit(drop_path_rate=0.1))
    set_drop_path(model, 0.0)
    set_drop_path(model, 0.3, [[0, 2, 4, 5]])
    assert rates(model) == pytest.approx([0, 0, 0.1, 0, 0.2, 0.3])
    set_drop_path(model, 0.3, [[4]])
    assert rates(model)[4] == 0
    one = truncate(ensure_drop_path(vit(drop_path_rate=0.1)), 1)
    set_drop_path(one, 0.3)
    assert rates(one) == [0]


def test_drop_path_of_volo():
    model = ensure_drop_path(volo(drop_path_rate=0.7))
    wanted = [None, None, *(0.7 * i / 7 for i in range(2, 8))]
    assert rates(model) == pytest.approx(wanted)
    set_drop_path(model, 0.35)
    assert rates(model) == pytest.approx([r and r / 2 for r in wanted])
    model = truncate(model, 5)
    set_drop_path(model, 0.4)
    assert rates(model) == pytest.approx([None, None, 0.2, 0.3, 0.4])


def test_drop_path_errors():
    model = ensure_drop_path(vit())
    set_drop_path(model, 0.0)
    assert rates(model) == [None] * 6
    with pytest.raises(ModelError, match=r"no DropPath to set to 0.1.*drop_path_rate"):
        set_drop_path(model, 0.1)
    with pytest.raises(ModelError, match="0 <= rate < 1"):
        set_drop_path(model, 1.0)


# -- input sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [48, 64, 96])
def test_sizes_with_elastic_depth(side):
    model = vit()
    count, before = sum(p.numel() for p in model.parameters()), model.pos_embed.detach().clone()
    set_paths(model, [[0, 2, 4]])
    out = model(torch.randn(2, 3, side, side))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert torch.equal(model.pos_embed, before)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.pos_embed.shape[1] == 37
    assert (model.pos_embed.grad[0, 1:].abs().sum(-1) > 0).all()
