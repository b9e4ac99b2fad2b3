"""timm models on our attention."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch._dynamo
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import nn

from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.core.errors import CheckpointError, ModelError, NoEffectWarning
from efftrain_ds.cost.macs import counted_macs
from efftrain_ds.export.model import load, model_spec
from efftrain_ds.kernels import runtime
from efftrain_ds.kernels.attention import BlockMask
from efftrain_ds.models.attention import BlockAttention, update_routes, use_block_attention
from efftrain_ds.zero.blueprint import make_blueprint, materialise
from efftrain_ds.zero.bundle import restore_buffers
from tests.kernels.common import needs_kernels
from tests.unit.cli.test_export import config_of, save_model
from tests.unit.cli.test_export import vit as vit_to_export

N, HEADS = 17, 2  # 4 x 4 patches and the class token


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv(runtime.VARIABLE, "reference")


def vit(depth: int = 2, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": HEADS, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **(sizes | kwargs))


def mask(seed: int = 0, heads: int = HEADS) -> BlockMask:
    keep = torch.rand(heads, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.6
    return BlockMask(keep, N, N, 16)


def curve(model: nn.Module, steps: int, images: int = 4) -> torch.Tensor:
    x, labels = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(images)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_same_loss_curve_as_sdpa_over_50_steps():
    plain, ours = vit(), vit()
    assert use_block_attention(ours) == ["blocks.0.attn", "blocks.1.attn"]
    wanted, found = curve(plain, 50), curve(ours, 50)
    assert wanted[-1] < 0.7 * wanted[0], "it learns"
    assert (wanted - found).abs().max() < 2e-5


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter; a GPU runs the kernels in other tests")
def test_same_two_steps_through_the_interpreter(monkeypatch):
    plain, ours = vit(depth=1, num_heads=1), vit(depth=1, num_heads=1)
    for model in (plain, ours):
        use_block_attention(model, {"blocks.0.attn": mask(heads=1)})
    wanted = curve(plain, 2, images=2)
    monkeypatch.setenv(runtime.VARIABLE, "triton")
    assert (wanted - curve(ours, 2, images=2)).abs().max() < 2e-5


@pytest.mark.parametrize(
    "kwargs", [{"qk_norm": True}, {"attn_layer": "attn", "scale_attn_norm": True}, {"qkv_bias": False}]
)
def test_variants_of_the_block_give_the_same(kwargs):
    plain = vit(**kwargs)
    ours = copy.deepcopy(plain)
    use_block_attention(ours)
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(plain(x), ours(x), atol=1e-6)


def test_gated_attention():
    plain = Attention(32, num_heads=2, gated=True)
    ours = nn.Sequential(copy.deepcopy(plain))
    use_block_attention(ours)
    x = torch.randn(2, 9, 32)
    assert torch.allclose(plain(x), ours(x), atol=1e-6)


def test_state_dict_gains_the_masks_only_and_they_survive():
    model = vit()
    before = set(model.state_dict())
    use_block_attention(model)
    assert set(model.state_dict()) == before
    use_block_attention(model, {"blocks.1.attn": mask(3)})
    assert set(model.state_dict()) - before == {"blocks.1.attn.block_mask.keep"}
    other = vit()
    use_block_attention(other, {"blocks.1.attn": mask(4)})
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), other(x)), "lists are rebuilt from the loaded mask"
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin.blocks[1].attn.block_mask.update_(~mask(3).keep)
    assert not torch.equal(twin(x), model(x)), "a copy has its own mask"


def test_parameters_are_the_same_objects():
    model = vit()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    use_block_attention(model, {"blocks.0.attn": mask()})
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_masks_from_a_function_and_changed_by_a_second_call():
    model = vit()
    masks = {"blocks.0.attn": mask(0), "blocks.1.attn": None}
    use_block_attention(model, lambda name, module: masks[name] if module.num_heads == HEADS else None)
    assert model.blocks[0].attn.block_mask is masks["blocks.0.attn"]
    assert model.blocks[1].attn.block_mask is None
    use_block_attention(model)
    assert model.blocks[0].attn.block_mask is None
    assert torch.allclose(model(torch.ones(1, 3, 16, 16)), vit()(torch.ones(1, 3, 16, 16)), atol=1e-6)


def test_mask_is_applied_per_head():
    model = vit(depth=1)
    own = Attention(32, num_heads=2)
    x = torch.randn(1, N, 32)
    heads = BlockMask(torch.tensor([[[1, 0], [1, 1]], [[0, 1], [1, 0]]]).bool(), N, N, 16)
    wanted = copy.deepcopy(own)(x, attn_mask=heads.to_dense())
    model.blocks[0].attn = own
    use_block_attention(model, {"blocks.0.attn": heads})
    assert torch.allclose(own(x), wanted, atol=1e-6)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_block_compiles_in_one_graph_over_mask_changes():
    torch._dynamo.reset()
    block = vit(depth=1).blocks[0]
    use_block_attention(block, {"attn": mask()})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block.to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    x = torch.randn(2, N, 32, device=device)
    outputs = []
    for seed in range(5):
        block.attn.block_mask.update_(mask(seed).keep.to(device))
        outputs.append(compiled(x))
        assert torch.allclose(outputs[-1], block(x), atol=0 if device == "cpu" else 1e-5, rtol=0)
    assert not all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_masks_and_routes_after_a_rebuild():
    """The steps of a rebuild of an engine: blueprint, changes of the masks, new module, buffers restored."""
    start = BlockMask.full(1, 577, 577)
    model = vit(depth=1)
    use_block_attention(model, {"blocks.0.attn": start})
    assert start.density == 1.0
    assert update_routes(model, torch.bfloat16) == {"blocks.0.attn": "sdpa"}
    blueprint = make_blueprint(model)
    start.update_(torch.arange(100).view(1, 10, 10) % 4 == 0)
    assert update_routes(model, torch.bfloat16) == {"blocks.0.attn": "auto"}
    rebuilt = materialise(blueprint)
    restore_buffers(rebuilt, dict(model.named_buffers()), {})
    attn = rebuilt.blocks[0].attn
    assert isinstance(attn, BlockAttention)
    assert attn.block_mask is not start
    assert attn.block_mask.density == start.density == 0.25
    for name, buffer in start.named_buffers():
        assert torch.equal(getattr(attn.block_mask, name), buffer)
    assert attn.attention_route == "sdpa", "that of the blueprint: update_routes is called again"
    assert update_routes(rebuilt, torch.bfloat16) == {"blocks.0.attn": "auto"}
    attn.block_mask.update_(~start.keep)
    assert attn.block_mask.density == 0.75
    assert start.density == 0.25


def test_mask_of_partitioned_weights_goes_to_the_accelerator(monkeypatch):
    model = vit(depth=1)
    moved = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(BlockMask, "to", lambda self, device: moved.append(str(device)))
    use_block_attention(model, {"blocks.0.attn": mask()})
    weight = model.blocks[0].attn.qkv.weight  # as ZeRO-3 leaves the weights that it partitions
    weight.ds_shape, weight.data = weight.shape, weight.data.new_empty(0)
    use_block_attention(model, {"blocks.0.attn": mask()})
    assert moved == ["cpu", "cuda"]


def test_export_refuses_masks_that_prune(tmp_path):
    model = vit_to_export().eval()
    full = BlockMask.full(1, 50, 50, 16)
    use_block_attention(model, {"blocks.0.attn": full, "blocks.2.attn": BlockMask.full(2, 50, 50, 16)})
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted = model(x)
        found = Checkpoint(save_model(tmp_path / "whole", model, config_of()))
        assert "blocks.0.attn.block_mask.keep" in found.buffers
        exported = load(model_spec(found), found)
        assert torch.allclose(exported(x), wanted, atol=1e-5), "masks that keep everything change nothing"
    assert not any("block_mask" in name for name, _ in exported.named_buffers())
    keep = full.keep.clone()
    keep[0, 0, 1] = False
    full.update_(keep)
    found = Checkpoint(save_model(tmp_path / "pruned", model, config_of()))
    with pytest.raises(CheckpointError, match=r"1 attention layers prune.*\(blocks.0.attn\).*use_block_attention"):
        load(model_spec(found), found)


def test_routes_follow_the_sparsity():
    model = vit()
    sparse = BlockMask(torch.eye(10, dtype=torch.bool)[None], 577, 577)
    use_block_attention(model, {"blocks.0.attn": BlockMask.full(1, 577, 577), "blocks.1.attn": sparse})
    assert update_routes(model, torch.bfloat16) == {"blocks.0.attn": "sdpa", "blocks.1.attn": "auto"}
    assert [block.attn.attention_route for block in model.blocks] == ["sdpa", "auto"]
    assert set(update_routes(model).values()) == {"sdpa"}, "the weights' fp32: the kernels are not made for it"


def test_dense_masks_start_on_sdpa():
    sparse = BlockMask(torch.eye(10, dtype=torch.bool)[None], 577, 577)
    masks = {"blocks.0.attn": BlockMask.full(1, 577, 577), "blocks.1.attn": sparse}
    for dtype in (torch.float32, torch.bfloat16):  # fp32 weights are cast later by most runs: judged as 16-bit ones
        model = vit().to(dtype)
        use_block_attention(model, masks)
        assert [block.attn.attention_route for block in model.blocks] == ["sdpa", "auto"]
    use_block_attention(model, {"blocks.0.attn": sparse})
    assert [block.attn.attention_route for block in model.blocks] == ["auto", "auto"]
    with torch.device("meta"):
        model = vit()
        use_block_attention(model, {"blocks.0.attn": BlockMask.full(1, 577, 577)})  # nothing to read
    assert model.blocks[0].attn.attention_route == "auto"


def test_macs_are_counted():
    plain, ours = vit(), vit()
    use_block_attention(ours)
    assert counted_macs(ours, 16) == counted_macs(plain, 16)


def test_subclasses_that_keep_the_forward():
    class Named(Attention):
        def note(self) -> str:
            return "mine"

    model = nn.Sequential(Named(32, num_heads=2))
    assert use_block_attention(model) == ["0"]
    assert isinstance(model[0], Named)
    assert model[0].note() == "mine"
    assert copy.deepcopy(model)(torch.ones(1, 3, 32)).shape == (1, 3, 32)

    class OtherAttention(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    with pytest.warns(NoEffectWarning, match="OtherAttention cannot be replaced"):
        assert use_block_attention(nn.Sequential(OtherAttention(32, num_heads=2))) == []


def test_nothing_matched():
    with pytest.warns(NoEffectWarning, match="has no timm Attention"):
        assert use_block_attention(nn.Linear(2, 2)) == []


def test_errors_come_before_any_change():
    model = vit()
    cases = [
        ({"blocks.7.attn": mask()}, '"blocks.7.attn" is no module'),
        ({"blocks.0.mlp": mask()}, "is a Mlp, not timm's Attention"),
        ({"blocks.0.attn": mask(), "blocks.1.attn": mask(heads=3)}, "blocks.1.attn: the mask is for 3 heads"),
    ]
    for masks, text in cases:
        with pytest.raises(ModelError, match=text):
            use_block_attention(model, masks)
        assert not any(isinstance(module, BlockAttention) for module in model.modules())


def test_attention_dropout_is_refused_in_training():
    model = vit(attn_drop_rate=0.1)
    with pytest.raises(ModelError, match="attn_drop_rate=0"):
        use_block_attention(model)
    model.eval()
    use_block_attention(model)
    assert model(torch.ones(1, 3, 16, 16)).shape == (1, 5)
    model.train()
    with pytest.raises(ModelError, match="attention dropout is 0.1"):
        model(torch.ones(1, 3, 16, 16))


def test_other_masks_and_lengths_are_refused():
    model = vit()
    use_block_attention(model, {"blocks.0.attn": mask()})
    with pytest.raises(ModelError, match="not causal"):
        model.blocks[0].attn(torch.ones(1, N, 32), is_causal=True)
    with pytest.raises(ModelError, match=r"made for 17 tokens, the input has 18; .*svite_attention"):
        model.blocks[0](torch.ones(1, 18, 32))
