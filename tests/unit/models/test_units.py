"""Heads and neurons as units: which entries they are, compact models, wide twins, refusals."""

import copy

import pytest
import timm
import torch
from timm.layers import GluMlp
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.kernels.attention import BlockMask
from efftrain_ds.methods.svite.accounting import live_macs
from efftrain_ds.models import masked
from efftrain_ds.models.attention import use_block_attention
from efftrain_ds.models.unit_export import dense_twin, fold_dead_biases
from efftrain_ds.models.units import (
    BlockUnits,
    compact_,
    compact_request,
    entry_mask,
    head_rows,
    parts_of,
    unit_entries,
    units_of,
)
from efftrain_ds.zero.blueprint import make_blueprint, named_tensors
from efftrain_ds.zero.checks import check_maps
from efftrain_ds.zero.request import compose_requests

TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10)
VARIANTS = {
    "plain": {},
    "registers": dict(reg_tokens=3, init_values=0.5, drop_path_rate=0.1),
    "qk_norm": dict(qk_norm=True, qkv_bias=False),
    "no_proj_bias": dict(proj_bias=False, global_pool="avg", class_token=False),
    "pool": dict(global_pool="map"),
}
KEEP = {"blocks.0": ([3, 1], [*range(200, 40, -2)]), "blocks.1": ([2], [*range(256)])}


