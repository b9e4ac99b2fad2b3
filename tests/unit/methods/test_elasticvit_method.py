"""ElasticViT's method: configuration, losses of the passes, teachers, calibration, price."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from efftrain_ds.config.loader import build_methods, load_config
from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import ConfigError, ModelError, PlanError
from efftrain_ds.core.timeline import PlanSpec
from efftrain_ds.methods.elasticvit.calibrate import batch_norms, calibrate, kept_statistics
from efftrain_ds.methods.elasticvit.config import ElasticViTConfig, TeacherConfig
from efftrain_ds.methods.elasticvit.losses import alpha_div
from efftrain_ds.methods.elasticvit.method import ElasticVit
from efftrain_ds.methods.elasticvit.scoring import Images, score
from efftrain_ds.methods.elasticvit.targets import Targets, soft_labels
from efftrain_ds.methods.elasticvit.teacher import Teacher, make_teachers
from efftrain_ds.methods.elasticvit.update import Update
from efftrain_ds.models.adapters import create_model
from efftrain_ds.models.elastic import elasticvit_space
from efftrain_ds.models.elastic.named import space_of, unused_parts
from tests.distributed.elasticvit_jobs import HYBRID, LEVELS, PLAIN, supernet


def _config(**changes) -> ElasticViTConfig:
    return ElasticViTConfig.model_validate({"levels": (4000, 8000), "window": 2000, "rows": 5, **changes})


LEVELS_OF_HYBRID = {"levels": (22000, 32000), "window": 6000}


def _spec(space, **changes) -> PlanSpec:
    return PlanSpec(0, 1.0, 100, 10, 5, 2, 12, 4, space=space, **changes)


def test_names_of_supernets():
    net = create_model("elasticvit", resolution=32, num_classes=7, divisor=4, resolutions=[24, 32])
    assert net.space == elasticvit_space(divisor=4, num_classes=7, resolutions=(24, 32))
    assert space_of("elasticvit", {"divisor": 4, "resolutions": [24, 32]}, 7) == net.space
    space = {key: value for key, value in HYBRID.to_dict().items() if key != "num_classes"}
    assert space_of("elasticvit", {"space": space}, 10) == HYBRID
    assert space_of("deit_tiny_patch16_224", {}, 10) is None
    with pytest.raises(ModelError, match='"widths" is missing'):
        space_of("elastic_vit", {"depths": [2]}, 10)
    with pytest.raises(ModelError, match='unknown entry "stagess".*Did you mean "stages"'):
        space_of("elasticvit", {"space": {**space, "stagess": []}}, 10)
    with pytest.raises(ModelError, match="efftrain.model.pretrained"):
        create_model("elasticvit", resolution=32, num_classes=7, pretrained=True)


def test_unused_parts_get_no_gradient():
    for space in (PLAIN, HYBRID):
        net = supernet(space)
        configs = [space.min(), space.min()]
        sum(net(torch.randn(3, 3, 12, 12), config).sum() for config in configs).backward()
        blocks = unused_parts(space, configs)
        unused = {n for n, p in net.named_parameters() if p.grad is None}
        assert unused == {n for n, _ in net.named_parameters() if n.startswith(tuple(f"{b}." for b in blocks))}
        assert unused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("smallest", "random")}, 'then "random" ones'),
        ({"modes": ()}, "needed"),
        ({"levels": (4000,), "window": None}, "window: missing"),
        ({"levels": 4}, "levels that are spread"),
        ({"evaluate": ("smallest", "smallest")}, "each once"),
        ({"search": {}}, "a limit is needed"),
        ({"bank": {"exploit": {"at": (0.5, 0.1)}}}, "ascending"),
        ({"bank": {"refresh": "10min"}}, "an interval of steps"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


def test_what_does_not_fit_the_space():
    def plan(space=PLAIN, **changes):
        return ElasticVit(_config(**changes)).plan(_spec(space))

    assert plan().segments[0].end == 1
    with pytest.raises(PlanError, match="the model is no supernet"):
        plan(None)
    with pytest.raises(ConfigError, match=r"elasticvit.levels: level 1 K MACs lies below the smallest"):
        plan(levels=(1000,), window=10)
    with pytest.raises(ConfigError, match="level 3; there are levels 0 to 1"):
        plan(evaluate=("smallest", 3))
    with pytest.raises(ConfigError, match=r"elasticvit.bank: capacities \[1, 2, 3\] for 2 levels"):
        plan(bank={"capacity": (1, 2, 3)})
    with pytest.raises(ConfigError, match=r"elasticvit.smallest\[0\] has level; needed: up_to, config"):
        plan(smallest=[{"level": 3}])
    config = HYBRID.min().to_dict()
    config["stages"]["vit9"] = config["stages"].pop("vit")
    with pytest.raises(ConfigError, match=r'elasticvit.smallest\[0\].config.stages: unknown entry "vit9".*mean "vit"'):
        plan(HYBRID, **LEVELS_OF_HYBRID, smallest=[{"up_to": None, "config": config}])
    with pytest.raises(ModelError, match="Linear is no supernet"):
        ElasticVit(_config()).prepare_model(nn.Linear(2, 2))


def test_in_a_file():
    text = {"train_batch_size": 8, "gradient_clipping": 1.0, "efftrain": {"methods": {"elasticvit": {"wlak": "x"}}}}
    with pytest.raises(ConfigError, match='Did you mean "walk"'):
        load_config(text, world=1)
    text["efftrain"]["methods"] = {"elasticvit": {}, "svite": {}}
    with pytest.raises(ConfigError, match="elasticvit"):
        load_config(text, world=1)
    text["efftrain"]["methods"] = {"elasticvit": {}}
    with pytest.raises(ConfigError, match=r"gradient_clipping: 1, but efftrain.methods.elasticvit.agc clips"):
        build_methods(load_config(text, world=1))
    del text["gradient_clipping"]
    with pytest.raises(ConfigError, match="gradient_clipping: not given, which means 1.0, but"):
        build_methods(load_config(text, world=1))
    for changes in ({"gradient_clipping": 0.0}, {"efftrain": {"methods": {"elasticvit": {"agc": None}}}}):
        assert len(build_methods(load_config({**text, **changes}, world=1))) == 1


def test_published_settings_in_the_published_space():
    method = ElasticVit(ElasticViTConfig())
    method.plan(_spec(elasticvit_space()))
    assert method.passes == 4
    assert method.levels.macs[-1] == 1_200_000_000
    assert len(method.smallest) == 3
    assert method.bank.capacity == (150,) * 4 + (50,) * 4


def test_price_of_a_step():
    def price(**changes):
        method = ElasticVit(ElasticViTConfig.model_validate(changes))
        spec = PlanSpec(0, 10.0, 1_281_167, 768, 96, 8, 224, 32, space=elasticvit_space())
        method.plan(spec)
        return method.cost_factor(spec, None)

    # (3 x (mean level + half a window) + mean smallest) / largest, all in M MACs
    mean, least = 4300 / 8, (2 * 38.286016 + 2 * 161.671 + 4 * 290.31) / 8
    passes = price(bank=None)
    assert passes == pytest.approx((3 * (mean + 10) + least) / 3213.103, rel=1e-3)
    # q is .2, .35, ... for about a sixth of the run each: 0.57 on average; a score is a forward pass, a third
    again = (99 * 0.2 + 100 * (0.35 + 0.5 + 0.65 + 0.8 + 0.95) + 11 * 1.0) / 610
    never = price(bank={"refresh": None, "refresh_level": None})
    assert never - passes == pytest.approx((1 - again) * 3 * (mean + 10) / 3 / 3213.103, rel=1e-3)
    # 150 entries of four levels and 50 of four: 800 forward passes of 256 images for 1,668 x 768
    every = price(bank={"refresh_level": None}) - never
    assert every == pytest.approx((150 * 1040 + 50 * 3340) * 256 / (1668 * 768) / 3 / 3213.103, rel=1e-3)
    # a frozen ViT-Ti of 1.26 G MACs sees every image once; at 112 pixels a good quarter of that
    teacher = {"model": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"}
    assert price(bank=None, teachers=(teacher,)) - passes == pytest.approx(1258 / 3 / 3213.103, rel=0.01)
    assert price(bank=None, teachers=({**teacher, "resolution": 112},)) - passes < 0.3 * 1258 / 3 / 3213.103
    assert price(bank=None, teachers=({"model": "hf-hub:someone/something"},)) == passes
    with pytest.raises(ModelError, match='teachers.0.model: timm has no model "resnet99"'):
        price(teachers=({"model": "resnet99"},))


# -- losses ------------------------------------------------------------------------------------------------------------


def _logits(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator, requires_grad=True) for _ in range(count)]


def _batch(**changes) -> Batch:
    return Batch(images=torch.randn(4, 3, 8, 8), labels=torch.tensor([0, 2, 1, 1]), **changes)


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach())


def test_smallest_learns_the_mean_of_the_random_ones():
    targets = Targets(_config(label_smoothing=0.0), [], 3)
    batch, (a, b, c, d) = _batch(), _logits(4)
    targets.begin(batch)
    first = targets.loss("random", a)
    _same(first, nn.functional.cross_entropy(a, batch.labels))
    targets.loss("random", b)
    targets.loss("random", c)
    mean = torch.stack([x.softmax(-1) for x in (a, b, c)]).mean(0)
    loss = targets.loss("smallest", d)
    _same(loss, alpha_div(d, mean))
    loss.backward()
    assert a.grad is None  # nothing goes back into the targets
    targets.begin(batch)  # a new micro-batch starts without predictions
    _same(targets.loss("smallest", d), nn.functional.cross_entropy(d, batch.labels))


def test_largest_teaches_all_others():
    targets = Targets(_config(modes=("largest", "random", "smallest"), label_smoothing=0.1), [], 3)
    batch, (a, b, c) = _batch(), _logits(3)
    targets.begin(batch)
    _same(targets.loss("largest", a), nn.functional.cross_entropy(a, batch.labels, label_smoothing=0.1))
    _same(targets.loss("random", b), alpha_div(b, a.softmax(-1)))
    _same(targets.loss("smallest", c), alpha_div(c, a.softmax(-1)))


@pytest.mark.parametrize("teachers", [0, 1, 2])
def test_samples_that_are_not_valid_have_no_part(teachers):
    class Fixed(nn.Module):
        def __init__(self, add: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(9.0).view(3, 3) + add)

        def forward(self, x):
            return x.mean((2, 3)) @ self.weight

    found = [Teacher(Fixed(float(j))) for j in range(teachers)]
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, -100, 1])
    valid = torch.tensor([True, True, False, True])
    results = []
    for keep in (slice(None), valid):
        targets = Targets(_config(), found, 3)
        logits = [x.detach()[keep].requires_grad_() for x in _logits(2)]
        every = isinstance(keep, slice)
        targets.begin(Batch(images[keep], labels[keep], valid if every else None, lam=1.0))
        losses = [targets.loss(mode, x) for mode, x in zip(("random", "smallest"), logits, strict=True)]
        sum(losses).backward()
        results.append(([float(x.detach()) for x in losses], [x.grad[valid] if every else x.grad for x in logits]))
        if every:
            assert not any(x.grad[2].any() for x in logits)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("classes", [10, 19, 29, 61, 1000])
def test_a_sample_that_is_not_valid_adds_nothing(classes):
    # the published divergence of equal predictions is 0 or far from it, by rounding
    targets, generator = Targets(_config(), [], classes), torch.Generator().manual_seed(classes)
    logits = torch.randn(2, 3, classes, generator=generator)
    batch = Batch(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64), torch.tensor([True, True, False]))
    targets.begin(batch)
    targets.loss("random", logits[0])
    _same(targets.loss("smallest", logits[1]), alpha_div(logits[1, :2], logits[0, :2].softmax(-1)))


@pytest.mark.parametrize("teachers", [0, 2])
def test_the_mean_is_over_the_valid_samples_of_all_ranks(teachers):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

        def forward(self, x):
            return x.mean((2, 3)) @ self.weight

    def losses(images, labels, logits, valid=None, denominator=None):
        targets = Targets(_config(), [Teacher(Fixed())] * teachers, 3)
        targets.begin(Batch(images, labels, valid, denominator=denominator))
        return torch.stack([targets.loss(mode, x) for mode, x in zip(("random", "smallest"), logits, strict=True)])

    images, labels = torch.randn(8, 3, 8, 8), torch.tensor([0, 2, 1, 1, 2, -100, -100, -100])
    logits = torch.stack([torch.cat([a, b]) for a, b in zip(_logits(2), _logits(2, 1), strict=True)]).detach()
    valid = labels >= 0
    share = valid.sum() / 2  # of two ranks; DeepSpeed takes the mean of their gradients
    parts = [losses(images[at], labels[at], logits[:, at], valid[at], share) for at in (slice(4), slice(4, 8))]
    _same(torch.stack(parts).mean(0), losses(images[:5], labels[:5], logits[:, :5]))
    _same(losses(images[:4], labels[:4], logits[:, :4], None, share), parts[0])


def test_labels_are_mixed_and_smoothed():
    batch = _batch(labels_b=torch.tensor([1, 1, 0, 1]), lam=0.75)
    found = soft_labels(batch, 3, 0.3)
    assert found[0].tolist() == pytest.approx([0.75 * 0.7 + 0.1, 0.25 * 0.7 + 0.1, 0.1])
    assert found[3].tolist() == pytest.approx([0.1, 0.8, 0.1])


# -- teachers ----------------------------------------------------------------------------------------------------------


def test_teacher_sees_its_own_size_and_normalisation():
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            self.seen = x
            return x.mean((2, 3))

    net = Looking()
    teacher = Teacher(net, 6, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pixels = torch.full((2, 3, 12, 12), 0.7)
    images = (pixels - 0.3) / 0.2
    found = teacher(images, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
    assert net.seen.shape[-1] == 6
    torch.testing.assert_close(net.seen, torch.full((2, 3, 6, 6), 0.8))
    assert not found.requires_grad
    assert not net.training


def test_teachers_that_do_not_fit(tmp_path):
    with pytest.raises(ModelError, match='teachers.0.model: timm has no model "resnet99"'):
        make_teachers([TeacherConfig(model="resnet99")], 10)
    with pytest.raises(ModelError, match=r"teachers.0.weights: .*no such file"):
        make_teachers([TeacherConfig(model="resnet10t", weights=str(tmp_path / "none.safetensors"))], 10)
    from safetensors.torch import save_file

    kwargs = {"num_classes": 4, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "img_size": 8}
    net = create_model("vit_tiny_patch16_224", resolution=8, **kwargs)
    save_file(net.state_dict(), str(tmp_path / "t.safetensors"))
    config = TeacherConfig(model="vit_tiny_patch16_224", weights=str(tmp_path / "t.safetensors"), kwargs=kwargs)
    with pytest.raises(ModelError, match="tells 4 classes apart, this run has 10"):
        make_teachers([config], 10)
    state = torch.random.get_rng_state()
    (teacher,) = make_teachers([config], 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(teacher(images), net.eval()(images))


# -- calibration -------------------------------------------------------------------------------------------------------


def _trained() -> nn.Module:
    """A supernet whose loss is far from that of fresh weights."""
    net = supernet(HYBRID)
    for m in batch_norms(net):
        nn.init.ones_(m.weight)
    return net.train()


def test_calibrated_loss_is_that_of_training():
    net = _trained()
    images, labels = torch.randn(64, 3, 20, 20) + 0.5, torch.randint(10, (64,))
    config = HYBRID.max()
    with torch.no_grad(), kept_statistics(net):
        expected = nn.functional.cross_entropy(net(images, config), labels)
    other = HYBRID.min()
    found = []
    for before in ((), (other,)):  # what ran before makes no difference
        with torch.no_grad():
            for one in before:
                net(images * 3, one)
        net.set_config(config)
        with kept_statistics(net):
            assert calibrate(net, net, [(part, len(part)) for part in images.split(16)]) == 64
            with torch.no_grad():
                found.append(float(nn.functional.cross_entropy(net.eval()(images), labels)))
            net.train()
        net.set_config(None)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(float(expected), rel=0.05)
    assert all(m.momentum == 0.1 and m.training for m in batch_norms(net))


def test_calibration_leaves_the_rest_alone():
    net = _trained().train()
    before = {n: b.clone() for n, b in net.named_buffers()}
    with kept_statistics(net):
        calibrate(net, net, [(torch.randn(8, 3, 20, 20), 8)])
        assert any(not torch.equal(before[n], b) for n, b in net.named_buffers())
    assert all(torch.equal(before[n], b) for n, b in net.named_buffers())
    with pytest.raises(ValueError, match="without images"), kept_statistics(net):
        calibrate(net, net, [(torch.randn(8, 3, 20, 20), 0)])
    assert calibrate(supernet(PLAIN), lambda x: None, []) == 0


# -- scores ------------------------------------------------------------------------------------------------------------


def _context(net) -> SimpleNamespace:
    class Engine:
        module = net
        rows: list[int] = []

        def __call__(self, x):
            self.rows.append(len(x))
            return net(x)

    engine = Engine()
    engine.deepspeed_engine = engine
    return SimpleNamespace(engine=engine, device="cpu", world=1)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_scores_do_not_depend_on_padding(count):
    net, generator = _trained(), torch.Generator().manual_seed(1)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0, 0.3, generator=generator)
    numbers = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
    images = torch.randint(256, (count, 3, 20, 20), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    place = torch.tensor([0, 3, 4, 5, 7, 8])[:count]
    padded, found = torch.zeros(9, 3, 20, 20, dtype=torch.uint8), torch.full((9,), -100)
    padded[place], found[place] = images, labels
    configs = [HYBRID.sample(np.random.default_rng(seed)) for seed in range(3)]
    ctx = _context(net)
    expected = score(ctx, configs, [Images(images, labels, **numbers)])
    assert score(ctx, configs, [Images(padded, found, found >= 0, **numbers)]) == pytest.approx(expected, abs=1e-5)
    assert ctx.engine.rows == [max(count, 2)] * 6  # what the plan prices
    # a batch without any image still runs, as other ranks' collectives need, and counts for nothing
    empty = Images(padded, found, torch.zeros(9, dtype=torch.bool), **numbers)
    both = score(ctx, configs, [empty, Images(images, labels, **numbers)])
    assert both == pytest.approx(expected, abs=1e-5)
    assert ctx.engine.rows[6:] == [9] * 3 + [max(count, 2)] * 3
    assert {m.momentum for m in batch_norms(net)} == {0.1}


def test_statistics_do_not_depend_on_padding():
    net, images = _trained(), torch.randn(5, 3, 20, 20)
    net.set_config(HYBRID.max())
    ctx, found = _context(net), []
    padded = torch.cat([images[:2], torch.zeros(3, 3, 20, 20), images[2:]])
    labels = torch.tensor([0, 1, -100, -100, -100, 2, 3, 4])
    for batch in (Images(images, labels[labels >= 0]), Images(padded, labels, labels >= 0)):
        ready, kept = batch.on(ctx)
        assert calibrate(net, net, [(ready, len(kept))]) == 5
        found.append({n: b.clone() for n, b in net.named_buffers()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


# -- choices -----------------------------------------------------------------------------------------------------------


def _deepspeed(offload: str | None = None) -> SimpleNamespace:
    place = None if offload is None else SimpleNamespace(device=SimpleNamespace(value=offload))
    return SimpleNamespace(_config=SimpleNamespace(zero_config=SimpleNamespace(offload_optimizer=place)))


def test_an_offloaded_optimizer_is_refused():
    with pytest.raises(ConfigError, match=r"zero_optimization.offload_optimizer is set.*loses the gradients"):
        Update(PLAIN, [], None, False).attach(_deepspeed("cpu"))
    Update(PLAIN, [], None, False).attach(_deepspeed("none"))


@pytest.mark.parametrize("smallest", [1, 3])
def test_ablations_train(tmp_path, smallest):
    for walk, preference in itertools.product(("adjacent", "random"), ("wide_shallow", "uniform")):
        _train(tables=str(tmp_path), walk=walk, smallest=smallest, preference=preference)


def _train(**changes) -> None:
    """A few steps of a few images, without DeepSpeed."""
    changes = {**LEVELS[PLAIN], "levels": (4000, 8000, 14000), "decay_unused": True, "agc": None, **changes}
    method = ElasticVit(_config(bank={"capacity": 3, "exploit": {"start": 0.5}}, **changes))
    method.plan(_spec(PLAIN))
    net = supernet(PLAIN)
    method.prepare_model(net)
    ctx = _context(net)
    vars(ctx).update(progress=0.5, schedule=None, record=lambda *a, **k: None)
    vars(ctx.engine).update(vars(_deepspeed()), optimizer=torch.optim.AdamW(net.parameters(), lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(5, 3, 12, 12, generator=generator), torch.arange(5))
    losses = []
    for ctx.step in range(5):
        method.on_step_start(ctx)
        batch = method.on_batch(ctx, batch)
        for index in range(method.passes):
            method.on_pass(ctx, index)
            loss = method.loss(ctx, net(batch.images), batch)
            loss.backward()
            assert torch.isfinite(loss)
            losses.append(float(loss.detach()))
        method.on_boundary(ctx)
        ctx.engine.optimizer.step()
        ctx.engine.optimizer.zero_grad()
        method.on_step_end(ctx, True)
    random = [loss for mode, loss in zip(method.config.modes * 5, losses, strict=True) if mode == "random"]
    assert sum(random[-3:]) < 0.95 * sum(random[:3])
    assert len(method.bank)
    assert len(method.smallest) == changes["smallest"]
    assert method.scalars(ctx)["supernet/explored"] > 0


@pytest.mark.parametrize("walk", ["adjacent", "random", "cyclic"])
@pytest.mark.parametrize("preference", ["wide_shallow", "uniform"])
@pytest.mark.parametrize("smallest", [1, 2])
def test_ablations_draw_from_their_level(walk, preference, smallest):
    config = _config(walk=walk, preference=preference, smallest=smallest, bank={"capacity": 3}, agc=None)
    method = ElasticVit(config)
    method.plan(_spec(PLAIN))
    net = supernet(PLAIN)
    method.prepare_model(net)
    engine = SimpleNamespace(module=SimpleNamespace(parameters=net.parameters), deepspeed_engine=_deepspeed())
    ctx = SimpleNamespace(step=0, progress=0.5, record=lambda *a, **k: None, device="cpu", engine=engine)
    for ctx.step in range(12):
        method.on_step_start(ctx)
        *random, least = [drawn.config for drawn in method.drawn]
        levels = method._levels_drawn
        assert least == method.smallest.of(min(levels[:3]))
        for level, one in zip(levels, random, strict=False):
            assert method.levels.holds(level, PLAIN.macs(one))
            assert PLAIN.contains(one, lower=method.smallest.of(level))
        if walk != "random":
            assert len(set(levels)) == 1
    text = method.decision(ctx)
    again = ElasticVit(config)
    again.plan(_spec(PLAIN))
    again.prepare_model(net)
    again.load_state_dict(method.state_dict())
    assert again.walk.index == method.walk.index
    assert len(text.split()[2]) == 12


def test_evaluated_sub_networks():
    method = ElasticVit(ElasticViTConfig.model_validate({**LEVELS_JSON, "evaluate": ("largest", 1, "smallest")}))
    method.plan(_spec(PLAIN))
    assert method.variants == ("level1", "smallest")
    assert method.evaluated() == PLAIN.max()
    assert method.evaluated("smallest") == PLAIN.min()
    assert method.evaluated("level1") == method.smallest.of(1)
    table = method._make_tables()[1]
    config = PLAIN.config(table.codes[0])
    method.bank.offer(1, config, -1.0)
    assert method.evaluated("level1") == config


def test_a_folder_of_tables_that_was_interrupted(tmp_path):
    def make(**changes):
        method = ElasticVit(_config(tables=str(tmp_path), **changes))
        method.plan(_spec(PLAIN))
        return method._make_tables()

    first = make()
    later = tmp_path / "level_8000.npz"
    whole = later.read_bytes()
    later.unlink()  # stopped between two files
    again = make()
    assert [table.codes.tolist() for table in again] == [table.codes.tolist() for table in first]
    assert later.read_bytes() == whole
    assert [table.codes.tolist() for table in make(rows=3)] == [table.codes[:3].tolist() for table in first]
    with pytest.raises(ConfigError, match=r'elasticvit.tables: .*level_4000.npz was made with seed 0.*"seed": 5; give'):
        make(seed=5)
    with pytest.raises(ConfigError, match=r'elasticvit.tables: .*level_4000.npz has 5 sub-networks.*"rows": 20; give'):
        make(rows=20)
    later.write_bytes(whole[:100])
    with pytest.raises(ConfigError, match=r"elasticvit.tables: .*level_8000.npz is no table.*remove the file"):
        make()


LEVELS_JSON = {key: tuple(v) if isinstance(v, list) else v for key, v in LEVELS[PLAIN].items()} | {"rows": 5}
