"""The token selector as a module: counts, values, gradients, noise, compilation, copies, and models it refuses."""

import copy
from math import log

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models.attention import use_block_attention
from efftrain_ds.models.tokens import TokenSelector, insert_selector, kept_tokens, selector_of
from efftrain_ds.zero.blueprint import make_blueprint, materialise

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
KINDS = {
    "class token": (VisionTransformer, {}, 1),
    "registers": (VisionTransformer, {"reg_tokens": 4}, 5),
    "registers apart": (VisionTransformer, {"reg_tokens": 2, "no_embed_class": True}, 3),
    "no prefix": (VisionTransformer, {"class_token": False, "global_pool": "avg"}, 0),
    "mean over patches": (VisionTransformer, {"global_pool": "avg"}, 1),
    "distilled": (VisionTransformerDistilled, {}, 2),
    "norm_pre": (VisionTransformer, {"pre_norm": True}, 1),
}


def vit(kind="class token", **changes):
    torch.manual_seed(0)
    cls, kwargs, _ = KINDS[kind]
    return cls(**{**SIZES, **kwargs, **changes})


def images(count=3, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def tokens(count=3, n=17, dim=64):
    return torch.randn(count, n, dim, generator=torch.Generator().manual_seed(2))


def selector(select="gather", keep=0.5, prefix=1, **kwargs):
    made = TokenSelector(64, keep=keep, select=select, prefix=prefix, seed=3, **kwargs)
    with torch.no_grad():
        made.scorer.weight.mul_(20)  # scores that matter beside the noise
    return made


def kept_places(out, x):
    """Which of the tokens x [B, n, D] are in out [B, k or n, D]: bool [B, n]."""
    return (out[:, :, None] == x[:, None]).all(-1).any(1)


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "count"), [(1.0, 197), (0.95, 187), (0.9, 177), (0.7, 138), (0.5, 99)])
def test_published_counts(keep, count):
    assert kept_tokens(keep, 197, 1) == count
    assert selector(keep=keep).kept(197) == count


def test_counts_at_the_edges():
    assert kept_tokens(0.5, 5) == 3  # half up
    assert kept_tokens(0.01, 17, 1) == 2  # never without a patch
    assert kept_tokens(0.01, 17, 5) == 6
    assert kept_tokens(0.1, 10, 0) == 1
    for keep in (0.0, 1.1, -0.5, float("nan")):
        with pytest.raises(ModelError, match="above 0, at most 1"):
            selector(keep=keep)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_the_blocks_see_exactly_k_tokens_and_all_of_the_prefix(kind, training):
    model, prefix = vit(kind).train(training), KINDS[kind][2]
    insert_selector(model, 0.5)
    seen, before = [], []
    model.patch_drop.register_forward_pre_hook(lambda m, i: before.append(i[0]))
    model.norm_pre.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    torch.manual_seed(5)
    logits = model(images())
    total = 16 + prefix
    assert seen[0].shape == (3, kept_tokens(0.5, total, prefix), 64)
    assert logits.shape == (3, 10)
    for image in range(3):
        same = (seen[0][image][:, None] == before[0][image]).all(-1)
        places = [int(row.nonzero()) for row in same]
        assert places == sorted(set(places))  # each once, in order
        assert places[:prefix] == list(range(prefix))


