"""Attention sparsity: scores against dense autograd, exchanges, patterns, configuration, models; on one process."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from efftrain_ds.config.loader import build_methods, load_config
from efftrain_ds.core.context import Context
from efftrain_ds.core.errors import ConfigError, ModelError, NoEffectWarning, PlanError
from efftrain_ds.core.timeline import PlanSpec, merge_timelines
from efftrain_ds.cost.macs import vit_macs
from efftrain_ds.kernels import runtime
from efftrain_ds.kernels.attention import BlockMask, attention_qkv
from efftrain_ds.kernels.attention import patterns as kernel_patterns
from efftrain_ds.methods.svite import attention_masks as am
from efftrain_ds.methods.svite.attention import SViTEAttention
from efftrain_ds.methods.svite.attention_config import AttentionConfig
from efftrain_ds.methods.svite.attention_sizes import attention_macs
from efftrain_ds.models.attention import masked_attention, use_block_attention
from efftrain_ds.models.attention_scores import block_scores, capture_scores, collect_scores, observed
from efftrain_ds.zero.blueprint import make_blueprint

H = 2


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv(runtime.VARIABLE, "reference")


def vit(side: int = 16, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": side, "patch_size": 4, "embed_dim": 32, "num_heads": H, "num_classes": 5, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | kwargs))


def sums(values: torch.Tensor, block: int) -> torch.Tensor:
    """[B, H, Nq, Nk] to sums over images and blocks, one by one."""
    n_q, n_k = (math.ceil(n / block) for n in values.shape[2:])
    found = torch.zeros(values.shape[1], n_q, n_k, dtype=values.dtype)
    for i, j in itertools.product(range(n_q), range(n_k)):
        found[:, i, j] = values[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block].sum((0, 2, 3))
    return found


def gated(q, k, v, dense, scale):
    """Dense attention with a factor on exp(score) for each pair: output, weights, and the factors as leaves."""
    gate = dense.to(q.dtype).expand(q.shape[0], q.shape[2], -1, -1).clone().requires_grad_()
    exponent = gate * (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).exp()
    weights = exponent / exponent.sum(-1, keepdim=True).where(exponent.sum(-1, keepdim=True) != 0, 1.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), weights.detach(), gate


# -- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_q", "n_k", "block", "heads"), [(70, 70, 16, H), (70, 70, 16, 1), (33, 80, 32, H), (17, 17, 16, H)]
)
def test_scores_are_those_of_dense_autograd(n_q, n_k, block, heads):
    rng = torch.Generator().manual_seed(n_q + heads)
    q, k, v = (torch.randn(3, n, H, 8, dtype=torch.float64, generator=rng) for n in (n_q, n_k, n_k))
    keep = torch.rand(heads, math.ceil(n_q / block), math.ceil(n_k / block), generator=rng) < 0.5
    keep[:, 0] = False  # queries without keys
    keep[:, 1, 0] = True
    mask = BlockMask(keep, n_q, n_k, block)
    weight = torch.randn(3, n_q, H, 8, dtype=torch.float64, generator=rng)
    out, weights, gate = gated(q, k, v, mask.to_dense(), 0.4)
    (out * weight).sin().sum().backward()
    slope = gate.grad.abs() * mask.to_dense().any(-1, keepdim=True)  # nothing comes to queries without keys

    leaf = q.clone().requires_grad_()
    probe = torch.zeros((), dtype=torch.float64).expand(2, H, *keep.shape[1:]).requires_grad_()
    result = attention_qkv(leaf, k, v, mask, 0.4)
    seen = observed(result, leaf, k, v, mask.keep, probe, block, 0.4)
    assert torch.equal(result, seen)
    (seen * weight).sin().sum().backward()
    assert (probe.grad[0] - sums(weights, block)).abs().max() < 1e-10
    assert (probe.grad[1] - sums(slope, block)).abs().max() < 1e-10
    assert probe.grad[1][~keep.expand_as(probe.grad[1])].count_nonzero() > 0, "blocks that do not live have slopes"
    plain = q.clone().requires_grad_()
    (attention_qkv(plain, k, v, mask, 0.4) * weight).sin().sum().backward()
    assert torch.equal(leaf.grad, plain.grad)

    dout = weight * (out.detach() * weight).cos()
    for chunk in (1, 2000, 9000):
        parts = block_scores(q, k, v, out.detach(), dout, keep, block, 0.4, chunk)
        assert (parts - probe.grad).abs().max() < 1e-10


def test_scores_need_memory_for_a_chunk_only():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    batch, n, heads, chunk = 16, 80, 4, 4 * 16 * 80
    q, k, v, out, dout = torch.randn(5, batch, n, heads, 4).unbind(0)
    keep = torch.ones(heads, 5, 5, dtype=torch.bool)
    inputs = q.untyped_storage().nbytes() // 4
    with Sizes():
        block_scores(q, k, v, out, dout, keep, 16, 0.5, chunk)
    made = [size for size in sizes if size != inputs]
    assert max(made) == chunk
    assert chunk * 80 == batch * heads * n * n


def test_sixteen_bits_and_far_scores_stay_finite():
    torch.manual_seed(1)
    q, k, v, out, dout = torch.randn(5, 2, 40, H, 8).bfloat16().unbind(0)
    keep = torch.rand(H, 3, 3) < 0.5
    low = block_scores(q, k, v, out, dout, keep, 16, 0.35)
    wide = block_scores(*(x.double() for x in (q, k, v, out, dout)), keep, 16, 0.35)
    assert torch.allclose(low, wide, rtol=1e-4, atol=1e-5)
    k[:, 16:32] *= 300
    assert block_scores(q, k, v, out, dout, torch.eye(3, dtype=torch.bool)[None], 16, 10.0).isfinite().all()
    k[0, 0, 0, 0] = math.nan
    assert not block_scores(q, k, v, out, dout, keep | True, 16, 0.35).isfinite().all()


def step_scores(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, parts: int = 1, scale: float = 1.0):
    """Scores of a step in `parts` micro-batches, and the weights' gradients."""
    layers = masked_attention(model)
    capture_scores(layers, True)
    model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (F.cross_entropy(model(x), y) / parts * scale).backward()
    found = collect_scores(layers, scale)
    capture_scores(layers, False)
    return found, [p.grad.clone() for p in model.parameters()]


