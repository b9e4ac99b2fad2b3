"""Scores of units against plain autograd, and probes that leave no trace in the step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from efftrain_ds.core.errors import ModelError
from efftrain_ds.models import unit_probes
from efftrain_ds.models.attention import use_block_attention
from efftrain_ds.models.masked import mask_layers
from efftrain_ds.models.unit_export import dense_twin
from efftrain_ds.models.unit_probes import Candidates, UnitProbe
from efftrain_ds.models.units import compact_, entry_mask, unit_entries, units_of

TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10)
VARIANTS = {
    "plain": {},
    "registers": dict(reg_tokens=2, init_values=0.3, act_layer=nn.SiLU),
    "qk_norm": dict(qk_norm=True, qkv_bias=False),
}
KEEP = {"blocks.0": ([3, 1], [*range(200, 0, -2)]), "blocks.1": ([2, 0, 1], [*range(0, 256, 2)])}


def vit(seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    model = VisionTransformer(**{**TINY, **kwargs})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def batch(seed=1, count=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator).to(dtype), torch.arange(count) % 10


def dead_of(full):
    return {
        name: (
            [h for h in range(units.heads) if h not in KEEP[name][0]],
            [j for j in range(units.neurons) if j not in KEEP[name][1]],
        )
        for name, units in full.items()
    }


def draws(full, dtype=torch.float32, seed=5):
    """Shadows of all dead units."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (heads, neurons) in dead_of(full).items():
        unit = full[name]
        columns = torch.randn(len(heads), unit.width, unit.head_dim, generator=generator) * 0.1
        rows = torch.randn(len(neurons), unit.width, generator=generator) * 0.1
        found[name] = Candidates(columns.to(dtype), rows.to(dtype))
    return found


@torch.no_grad()
def carrying(compact, full, candidates):
    """The compact model with the shadows as real units: drawn proj columns and fc1 rows, zeros elsewhere."""
    model = dense_twin(compact, full, KEEP)
    for block, (heads, neurons) in dead_of(full).items():
        given = candidates[block]
        for i, head in enumerate(heads):
            ((name, take),) = unit_entries(model, block, [head], parts=("proj",)).items()
            model.get_parameter(name)[:, take[1]] = given.head_draws[i]
            ((name, take), *_) = unit_entries(model, block, [head], parts=("q", "k")).items()
            model.get_parameter(name)[take[0]] = 0.1  # their queries and keys do not matter
        model.get_submodule(block).mlp.fc1.weight[neurons] = given.neuron_rows
    return model


def direct(model, x, y, micro=1):
    """I_h, R_h and Q_j of all units of a model by plain autograd: a dictionary by block, and the gradients."""
    found = {}
    seen = {}

    def keep(name):
        def hook(module, args):
            args[0].retain_grad()
            seen[name].append(args[0])

        return hook

    units = units_of(model)
    handles = []
    for name in units:
        seen[name] = []
        handles.append(model.get_submodule(name).attn.proj.register_forward_pre_hook(keep(name)))
    model.zero_grad()
    for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True):
        (F.cross_entropy(model(xs), ys) / micro).backward()
    for handle in handles:
        handle.remove()
    for name, unit in units.items():
        a, gamma = torch.cat([t.detach() for t in seen[name]]), torch.cat([t.grad for t in seen[name]])
        a, gamma = (t.unflatten(-1, (unit.heads, unit.head_dim)) for t in (a, gamma))
        columns = model.get_submodule(name).mlp.fc2.weight.grad
        found[name] = (
            (a * gamma).sum((1, 3)).abs().mean(0),
            gamma.abs().sum((1, 3)).mean(0),
            columns.abs().sum(0),
        )
    return found