def test_the_number_of_tokens_follows_the_input():
    model = insert_selector(vit(dynamic_img_size=True), 0.5)
    counts = []
    model.norm_pre.register_forward_pre_hook(lambda m, i: counts.append(i[0].shape[1]))
    for side in (32, 16, 24, 8):
        model(images(side=side))
    assert counts == [9, 3, 5, 2]


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["gather", "mask"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_all_tokens_kept_is_no_selector_to_the_bit(kind, select, training):
    model, pairs = vit(kind).train(training), []
    want = model(images())
    insert_selector(model, 1.0, select)
    model.patch_drop.register_forward_hook(lambda m, i, out: pairs.append((i[0], out)))
    got = model(images())
    assert torch.equal(*pairs[0])
    # without a prefix the tokens arrive transposed in memory, and another layout rounds otherwise
    assert torch.equal(got, want) if KINDS[kind][2] else torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mask_keeps_k_tokens_and_the_prefix(training):
    module, x = selector("mask", prefix=2).train(training), tokens(64)
    extra = set()
    for seed in range(5):
        torch.manual_seed(seed)
        out = module(x).detach()
        kept = (out == x).all(-1)
        assert torch.equal(kept, (out != 0).any(-1))  # a token is itself or zero
        assert kept[:, :2].all()
        extra |= set((kept.sum(1) - module.kept(17)).tolist())
    assert extra == {0, 1, 2}  # up to P more than k


def test_evaluation_takes_the_best_scores_and_draws_nothing():
    module, x = selector().eval(), tokens()
    state = torch.get_rng_state()
    out = module(x)
    assert torch.equal(out, module(x))
    assert torch.equal(torch.get_rng_state(), state)
    best = module.scorer(x[:, 1:]).squeeze(-1).topk(8, dim=1).indices.sort(1).values + 1
    assert torch.equal(out[:, 1:], torch.stack([x[i, row] for i, row in enumerate(best)]))
    single = torch.cat([module(x[i : i + 1]) for i in range(3)])
    assert torch.equal(out, single)  # an image's tokens do not depend on the batch
    module.train()
    assert not torch.equal(module(x), module(x))


def test_equal_scores_go_to_the_earlier_token():
    for select in ("gather", "mask"):
        module, x = selector(select).eval(), tokens()
        with torch.no_grad():
            module.scorer.weight.zero_()
        assert kept_places(module(x), x)[0].tolist() == [True] * 9 + [False] * 8


def test_noise_is_gumbel():
    module = selector(keep=1 / 17 + 0.01, prefix=0)  # the best of 17
    with torch.no_grad():
        module.scorer.weight.zero_()
        module.scorer.weight[0, 0] = 1.0
    x = torch.zeros(20000, 3, 64)
    scores = torch.tensor([0.0, 1.0, -1.0])
    x[..., 0], x[..., 1] = scores, torch.tensor([1.0, 2.0, 3.0])
    torch.manual_seed(0)
    winners = module(x)[:, 0, 1]
    shares = torch.stack([(winners == v).float().mean() for v in (1.0, 2.0, 3.0)])
    assert torch.allclose(shares, scores.softmax(0), atol=0.015)  # the law of Gumbel's maximum


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["gather", "mask"])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_the_scorer_has_a_gradient(select, keep):
    model = insert_selector(vit(), keep, select)
    torch.manual_seed(1)
    model(images()).square().sum().backward()
    grad = model.patch_drop.scorer.weight.grad
    assert grad.isfinite().all()
    assert grad.count_nonzero() == 64
    assert model.patch_drop.scorer.bias.grad.abs() < 1e-4 * grad.abs().max()  # moves all scores alike