def vit(seed=0, **kwargs):
    """Tiny ViT whose every parameter, biases too, is far from zero."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**TINY, **kwargs}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def images(seed=1, count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def dead_units(model, keep):
    return {
        name: (
            [h for h in range(units.heads) if h not in keep[name][0]],
            [j for j in range(units.neurons) if j not in keep[name][1]],
        )
        for name, units in units_of(model).items()
    }


@torch.no_grad()
def with_zeros(model, units):
    """The model with zeros at all entries of some units."""
    model = copy.deepcopy(model)
    for block, (heads, neurons) in units.items():
        for name, take in unit_entries(model, block, heads, neurons).items():
            parameter = model.get_parameter(name)
            parameter[entry_mask(parameter.shape, take)] = 0
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compact_model_computes_what_the_masked_one_does(variant):
    model = vit(**VARIANTS[variant])
    full = units_of(model)
    assert full == {name: BlockUnits(4, 16, 256, 64) for name in ("blocks.0", "blocks.1")}
    zeroed = with_zeros(model, dead_units(model, KEEP))
    compact = compact_(copy.deepcopy(model), KEEP)
    assert units_of(compact) == {"blocks.0": BlockUnits(2, 16, 80, 64), "blocks.1": BlockUnits(1, 16, 256, 64)}
    want, got = zeroed(images()), compact(images())
    assert float((want - model(images())).detach().abs().max()) > 1e-2
    assert float((want - got).detach().abs().max()) < 1e-5
    assert compact.blocks[0].attn.scale == 16**-0.5
    twin = dense_twin(compact, full, KEEP)
    torch.testing.assert_close(dict(twin.named_parameters()), dict(zeroed.named_parameters()), rtol=0, atol=0)
    assert float((twin(images()) - got).detach().abs().max()) < 1e-5
    vit(**VARIANTS[variant]).load_state_dict(twin.state_dict())  # strict: a plain timm model
    assert units_of(compact)["blocks.0"].heads == 2, "the twin is a copy"
    got.sum().backward()
    assert all(p.grad is not None for p in compact.parameters())


def test_compaction_on_our_attention_and_in_the_distilled_model():
    model = vit()
    want = compact_(copy.deepcopy(model), KEEP)(images())
    use_block_attention(model)
    torch.testing.assert_close(compact_(model, KEEP)(images()), want, rtol=0, atol=1e-5)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10).eval()
    keep = {"blocks.3": ([0, 2], [*range(500)])}
    zeroed = with_zeros(distilled, {"blocks.3": ([1], [*range(500, 768)])})
    torch.testing.assert_close(compact_(distilled, keep)(images()), zeroed(images()), rtol=0, atol=1e-5)


def test_reference_masks_need_the_fold_of_the_value_biases():
    """Weights of dead units are zero and biases live, as in the published code; proj stays dense."""
    model = vit()
    dead = dead_units(model, KEEP)
    with torch.no_grad():
        for block, (heads, neurons) in dead.items():
            for name, take in unit_entries(model, block, heads, neurons, parts=("q", "k", "v", "fc1", "fc2")).items():
                if name.endswith("weight"):
                    parameter = model.get_parameter(name)
                    parameter[entry_mask(parameter.shape, take)] = 0
    want = model(images())
    assert float((compact_(copy.deepcopy(model), KEEP)(images()) - want).detach().abs().max()) > 1e-2
    folded = fold_dead_biases(copy.deepcopy(model), {name: heads for name, (heads, _) in dead.items()})
    torch.testing.assert_close(folded(images()), want, rtol=0, atol=1e-5)
    assert float((compact_(folded, KEEP)(images()) - want).detach().abs().max()) < 1e-5
    with pytest.raises(ModelError, match="blocks.0: head 1 is not dead"):
        fold_dead_biases(model, {"blocks.0": [0, 1]})
    model.blocks[1].attn.proj.bias = None
    with pytest.raises(ModelError, match="blocks.1.attn.proj has no bias"):
        fold_dead_biases(model, {"blocks.1": dead["blocks.1"][0]})


@pytest.mark.parametrize(
    ("name", "heads", "share", "cut", "kept", "saved"),
    [
        ("deit_tiny_patch16_224", 2, 0.7, 4.06, 4.21, 30.75),
        ("deit_small_patch16_224", 4, 0.6, 14.01, 14.60, 36.98),
        ("deit_base_patch16_224", 8, 0.6, 54.45, 56.81, 37.35),
    ],
)
def test_sizes_of_compact_deit(name, heads, share, cut, kept, saved):
    with torch.device("meta"):
        model = timm.create_model(name)
    dense = live_macs(model, 224)
    count = sum(p.numel() for p in model.parameters())
    units = units_of(model)
    keep = {block: ([*range(heads)], [*range(int(unit.neurons * share))]) for block, unit in units.items()}
    compact_(model, keep)
    left = sum(p.numel() for p in model.parameters())
    gone = sum((unit.heads - heads) * unit.head_dim * unit.width for unit in units.values())
    assert (round(left / 1e6, 2), round((left + gone) / 1e6, 2)) == (cut, kept)
    per_head = 3 * (units["blocks.0"].width + 1) + units["blocks.0"].width  # rows of q, k, v with biases, columns
    expected = sum(
        (u.heads - heads) * u.head_dim * per_head + (u.neurons - int(u.neurons * share)) * (2 * u.width + 1)
        for u in units.values()
    )
    assert count - left == expected
    assert round(100 * (1 - live_macs(model, 224) / dense), 2) == saved


def test_entries_of_all_units_are_the_layers_and_do_not_overlap():
    model = vit()
    units = units_of(model)["blocks.0"]
    total = {}
    for head in range(4):
        found = unit_entries(model, "blocks.0", heads=[head])
        assert found["blocks.0.attn.qkv.bias"] == found["blocks.0.attn.qkv.weight"]
        assert found["blocks.0.attn.proj.weight"] == {1: [*range(16 * head, 16 * head + 16)]}
        for name, take in found.items():
            total[name] = total.get(name, 0) + entry_mask(model.get_parameter(name).shape, take).int()
    found = unit_entries(model, "blocks.0", neurons=[7, 3])
    assert found["blocks.0.mlp.fc1.weight"] == found["blocks.0.mlp.fc1.bias"] == {0: [7, 3]}
    for name, take in unit_entries(model, "blocks.0", neurons=range(256)).items():
        total[name] = entry_mask(model.get_parameter(name).shape, take).int()
    assert all(bool((t == 1).all()) for t in total.values())
    inside = {f"blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert set(total) == {f"{n}.{k}" for n in inside for k in ("weight", "bias")} - {
        "blocks.0.attn.proj.bias",
        "blocks.0.mlp.fc2.bias",
    }
    assert head_rows(units, [2, 0], "kv") == [*range(96, 112), *range(64, 80), *range(160, 176), *range(128, 144)]
    assert unit_entries(model, "blocks.1", [1], [2], parts="v") == {
        "blocks.1.attn.qkv.weight": {0: [*range(144, 160)]},
        "blocks.1.attn.qkv.bias": {0: [*range(144, 160)]},
    }
    bare = unit_entries(vit(qkv_bias=False), "blocks.0", heads=[0])
    assert "blocks.0.attn.qkv.bias" not in bare
    assert next(iter(unit_entries(model.blocks[0], "", heads=[0]))) == "attn.qkv.weight"


def shapes_of(model):
    return {name: tensor.shape for name, tensor in named_tensors(model).items()}


def carried(request, model):
    """A compact model with values through the maps of a request."""
    blueprint = request.surgery(make_blueprint(model))
    check_maps(request, shapes_of(blueprint), shapes_of(model))
    old, new = named_tensors(model), {}
    for name in named_tensors(blueprint):
        new[name] = old[name]
        for piece in request.maps[name].pieces if name in request.maps else ():
            new[name] = old[piece.source]
            for dim, indices in piece.take.items():
                new[name] = new[name].index_select(dim, torch.tensor(indices))
    result = blueprint.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in named_tensors(result).items():
            tensor.copy_(new[name])
    return result


def test_a_request_carries_the_values():
    model = vit(reg_tokens=1, qk_norm=True, init_values=0.1)
    keep = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(3)) < 0.7
    keep |= torch.eye(2, dtype=torch.bool)
    use_block_attention(model, {"blocks.0.attn": BlockMask(keep, 18, 18, 16)})
    blueprint = make_blueprint(model)
    request = compact_request(blueprint, KEEP)
    assert request.reason == "heads 8 -> 3, neurons 512 -> 336"
    assert {n for n in request.maps if "blocks.1" in n} == {
        "blocks.1.attn.qkv.weight",
        "blocks.1.attn.qkv.bias",
        "blocks.1.attn.proj.weight",
    }
    assert all(target.moments for target in request.maps.values())
    assert units_of(blueprint)["blocks.0"].heads == 4, "the blueprint is not changed"
    want = compact_(copy.deepcopy(model), KEEP)
    got = carried(request, model)
    torch.testing.assert_close(named_tensors(got), named_tensors(want), rtol=0, atol=0)
    assert torch.equal(got(images()), want(images()))
    assert got.blocks[0].attn.block_mask.num_heads == 2
    # two in one boundary
    second = compact_request(make_blueprint(want), {"blocks.0": ([1], [5, 0])}, "again")
    both = compose_requests(request, second)
    want = compact_(want, {"blocks.0": ([1], [5, 0])})
    got = carried(both, model)
    torch.testing.assert_close(named_tensors(got), named_tensors(want), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"blocks.0: made for BlockUnits\(heads=2"):
        second.surgery(make_blueprint(model))


def test_frozen_stays_frozen_and_identity_keeps_objects():
    model = vit()
    model.blocks[0].requires_grad_(False)
    before = dict(model.named_parameters())
    compact_(model, {"blocks.0": KEEP["blocks.0"], "blocks.1": ([*range(4)], [*range(256)])})
    after = dict(model.named_parameters())
    assert not any(p.requires_grad for n, p in after.items() if n.startswith("blocks.0"))
    assert {n for n in before if before[n] is not after[n]} == {
        f"blocks.0.{n}"
        for n in (
            "attn.qkv.weight",
            "attn.qkv.bias",
            "attn.proj.weight",
            "mlp.fc1.weight",
            "mlp.fc1.bias",
            "mlp.fc2.weight",
        )
    }


def _tied():
    model = vit()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    return model


def _masked():
    model = vit()
    masked.mask_layers(model, {"blocks.0.mlp.fc1.weight": torch.ones(256, 64, dtype=torch.bool)})
    return model


def _one_mask():
    model = vit()
    mask = BlockMask.full(4, 17, 17, 16)
    use_block_attention(model, lambda name, module: mask)
    return model


@pytest.mark.parametrize(
    ("make", "keep", "text"),
    [
        (vit, {"blocks.2": ([0], [0])}, r'"blocks.2" is no block of the model; its blocks: blocks.0, blocks.1'),
        (vit, {"blocks.1": ([4], [0])}, "blocks.1: heads 4 of 4; allowed: different ones from 0 to 3, at least one"),
        (vit, {"blocks.1": ([0, 0], [0])}, "blocks.1: heads 2, 1 different, of 4"),
        (vit, {"blocks.1": ([0], [])}, "blocks.1: neurons 0, 0 different, of 256"),
        (_tied, {"blocks.1": ([0], [0])}, "blocks.1.mlp.fc2 is shared: blocks.0.mlp.fc2.weight, blocks.1.mlp.fc2"),
        (_masked, {"blocks.0": ([0], [0])}, "blocks.0.mlp.fc1 is masked"),
        (_one_mask, {"blocks.0": ([0], [0])}, "blocks.0: one block mask for several layers"),
    ],
)
def test_what_cannot_be_kept(make, keep, text):
    model = make()
    before = shapes_of(model)
    for action in (compact_, compact_request):
        with pytest.raises(ModelError, match=text):
            action(model, keep)
    assert shapes_of(model) == before


def _fused():
    model = vit()
    model.blocks[1].attn.qkv = nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv)
    model.blocks[1].attn.qkv.__class__ = type("FusedQkv", (nn.Linear,), {"forward": lambda self, x: x})
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "Sequential has no attention blocks"),
        (lambda: timm.create_model("resnet18"), "ResNet has no attention blocks"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "layers.0.blocks.0.attn is WindowAttention"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "blocks.0.attn is EvaAttention"),
        (lambda: vit(block_fn=ParallelScalingBlock), "blocks.0 is ParallelScalingBlock"),
        (lambda: vit(block_fn=DiffParallelScalingBlock), "blocks.0 is DiffParallelScalingBlock"),
        (lambda: vit(attn_layer="diff"), "blocks.0.attn is DiffAttention"),
        (lambda: vit(mlp_layer=GluMlp), "blocks.0.mlp is GluMlp, which cannot be split into neurons"),
        (lambda: vit(scale_attn_norm=True), r"blocks.0.attn.norm \(LayerNorm\) normalises over all heads"),
        (lambda: vit(scale_mlp_norm=True), r"blocks.0.mlp.norm \(LayerNorm\) normalises over all neurons"),
        (lambda: vit(act_layer=nn.PReLU), r"blocks.0.mlp.act \(PReLU\) has a parameter weight"),
        (_fused, "blocks.1.attn.qkv is FusedQkv, which is not known here"),
    ],
)
def test_models_without_units(make, text):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ModelError, match=text):
        units_of(model)


def test_twins_refuse_slots_that_do_not_fit():
    model = vit()
    full = units_of(model)
    compact = compact_(model, KEEP)
    for slots, text in (
        ({"blocks.0": KEEP["blocks.0"]}, "blocks.1: a block of the model that"),
        ({**KEEP, "blocks.0": ([1, 4], KEEP["blocks.0"][1])}, "blocks.0: 2 slots of heads hold 2 units"),
        ({**KEEP, "blocks.1": ([1], [0] * 256)}, "blocks.1: 256 slots of neurons hold 1 units"),
    ):
        with pytest.raises(ModelError, match=text):
            dense_twin(compact, full, slots)
    assert [type(mlp).__name__ for _, mlp in parts_of(compact).values()] == ["Mlp", "Mlp"]