def masked_vit(**kwargs) -> nn.Module:
    model = vit(32, **kwargs).double()
    rng = torch.Generator().manual_seed(7)
    n = 5  # 65 tokens in blocks of 16
    masks = {f"blocks.{i}.attn": BlockMask(torch.rand(H, n, n, generator=rng) < 0.6, 65, 65, 16) for i in range(2)}
    use_block_attention(model, masks)
    return model


SLOW = pytest.param("compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("how", ["accumulation", "scale", "checkpoint", "reentrant", SLOW])
def test_scores_of_a_model(how):
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    model = masked_vit(qk_norm=how == "scale")
    plain = copy.deepcopy(model)
    want, gradients = step_scores(plain, images, labels)
    F.cross_entropy(model(images), labels).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)), "value-neutral"
    assert all(not module.score_probe for module in masked_attention(model).values())
    if how == "checkpoint":
        model.set_grad_checkpointing()
    if how == "reentrant":
        for block in model.blocks:
            inner = block.forward
            block.forward = lambda x, inner=inner, **_: checkpoint(inner, x, use_reentrant=True)
    run = model
    if how == "compile":
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager")
    parts, scale = (4 if how == "accumulation" else 1), (1024.0 if how == "scale" else 1.0)
    layers = masked_attention(model)
    for _ in range(2):  # a second step begins with empty sums
        model.zero_grad()
        capture_scores(layers, True)
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (F.cross_entropy(run(x), y) / parts * scale).backward()
        found = collect_scores(layers, scale)
        capture_scores(layers, False)
        for name, scores in want.items():
            assert torch.allclose(found[name].mass, scores.mass, rtol=0, atol=1e-10)
            assert torch.allclose(found[name].slope, scores.slope, rtol=0, atol=1e-10)
            assert scores.mass.sum((1, 2)).tolist() == pytest.approx([1.0] * H)
    assert run(images).isfinite().all()


