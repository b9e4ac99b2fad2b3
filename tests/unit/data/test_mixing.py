"""Mixup, CutMix and the loss of mixed batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from efftrain_ds.core.batch import Batch
from efftrain_ds.data.augment import BatchMixer, Mix, mixed_cross_entropy


class Fixed(BatchMixer):
    """A mixer whose draw is given."""

    def __init__(self, mix: Mix):
        super().__init__()
        self.mix = mix

    def draw(self, *_args) -> Mix:
        return self.mix


def batch_of(count: int = 6, side: int = 16, invalid: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(1)
    valid = torch.ones(count, dtype=torch.bool)
    valid[list(invalid)] = False
    labels = torch.arange(count) % 5
    labels[~valid] = -100
    return Batch(torch.randn(count, 3, side, side, generator=generator), labels, valid)


def test_mixup_formula():
    batch = batch_of()
    images = batch.images.clone()
    out = Fixed(Mix(0.3))(batch, 0, 0, 0)
    for i in range(6):
        torch.testing.assert_close(out.images[i], 0.3 * images[i] + 0.7 * images[5 - i])
    assert out.lam == 0.3
    assert out.labels_b.tolist() == batch.labels.tolist()[::-1]


def test_cutmix_formula():
    batch = batch_of()
    images = batch.images.clone()
    out = Fixed(Mix(0.75, (2, 10, 4, 12)))(batch, 0, 0, 0)
    for i in range(6):
        expected = images[i].clone()
        expected[:, 2:10, 4:12] = images[5 - i, :, 2:10, 4:12]
        assert torch.equal(out.images[i], expected)
    assert out.labels_b.tolist() == batch.labels.tolist()[::-1]


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.75, (2, 10, 4, 12))])
def test_invalid_samples_are_left_out(mix):
    batch = batch_of(7, invalid=(1,))
    images, labels = batch.images.clone(), batch.labels.clone()
    out = Fixed(mix)(batch, 0, 0, 0)
    # Samples 1 and 5 are partners; 3 is in the middle. They keep image and label, to the bit.
    for i in (1, 5, 3):
        assert torch.equal(out.images[i], images[i])
        assert out.labels_b[i] == labels[i]
    for i in (0, 2, 4, 6):
        assert not torch.equal(out.images[i], images[i])
        assert out.labels_b[i] == labels[6 - i]


def test_without_mixing_the_batch_is_unchanged():
    batch = batch_of()
    images = batch.images.clone()
    for mixer in (BatchMixer(mixup=0, cutmix=0), BatchMixer(prob=0)):
        out = mixer(batch, 0, 3, 1)
        assert torch.equal(out.images, images)
        assert out.lam == 1
        assert out.labels_b is None


def test_draws_are_pure_and_distinct():
    mixer = BatchMixer()
    draws = [mixer.draw(0, step, micro, 224, 224) for step in range(20) for micro in range(3)]
    assert draws == [BatchMixer().draw(0, step, micro, 224, 224) for step in range(20) for micro in range(3)]
    assert len(set(draws)) == 60
    assert mixer.draw(1, 0, 0, 224, 224) != draws[0]


def test_draw_statistics():
    mixer = BatchMixer(mixup=0.8, cutmix=1.0, prob=0.8, switch=0.25)
    draws = [mixer.draw(0, step, 0, 60, 90) for step in range(4000)]
    mixed = [d for d in draws if d != Mix()]
    cut = [d for d in mixed if d.box is not None]
    assert abs(len(mixed) / 4000 - 0.8) < 0.03
    assert abs(len(cut) / len(mixed) - 0.25) < 0.03
    for d in cut:
        top, bottom, left, right = d.box
        assert 0 <= top <= bottom <= 60
        assert 0 <= left <= right <= 90
        assert d.lam == 1 - (bottom - top) * (right - left) / (60 * 90)
    lam = np.array([d.lam for d in mixed if d.box is None])
    assert abs(lam.mean() - 0.5) < 0.02
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # variance of Beta(a, a)
    assert all(d.box is not None for d in (BatchMixer(mixup=0).draw(0, s, 0, 32, 32) for s in range(20)))
    assert all(d.box is None for d in (BatchMixer(cutmix=0).draw(0, s, 0, 32, 32) for s in range(20)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_timm_soft_targets(smoothing):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    batch = Fixed(Mix(0.3))(batch_of(), 0, 0, 0)
    target = mixup_target(batch.labels, 5, 0.3, smoothing)
    loss = mixed_cross_entropy(logits, batch, smoothing)
    assert abs(loss - SoftTargetCrossEntropy()(logits, target)) < 1e-6
    assert abs(loss - F.cross_entropy(logits, target)) < 1e-6
    plain = batch_of()
    expected = F.cross_entropy(logits, plain.labels, label_smoothing=smoothing)
    assert abs(mixed_cross_entropy(logits, plain, smoothing) - expected) < 1e-6
    plain.valid = None
    assert abs(mixed_cross_entropy(logits, plain, smoothing) - expected) < 1e-6


def test_invalid_samples_add_no_loss_and_no_gradient():
    batch = Fixed(Mix(0.3))(batch_of(6, invalid=(1, 2)), 0, 0, 0)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = mixed_cross_entropy(logits, batch, 0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[[1, 2]].abs().max() == 0
    assert (gradient[[0, 3, 4, 5]].abs().amax(1) > 0).all()
    rows, labels = logits[[0, 3, 4, 5]], batch.labels[[0, 3, 4, 5]]
    parts = [F.cross_entropy(rows, other, label_smoothing=0.1) for other in (labels, batch.labels_b[[0, 3, 4, 5]])]
    assert abs(loss - (0.3 * parts[0] + 0.7 * parts[1])) < 1e-6
    assert abs(mixed_cross_entropy(logits, batch, 0.1, 8.0) - loss * 4 / 8) < 1e-6
    assert abs(mixed_cross_entropy(logits, batch, 0.1, torch.tensor(16)) - loss * 4 / 16) < 1e-6


def test_loss_of_a_batch_without_valid_samples_is_zero():
    batch = batch_of(2, invalid=(0, 1))
    logits = torch.randn(2, 5, requires_grad=True)
    loss = mixed_cross_entropy(logits, batch, 0.1)
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_loss_of_low_precision_logits_is_computed_in_float32():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = mixed_cross_entropy(logits, batch_of())
    assert loss.dtype == torch.float32
    assert abs(loss - F.cross_entropy(logits.float(), batch_of().labels)) < 1e-6