@pytest.mark.parametrize("select", ["gather", "mask"])
def test_gradient_is_that_of_the_softmax(select):
    """Against the formula written out for one fixed draw."""
    module, x = selector(select, tau=0.7), tokens().requires_grad_()
    torch.manual_seed(4)
    out = module(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    got = torch.autograd.grad(out, [module.scorer.weight, x], upstream)
    torch.manual_seed(4)
    first = 1 if select == "gather" else 0
    scores = module.scorer(x)[:, first:].squeeze(-1)
    noise = -torch.empty_like(scores).exponential_().log()
    soft = ((scores.log_softmax(1) + noise) / 0.7).softmax(1)
    k = module.kept(17) - first
    hard = torch.zeros_like(soft).scatter(1, (scores + noise).topk(k, dim=1).indices, 1.0)
    m = hard - soft.detach() + soft
    if select == "gather":
        m = torch.cat((torch.ones(3, 1), m), 1)
        rows = [row.nonzero().flatten() for row in m.detach() > 0.5]
        want = torch.stack([(x[i] * m[i, :, None])[row] for i, row in enumerate(rows)])
    else:
        m = torch.cat((torch.ones(3, 1), m[:, 1:]), 1)
        want = x * m[..., None]
    assert torch.allclose(out, want, atol=1e-6)
    for a, b in zip(got, torch.autograd.grad(want, [module.scorer.weight, x], upstream), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("select", ["gather", "mask"])
def test_tau_never_changes_the_choice(select):
    module, x = selector(select), tokens(16)
    chosen, grads = [], []
    for tau in (10.0, 1.0, 0.1, 1e-4):
        module.tau.fill_(tau)
        torch.manual_seed(7)
        out = module(x)
        module.scorer.weight.grad = None
        out.square().sum().backward()
        chosen.append(out.detach())
        grads.append(module.scorer.weight.grad.norm())
    assert all(torch.equal(chosen[0], other) for other in chosen[1:])
    assert len({round(float(g), 6) for g in grads}) == 4


def test_entropy_of_the_scores():
    module, x = selector(), tokens()
    module(x)
    logs = module.scorer(x)[:, 1:].squeeze(-1).log_softmax(1).detach()
    assert module.entropy == pytest.approx(float(-(logs.exp() * logs).sum(1).mean()), rel=1e-5)
    with torch.no_grad():
        module.scorer.weight.zero_()
    module(x)
    assert float(module.entropy) == pytest.approx(log(16), rel=1e-5)
    module.eval()(2 * x)
    assert float(module.entropy) == pytest.approx(log(16), rel=1e-5)


# -- as a part of models -------------------------------------------------------------------------------------------


def test_the_runs_random_numbers_do_not_move_and_seeds_count():
    model = vit()
    state = torch.get_rng_state()
    insert_selector(model, 0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (insert_selector(vit(), 0.5, seed=s).patch_drop.scorer for s in (1, 1, 2))
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert 0 < one.weight.abs().max() < 0.1
    assert not one.bias.any()
    assert one.efftrain_dense is True


def test_casts_leave_the_temperature_alone():
    model = insert_selector(vit(), 0.5).to(torch.bfloat16)
    selector = selector_of(model)
    selector.tau.fill_(0.1)
    model.half().bfloat16()
    assert selector.tau.dtype == selector.entropy.dtype == torch.float32
    assert float(selector.tau) == pytest.approx(0.1, rel=1e-6)
    assert selector.scorer.weight.dtype == torch.bfloat16
    out = model(images().bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert selector.scorer.weight.grad.isfinite().all()
    assert not [name for name in model.state_dict() if name.endswith(("tau", "noise", "entropy"))]


def test_copies_and_blueprints():
    model = insert_selector(vit(), 0.5)
    selector_of(model).keep = 0.7
    selector_of(model).tau.fill_(3.0)
    for other in (copy.deepcopy(model), materialise(make_blueprint(model))):
        found = selector_of(other)
        assert found is not selector_of(model)
        assert (found.kept(17), float(found.tau), found.scorer.efftrain_dense) == (12, 3.0, True)
    found.keep = 0.5
    assert selector_of(model).keep == 0.7
    with torch.device("meta"):
        hollow = VisionTransformer(**SIZES)
    insert_selector(hollow, 0.5)
    assert hollow.patch_drop.scorer.weight.is_meta
    assert selector_of(nn.Sequential(vit())) is None


@pytest.mark.parametrize("select", ["gather", "mask"])
def test_compiled_whole_and_once(select):
    from torch._dynamo.testing import CompileCounterWithBackend

    module, x = selector(select), tokens().requires_grad_()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step in range(4):
        module.tau.fill_(10.0 - 3 * step)
        torch.manual_seed(step)
        out = compiled(x)
        torch.manual_seed(step)
        assert torch.allclose(out, module(x), atol=1e-6)
        out.sum().backward()
    assert counter.frame_count == 1
    assert module.scorer.weight.grad.count_nonzero()
    module.keep = 0.7
    assert compiled(x).shape[1] == (12 if select == "gather" else 17)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("keeps", "limit"), [((1.0, 0.7), 2), pytest.param((1.0, 0.9, 0.8, 0.7, 0.6), 8, marks=pytest.mark.slow)]
)
def test_every_share_is_compiled_for_training_and_evaluation(keeps, limit):
    from torch._dynamo.backends.registry import lookup_backend

    module, x, runs = selector(), tokens().requires_grad_(), []

    def backend(graph, inputs):
        made = lookup_backend("aot_eager")(graph, inputs)
        return lambda *args: (runs.append(len(seen)), made(*args))[1]

    torch._dynamo.reset()
    module.compile(backend=backend)
    seen = []
    with torch._dynamo.config.patch(recompile_limit=limit):  # versions of a function
        for keep in keeps:
            module.keep = keep
            module.keep = keep  # an equal one changes nothing
            for training in (True, False):
                out = module.train(training)(x)
                if training:
                    out.sum().backward()
                seen.append(out.shape[1])
    assert seen == [kept_tokens(keep, 17, 1) for keep in keeps for _ in range(2)]
    assert runs == list(range(2 * len(keeps))), "every call ran compiled code"
    torch._dynamo.reset()


def test_an_equal_share_keeps_compiled_code(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    module = selector()
    module.keep = 0.5
    copy.deepcopy(module).keep = 0.5
    assert not resets
    module.keep = 0.7
    assert resets == [1]


@pytest.mark.slow
@pytest.mark.parametrize("select", ["gather", "mask"])
def test_compiled_by_inductor_at_several_sizes(select):
    model = insert_selector(vit(depth=1, dynamic_img_size=True), 0.5, select)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for side in (32, 16, 24, 8):
        model.train()
        compiled(images(side=side)).sum().backward()
        model.eval()
        assert torch.allclose(compiled(images(side=side)), model(images(side=side)), atol=1e-5)
    assert model.patch_drop.scorer.weight.grad.count_nonzero()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("select", ["gather", "mask"])
@pytest.mark.parametrize("kind", ["class token", "distilled", "no prefix"])
def test_onnx_has_equal_logits(kind, select, tmp_path):
    from efftrain_ds.export import onnx

    model = insert_selector(vit(kind), 0.6, select).eval()
    assert onnx.write(model, images(5), tmp_path / "model.onnx") < 1e-5


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Eva(**SIZES), ["Eva", "VisionTransformer"]),
        (lambda: nn.Sequential(vit()), ["Sequential", "VisionTransformer"]),
        (lambda: vit(patch_drop_rate=0.2), ["patch_drop", "PatchDropout", "patch_drop_rate 0"]),
        (lambda: insert_selector(vit(), 0.5), ["already"]),
    ],
)
def test_models_it_cannot_take(build, words):
    model = build()
    with pytest.raises(ModelError) as found:
        insert_selector(model, 0.5)
    assert all(word in str(found.value) for word in words), found.value


def test_shares_that_leave_no_patch():
    with pytest.raises(ModelError, match=r"0\.05 of 17 tokens leaves no patch beside 1 .* at least 0\.118"):
        insert_selector(vit(), 0.05)
    with pytest.raises(ModelError, match="0.2 of 21 tokens"):
        insert_selector(vit("registers"), 0.2)
    with pytest.raises(ModelError, match='"random", allowed: gather, mask'):
        insert_selector(vit(), 0.5, "random")


def test_block_masks_are_refused_for_gathered_tokens():
    from efftrain_ds.kernels.attention import BlockMask

    model = vit()
    use_block_attention(model, {"blocks.1.attn": BlockMask(torch.ones(1, 2, 2, dtype=torch.bool), 17, 17, 16)})
    with pytest.raises(ModelError, match=r"blocks\.1\.attn"):
        insert_selector(model, 0.5)
    assert isinstance(model.patch_drop, nn.Identity)


@pytest.mark.parametrize("select", ["gather", "mask"])
def test_without_noise_training_chooses_as_evaluation_does(select):
    model = insert_selector(vit(), 0.5, select)
    selector = selector_of(model)
    tokens = torch.randn(3, 17, model.embed_dim)
    chosen = selector.eval()(tokens)
    selector.train().noise.fill_(0.0)
    assert torch.equal(selector(tokens), chosen)
    selector.noise.fill_(5.0)
    assert not torch.equal(selector(tokens), chosen)