def test_a_layer_without_gradients_has_no_scores_and_stays():
    model = masked_vit()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    layers = masked_attention(model)
    with pytest.raises(ModelError, match="blocks.0.attn"):
        collect_scores(layers)
    capture_scores(layers, True)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    found = collect_scores(layers)
    assert all(not scores.mass.any() and not scores.slope.any() for scores in found.values())


# -- exchanges -----------------------------------------------------------------------------------------------------


def config(**kwargs) -> AttentionConfig:
    return AttentionConfig(**kwargs)


@pytest.mark.parametrize("kind", ["equal", "zero", "few", "random", "inf"])
@pytest.mark.parametrize("protect", [[], ["prefix"], ["prefix", "diagonal"]])
def test_counts_never_move(kind, protect):
    chosen = config(density=0.55, protect=protect, block=16)
    layer, tokens = am.Layer("blocks.0.attn", 1, 1, 3), 80
    keep, certain = am.first_keep(chosen, layer, tokens)[0], am.protected(chosen, tokens, 1)[0]
    rng, live, moved = torch.Generator().manual_seed(0), int(keep.sum()), 0
    for step in range(50):
        mass = {"equal": torch.ones(5, 5), "zero": torch.zeros(5, 5)}.get(kind, torch.rand(5, 5, generator=rng))
        if kind == "few":
            mass = (mass * 3).floor()
        if kind == "inf":
            mass[mass > 0.6] = math.inf
        slope = mass.flip(0)
        done = am.exchange(keep, mass * keep, slope, certain, 0.5, exclude_just_dropped=step % 2 == 1)
        assert int(done.mask.sum()) == live
        assert done.mask[certain].all()
        assert done.mask.any(1).all() or not keep.any(1).all()
        assert int(done.dropped.sum()) == int(done.grown.sum())
        assert not (done.dropped & ~keep).any()
        moved += int((done.mask ^ keep).sum())
        keep = done.mask
    assert moved > 0


def test_ties_go_to_the_lower_place_and_rows_keep_one():
    keep = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    none, flat = torch.zeros(3, 3, dtype=torch.bool), torch.ones(3, 3)
    assert am.lowest(flat, keep, none, 2).nonzero().tolist() == [[1, 0], [2, 1]]
    assert am.lowest(flat, keep, none, 9).nonzero().tolist() == [[1, 0], [2, 1]], "no row is emptied"
    certain = none.clone()
    certain[1, 0] = True
    assert am.lowest(flat, keep, certain, 2).nonzero().tolist() == [[1, 1], [2, 1]]
    done = am.exchange(keep, flat, flat, none, 0.4, exclude_just_dropped=True)
    assert done.grown.nonzero().tolist() == [[0, 1], [0, 2]]
    done = am.exchange(keep, flat, torch.tensor([[0, 5.0, 0], [9, 0, 0], [0, 8, 0]]), none, 0.4)
    assert done.grown.nonzero().tolist() == [[1, 0], [2, 1]]
    assert torch.equal(done.mask, keep)


def test_number_of_exchanged_blocks():
    assert am.swaps(0.5, 13, 25, 9) == 4, "only blocks that may go"
    assert am.swaps(0.5, 60, 100, 19) == 30
    assert am.swaps(0.5, 90, 100, 19) == 10, "not more than there are to grow"
    assert am.swaps(0.06, 10, 100, 0) == 1
    assert am.swaps(0.04, 10, 100, 0) == 0
    assert am.swaps(0.5, 25, 25, 9) == 0