def probed(model, candidates, x, y, micro=1, scale=1.0, run=None):
    """Scores, losses and gradients of a step with the probe on."""
    probe = UnitProbe(model, candidates)
    probe.start()
    model.zero_grad()
    losses = []
    for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True):
        logits = (model if run is None else run)(xs)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ys)
        losses.append(loss.detach())
        (loss * scale / micro).backward()
    probe.stop()
    return probe.scores(scale), losses, {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_scores(scores, want, full, **tolerance):
    for name, (heads, neurons) in dead_of(full).items():
        got, (prune, grow, columns) = scores[name], want[name]
        live_heads, live_neurons = KEEP[name]
        torch.testing.assert_close(got.head_prune, prune[live_heads], **tolerance)
        torch.testing.assert_close(got.head_grow_live, grow[live_heads], **tolerance)
        torch.testing.assert_close(got.head_grow_dead, grow[heads], **tolerance)
        torch.testing.assert_close(got.neuron_grow_live, columns[live_neurons], **tolerance)
        torch.testing.assert_close(got.neuron_grow_dead, columns[neurons], **tolerance)
        assert min(float(t.min()) for t in vars(got).values() if torch.is_tensor(t)) > 0


EXACT = dict(rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1 << 24, 1])
def test_scores_are_those_of_a_model_that_carries_the_shadows(variant, chunk, monkeypatch):
    monkeypatch.setattr(unit_probes, "CHUNK_ELEMENTS", chunk)
    model = vit(dtype=torch.float64, **VARIANTS[variant])
    full = units_of(model)
    compact = compact_(model, KEEP)
    candidates = draws(full, torch.float64)
    x, y = batch(dtype=torch.float64)
    wide = carrying(compact, full, candidates)
    assert float((wide(x) - compact(x)).detach().abs().max()) < 1e-12
    want = direct(wide, x, y)
    scores, _, _ = probed(compact, candidates, x, y)
    assert scores["blocks.0"].head_prune.dtype == torch.float64
    assert scores["blocks.0"].images == 6
    assert_scores(scores, want, full, **EXACT)
    assert float(want["blocks.0"][0][dead_of(full)["blocks.0"][0]].abs().max()) == 0, "A of a shadow is zero"


def test_micro_batches_scale_and_checkpointing_change_nothing():
    model = vit(dtype=torch.float64, init_values=0.3)
    full = units_of(model)
    compact = compact_(model, KEEP)
    candidates = draws(full, torch.float64)
    x, y = batch(dtype=torch.float64)
    want = direct(carrying(compact, full, candidates), x, y)
    assert_scores(probed(compact, candidates, x, y, micro=3)[0], want, full, **EXACT)
    assert_scores(probed(compact, candidates, x, y, scale=64.0)[0], want, full, **EXACT)
    for reentrant in (False, True):

        def run(images, reentrant=reentrant):
            return checkpoint(compact, images.requires_grad_(), use_reentrant=reentrant)

        scores = probed(compact, candidates, x, y, micro=2, run=run)[0]
        assert scores["blocks.1"].images == 6
        assert_scores(scores, want, full, **EXACT)
    compact.set_grad_checkpointing()
    assert_scores(probed(compact, candidates, x, y, micro=2)[0], want, full, **EXACT)


