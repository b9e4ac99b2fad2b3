import numpy as np
import pytest
import torch

from efftrain_ds.core.errors import ModelError
from efftrain_ds.methods.elasticvit.losses import (
    alpha_div,
    divergences,
    soft_cross_entropy,
    soft_targets,
    taught_loss,
)

Z = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, -1.0]])
P = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])


def test_alpha_divergence_of_known_numbers():
    negative, positive = divergences(Z, P)
    torch.testing.assert_close(negative, torch.tensor([1.31862, 0.12388]), atol=1e-5, rtol=0)
    torch.testing.assert_close(positive, torch.tensor([1.20579, 0.17190]), atol=1e-5, rtol=0)
    z = Z.clone().requires_grad_()
    loss = alpha_div(z, P)
    assert loss.item() == pytest.approx(-0.159569, abs=1e-6)
    loss.backward()
    expected = torch.tensor([[-0.157942, -0.295339, 0.453280], [0.121897, -0.092902, -0.028995]])
    torch.testing.assert_close(z.grad, expected, atol=1e-6, rtol=0)


def by_hand(z, p):
    """Mean over the batch of the larger divergence, without a cap."""
    q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    negative = 0.5 * (q * (q / p - 1)).sum(1)
    positive = (p * np.log(p / q)).sum(1)
    return np.maximum(negative, positive).mean()


def test_alpha_divergence_gradient_is_that_of_the_divergence():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 5))
    p = rng.dirichlet(np.full(5, 4.0), size=6)
    x = torch.tensor(z, requires_grad=True)
    alpha_div(x, torch.tensor(p), cap=1e9).backward()
    numeric = np.zeros_like(z)
    for place in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        numeric[place] = (by_hand(up, p) - by_hand(down, p)) / 2e-5
    np.testing.assert_allclose(x.grad.numpy(), numeric, atol=1e-8)
    negative, positive = divergences(torch.tensor(z), torch.tensor(p), cap=1e9)
    assert 0 < (negative > positive).sum() < 6  # both sides were tried


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_stay_finite(dtype):
    z = torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    one_hot = torch.eye(3, dtype=dtype)
    for loss in (alpha_div(z, one_hot), soft_cross_entropy(z, one_hot), taught_loss(z, one_hot, one_hot, 1)):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert torch.isfinite(gradient).all()


def test_losses_of_the_samples():
    labels, other = torch.tensor([0, 2]), Z.softmax(1).flip(0)
    for of in (
        lambda reduction: alpha_div(Z, P, 5.0, reduction),
        lambda reduction: soft_cross_entropy(Z, P, reduction),
        lambda reduction: taught_loss(Z, labels, None, 0, reduction),
        lambda reduction: taught_loss(Z, other, P, 1, reduction),
        lambda reduction: taught_loss(Z, None, P, 2, reduction),
    ):
        each = of("none")
        assert each.shape == (2,)
        assert each[0] != each[1]
        torch.testing.assert_close(each.mean(), of("mean"))


def test_targets_get_no_gradient():
    target = P.clone().requires_grad_()
    z = Z.clone().requires_grad_()
    (alpha_div(z, target) + soft_cross_entropy(z, target)).backward()
    assert target.grad is None


def test_soft_targets_sharpen_and_average():
    other = Z.flip(1)
    expected = ((Z / 0.2).softmax(1) + (other / 0.2).softmax(1)) / 2
    torch.testing.assert_close(soft_targets([Z, other]), expected)
    assert soft_targets([Z.bfloat16()]).dtype == torch.float32
    assert not soft_targets([Z.clone().requires_grad_()]).requires_grad
    with pytest.raises(ModelError, match=r"\[2, 3\].*\[2, 4\]; the same classes"):
        soft_targets([Z, torch.zeros(2, 4)])
    with pytest.raises(ModelError, match="at least one teacher"):
        soft_targets([])
    with pytest.raises(ModelError, match="the same classes"):
        alpha_div(Z, torch.zeros(2, 4))


def test_labels_count_in_full_in_half_or_not_at_all():
    labels = torch.tensor([0, 2])
    hard = torch.nn.functional.cross_entropy(Z, labels)
    soft = -(P * Z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(taught_loss(Z, labels, None, 0), hard)
    torch.testing.assert_close(taught_loss(Z, labels, P, 1), (hard + soft) / 2)
    torch.testing.assert_close(taught_loss(Z, None, P, 2), soft)
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]])
    torch.testing.assert_close(taught_loss(Z, mixed, None, 0), -(mixed * Z.log_softmax(1)).sum(1).mean())