def test_random_growth_is_equal_for_equal_seeds():
    chosen = config(density=0.4)
    keep = am.first_keep(chosen, am.Layer("a", 1, 0, 1), 640)[0]
    mass, none = torch.rand(10, 10) * keep, torch.zeros(10, 10, dtype=torch.bool)
    twice = [am.exchange(keep, mass, None, none, 0.5, torch.Generator().manual_seed(4)).mask for _ in range(2)]
    other = am.exchange(keep, mass, None, none, 0.5, torch.Generator().manual_seed(5)).mask
    assert torch.equal(*twice)
    assert not torch.equal(twice[0], other)


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "prefix", "tokens"), [(0.5, 1, 577), (0.28, 1, 1025), (0.6, 0, 256), (0.9, 5, 261)]
)
def test_first_masks(density, prefix, tokens):
    chosen, layer = config(density=density), am.Layer("blocks.3.attn", 4, prefix, 5)
    keep = am.first_keep(chosen, layer, tokens)
    n = math.ceil(tokens / 64)
    assert keep.shape == (4, n, n)
    assert keep.sum((1, 2)).tolist() == [math.floor(density * n * n + 0.5)] * 4
    assert keep[:, range(n), range(n)].all()
    if prefix:
        assert keep[:, 0].all()
        assert keep[:, :, 0].all()
    assert len({tuple(k.flatten().tolist()) for k in keep}) > 2, "heads are drawn apart"
    assert torch.equal(keep, am.first_keep(chosen, layer, tokens))
    assert not torch.equal(keep, am.first_keep(chosen, am.Layer("blocks.4.attn", 4, prefix, 5), tokens))


def test_a_density_that_is_too_low_is_refused():
    with pytest.raises(ModelError, match=r"blocks.0.attn: density 0.3 of 5 x 5 .* is 8 a head, but 9 .*0.360"):
        am.first_keep(config(density=0.3), am.Layer("blocks.0.attn", 2, 1, 0), 257)
    keep = am.first_keep(config(density=0.3, protect=[]), am.Layer("blocks.0.attn", 2, 1, 0), 257)
    assert keep.any(-1).all()
    with pytest.raises(ModelError, match="every block of queries"):
        am.first_keep(config(density=0.1, protect=[]), am.Layer("a", 2, 1, 0), 257)


@pytest.mark.parametrize(
    ("grid", "window", "block", "prefix"), [((6, 6), 3, 16, 1), ((5, 8), 5, 16, 3), ((8, 8), 1, 16, 0)]
)
def test_windows_are_those_of_the_tokens(grid, window, block, prefix):
    tokens = grid[0] * grid[1] + prefix
    n, want = (
        math.ceil(tokens / block),
        torch.zeros(math.ceil(tokens / block), math.ceil(tokens / block), dtype=torch.bool),
    )
    for i, j in itertools.product(range(tokens), range(tokens)):
        a, b = divmod(i - prefix, grid[1]), divmod(j - prefix, grid[1])
        near = max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= window // 2
        if i < prefix or j < prefix or near:
            want[i // block, j // block] = True
    got = am.windows(grid, window, block, prefix)
    assert got.shape == (1, n, n)
    assert torch.equal(got[0], want)
    if not prefix:
        assert torch.equal(got, kernel_patterns.windows(grid, window, block, tile=None))


def test_fixed_patterns():
    layer = am.Layer("blocks.0.attn", 3, 1, 0)
    keep = am.fixed_keep(config(pattern="strided", stride=3, local=1), layer, 577)
    assert keep.shape == (3, 10, 10)
    assert keep[:, 0].all()
    assert keep[:, :, 0].all()
    assert keep[:2, 4, 2].tolist() == [False, True], "heads begin at different blocks"
    random = config(pattern="random", density=0.4)
    assert am.fixed_keep(random, layer, 577).sum((1, 2)).tolist() == [40] * 3
    make = am.FixedMask(config(pattern="window", window=3), layer)
    assert make(197) is None
    assert make(577).q_len == 577
    assert am.FixedMask(config(pattern="window", window=3, allow_short=True), layer)(197).keep.shape == (1, 4, 4)
    with pytest.raises(ModelError, match="no square"):
        make(573)


# -- configuration, plan, models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"density": 0.0}, ["density"]),
        ({"pattern": "axial"}, ["pattern", "strided"]),
        ({"block": 48}, ["block", "48"]),
        ({"pattern": "window", "density": 0.5}, ["density", "learned", "random", "window"]),
        ({"window": 5}, ["window", '"learned"']),
        ({"pattern": "window", "window": 4}, ["window", "4"]),
        ({"pattern": "strided", "growth": "random"}, ["growth", "learned"]),
        ({"protect": ["class"]}, ["protect", "prefix"]),
        ({"update_every": "2h"}, ["update_every", "2h"]),
        ({"sparsity": 0.5}, ["sparsity"]),
    ],
)
def test_a_wrong_value_is_one_clear_error(section, words):
    with pytest.raises(ConfigError) as found:
        load_config(
            {"train_batch_size": 8, "efftrain": {"run": {"steps": 10}, "methods": {"svite_attention": section}}}
        )
    assert "efftrain.methods.svite_attention" in str(found.value)
    for word in words:
        assert word in str(found.value), str(found.value)