def test_on_our_attention_and_with_masked_layers():
    model = vit(dtype=torch.float64)
    full = units_of(model)
    compact = compact_(model, KEEP)
    candidates = draws(full, torch.float64)
    x, y = batch(dtype=torch.float64)
    want = direct(carrying(compact, full, candidates), x, y)
    mask_layers(compact, {"blocks.0.attn.proj.weight": torch.ones(64, 32, dtype=torch.bool)})
    use_block_attention(compact)
    assert_scores(probed(compact, candidates, x, y)[0], want, full, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_loss_and_gradients_are_the_same_to_the_last_bit(kind):
    model = compact_(vit(init_values=0.3, drop_path_rate=0.3, proj_drop_rate=0.1), KEEP)
    full = units_of(vit())
    candidates = draws(full)
    x, y = batch()
    if kind == "bf16":
        model, x = model.bfloat16(), x.bfloat16()
    results = []
    for on in (False, True):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            if on:
                scores, losses, grads = probed(model, candidates, x, y, micro=2)
            else:
                model.zero_grad()
                losses = []
                for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
                    loss = F.cross_entropy(model(xs).float(), ys)
                    losses.append(loss.detach())
                    (loss / 2).backward()
                grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append((losses, grads))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(t.dtype == torch.float32 for s in scores.values() for t in vars(s).values() if torch.is_tensor(t))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks are gone"


def test_low_precision_scores_are_near():
    full = units_of(vit())
    compact = compact_(vit(), KEEP)
    candidates = draws(full)
    x, y = batch()
    want = direct(carrying(compact, full, candidates), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _, _ = probed(compact, candidates, x, y)
    assert_scores(scores, want, full, rtol=0.2, atol=1e-3)


def test_heads_permute_with_their_scores_and_the_loss_scale_keeps_the_ranking():
    model = vit()
    x, y = batch()
    order = [2, 0, 3, 1]
    moved = compact_(copy.deepcopy(model), {name: (order, [*range(256)]) for name in units_of(model)})
    plain, _, _ = probed(model, {}, x, y)
    other, _, _ = probed(moved, {}, x, y)
    scaled = UnitProbe(model)
    scaled.start()
    (F.cross_entropy(model(x), y) * 3.0).backward()
    scaled.stop()
    times = scaled.scores()
    for name in plain:
        assert plain[name].head_grow_dead.shape == plain[name].neuron_grow_dead.shape == (0,)
        for key in ("head_prune", "head_grow_live"):
            torch.testing.assert_close(getattr(other[name], key), getattr(plain[name], key)[order])
        for key in ("head_prune", "head_grow_live", "neuron_grow_live"):
            a, b = getattr(plain[name], key), getattr(times[name], key)
            torch.testing.assert_close(b, a * 3)
            assert torch.equal(a.argsort()[:8], b.argsort()[:8])


@pytest.mark.parametrize("how", ["module.compile", pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_compiled_models_run_eagerly_for_one_step_and_compiled_after_it(how):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = vit(dtype=torch.float64, depth=1)
    full = units_of(model)
    compact = compact_(model, {"blocks.0": KEEP["blocks.0"]})
    candidates = draws(full, torch.float64)
    x, y = batch(dtype=torch.float64)
    want = direct(carrying(compact, full, candidates), x, y)
    counter = CompileCounterWithBackend("aot_eager")
    run = compact
    if how == "module.compile":
        compact.compile(backend=counter)
    else:
        run = torch.compile(compact, backend=counter)
    before = run(x).detach()
    graphs = counter.frame_count
    assert graphs > 0
    for _ in range(2):
        scores, _, _ = probed(compact, candidates, x, y, run=run)
        assert_scores(scores, want, full, **EXACT)
        F.cross_entropy(run(x), y).backward()  # compiled again, without a trace of the probe
        assert counter.frame_count == graphs
    torch.testing.assert_close(run(x).detach(), before)


def test_forward_passes_without_gradients_do_not_count():
    model = compact_(vit(), KEEP).eval()
    x, y = batch()
    probe = UnitProbe(model, draws(units_of(vit())))
    with pytest.raises(ModelError, match="no backward pass"):
        probe.scores()
    probe.start()
    with torch.no_grad():
        model(x)
    with pytest.raises(ModelError, match="no backward pass"):
        probe.scores()
    F.cross_entropy(model(x), y).backward()
    model(x)  # no backward pass
    first = probe.scores()
    probe.stop(), probe.stop()
    assert first["blocks.0"].images == 6
    assert probe.scores() is first
    probe.start()
    F.cross_entropy(model(x), y).backward()
    again = probe.scores()
    probe.stop()
    torch.testing.assert_close(vars(again["blocks.1"]), vars(first["blocks.1"]), rtol=0, atol=0)


def test_frozen_blocks_have_no_head_scores():
    model = vit()
    model.requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    x, y = batch()
    probe = UnitProbe(model)
    probe.start()
    F.cross_entropy(model(x), y).backward()
    probe.stop()
    scores = probe.scores()
    assert (scores["blocks.0"].images, scores["blocks.1"].images) == (0, 6)
    assert float(scores["blocks.0"].head_prune.abs().max()) == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"blocks.9": Candidates()}, '"blocks.9" is no block of the model'),
        (
            {"blocks.0": Candidates(torch.zeros(1, 16, 64))},
            r"head_draws has shape \[1, 16, 64\]; allowed: \[n, 64, 16\]",
        ),
        ({"blocks.1": Candidates(None, torch.zeros(2, 16))}, r"neuron_rows has shape \[2, 16\]; allowed: \[n, 64\]"),
    ],
)
def test_shadows_that_do_not_fit(given, text):
    with pytest.raises(ModelError, match=text):
        UnitProbe(vit(), given)


def test_entry_masks_are_on_the_device_of_choice():
    assert entry_mask((2, 3), {1: [2]}, "meta").is_meta