@pytest.mark.parametrize("other", ["autoprog", "autoprog_zero"])
def test_methods_that_cannot_run_beside_it(other):
    section = {"run": {"steps": 10}, "model": {"ema": {}}, "methods": {"svite_attention": {}, other: {}}}
    with pytest.raises(ConfigError, match=other):
        build_methods(load_config({"train_batch_size": 8, "efftrain": section}))


def spec(**kwargs) -> PlanSpec:
    values = {"seed": 5, "epochs": 0, "samples": 0, "batch": 16, "micro_batch": 8, "world": 2, "resolution": 64}
    return PlanSpec(**{**values, "stride": 4, "steps": 1000, "width": 32, **kwargs})


def prepared(model: nn.Module | None = None, plan: dict | None = None, **kwargs) -> tuple[SViTEAttention, nn.Module]:
    method = SViTEAttention(AttentionConfig(**kwargs))
    method.plan(spec(**(plan or {})))
    model = vit(64) if model is None else model
    assert method.prepare_model(model) is model
    return method, model


def test_short_sequences_are_refused():
    method = SViTEAttention(AttentionConfig())
    with pytest.raises(PlanError, match=r"197 tokens.*256 .*allow_short"):
        method.plan(spec(resolution=224, stride=16))
    method.plan(spec(resolution=256, stride=16))
    with pytest.raises(ModelError, match="17 tokens"):
        prepared(vit(16))
    _, model = prepared(vit(16), density=0.8, block=16, protect=[], allow_short=True, exclude=["blocks.1"])
    assert list(masked_attention(model)) == ["blocks.0.attn"]
    with pytest.raises(PlanError, match="update_every: 1000st is 1000 steps"):
        SViTEAttention(AttentionConfig(update_every="1000st")).plan(spec())


def test_models_that_cannot_take_masks():
    for model, words in (
        (nn.Sequential(nn.Linear(2, 2)), "Sequential.*patch_embed"),
        (vit(64, patch_drop_rate=0.2), "patch_drop_rate 0.2"),
        (vit(64, attn_drop_rate=0.1), "blocks.0.attn: attention dropout"),
        (timm.create_model("beit_base_patch16_224", img_size=272, depth=1, num_classes=2), "no attention layer"),
    ):
        with pytest.raises(ModelError, match=f"svite_attention: .*{words}"):
            prepared(model)
    with pytest.raises(ModelError, match='exclude: VisionTransformer has no module "blocks.7"'):
        prepared(exclude=["blocks.7"])
    with pytest.warns(NoEffectWarning, match="every block"):
        prepared(density=1.0)


def test_a_prepared_model():
    method, model = prepared(density=0.6)
    layers = masked_attention(model)
    assert list(layers) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(m.block_mask.keep.sum((1, 2)).tolist() == [15, 15] for m in layers.values())
    assert [n for n in model.state_dict() if "mask" in n] == [f"blocks.{i}.attn.block_mask.keep" for i in range(2)]
    shape = method.architecture()
    assert shape == {"tokens": 257, "block": 64, "layers": ["blocks.0.attn", "blocks.1.attn"]}
    again = SViTEAttention(AttentionConfig(density=0.6))
    assert again.shape_model(vit(64), shape) is not None
    with pytest.raises(ModelError, match="'block': 64"):
        SViTEAttention(AttentionConfig(density=0.6, block=32)).shape_model(vit(64), shape)
    blueprint = make_blueprint(model)
    assert torch.equal(blueprint.blocks[0].attn.block_mask.keep, model.blocks[0].attn.block_mask.keep)
    assert method.describe(None) == "attention 0.6 b64"
    context = Context(engine=SimpleNamespace(module=model), schedule=None, seed=5)
    assert method.scalars(context) == {}
    assert method.pictures(context)["sparse_attention/masks"].dtype == torch.uint8
    assert SViTEAttention(AttentionConfig(pattern="window")).describe(None) == "attention window 9 b64"


def test_a_dynamic_model_has_the_length_of_the_run():
    _, model = prepared(vit(32, dynamic_img_size=True))
    assert masked_attention(model)["blocks.0.attn"].block_mask.q_len == 257
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match="made for 257"):
        model(torch.randn(1, 3, 32, 32))


def test_fixed_patterns_take_other_lengths():
    _, model = prepared(vit(64, dynamic_img_size=True), pattern="window", window=3, block=16, allow_short=True)
    plain = vit(64, dynamic_img_size=True)
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if "mask" not in n})
    for side in (64, 32, 64):
        images = torch.randn(2, 3, side, side)
        tokens = (side // 4) ** 2 + 1
        keep = am.fixed_keep(
            config(pattern="window", window=3, block=16, allow_short=True), am.Layer("", H, 1, 0), tokens
        )
        assert not keep.all()
        use_block_attention(plain, {f"blocks.{i}.attn": BlockMask(keep, tokens, tokens, 16) for i in range(2)})
        assert torch.allclose(model(images), plain(images), atol=1e-6)
    attn = model.blocks[0].attn
    assert [key[0] for key in attn.length_masks.made] == [65]
    assert len(list(attn.block_mask.buffers())) == 6
    assert copy.deepcopy(model)(images).shape == pickle.loads(pickle.dumps(model))(images).shape  # noqa: S301
    _, model = prepared(vit(64, dynamic_img_size=True), pattern="window", window=3)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all(), "short sequences attend to everything"


def test_stages_of_other_lengths():
    from efftrain_ds.methods.efficienttrain.config import EfficientTrainConfig
    from efftrain_ds.methods.efficienttrain.method import EfficientTrain

    schedule = [{"until": 0.5, "bandwidth": 32}, {"until": 1.0, "bandwidth": 64}]
    other, full = EfficientTrain(EfficientTrainConfig(schedule=schedule)), spec()
    stages = merge_timelines([other.plan(full)], full).stages
    with pytest.raises(PlanError, match=r"stage 0 .*65 tokens, the full model 257.*fixed pattern"):
        SViTEAttention(AttentionConfig()).cost_factor(full, stages[0])
    fixed = SViTEAttention(AttentionConfig(pattern="window", window=3))
    assert fixed.cost_factor(full, stages[0]) == 1.0
    assert 0 < fixed.cost_factor(full, stages[1]) < 1


@pytest.mark.parametrize("kwargs", [{"density": 0.6}, {"pattern": "window", "window": 3}])
def test_the_price_is_that_of_the_live_blocks(kwargs):
    method, model = prepared(**kwargs)
    stage = merge_timelines([], spec()).stages[0]
    layers = masked_attention(model)
    found = attention_macs(model, {n: (m.block_mask, 257) for n, m in layers.items()})
    assert found["dense_macs"] == vit_macs(64, patch=4, dim=32, depth=2, num_classes=5)
    pairs = sum(int(m.block_mask.to_dense().sum()) * H // m.block_mask.num_heads for m in layers.values())
    assert found["dense_macs"] - found["macs"] == 2 * 16 * (2 * H * 257 * 257 - pairs)
    density = float(layers["blocks.0.attn"].block_mask.keep.float().mean())
    dense = 2 * (257 * 12 * 32 * 32 + 2 * 257 * 257 * 32)
    saved = 2 * (1 - density) * 2 * 257 * 257 * 32
    assert method.cost_factor(spec(), stage) == pytest.approx(1 - saved / dense)
    assert method.cost_factor(spec(width=0), stage) == 1.0
